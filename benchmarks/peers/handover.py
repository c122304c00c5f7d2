"""Hands the patients of a run to another program, and its masks back to the run."""

import json

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet._machine import machine
from keras_mmfnet.data import Grid
from keras_mmfnet.data.geometry import resample
from keras_mmfnet.data.image_io import read_image, write_image
from keras_mmfnet.data.preprocess import read_masks
from keras_mmfnet.evaluation import evaluate_case


def write_patients(run, names, images, labels):
    """Writes patients as `<patient>_<channel>.nii.gz` and `<patient>.nii.gz`, all on the grid of the first sequence.

    Exclusive structures have a label value each. Of regions, each lies in the one before, and the label value of a
    voxel is the number of regions that it lies in.

    Args:
        run: The run.
        names: Names of the patients.
        images, labels: Folders to write to.
    """
    labels.mkdir(parents=True, exist_ok=True)
    for name in names:
        [patient], recipe = run.patients([name]), run.recipe.data
        write_images(run.cases[name], recipe.modalities, patient.source, images)
        masks = list(read_masks(run.cases[name], recipe, patient).values())
        values = np.zeros(masks[0].shape, np.uint8)
        for number, mask in enumerate(masks, start=1):
            if not recipe.exclusive and ((mask > 0) & (values < number - 1)).any():
                raise ValueError(f"{name}: each region must lie in the one before. Received: one that does not")
            values[mask > 0] = number
        write_image(patient.source.image(values), labels / f"{name}.nii.gz")


def write_images(case, modalities, grid, folder):
    """Writes the images of a `Case` on a grid as `<patient>_<channel>.nii.gz`; a sequence that is missing is zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    for channel, modality in enumerate(modalities):
        image = grid.image(np.zeros(grid.shape, np.float32))
        if modality in case.images:
            image = read_image(case.images[modality], case.name, sitk.sitkFloat32)
        if Grid.from_image(image) != grid:
            low = float(sitk.GetArrayViewFromImage(image).min())
            image = grid.image(resample(image, grid, background=low))
        write_image(image, folder / f"{case.name}_{channel:04d}.nii.gz")


def rows_of(run, name, values, probabilities, seconds):
    """Evaluates a mask of a patient: a row for each structure.

    Args:
        run: The run.
        name: Name of the patient.
        values: Label values on the grid of the first sequence, as `write_patients` writes them, `(z, y, x)`.
        probabilities: Probabilities of the structures, `(structures, z, y, x)`.
        seconds: How long the prediction took.

    Returns:
        A list of rows.
    """
    recipe, [patient] = run.recipe.data, run.patients([name])
    rows = []
    for number, (structure, truth) in enumerate(read_masks(run.cases[name], recipe, patient).items(), start=1):
        mask = (values == number if recipe.exclusive else values >= number).astype(np.uint8)
        numbers = evaluate_case(probabilities[number - 1], truth, patient.source.spacing[::-1], predicted=mask)
        rows.append({"patient": name, "structure": structure, **numbers, "seconds": seconds})
    return rows


def write_mask(run, fold, method, name, values):
    """Writes the mask of a test patient beside those of the run's own methods."""
    [patient] = run.patients([name])
    for path in run.masks(fold, method, name).values():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(patient.source.image(values), path)


def write_result(run, fold, method, title, rows, parameters, updates, history, library):
    """Writes the result of a fold where the run has its own; returns it.

    `history` has the losses and the seconds of each epoch.
    """
    found = {
        "method": method,
        "title": title,
        "paper": {},
        "fold": fold,
        "parameters": parameters,
        "updates": updates,
        "training_seconds": sum(row["seconds"] for row in history),
        "machine": machine("keras-mmfnet", library, "torch"),
        "history": history,
        "patients": rows,
        "shares": {},
    }
    write(run.result(fold, method), json.dumps(found) + "\n")
    return found
