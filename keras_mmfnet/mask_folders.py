"""Compares two folders of masks, such as those of a network and of an expert."""

import functools
import glob
import logging
import os
import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import read_json
from keras_mmfnet._parallel import map_patients
from keras_mmfnet.data.case import StructureFiles, listed
from keras_mmfnet.data.dicom import find_objects
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import image_stem, read_image
from keras_mmfnet.data.names import is_mask_of_tissue
from keras_mmfnet.data.preprocess import structures_in, unclaimed_labels
from keras_mmfnet.data.structures import DicomStructures, drawn_mask
from keras_mmfnet.evaluation import compare_masks, rows_by_structure
from keras_mmfnet.recipe import DataRecipe

_log = logging.getLogger(__name__)
_MASK = re.compile(r"(^|[_-])(mask|seg|segmentation|gtv|roi|label)$", re.IGNORECASE)
# What the mask in a patient's folder is called if nobody says.
_DEFAULT = DataRecipe().mask
# What `mmfnet segment` writes beside a mask.
_OTHERS = re.compile(r"(.+)_(probability|disagreement)(_[\w-]+)?")


def compare_folders(predictions: str | os.PathLike, truth: str | os.PathLike, recipe: DataRecipe) -> list[dict]:
    """Compares the masks of the patients that are in both folders.

    A folder has a file for each patient, such as `anna.nii.gz`, or for each patient and structure, such as
    `anna_core.nii.gz`; or a folder for each patient, with one mask or a DICOM structure set or segmentation. Warnings
    are logged about patients who are in one folder alone, and about a structure that is in no mask of one side.

    Args:
        predictions: Folder of the predicted masks.
        truth: Folder of the expert's masks.
        recipe: The `DataRecipe`, whose `structures` say what is compared, and its `mask` what the mask in a patient's
            folder is called; with `allow_empty` masks may be empty. With the default name, it is the one that the
            network was trained on, if `PATIENT.json` beside a predicted mask tells, or else the only one.

    Returns:
        A dict for each patient and structure that both have: `patient`, `structure` and the numbers of `compare_masks`.

    Raises:
        ValueError: No patient or no structure is in both folders, a folder holds no masks or several of a patient, a
            mask is damaged or has no voxel of the structures, or the masks of a patient do not lie on one grid.
    """
    folders = Path(predictions), Path(truth)
    predicted = _find_masks(folders[0], recipe)
    told = {record["mask"] for record in _records(predicted).values() if "mask" in record}
    if recipe.mask == _DEFAULT and len(told) == 1:
        name = told.pop()
        if any(folders[1].glob(f"*/{glob.escape(name)}.*")):
            recipe = recipe.model_copy(update={"mask": name})
    expert = _find_masks(folders[1], recipe)
    for lacking, alone in (
        ("prediction", expert.keys() - predicted),
        ("mask of the expert", predicted.keys() - expert),
    ):
        if alone:
            names = listed(sorted(alone))
            _log.warning("no %s of %d patient%s: %s", lacking, len(alone), "s" * (len(alone) > 1), names)
    names = sorted(predicted.keys() & expert)
    if not names:
        raise ValueError(f"masks of the same names are expected. Received: {predictions} and {truth} without a pair")
    rows, others, recipes = [], set(), (_recipe_of_predictions(predicted, recipe), recipe)
    pairs = [(name, predicted[name], expert[name]) for name in names]
    compare = functools.partial(_compare, recipes=recipes)
    for compared, unclaimed, notes in map_patients(compare, pairs, names, "comparing"):
        rows, others = rows + compared, others | unclaimed
        for note in notes:
            _log.warning("%s", note)
    if others and len(recipe.structures) > 1:  # From one structure, the others are left out on purpose.
        about = "The expert's masks have labels that belong to no structure and are not compared: %s"
        _log.warning(about, ", ".join(f"{label:g}" for label in sorted(others)[:10]))
    if not rows:
        raise ValueError(f"{truth}: a structure that the predictions have, too, is expected. Received: none")
    _warn_of_absent(rows, recipe.structures)
    return rows


def _records(masks):
    """What `PATIENT.json` beside a patient's mask says of it, by the patient's name, where there is one."""
    files = {name: path.parent / f"{name}.json" for name, path in masks.items() if isinstance(path, Path)}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def _find_masks(folder, recipe):
    """The mask of each patient by name: a file in the folder, or the one mask in the patient's folder.

    Structures that are named, not given by labels, have a file each, `PATIENT_STRUCTURE`.
    """
    named = recipe.named_structures
    if (folder / "dataset.json").is_file() and (folder / "labelsTr").is_dir():
        folder = folder / "labelsTr"
    files = [(image_stem(path), path) for path in sorted(folder.iterdir()) if path.is_file()]
    stems, masks, apart = {stem for stem, _ in files}, {}, {}
    # A patient's name may end like the one structure there is, unless all do.
    endings = [name for name in named if len(named) > 1 or all((stem or "").endswith(f"_{name}") for stem in stems)]
    for stem, path in files:
        other = _OTHERS.fullmatch(stem or ".")
        if not stem or stem[0] == "." or (other and (not other[3] or other[1] in stems)):
            continue
        structure = max((name for name in endings if stem.endswith(f"_{name}")), key=len, default=None)
        name = stem.removesuffix(f"_{structure}")
        own = apart.setdefault(name, {}) if structure else masks
        key = structure or name
        if key in own:
            raise ValueError(f"{folder}: must hold one mask of {stem}. Received: {own[key].name}, {path.name}")
        own[key] = path
    if apart:
        masks = {name: StructureFiles(own) for name, own in apart.items()}
    elif len(named) == 1:
        masks = {name: StructureFiles(dict.fromkeys(named, path)) for name, path in masks.items()}
    for patient in sorted(path for path in folder.iterdir() if path.is_dir() and not masks):
        if source := _mask_in(patient, recipe):
            masks[patient.name] = source
    if not masks:
        raise ValueError(f"{folder}: must hold masks, or patients' folders with a mask. Received: a folder without")
    return masks


def _mask_in(patient, recipe):
    """The mask in a patient's folder or `None`: the named structures, the recipe's mask, or the only one."""

    def only(found):
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            raise ValueError(f"{patient}: must hold one mask. Received: {listed}")
        return found[0] if found else None

    named, stems = recipe.named_structures, {path: image_stem(path) or "" for path in sorted(patient.iterdir())}
    is_mask = _MASK.search if recipe.mask == _DEFAULT else re.compile(re.escape(recipe.mask)).fullmatch
    if recipe.mask == _DEFAULT:
        stems = {path: stem for path, stem in stems.items() if not is_mask_of_tissue(stem)}
    if not named and (found := [path for path, stem in stems.items() if is_mask(stem)]):
        return only(found)
    series, objects = find_objects(patient, patient.name)
    drawn = drawn_mask(objects, series, named, patient.name, allow_empty=True)
    if not named:
        return drawn
    files = dict(drawn.files) if drawn else {}
    for name, pattern in named.items():
        found = only([path for path, stem in stems.items() if re.fullmatch(pattern, stem, re.IGNORECASE)])
        if found and name not in files:
            files[name] = found
    return StructureFiles(files) if files else None


def _recipe_of_predictions(masks, recipe):
    """The recipe by which predictions are read: those of a network of one structure are 0 and 1, whatever its labels.

    `PATIENT.json` beside a mask tells. Without it, that is so if no prediction has another value.
    """
    for patient, record in _records(masks).items():
        _require_predicted(patient, record.get("labels", {}), recipe.structures)
    [(name, labels), *others] = recipe.structures.items()
    if others or not isinstance(labels, tuple) or 1 in labels:
        return recipe
    as_one = recipe.model_copy(update={"structures": {name: None}})
    if len(records := _records(masks)) == len(masks):
        told = [record.get("labels", {}).get(name) for record in records.values()]
        if None not in told:
            return as_one if told[0] == [1] else recipe
    for patient, path in masks.items():
        if not set(np.unique(sitk.GetArrayFromImage(read_image(path, patient)))) <= {0, 1}:
            return recipe
    _log.warning("The predictions have the values 0 and 1 alone: 1 is taken for %s", name)
    return as_one


def _require_predicted(patient, predicted, structures):
    """Refuses structures that are not among those that were predicted, by the label values that `segment` wrote."""
    wanted = {name: list(labels) for name, labels in structures.items() if isinstance(labels, tuple)}
    if len(predicted) > 1 and (unknown := [name for name in wanted if wanted[name] != predicted.get(name)]):
        raise ValueError(
            f"{patient}: structures that were predicted are expected: {predicted}. "
            f"Received: {', '.join(f'{name}={wanted[name]}' for name in unknown)}"
        )


def _compare(patient, recipes):
    """The numbers of one patient, a row for each structure that both have; and the expert's labels of no structure.

    Args:
        patient: The name, the prediction and the mask of the expert.
        recipes: That of the predictions and that of the expert's masks.

    Returns:
        The rows, the labels and what is to be said of it.
    """
    name, *sources = patient
    rows, notes, expert, structures = [], [], sources[1], list(recipes[1].structures)
    for who, source in zip(("prediction", "mask of the expert"), sources, strict=True):
        if isinstance(source, StructureFiles) and (lacking := [one for one in structures if one not in source.files]):
            notes.append(f"{name}: no {who} of {', '.join(lacking)}, which is not compared")
            structures = [one for one in structures if one not in lacking]
    found = [structures_in(source, recipe, name) for source, recipe in zip(sources, recipes, strict=True)]
    for structure in structures:
        (image, inside), (own, truth) = (masks[structure] for masks in found)
        source = expert.files[structure] if isinstance(expert, StructureFiles) else expert
        grids = [Grid.from_image(one) for one in (image, own)]
        if isinstance(source, DicomStructures):
            # A segmentation may have the slices with tumour alone: the others are added where no voxel is lost by it.
            drawn = grids[1].image(truth.astype(np.uint8))
            whole = sitk.Resample(drawn, image, sitk.Transform(), sitk.sitkNearestNeighbor)
            whole = sitk.GetArrayFromImage(whole) > 0
            if np.count_nonzero(whole) == np.count_nonzero(truth):
                grids[1], truth = grids[0], whole
        if not grids[0].matches(grids[1]):
            # The axes may be in another order.
            (grids[0], inside), (grids[1], truth) = _upright(grids[0], inside), _upright(grids[1], truth)
        if not grids[0].matches(grids[1]):
            sizes = " and ".join(f"{grid.size} voxels of {grid.spacing} mm from {grid.origin}" for grid in grids)
            listed = " and ".join(map(str, sources))
            raise ValueError(f"{name}: both masks must lie on one grid. Received: {listed} with {sizes}")
        numbers = compare_masks(inside, truth, grids[0].spacing[::-1])
        rows.append({"patient": name, "structure": structure, **numbers})
    return rows, unclaimed_labels(found[1], recipes[1]), notes


def _upright(grid, mask):
    """A grid and its mask in the order of the patient's axes."""
    image = sitk.DICOMOrient(grid.image(mask.astype(np.uint8)), "LPS")
    return Grid.from_image(image), sitk.GetArrayFromImage(image) > 0


def _warn_of_absent(rows, structures):
    """Says of a structure that is in no prediction, or in no mask of the expert: its labels may be others there."""
    for name, some in rows_by_structure(rows).items():
        labels = structures[name]
        what = f"{name} (label {', '.join(map(str, labels))})" if isinstance(labels, tuple) else name
        for key, other, who in (("predicted_ml", "volume_ml", "prediction"), ("volume_ml", "predicted_ml", "expert")):
            if not any(row[key] for row in some) and any(row[other] for row in some):
                _log.warning("no voxel of %s in any mask of the %s", what, who)
