import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import counted, session

_log = logging.getLogger(__name__)
_MASK = re.compile(r"(^|[_-])(mask|seg|segmentation|gtv|roi|label)$", re.IGNORECASE)
# What `mmfnet segment` writes beside a mask.
_OTHERS = re.compile(r"(.+)_(probability|disagreement)(_[\w-]+)?")


def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of predicted masks.")],
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", help="Folder of the expert's masks, or of patients' folders with one.")
    ],
    structure: options.Structure = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each patient's numbers as CSV.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers as JSON.")] = None,
    quiet: options.Quiet = False,
):
    """Compares two folders of masks, patient by patient, with 95% intervals of the means."""
    with session(quiet) as terminal:
        from keras_mmfnet._files import csv_text, write
        from keras_mmfnet._log import progress
        from keras_mmfnet.evaluation import mean_over_structures, metrics_json, summarise
        from keras_mmfnet.recipe import Recipe

        for path in filter(None, (csv, as_json)):
            options.require_new(path, "--csv, --json")
        recipe = Recipe().replace({**options.parse_structures(structure), "data.allow_empty": True}).data
        predicted, expert = (_find_masks(folder, recipe.named_structures) for folder in (predictions, truth))
        for lacking, alone in (
            ("prediction", expert.keys() - predicted),
            ("mask of the expert", predicted.keys() - expert),
        ):
            if alone:
                listed = ", ".join(sorted(alone)[:10]) + (", ..." if len(alone) > 10 else "")
                _log.warning("no %s of %s: %s", lacking, counted(len(alone), "patient"), listed)
        names = sorted(set(predicted) & set(expert))
        if not names:
            raise ValueError(
                f"masks of the same names are expected. Received: {predictions} and {truth} without a pair"
            )
        of_predictions, rows = _recipe_of_predictions(predicted, recipe), []
        for number, name in enumerate(names, start=1):
            rows += _compare(name, (predicted[name], of_predictions), (expert[name], recipe))
            progress("comparing", number, len(names))
        _warn_of_absent(rows, recipe.structures)
        if csv:
            write(csv, csv_text(rows))
        if as_json:
            write(as_json, metrics_json(rows))
        terminal.metrics(rows)
        if quiet:
            mean = summarise(mean_over_structures(rows))["dsc"]["mean"]
            terminal.say("-" if mean is None else mean, always=True)


def _find_masks(folder, named):
    """The mask of each patient by name: a file in the folder, or the one mask in the patient's folder.

    Structures that are named, not given by labels, have a file each, `PATIENT_STRUCTURE`.
    """
    from keras_mmfnet.data.case import StructureFiles
    from keras_mmfnet.data.image_io import image_stem

    options.require_folder(folder, "PREDICTIONS, TRUTH")
    if (folder / "dataset.json").is_file() and (folder / "labelsTr").is_dir():
        folder = folder / "labelsTr"
    files = [(image_stem(path), path) for path in sorted(folder.iterdir()) if path.is_file()]
    stems, masks, apart = {stem for stem, _ in files}, {}, {}
    for stem, path in files:
        other = _OTHERS.fullmatch(stem or ".")
        if not stem or stem[0] == "." or (other and (not other[3] or other[1] in stems)):
            continue
        structure = max((name for name in named if stem.endswith(f"_{name}")), key=len, default=None)
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
        if source := _mask_in(patient, named):
            masks[patient.name] = source
    if not masks:
        raise ValueError(f"{folder}: must hold masks, or patients' folders with a mask. Received: a folder without")
    return masks


def _mask_in(patient, named):
    """The mask in a patient's folder or `None`: the structures that are named, or the only one."""
    from keras_mmfnet.data.case import StructureFiles
    from keras_mmfnet.data.dicom import find_objects
    from keras_mmfnet.data.image_io import image_stem
    from keras_mmfnet.data.structures import drawn_mask

    def only(found):
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            raise ValueError(f"{patient}: must hold one mask. Received: {listed}")
        return found[0] if found else None

    stems = {path: image_stem(path) or "" for path in sorted(patient.iterdir())}
    if not named and (found := [path for path, stem in stems.items() if _MASK.search(stem)]):
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

    That is so if no prediction has another value, which one with the structure's labels would have.
    """
    import numpy as np
    import SimpleITK as sitk

    from keras_mmfnet.data.image_io import read_image

    [(name, labels), *others] = recipe.structures.items()
    if others or not isinstance(labels, tuple) or 1 in labels:
        return recipe
    for patient, path in masks.items():
        if not set(np.unique(sitk.GetArrayFromImage(read_image(path, patient)))) <= {0, 1}:
            return recipe
    _log.info("The predictions are of 0 and 1: 1 is taken for %s", name)
    return recipe.model_copy(update={"structures": {name: None}})


def _compare(name, predicted, expert):
    """The numbers of one patient, a row for each structure that both have; each is a source and its recipe."""
    import numpy as np
    import SimpleITK as sitk

    from keras_mmfnet.data import Grid
    from keras_mmfnet.data.case import StructureFiles
    from keras_mmfnet.data.preprocess import structures_in
    from keras_mmfnet.data.structures import DicomStructures
    from keras_mmfnet.evaluation import evaluate_case

    rows, sources, structures = [], (predicted[0], expert[0]), list(expert[1].structures)
    for who, source in zip(("prediction", "mask of the expert"), sources, strict=True):
        if isinstance(source, StructureFiles) and (lacking := [one for one in structures if one not in source.files]):
            _log.warning("%s: no %s of %s, which is not compared", name, who, ", ".join(lacking))
            structures = [one for one in structures if one not in lacking]
    found = [structures_in(source, recipe, name) for source, recipe in (predicted, expert)]
    for structure in structures:
        (image, inside), (own, truth) = (masks[structure] for masks in found)
        source = expert[0].files[structure] if isinstance(expert[0], StructureFiles) else expert[0]
        grids = [Grid.from_image(one) for one in (image, own)]
        if isinstance(source, DicomStructures):
            # A segmentation may have the slices with tumour alone: the others are added where no voxel is lost by it.
            drawn = grids[1].image(truth.astype(np.uint8))
            whole = sitk.Resample(drawn, image, sitk.Transform(), sitk.sitkNearestNeighbor)
            whole = sitk.GetArrayFromImage(whole) > 0
            if np.count_nonzero(whole) == np.count_nonzero(truth):
                grids[1], truth = grids[0], whole
        if not grids[0].matches(grids[1]):
            sizes = " and ".join(f"{grid.size} voxels of {grid.spacing} mm" for grid in grids)
            listed = " and ".join(map(str, sources))
            raise ValueError(f"{name}: both masks must lie on one grid. Received: {listed} with {sizes}")
        numbers = evaluate_case(inside.astype(np.float32), truth, grids[0].spacing[::-1])
        # Those of probabilities say nothing about a mask.
        numbers = {key: value for key, value in numbers.items() if key not in ("ap", "dice_loss")}
        which = {"structure": structure} if len(expert[1].structures) > 1 else {}
        rows.append({"patient": name, **which, **numbers})
    return rows


def _warn_of_absent(rows, structures):
    """Says of a structure that is in no prediction, or in no mask of the expert: its labels may be others there."""
    from keras_mmfnet.evaluation import rows_by_structure

    names = list(structures)
    for name, some in rows_by_structure(rows).items():
        name = names[0] if len(names) == 1 else name
        labels = structures[name]
        what = f"{name} (label {', '.join(map(str, labels))})" if isinstance(labels, tuple) else name
        for key, other, who in (("predicted_ml", "volume_ml", "prediction"), ("volume_ml", "predicted_ml", "expert")):
            if not any(row[key] for row in some) and any(row[other] for row in some):
                _log.warning("no voxel of %s in any mask of the %s", what, who)
