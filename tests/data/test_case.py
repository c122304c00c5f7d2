import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.data.case import Case, CaseError, PreprocessedCase, group_messages
from keras_mmfnet.data.geometry import Grid

# Columns: the directions of x, y and z. Reversed and permuted axes, and an oblique set.
IDENTITY = np.eye(3)
REVERSED = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def oblique(degrees=20.0):
    a, b = np.radians([degrees, 0.7 * degrees])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z @ about_x


def make_grid(size=(20, 16, 8), spacing=(0.6, 0.7, 4.0), origin=(-3.0, 7.5, 40.0), direction=IDENTITY):
    return Grid(tuple(size), tuple(spacing), tuple(origin), tuple(np.ravel(direction).tolist()))


def make_case(grid, source, images=None):
    return PreprocessedCase("ann", images or {}, None, grid, source, (0, 0, 0))


def test_case_takes_paths_as_text():
    case = Case("ann", {"t1": "a/t1.nii"}, "a/mask.nii")
    assert case.images == {"t1": Path("a/t1.nii")}
    assert case.mask == Path("a/mask.nii")
    assert Case("ann", {}).mask is None


def test_case_error_is_a_value_error():
    assert issubclass(CaseError, ValueError)


def test_case_errors_are_listed_together():
    errors = [CaseError(f"p{number}: lacks t2. Received: {'abcdefghijklmnopqrstu'[number]}") for number in range(21)]
    assert CaseError.of_several(errors[:1]) is CaseError.of_several(errors[:1], 1) is errors[0]
    one = CaseError.of_several(errors[:1], 9)
    assert (str(one), one.patient) == ("p0: lacks t2. Received: a (--skip-bad leaves this patient out)", "p0")
    head, *lines = str(CaseError.of_several(errors[:2], 9)).splitlines()
    assert head == "2 of 9 patients cannot be used; --skip-bad leaves them out:"
    assert lines == ["  p0: lacks t2. Received: a", "  p1: lacks t2. Received: b"]
    assert str(CaseError.of_several(errors[:20])).startswith("20 patients cannot be used; --skip-bad leaves them out:")
    assert str(CaseError.of_several(errors[:20], 20)).startswith("20 of 20 patients cannot be used:")
    assert str(CaseError.of_several(errors[:20])).endswith("\n  p19: lacks t2. Received: t")
    assert str(CaseError.of_several(errors)).endswith("\n  p19: lacks t2. Received: t\n  ... and 1 more")


def test_messages_that_differ_in_the_patient_alone_are_one():
    messages = [f"p{number}: /data/p{number}/t1.nii: is missing" for number in range(8)]
    assert group_messages([messages[0], "q: mask: is empty", *messages[1:]]) == [
        "p0: /data/p0/t1.nii: is missing (likewise for 7 others: p1, p2, p3, p4, p5, ...)",
        "q: mask: is empty",
    ]
    assert group_messages(messages[:2])[0].endswith("is missing (likewise for 1 other: p1)")


@pytest.mark.parametrize("direction", [IDENTITY, REVERSED, oblique()], ids=["identity", "reversed", "oblique"])
def test_grid_has_the_positions_of_the_image(direction):
    grid = make_grid(direction=direction)
    image = grid.image(np.zeros(grid.shape, np.float32))
    assert image.GetSize() == grid.size
    assert Grid.from_image(image) == grid
    for index in [(0, 0, 0), (19, 0, 3), (2.5, 7.25, 1.75)]:
        expected = image.TransformContinuousIndexToPhysicalPoint(index)
        np.testing.assert_allclose(grid.positions(np.array(index)), expected, atol=1e-9)
        np.testing.assert_allclose(grid.indices(np.array(expected)), index, atol=1e-9)


def test_grid_goes_through_json():
    grid = make_grid(direction=oblique())
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_grid_matches_up_to_rounding():
    grid = make_grid(direction=oblique())
    assert grid.matches(make_grid(origin=(-3.0001, 7.5, 40.0001), direction=oblique()))
    assert not grid.matches(make_grid(origin=(-3.1, 7.5, 40.0), direction=oblique()))
    assert not grid.matches(make_grid(spacing=(0.601, 0.7, 4.0), direction=oblique()))
    assert not grid.matches(make_grid(size=(20, 16, 9), direction=oblique()))


def test_coverage_is_the_share_of_the_volume():
    grid = make_grid(direction=REVERSED)
    assert grid.coverage_by(grid) == 1
    half = make_grid(origin=grid.positions(np.array([10.0, 0, 0])).tolist(), direction=REVERSED)
    assert grid.coverage_by(half) == pytest.approx(0.5, abs=0.07)
    assert grid.coverage_by(make_grid(origin=(1000, 0, 0))) == 0


def test_crop_keeps_the_positions():
    grid = make_grid(direction=oblique())
    part = grid.crop((1, 2, 3), (5, 10, 20))
    assert part.shape == (4, 8, 17)
    np.testing.assert_allclose(part.positions(np.array([0, 0, 0])), grid.positions(np.array([3, 2, 1])))
    np.testing.assert_allclose(part.positions(np.array([16, 7, 3])), grid.positions(np.array([19, 9, 4])))


def test_resample_to_another_order_of_the_axes_keeps_the_values():
    rng = np.random.default_rng(0)
    image = make_grid(direction=REVERSED).image(rng.normal(size=(8, 16, 20)).astype(np.float32))
    upright = sitk.DICOMOrient(image, "LPS")
    there = Grid.from_image(upright).resample(image)
    np.testing.assert_array_equal(there, sitk.GetArrayFromImage(upright))
    np.testing.assert_array_equal(Grid.from_image(image).resample(upright), sitk.GetArrayFromImage(image))


def test_resample_interpolates_linearly_and_fills_outside():
    grid = make_grid(size=(12, 12, 6), spacing=(1.0, 1.0, 3.0), origin=(0, 0, 0))
    x = np.broadcast_to(np.arange(12, dtype=np.float32), (6, 12, 12))
    shifted = make_grid(size=(12, 12, 6), spacing=(1.0, 1.0, 3.0), origin=(-1.75, 0, 0))
    values = shifted.resample(grid.image(x.copy()), background=-5.0)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values[0, 0], [-5, -5, *(np.arange(2, 12) - 1.75)], atol=1e-6)
    np.testing.assert_allclose(shifted.resample(grid.image(x.copy()), extend=True)[0, 0, :2], 0, atol=1e-6)


def test_preprocessed_case_is_in_array_order():
    case = make_case(make_grid(), make_grid())
    assert case.shape == (8, 16, 20)
    assert case.spacing == (4.0, 0.7, 0.6)


def test_to_source_is_exact_where_only_the_axes_differ():
    rng = np.random.default_rng(1)
    source = make_grid(direction=REVERSED)
    image = source.image(rng.random(source.shape, dtype=np.float32))
    upright = sitk.DICOMOrient(image, "LPS")
    back = make_case(Grid.from_image(upright), source).to_source(sitk.GetArrayFromImage(upright))
    assert Grid.from_image(back) == source
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


def test_to_source_gives_a_probability_map():
    source = make_grid(direction=oblique())
    grid = make_grid(size=(10, 8, 8), spacing=(1.2, 1.4, 4.0), origin=source.positions(np.array([0.5, 0.5, 0])))
    case = make_case(Grid(grid.size, grid.spacing, grid.origin, source.direction), source)
    ramp = np.broadcast_to(np.linspace(0, 1, 10), case.shape)
    probability = case.to_source(ramp)
    assert probability.GetPixelID() == sitk.sitkFloat32
    values = sitk.GetArrayFromImage(probability)
    # A source voxel's centre lies a quarter of a grid voxel from the nearest grid centre.
    np.testing.assert_allclose(values[3, 5, 1:-1], (np.arange(1, 19) / 2 - 0.25) / 9, atol=1e-6)


def test_to_source_refuses_another_shape():
    with pytest.raises(ValueError, match=r"shape \(8, 16, 20\) of ann. Received: \(8, 16, 19\)"):
        make_case(make_grid(), make_grid()).to_source(np.zeros((8, 16, 19)))
