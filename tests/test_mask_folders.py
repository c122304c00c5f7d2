import json

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.evaluation import compare_masks
from keras_mmfnet.mask_folders import compare_folders
from keras_mmfnet.recipe import DataRecipe


def test_two_folders_from_python(tmp_path, caplog):
    rng = np.random.default_rng(0)
    masks = {}
    for side in ("predicted", "expert"):
        (tmp_path / side).mkdir()
        for name in ("ann", "bob", side):
            labels = rng.choice(np.array([0, 1, 4], np.uint8), (4, 6, 8))
            masks[side, name] = labels
            image = sitk.GetImageFromArray(labels)
            image.SetSpacing((0.5, 1.0, 3.0))
            sitk.WriteImage(image, str(tmp_path / side / f"{name}.nii.gz"))
    structures = {"whole": (1, 4), "inner": 4}
    rows = compare_folders(tmp_path / "predicted", str(tmp_path / "expert"), DataRecipe(structures=structures))
    assert [(row["patient"], row["structure"]) for row in rows] == [
        (name, structure) for name in ("ann", "bob") for structure in structures
    ]
    for row in rows:
        labels = np.atleast_1d(structures[row["structure"]])
        predicted, expert = (np.isin(masks[side, row["patient"]], labels) for side in ("predicted", "expert"))
        numbers = compare_masks(predicted, expert, (3.0, 1.0, 0.5))
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, nan_ok=True)
    assert "no prediction of 1 patient: expert" in caplog.text
    assert "no mask of the expert of 1 patient: predicted" in caplog.text


def test_masks_in_another_order_of_the_axes(tmp_path):
    rng, found = np.random.default_rng(0), []
    images = [sitk.GetImageFromArray(rng.integers(0, 2, (4, 6, 8)).astype(np.uint8)) for _ in range(2)]
    for folder, axes in (("same", "LPS"), ("other", "SAR")):
        for side, image, order in zip(("predicted", "expert"), images, ("LPS", axes), strict=True):
            image.SetSpacing((0.5, 1.0, 3.0))
            (tmp_path / folder / side).mkdir(parents=True)
            sitk.WriteImage(sitk.DICOMOrient(image, order), str(tmp_path / folder / side / "ann.nii.gz"))
        found += compare_folders(tmp_path / folder / "predicted", tmp_path / folder / "expert", DataRecipe())
    assert found[1] == pytest.approx(found[0], nan_ok=True)
    moved = sitk.ReadImage(str(tmp_path / "other" / "expert" / "ann.nii.gz"))
    moved.SetOrigin((7.0, 0.0, 0.0))
    sitk.WriteImage(moved, str(tmp_path / "other" / "expert" / "ann.nii.gz"))
    with pytest.raises(ValueError, match=r"must lie on one grid. Received: .* from \(3.5, -5.0, 0.0\)"):
        compare_folders(tmp_path / "other" / "predicted", tmp_path / "other" / "expert", DataRecipe())


def test_the_mask_that_the_network_was_trained_on(tmp_path):
    patient, predictions = tmp_path / "patients" / "ann", tmp_path / "predicted"
    patient.mkdir(parents=True)
    predictions.mkdir()
    regions = np.zeros((3, 8, 8), np.uint8)
    regions[:, 2:6, 2:6], regions[:, 3:5, 3:5] = 2, 1
    for path, array in (
        (patient / "mask.nii.gz", (regions == 1).astype(np.uint8)),
        (patient / "regions.nii.gz", regions),
        (predictions / "ann.nii.gz", regions),
    ):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    recipe = DataRecipe(structures={"whole": (1, 2), "core": (1,)})
    folders = predictions, tmp_path / "patients"

    def dsc(recipe):
        return {row["structure"]: row["dsc"] for row in compare_folders(*folders, recipe)}

    assert dsc(recipe)["whole"] < 1
    assert dsc(recipe.model_copy(update={"mask": "regions"})) == {"whole": 1, "core": 1}
    (predictions / "ann.json").write_text('{"mask": "regions"}')
    assert dsc(recipe) == {"whole": 1, "core": 1}
    (patient / "regions.nii.gz").unlink()
    assert dsc(recipe)["whole"] < 1, "the one mask that there is"
    with pytest.raises(ValueError, match="must hold masks"):
        dsc(recipe.model_copy(update={"mask": "regions"}))


def test_a_patient_whose_name_ends_like_the_one_structure(tmp_path):
    for side in ("predicted", "expert"):
        (tmp_path / side).mkdir()
        for name in ("a", "c_gtv"):
            image = sitk.GetImageFromArray(np.eye(4, dtype=np.uint8)[None])
            sitk.WriteImage(image, str(tmp_path / side / f"{name}.nii"))
    rows = compare_folders(tmp_path / "predicted", tmp_path / "expert", DataRecipe(structures={"gtv": "gtv"}))
    assert [(row["patient"], row["dsc"]) for row in rows] == [("a", 1), ("c_gtv", 1)]


def test_labels_that_belong_to_no_structure_are_said(tmp_path, caplog):
    for side in ("predicted", "expert"):
        (tmp_path / side).mkdir()
        labels = np.array([[[1, 2, 3 * (side == "expert"), 0]]], np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / side / "a.nii.gz"))
    recipe = DataRecipe(structures={"whole": (1, 2, 4), "core": (1, 4)})
    assert [row["dsc"] for row in compare_folders(tmp_path / "predicted", tmp_path / "expert", recipe)] == [1, 1]
    assert "labels that belong to no structure and are not compared: 3" in caplog.text


def test_no_structure_in_common(tmp_path):
    for side, name in (("predicted", "gtv"), ("expert", "ctv")):
        (tmp_path / side).mkdir()
        mask = sitk.GetImageFromArray(np.ones((2, 3, 4), np.uint8))
        sitk.WriteImage(mask, str(tmp_path / side / f"ann_{name}.nii.gz"))
    with pytest.raises(ValueError, match=r"expert: a structure that the predictions have.* Received: none"):
        compare_folders(
            tmp_path / "predicted", tmp_path / "expert", DataRecipe(structures={"gtv": "gtv", "ctv": "ctv"})
        )


def test_structures_that_were_not_predicted_are_refused(tmp_path):
    labels = np.random.default_rng(0).choice(np.array([0, 1, 4], np.uint8), (4, 6, 8))
    for side in ("predicted", "expert"):
        (tmp_path / side).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / side / "ann.nii.gz"))
    record = {"labels": {"whole": [1, 4], "inner": [4]}}
    (tmp_path / "predicted" / "ann.json").write_text(json.dumps(record))

    def compare(structures):
        return compare_folders(tmp_path / "predicted", tmp_path / "expert", DataRecipe(structures=structures))

    assert [row["dsc"] for row in compare({"whole": (1, 4)})] == [1.0]
    for structures in ({"necrosis": (1,)}, {"whole": (1, 4), "inner": (1,)}):
        with pytest.raises(
            ValueError, match=r"ann: structures that were predicted are expected: .* Received: (nec|inn)"
        ):
            compare(structures)
