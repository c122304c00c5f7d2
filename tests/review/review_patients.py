import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data import Grid, find_cases
from keras_mmfnet.recipe import DataRecipe
from keras_mmfnet.review.patients import ReviewPatient

# Oblique, with axes in another order and direction than the browser's.
OBLIQUE = Grid((7, 10, 9), (2.0, 1.5, 3.0), (-5.0, 4.0, 12.0), (0.0, -0.995, -0.1, 0.0, 0.1, -0.995, 1.0, 0.0, 0.0))


def make_patient(folder, structures=None, name="anna"):
    """A patient on an oblique grid, whose t2 has another one, with predicted and expert masks and a probability."""
    recipe = DataRecipe(modalities=("t1", "t2"), structures=structures or {"tumour": None}, spacing=None)
    rng = np.random.default_rng(0)
    patient = folder / "patients" / name
    patient.mkdir(parents=True)
    z, y, x = np.indices(OBLIQUE.shape)
    distance = np.sqrt((x - 3) ** 2 + (y - 5) ** 2 + (z - 4) ** 2)
    truth = np.select([distance < 1.2, distance < 2.2, distance < 3.2], [4, 1, 2])
    predicted = np.roll(truth, 1, axis=1)
    if structures is None:
        truth, predicted = truth > 0, predicted > 0
    sitk.WriteImage(OBLIQUE.image(truth.astype(np.uint8)), str(patient / "mask.nii.gz"))
    t1 = np.rint(500 - 20 * distance + rng.normal(0, 5, OBLIQUE.shape)).astype(np.int16)
    sitk.WriteImage(OBLIQUE.image(t1), str(patient / "t1.nii.gz"))
    corner = OBLIQUE.positions(np.array([0.5, 0.5, 0.5]))
    other = Grid((6, 9, 8), OBLIQUE.spacing, tuple(corner), OBLIQUE.direction)
    sitk.WriteImage(other.image(t1[:8, :9, :6].astype(np.float32) / 7), str(patient / "t2.nii.gz"))
    out = folder / "contours"
    out.mkdir(exist_ok=True)
    sitk.WriteImage(OBLIQUE.image(predicted.astype(np.uint8)), str(out / f"{name}.nii.gz"))
    probability = np.exp(-((distance / 3) ** 2)).astype(np.float32)
    maps = {}
    for structure in recipe.structures:
        maps["probability", structure] = out / f"{name}_probability_{structure}.nii.gz"
        sitk.WriteImage(OBLIQUE.image(probability), str(maps["probability", structure]))
    cases = {case.name: case for case in find_cases(folder / "patients", recipe)}
    masks, scores = {None: out / f"{name}.nii.gz"}, {"tumour": {"dsc": 0.7}}
    return ReviewPatient(cases[name], recipe, folder / "patients", masks, maps, scores)
