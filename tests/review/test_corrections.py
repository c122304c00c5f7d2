import dataclasses
import json

import numpy as np
import pytest
import SimpleITK as sitk
from review_patients import OBLIQUE

from keras_mmfnet.data import Grid
from keras_mmfnet.review.corrections import Correction, StrokesChanged
from keras_mmfnet.review.strokes import StrokeFile, pack


def voxel_values(image, grid, indices):
    """The values of an image at voxels of another grid, by position, independent of the order of the axes."""
    return [image[tuple(map(round, image.TransformPhysicalPointToContinuousIndex(p)))] for p in grid.positions(indices)]


def test_a_patient_as_the_browser_gets_it(patient):
    """The same voxels, with axes to the left, back and head of the patient's as near as they come."""
    assert (np.diag(np.reshape(patient.grid.direction, (3, 3))) > 0.9).all()
    assert patient.sequences == ("t1", "t2")
    everywhere = np.argwhere(np.ones(patient.grid.size)).astype(float)
    t1 = patient.image("t1")
    expected = voxel_values(sitk.ReadImage(str(patient.case.images["t1"])), patient.grid, everywhere)
    np.testing.assert_array_equal(t1.transpose(2, 1, 0).ravel(), expected)
    t2 = sitk.ReadImage(str(patient.case.images["t2"]))
    for index in np.argwhere(np.ones((4, 4, 4))) + 2:
        point = patient.grid.positions(index.astype(float)).tolist()
        assert patient.image("t2")[tuple(index[::-1])] == pytest.approx(t2.EvaluateAtPhysicalPoint(point), rel=1e-4)
    mask = sitk.ReadImage(str(patient.case.mask))
    [expert] = patient.expert()
    assert expert.transpose(2, 1, 0).ravel().tolist() == voxel_values(mask, patient.grid, everywhere)


def test_what_is_drawn_is_saved_on_the_patients_own_grid(patient, tmp_path):
    correction = Correction(patient, tmp_path / "corrections")
    before = correction.drawing.copy()
    drawn, erased = [tuple(np.argwhere(before == value)[0]) for value in (0, 1)]
    flat = [np.ravel_multi_index(voxel, before.shape) for voxel in (drawn, erased)]
    correction.draw(pack(np.array(flat, np.uint32), np.array([1, 0], np.uint8)), correction.state)
    assert not list((tmp_path / "corrections").rglob("*.nii.gz"))
    version = correction.save("Dr. Who", correction.state)
    saved = sitk.ReadImage(str(version.masks[None]))
    assert Grid.from_image(saved).matches(OBLIQUE)
    assert saved.GetPixelID() == sitk.sitkUInt8
    indices = np.array([drawn, erased])[:, ::-1].astype(float)
    assert voxel_values(saved, patient.grid, indices) == [1, 0]
    prediction = sitk.ReadImage(str(patient.masks[None]))
    assert voxel_values(prediction, patient.grid, indices) == [0, 1]
    changed = sitk.GetArrayFromImage(saved) != sitk.GetArrayFromImage(prediction)
    assert changed.sum() == 2
    about = json.loads(version.record.read_text())
    assert (about["state"], about["by"], about["from"]) == ("corrected", "Dr. Who", str(patient.masks[None]))
    assert about["changes"]["tumour"] == {
        "added_voxels": 1,
        "removed_voxels": 1,
        "added_ml": 0.009,
        "removed_ml": 0.009,
        "volume_ml": pytest.approx(before.sum() * 0.009),
    }


def test_versions_follow_one_another(patient, tmp_path):
    correction = Correction(patient, tmp_path)
    stroke = pack(np.array([0], np.uint32), np.array([1], np.uint8))
    assert correction.save("me", correction.state).about["state"] == "accepted"
    correction.draw(stroke, correction.state)
    correction.save("me", correction.state)
    files = sorted(path.name for path in (tmp_path / "anna").iterdir())
    assert files == ["001.json", "001.nii.gz", "002.json", "002.nii.gz"]
    again = Correction(patient, tmp_path)
    assert again.drawing[0, 0, 0] == 1
    assert again.strokes == 0
    assert again.versions()[-1].about["from"] == str(tmp_path / "anna" / "001.nii.gz")


def test_strokes_are_there_after_a_crash(patient, tmp_path):
    correction = Correction(patient, tmp_path)
    for number in range(3):
        correction.draw(pack(np.array([number], np.uint32), np.array([1], np.uint8)), correction.state)
    again = Correction(patient, tmp_path)  # without a word to the first one
    np.testing.assert_array_equal(again.drawing, correction.drawing)
    assert again.drawing.ravel()[:3].tolist() == [1, 1, 1]
    assert again.strokes == 3


def test_strokes_on_a_drawing_that_has_changed(patient, tmp_path):
    correction = Correction(patient, tmp_path)
    stroke = pack(np.array([0], np.uint32), np.array([1], np.uint8))
    first = correction.state
    correction.draw(stroke, first)
    correction.draw(stroke, first)  # once more, because the answer was lost
    assert correction.strokes == 1
    other = pack(np.array([1], np.uint32), np.array([1], np.uint8))
    for act in (lambda: correction.draw(other, first), lambda: correction.save("me", first)):
        with pytest.raises(StrokesChanged, match=rf"drawing .*-1 is expected; it was changed.*Received: {first}"):
            act()
    with pytest.raises(StrokesChanged, match=r"voxels of each class are expected. Received: \[1, 2\]"):
        correction.save("me", correction.state, [1, 2])
    with pytest.raises(ValueError, match="values up to 1"):
        correction.draw(pack(np.array([0], np.uint32), np.array([2], np.uint8)), correction.state)
    # Of a version saved meanwhile there are as many strokes, none, as at the start.
    correction.save("me", correction.state)
    with pytest.raises(StrokesChanged):
        correction.save("you", first)


def test_nothing_is_drawn_that_is_not_on_the_disk(patient, tmp_path, full_disk):
    correction = Correction(patient, tmp_path)
    before = correction.drawing.copy()
    many = np.arange(before.size, dtype=np.uint32)
    with full_disk(64), pytest.raises(OSError, match="File too large"):
        correction.draw(pack(many, np.ones(before.size, np.uint8)), correction.state)
    np.testing.assert_array_equal(correction.drawing, before)
    correction.draw(pack(many, np.ones(before.size, np.uint8)), correction.state)
    np.testing.assert_array_equal(Correction(patient, tmp_path).drawing, 1)


def test_regions_stay_within_one_another(regions, tmp_path):
    correction = Correction(regions, tmp_path)
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(regions.masks[None])))
    corner = np.zeros(correction.drawing.shape, bool)
    corner[0, 0, :2] = True
    masks = correction.classes.split(correction.drawing)
    correction.draw(correction.replacing(1, masks[1] | corner), correction.state)
    version = correction.save("me", correction.state)
    saved = sitk.GetArrayFromImage(sitk.ReadImage(str(version.masks[None])))
    assert sorted(saved[saved != truth]) == [1, 1]  # core, which is in the whole
    changes = version.about["changes"]
    assert [changes[name]["added_voxels"] for name in ("wt", "tc", "et")] == [2, 2, 0]
    again = Correction(regions, tmp_path).classes.split(correction.drawing)
    for mask, labels in zip(again, regions.recipe.structures.values(), strict=True):
        on_grid = regions.grid.resample(OBLIQUE.image(np.isin(saved, labels).astype(np.uint8)))
        np.testing.assert_array_equal(mask, on_grid > 0)


def test_a_crash_after_saving(patient, tmp_path, monkeypatch):
    correction = Correction(patient, tmp_path)
    correction.draw(pack(np.array([0], np.uint32), np.array([1], np.uint8)), correction.state)
    monkeypatch.setattr(StrokeFile, "remove", lambda self: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        correction.save("me", correction.state)
    monkeypatch.undo()
    again = Correction(patient, tmp_path)
    assert (again.drawing[0, 0, 0], again.strokes) == (1, 0)
    assert not (tmp_path / "anna" / "strokes").exists()


def test_no_version_is_written_over(patient, tmp_path):
    correction = Correction(patient, tmp_path)
    for _ in range(3):
        correction.save("me", correction.state)
    (tmp_path / "anna" / "001.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "anna").iterdir()}
    assert Correction(patient, tmp_path).save("me", correction.state).record.name == "004.json"
    for name, content in before.items():
        assert (tmp_path / "anna" / name).read_bytes() == content


def test_what_was_corrected_is_not_merely_accepted(patient, tmp_path):
    correction = Correction(patient, tmp_path)
    correction.draw(pack(np.array([0], np.uint32), np.array([1], np.uint8)), correction.state)
    states = [correction.save("me", correction.state).about["state"] for _ in range(2)]
    assert states == ["corrected", "corrected"]


def test_a_correction_of_other_structures_or_on_another_grid(regions, tmp_path):
    correction = Correction(regions, tmp_path / "corrections")
    correction.save("me", correction.state)
    others = regions.recipe.model_copy(update={"structures": {"wt": (1, 2, 4), "tc": (1,), "et": (4,)}})
    with pytest.raises(ValueError, match=r"001.json: a correction of the structures .* Received: one of "):
        Correction(dataclasses.replace(regions, recipe=others), tmp_path / "corrections")
    mask = sitk.ReadImage(str(regions.masks[None]))
    mask.SetOrigin([value + 0.7 for value in mask.GetOrigin()])
    sitk.WriteImage(mask, str(tmp_path / "moved.nii.gz"))
    with pytest.raises(ValueError, match=r"001.json: a correction on the grid .* Received: one on another grid"):
        Correction(dataclasses.replace(regions, masks={None: tmp_path / "moved.nii.gz"}), tmp_path / "corrections")
