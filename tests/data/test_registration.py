import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.data import cache as cache_files
from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.preprocess import read_masks
from keras_mmfnet.data.registration import RigidTransform, apply_transform, register_rigid
from keras_mmfnet.recipe import Recipe

IDENTITY = RigidTransform((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


def corners(image):
    """Places inside a head: the middle, and points 40% of the way from it to the edges."""
    size = np.array(image.GetSize()) - 1.0
    steps = [(0.0, 0, 0), (0.2, 0, 0), (-0.2, 0, 0), (0, 0.2, 0), (0, -0.2, 0), (0, 0, 0.2), (0, 0, -0.2)]
    return [image.TransformContinuousIndexToPhysicalPoint((size * (0.5 + np.array(step))).tolist()) for step in steps]


def distances(one, other, places):
    return [np.linalg.norm(np.subtract(one.TransformPoint(p), other.TransformPoint(p))) for p in places]


def turn_between(one, other):
    matrix = np.reshape(one, (3, 3)) @ np.reshape(other, (3, 3)).T
    return np.degrees(np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1)))


def inverse(transform):
    back = sitk.Euler3DTransform(transform.to_sitk().GetInverse())
    return RigidTransform(back.GetParameters()[:3], back.GetParameters()[3:], back.GetCenter())


def phantom(inverted=False, seed=0):
    """A head with two brighter places, in one of two contrasts."""
    z, y, x = np.meshgrid(np.linspace(-60, 60, 30), *[np.linspace(-90, 90, 64)] * 2, indexing="ij")
    head = (x / 65) ** 2 + (y / 75) ** 2 + (z / 55) ** 2 < 1
    tumour = (x - 20) ** 2 + (y - 15) ** 2 + (z - 5) ** 2 < 18**2
    other = ((x + 30) / 12) ** 2 + ((y + 25) / 25) ** 2 + ((z + 10) / 20) ** 2 < 1
    bright = (300, 150, 500) if inverted else (500, 800, 200)
    values = np.select([~head, tumour, other], [10, bright[1], bright[2]], bright[0])
    values = values + np.random.default_rng(seed).normal(0, 10, values.shape)
    spacing = (180 / 63, 180 / 63, 120 / 29)
    grid = Grid((64, 64, 30), spacing, (-90.0, -90.0, -60.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    return sitk.Cast(grid.image(values), sitk.sitkFloat32), grid.image(tumour.astype(np.uint8))


def test_a_transform_changes_only_the_header():
    image, _ = phantom()
    transform = RigidTransform((0.1, -0.2, 0.3), (4.0, -5.0, 6.0), (10.0, 20.0, -5.0))
    result = apply_transform(image, transform)
    np.testing.assert_array_equal(sitk.GetArrayViewFromImage(result), sitk.GetArrayViewFromImage(image))
    for index in ((0, 0, 0), (63, 10, 29)):
        place = result.TransformIndexToPhysicalPoint(index)
        expected = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(transform.to_sitk().TransformPoint(place), expected, atol=1e-6)
    assert transform.shift == pytest.approx(77**0.5)
    assert RigidTransform((0.0, 0.0, 0.3), (0.0, 0.0, 0.0), (1.0, 2.0, 3.0)).rotation == pytest.approx(np.degrees(0.3))


@pytest.mark.parametrize(
    "transform", [IDENTITY, RigidTransform((0.1, -0.08, 0.15), (8.0, -10.0, 6.0), (0.0, 0.0, 0.0))]
)
def test_a_known_transform_is_found_between_two_contrasts(transform):
    fixed, (moving, _) = phantom()[0], phantom(inverted=True, seed=1)
    found, gain = register_rigid(fixed, apply_transform(moving, inverse(transform)))
    assert max(distances(found.to_sitk(), transform.to_sitk(), corners(fixed))) < 1
    assert turn_between(found.to_sitk().GetMatrix(), transform.to_sitk().GetMatrix()) < 1
    assert gain > 0 or transform == IDENTITY


def test_the_same_images_have_the_same_transform():
    fixed, moving = phantom()[0], phantom(inverted=True)[0]
    transform = RigidTransform((0.05, 0.0, 0.1), (3.0, 2.0, 0.0), (0.0, 0.0, 0.0))
    one, other = (register_rigid(fixed, apply_transform(moving, transform))[0] for _ in range(2))
    assert one == other


def test_images_that_do_not_overlap():
    fixed, moving = phantom()[0], phantom(inverted=True)[0]
    with pytest.raises(RuntimeError):
        register_rigid(
            fixed, apply_transform(moving, RigidTransform((0.0, 0.0, 0.0), (900.0, 0.0, 0.0), (0.0, 0.0, 0.0)))
        )


def test_a_patient_who_moved(tmp_path):
    """Images and masks of the other sequences come back to where the first one has them, and the note says so."""
    moves = {"t2": RigidTransform((0.06, 0.0, 0.1), (4.0, -6.0, 3.0), (0.0, 0.0, 0.0)), "cet1": IDENTITY}
    for name in ("t1", "t2", "cet1"):
        transform = moves.get(name, IDENTITY)
        image, mask = phantom(inverted=name == "t2", seed=len(name))
        sitk.WriteImage(apply_transform(image, transform), str(tmp_path / f"{name}.nii.gz"))
        sitk.WriteImage(apply_transform(mask, transform), str(tmp_path / f"mask_{name}.nii.gz"))
    recipe = Recipe().replace({"data.spacing": None, "data.mask_from": "t2", "data.align": "rigid"})
    files = read_case_folder(tmp_path, recipe.data)
    case = preprocess_case(files, recipe.data, cache=tmp_path / "cache")
    truth = sitk.GetArrayFromImage(phantom()[1])

    def overlap(mask):
        return 2 * np.count_nonzero(mask & truth) / (mask.sum() + truth.sum())

    assert overlap(case.mask) > 0.93
    assert overlap(read_masks(files, recipe.data, case)["tumour"]) > 0.93
    trusting = recipe.replace({"data.align": "header"})
    assert overlap(preprocess_case(files, trusting.data).mask) < 0.8
    t2 = next(note for note in case.notes if note.startswith("t2: aligned by "))
    assert 6 < float(t2.split()[3]) < 9
    assert 5 < float(t2.split()[6]) < 8
    # From the cache: the transforms are part of it.
    again = preprocess_case(files, recipe.data, cache=tmp_path / "cache")
    assert again.transforms == case.transforms
    assert again.transforms["t2"].shift > 6
    # The only mask there is moves with the sequence that its name, or the recipe, says.
    for name in ("t1", "cet1"):
        (tmp_path / f"mask_{name}.nii.gz").unlink()
    for only, mask_from in (("mask_t2.nii.gz", None), ("mask.nii.gz", "t2")):
        (tmp_path / "mask_t2.nii.gz").rename(tmp_path / only)
        one = recipe.replace({"data.mask_from": mask_from})
        np.testing.assert_array_equal(preprocess_case(read_case_folder(tmp_path, one.data), one.data).mask, case.mask)


def test_the_cache_knows_the_alignment_and_not_the_training(tiny_cohort):
    files = read_case_folder(tiny_cohort / "patient_00", Recipe().data)
    keys = {
        (align, seed): cache_files.key(files, Recipe().replace({"data.align": align, "training.seed": seed}).data)
        for align in ("header", "rigid")
        for seed in (0, 1)
    }
    assert keys["header", 0] == keys["header", 1] != keys["rigid", 0] == keys["rigid", 1]


@pytest.mark.parametrize(("patient", "modality"), [("brats2013_patient", "cet1"), ("brainix", "t2")])
def test_a_known_transform_of_real_images(patient, modality, test_data):
    """A transform applied to an image is found again, to 1 mm and 1 degree, beside what is found without it.

    The sequences of brainix are a good millimetre apart from the beginning.
    """
    recipe = Recipe().replace({"data.modalities": ("t1", modality)})
    files = read_case_folder(test_data / patient, recipe.data, require_mask=False)
    fixed, moving = (read_image(files.images[name], patient, sitk.sitkFloat32) for name in recipe.data.modalities)
    centre = fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])
    transform = RigidTransform((0.07, -0.05, 0.14), (6.0, -9.0, 5.0), centre)
    found, gain = register_rigid(fixed, apply_transform(moving, inverse(transform)))
    before = IDENTITY if patient == "brats2013_patient" else register_rigid(fixed, moving)[0]
    expected = sitk.CompositeTransform([transform.to_sitk(), before.to_sitk()])
    assert max(distances(found.to_sitk(), expected, corners(fixed))) < 1
    matrix = np.reshape(transform.to_sitk().GetMatrix(), (3, 3)) @ np.reshape(before.to_sitk().GetMatrix(), (3, 3))
    assert turn_between(found.to_sitk().GetMatrix(), matrix) < 1
    assert gain > 0.1
