import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import counted, session

_log = logging.getLogger(__name__)
_MASK = re.compile(r"(^|[_-])(mask|seg|segmentation|gtv|roi|label)$", re.IGNORECASE)


def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of predicted masks.")],
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", help="Folder of the expert's masks, or of patients' folders with one.")
    ],
    labels: Annotated[
        str | None, typer.Option(metavar="1,4", help="Values that count as tumour; if there are several.")
    ] = None,
    structure: options.Structure = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each patient's numbers as CSV.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers as JSON.")] = None,
    quiet: options.Quiet = False,
):
    """Compares two folders of masks, patient by patient, with 95% intervals of the means."""
    with session(quiet) as terminal:
        from keras_mmfnet._files import csv_text, write
        from keras_mmfnet._log import progress
        from keras_mmfnet.evaluation import metrics_json, summarise

        for path in filter(None, (csv, as_json)):
            options.require_new(path, "--csv, --json")
        if labels is not None and not re.fullmatch(r"\d+(,\d+)*", labels):
            raise ValueError(f"--labels: whole numbers separated by commas are expected. Received: {labels}")
        chosen = None if labels is None else tuple(int(label) for label in labels.split(","))
        predicted, expert = _find_masks(predictions, structure), _find_masks(truth, structure)
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
        rows = []
        for number, name in enumerate(names, start=1):
            rows.append({"patient": name, **_compare(name, predicted[name], expert[name], chosen)})
            progress("comparing", number, len(names))
        if csv:
            write(csv, csv_text(rows))
        if as_json:
            write(as_json, metrics_json(rows))
        terminal.metrics(rows)
        if quiet:
            mean = summarise(rows)["dsc"]["mean"]
            terminal.say("-" if mean is None else mean, always=True)


def _find_masks(folder, structure):
    """The mask of each patient by name: a file in the folder, or the one mask in the patient's folder."""
    from keras_mmfnet.data.dicom import find_objects
    from keras_mmfnet.data.image_io import image_stem
    from keras_mmfnet.data.structures import find_structures

    options.require_folder(folder, "PREDICTIONS, TRUTH")
    if (folder / "dataset.json").is_file() and (folder / "labelsTr").is_dir():
        folder = folder / "labelsTr"
    masks = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        name = image_stem(path)
        if name in masks:
            raise ValueError(f"{folder}: must hold one mask of {name}. Received: {masks[name].name}, {path.name}")
        if name and not name.startswith(".") and not re.search("_(probability|disagreement)$", name):
            masks[name] = path
    for patient in sorted(path for path in folder.iterdir() if path.is_dir() and not masks):
        found = [path for path in patient.iterdir() if _MASK.search(image_stem(path) or "")]
        if not found:
            series, objects = find_objects(patient, patient.name)
            found = find_structures(objects, series, structure or (), patient.name)
        if len(found) > 1:
            listed = ", ".join(str(mask) for mask in found)
            raise ValueError(f"{patient}: must hold one mask. Received: {listed}")
        masks.update({patient.name: found[0]} if found else {})
    if not masks:
        raise ValueError(f"{folder}: must hold masks, or patients' folders with a mask. Received: a folder without")
    return masks


def _compare(name, predicted, expert, labels):
    """The numbers of one patient."""
    import numpy as np
    import SimpleITK as sitk

    from keras_mmfnet.data import Grid
    from keras_mmfnet.data.image_io import read_image
    from keras_mmfnet.data.preprocess import structure_voxels
    from keras_mmfnet.data.structures import Structures
    from keras_mmfnet.evaluation import evaluate_case

    images = [read_image(path, name) for path in (predicted, expert)]
    if isinstance(expert, Structures):
        # A segmentation may have the slices with tumour alone: the others are added where no voxel is lost by it.
        whole = sitk.Resample(images[1], images[0], sitk.Transform(), sitk.sitkNearestNeighbor)
        same = [np.count_nonzero(sitk.GetArrayViewFromImage(image)) for image in (whole, images[1])]
        images[1] = whole if same[0] == same[1] else images[1]
    grids = [Grid.from_image(image) for image in images]
    if not grids[0].matches(grids[1]):
        sizes = " and ".join(f"{grid.size} voxels of {grid.spacing} mm" for grid in grids)
        raise ValueError(f"{name}: both masks must lie on one grid. Received: {predicted} and {expert} with {sizes}")
    masks = []
    for path, image in zip((predicted, expert), images, strict=True):
        array = sitk.GetArrayFromImage(image)
        try:
            masks.append(structure_voxels(array, labels, allow_empty=True))
        except ValueError as error:
            raise ValueError(f"{name}: {path}: {error}; --labels says which ones count") from None
    numbers = evaluate_case(masks[0].astype(np.float32), masks[1], grids[0].spacing[::-1])
    # Those of probabilities say nothing about a mask.
    return {key: value for key, value in numbers.items() if key not in ("ap", "dice_loss")}
