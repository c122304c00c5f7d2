import dataclasses
import os
import re

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import write_series
from patients import (
    IDENTITY,
    MODALITIES,
    RAW,
    distance,
    head,
    make_case,
    make_grid,
    only,
    tumour,
    voxel_positions,
    write,
)

from keras_mmfnet.data.body import body_mask, bounding_box, otsu_threshold, z_score
from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.geometry import Grid, in_plane_grid, resample, upright_grid
from keras_mmfnet.data.layouts import read_case_folder
from keras_mmfnet.data.preprocess import preprocess_case, read_masks, structure_voxels
from keras_mmfnet.data.survey import survey_case
from keras_mmfnet.recipe import Recipe

REVERSED = np.diag([-1.0, -1.0, 1.0])
PERMUTED = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])


def oblique(degrees=15.0):
    a, b = np.radians([degrees, 0.6 * degrees])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return about_z @ about_x


def refused(case, recipe, file):
    """The message of the error that names the patient first and then the file."""
    with pytest.raises(CaseError) as caught:
        preprocess_case(case, recipe.data)
    message = str(caught.value)
    assert message.startswith(f"{case.name}: {file}: ")
    assert "Received: " in message
    return message


def differs_only_at_rim(mask, other, reach):
    """Whether two SimpleITK masks differ only within `reach` voxels (x, y, z) of the first one's surface."""
    inside = sitk.GetArrayFromImage(sitk.BinaryErode(mask, reach, sitk.sitkBox))
    near = sitk.GetArrayFromImage(sitk.BinaryDilate(mask, reach, sitk.sitkBox))
    other = sitk.GetArrayFromImage(other)
    return np.all(other[inside == 1] == 1) and np.all(other[near == 0] == 0)


def dice(mask, other):
    mask, other = sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(other)
    return 2 * np.count_nonzero(mask & other) / (np.count_nonzero(mask) + np.count_nonzero(other))


# --- geometry


@pytest.mark.parametrize("direction", [IDENTITY, oblique()], ids=["identity", "oblique"])
@pytest.mark.parametrize("spacing", [0.5, 0.8, 1.0, 2.0, 3.7])
def test_in_plane_grid_keeps_edges_and_slices(direction, spacing):
    grid = make_grid(direction=direction)
    new = in_plane_grid(grid, spacing)
    assert new.spacing == (spacing, spacing, 4.0)
    assert new.size[2] == grid.size[2]
    np.testing.assert_allclose(new.positions(np.array([-0.5, -0.5, 3])), grid.positions(np.array([-0.5, -0.5, 3])))
    for old_size, new_size in zip(grid.size[:2], new.size[:2], strict=True):
        assert abs(old_size * 0.8 - new_size * spacing) <= spacing / 2 + 1e-9
    last = grid.indices(new.positions(np.asarray(new.size) - 1.0))
    assert np.all(last <= np.asarray(grid.size) - 0.5)


def test_in_plane_grid_may_keep_the_spacing():
    grid = make_grid()
    assert in_plane_grid(grid, None) == grid
    assert in_plane_grid(grid, 0.8).matches(grid)
    assert in_plane_grid(grid, 1000.0).size == (1, 1, 8)


def test_resample_averages_what_is_finer_than_a_voxel():
    grid = make_grid(size=(128, 64, 4), spacing=(0.5, 0.5, 4.0))
    stripes = np.broadcast_to(100 + 10 * (-1.0) ** np.arange(128), grid.shape).astype(np.float32)
    coarse = resample(grid.image(stripes), in_plane_grid(grid, 2.3), background=0)
    assert np.abs(coarse - 100)[:, :, 2:-2].max() < 0.1
    fine = resample(grid.image(stripes), in_plane_grid(grid, 0.25), background=0)
    assert np.ptp(fine) == pytest.approx(15, abs=6)


def test_resample_smooths_along_the_images_own_axes():
    # The image's z is the grid's x: thin slices there are averaged into the grid's wider pixels.
    image_grid = make_grid(size=(20, 8, 96), spacing=(2.0, 4.0, 0.5), direction=PERMUTED)
    grid = make_grid(size=(20, 20, 8), spacing=(2.0, 2.0, 4.0))
    stripes = np.broadcast_to((100 + 10 * (-1.0) ** np.arange(96))[:, None, None], image_grid.shape)
    assert np.abs(resample(image_grid.image(stripes.astype(np.float32)), grid, background=100) - 100).max() < 0.1


def test_resample_leaves_a_ramp_a_ramp():
    image_grid = make_grid(size=(90, 80, 20), spacing=(0.7, 0.6, 3.0), direction=oblique())
    ramp = (voxel_positions(image_grid) @ [2.0, -3.0, 5.0]).astype(np.float32)
    grid = make_grid(size=(20, 18, 6), spacing=(1.5, 1.5, 4.0))
    values = resample(image_grid.image(ramp), grid, background=0)
    np.testing.assert_allclose(values, voxel_positions(grid) @ [2.0, -3.0, 5.0], atol=1e-2)


@pytest.mark.parametrize("direction", [IDENTITY, REVERSED, PERMUTED], ids=["identity", "reversed", "permuted"])
def test_values_are_the_files_where_nothing_is_resampled(tmp_path, direction):
    grid = make_grid(direction=direction)
    case = make_case(tmp_path, grid)
    for seed, path in enumerate(case.images.values()):
        write(path, grid, (head(grid, seed) - 300).astype(np.int16))
    result = preprocess_case(case, RAW.replace({"data.normalised_scale": 1}).data)
    for modality in MODALITIES:
        upright = sitk.DICOMOrient(sitk.ReadImage(str(case.images[modality])), "LPS")
        np.testing.assert_array_equal(result.images[modality], sitk.GetArrayFromImage(upright))
        assert result.images[modality].dtype == np.float32
    assert result.source.matches(grid)
    np.testing.assert_allclose(result.grid.direction, np.ravel(IDENTITY), atol=1e-6)
    assert result.shape == result.mask.shape
    assert result.notes == ()


def test_modalities_come_onto_the_first_ones_grid_by_position(tmp_path):
    grid = make_grid(direction=oblique())
    other = make_grid(size=(70, 60, 20), spacing=(0.9, 1.1, 3.0), direction=REVERSED @ oblique(8), middle=(4, -1, 31))
    case = make_case(tmp_path, grid, other)
    weights = np.array([2.0, -3.0, 5.0])
    ramp = (voxel_positions(other) @ weights).astype(np.float32)
    write(case.images["t2"], other, ramp)
    result = preprocess_case(case, Recipe().replace({"data.spacing": 1.0, "data.normalised_scale": 2.0}).data)
    assert result.spacing == pytest.approx((4, 1, 1))
    expected = voxel_positions(result.grid) @ weights
    # Where the modality does not reach, its lowest value stands.
    index = other.indices(voxel_positions(result.grid))
    outside = np.any((index < -0.5) | (index > np.asarray(other.size) - 0.5), axis=-1)
    inner = np.all((index > 5) & (index < np.asarray(other.size) - 6), axis=-1)
    assert inner.mean() > 0.3
    np.testing.assert_allclose(result.images["t2"][inner] * 2, expected[inner], atol=0.02)
    np.testing.assert_allclose(result.images["t2"][outside] * 2, ramp.min(), atol=1e-3)


def test_a_modality_that_does_not_overlap_is_refused(tmp_path):
    case = make_case(tmp_path, other_grid=make_grid(middle=(1, -2, 300)))
    assert "must overlap the field of view of t1. Received: no overlap" in refused(case, RAW, case.images["t2"])


def test_a_modality_that_covers_little_is_noted(tmp_path):
    case = make_case(tmp_path, other_grid=make_grid(middle=(1, -2, 30 + 20)))
    t2, cet1 = preprocess_case(case, RAW.data).notes
    assert re.match(r"t2: covers 3\d% of the field of view of t1", t2)
    assert cet1.startswith("cet1: ")


def test_slices_that_are_not_axial_are_noted(tmp_path):
    case = make_case(tmp_path, make_grid(direction=PERMUTED))
    (note,) = preprocess_case(case, Recipe().replace({"data.spacing": 1.0}).data).notes
    assert note.startswith("t1: the slices are not axial")


@pytest.mark.parametrize("direction", [IDENTITY, REVERSED, PERMUTED, oblique(), oblique(50) @ PERMUTED])
def test_upright_grid_is_simpleitks(direction):
    grid = make_grid(direction=direction)
    found, image = upright_grid(grid), sitk.DICOMOrient(grid.image(np.zeros(grid.shape, np.uint8)), "LPS")
    assert found.size == image.GetSize()
    assert found.spacing == image.GetSpacing()
    np.testing.assert_allclose(found.origin, image.GetOrigin())
    np.testing.assert_allclose(found.direction, image.GetDirection())


# --- the way back


@pytest.mark.parametrize("spacing", [None, 0.5, 1.9])
@pytest.mark.parametrize(
    "direction", [IDENTITY, REVERSED, PERMUTED, oblique()], ids=["identity", "reversed", "permuted", "oblique"]
)
def test_a_mask_there_and_back_differs_only_at_its_rim(tmp_path, direction, spacing):
    grid = make_grid(direction=direction)
    case = make_case(tmp_path, grid)
    result = preprocess_case(case, RAW.replace({"data.spacing": spacing}).data)
    back, truth = result.to_source(result.mask) >= 0.5, grid.image(tumour(grid))
    source = Grid.from_image(sitk.ReadImage(str(case.images["t1"])))
    assert Grid.from_image(back).matches(source)
    if spacing is None:
        assert dice(back, truth) == 1
    # The axes along which the pixels were resampled are the scanner's x and y.
    resampled = np.abs(np.reshape(direction, (3, 3))[:2]).max(axis=0) > 0.7
    assert differs_only_at_rim(truth, back, [2 if along else 0 for along in resampled.tolist()])
    assert dice(back, truth) > 0.9


# --- the body


def test_otsu_threshold_is_simpleitks():
    rng = np.random.default_rng(0)
    volume = np.where(
        rng.random((4, 60, 70)) < 0.3, rng.normal(800, 200, (4, 60, 70)), rng.normal(100, 150, (4, 60, 70))
    )
    volume = volume.astype(np.float32)
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.SetNumberOfHistogramBins(1024)
    otsu.Execute(sitk.GetImageFromArray(volume))
    assert otsu_threshold(volume) == pytest.approx(otsu.GetThreshold(), abs=2 * float(np.ptp(volume)) / 1024)


def test_otsu_threshold_of_two_values_lies_between_them():
    volume = np.zeros((2, 8, 8), np.float32)
    volume[:, 2:5] = 10
    assert otsu_threshold(volume - 3) == pytest.approx(2, abs=0.1)


def test_body_mask_is_the_head_without_the_air():
    grid = make_grid()
    volume = head(grid)
    hole = distance(grid, (1, -2, 30), (5, 5, 5)) < 1
    volume[hole] = 5
    body, truth = body_mask(volume, pixel=0.8), distance(grid) < 1
    assert body.dtype == bool
    assert np.count_nonzero(body & truth) / np.count_nonzero(truth) > 0.99
    assert np.count_nonzero(body & ~truth) / np.count_nonzero(truth) < 0.08
    assert body[hole].all()
    assert not body[0].any(), "a slice of air"


def test_body_mask_does_not_depend_on_scale_and_offset():
    volume = head(make_grid())
    np.testing.assert_array_equal(body_mask(volume), body_mask(volume * 3 - 500))


def test_body_mask_follows_each_slices_brightness():
    volume = head(make_grid())
    body = body_mask(volume)
    volume *= np.linspace(0.6, 1.4, len(volume), dtype=np.float32)[:, None, None]
    assert np.mean(body_mask(volume) == body) > 0.99


def test_bounding_box_passes_over_specks():
    grid = make_grid(size=(160, 130, 24), spacing=(0.3, 0.3, 2.0))
    mask = distance(grid) < 1
    exact = tuple((int(held.min()), int(held.max()) + 1) for held in np.nonzero(mask))
    assert bounding_box(mask, share=0) == exact
    assert bounding_box(mask) == exact
    mask[0, 0, :4] = mask[-1, -1, -4:] = True
    assert bounding_box(mask) == exact


@pytest.mark.parametrize("spacing", [None, 0.5, 2.0])
def test_centre_is_the_heads(tmp_path, spacing):
    middle = (6.0, -5.0, 34.0)
    case = make_case(tmp_path, make_grid(size=(80, 70, 12), direction=REVERSED))
    result = preprocess_case(case, Recipe().replace({"data.spacing": spacing}).data)
    shifted = preprocess_case(
        make_case(tmp_path / "b", make_grid(size=(80, 70, 12), middle=middle)),
        Recipe().replace({"data.spacing": spacing}).data,
    )
    for one in (result, shifted):
        assert all(isinstance(index, int) for index in one.centre)
        position = one.grid.positions(np.array(one.centre[::-1]))
        np.testing.assert_array_less(np.abs(position - (1, -2, 30)), np.array(one.grid.spacing) * 1.01)


# --- intensity


def test_z_score_is_numpys():
    rng = np.random.default_rng(0)
    volume = rng.normal(900, 50, (5, 20, 20)).astype(np.float32)
    body = rng.random(volume.shape) < 0.5
    scored = z_score(volume, body)
    expected = (volume.astype(np.float64) - volume[body].mean(dtype=np.float64)) / np.std(
        volume[body], dtype=np.float64
    )
    np.testing.assert_allclose(scored, expected, atol=1e-5)
    assert scored.dtype == np.float32
    assert scored[body].mean() == pytest.approx(0, abs=1e-4)
    assert scored[body].std() == pytest.approx(1, abs=1e-4)


def test_z_score_refuses_what_does_not_vary():
    with pytest.raises(ValueError, match=r"must vary. Received: 8 voxels, all of 3"):
        z_score(np.full((2, 2, 2), 3, np.float32), np.ones((2, 2, 2), bool))
    with pytest.raises(ValueError, match=r"must vary. Received: 0 voxels"):
        z_score(np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), bool))
    with pytest.raises(ValueError, match=r"must be below 1e18. Received: 7e\+30"):
        z_score(np.arange(8, dtype=np.float32).reshape(2, 2, 2) * np.float32(1e30), np.ones((2, 2, 2), bool))


def test_images_are_scored_inside_the_body_and_clipped(tmp_path):
    case = make_case(tmp_path)
    recipe = Recipe().replace({"data.spacing": None, "data.clip": {"t1": (-0.5, 0.25), "t2": (-3, 2)}})
    result = preprocess_case(case, recipe.data)
    for modality in MODALITIES:
        raw = sitk.GetArrayFromImage(sitk.ReadImage(str(case.images[modality]))).astype(np.float64)
        body = body_mask(raw.astype(np.float32), pixel=0.8)
        expected = (raw - raw[body].mean()) / raw[body].std()
        expected = np.clip(expected, *recipe.data.clip.get(modality, (None, None)))
        np.testing.assert_allclose(result.images[modality], expected, atol=1e-4)
    assert result.images["t1"].min() == -0.5
    assert result.images["t1"].max() == 0.25


def test_normalised_images_are_only_divided(tmp_path):
    case = make_case(tmp_path)
    result = preprocess_case(
        case,
        Recipe().replace({"data.spacing": None, "data.normalised_scale": 1000, "data.clip": {"t1": (-0.1, 0.1)}}).data,
    )
    raw = sitk.GetArrayFromImage(sitk.ReadImage(str(case.images["t1"])))
    np.testing.assert_allclose(result.images["t1"], raw / 1000, rtol=1e-6)
    assert result.images["t1"].dtype == np.float32


@pytest.mark.parametrize("modality", ["t1", "cet1"])
def test_a_constant_image_is_refused(tmp_path, modality):
    case = make_case(tmp_path)
    write(case.images[modality], make_grid(), np.full(make_grid().shape, 7, np.int16))
    assert "must not be constant. Received: 7 everywhere" in refused(case, RAW, case.images[modality])


def test_an_image_constant_in_the_field_of_view_is_refused(tmp_path):
    wide = make_grid(size=(60, 50, 24))
    case = make_case(tmp_path, other_grid=wide)
    values = np.zeros(wide.shape, np.int16)
    values[:4] = 100
    write(case.images["t2"], wide, values)
    message = refused(case, RAW, case.images["t2"])
    assert "must not be constant in the field of view of t1. Received: 0 everywhere" in message


def test_an_image_constant_inside_the_body_is_refused(tmp_path):
    case = make_case(tmp_path)
    write(case.images["t2"], make_grid(), 100 * (distance(make_grid()) < 1).astype(np.int16))
    message = refused(case, Recipe().replace({"data.spacing": None}), case.images["t2"])
    assert re.search(r"inside the body must vary. Received: \d+ voxels, all of 100", message)


@pytest.mark.parametrize("modality", ["t1", "t2"])
def test_nan_is_refused(tmp_path, modality):
    case = make_case(tmp_path)
    values = head(make_grid())
    values[2, 3, 4] = np.nan
    write(case.images[modality], make_grid(), values)
    assert "1 voxels with NaN" in refused(case, RAW, case.images[modality])


@pytest.mark.parametrize("file", ["t2", "mask"])
def test_a_truncated_file_is_refused(tmp_path, file):
    case = make_case(tmp_path)
    path = tmp_path / f"{file}.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert "must be a" in refused(case, RAW, path)


def test_a_missing_image_is_refused(tmp_path):
    case = make_case(tmp_path)
    with pytest.raises(CaseError, match=r"^ann: an image of t2, cet1 is expected, or .*Received: t1$"):
        preprocess_case(only(case, "t1"), RAW.data)
    case.images["t2"].unlink()
    assert "must be an undamaged image file" in refused(case, RAW, case.images["t2"])
    case.images["t2"].touch()
    assert refused(case, RAW, case.images["t2"]).endswith("undamaged image file. Received: an empty file of 0 bytes")
    case.images["t2"].unlink()
    with pytest.raises(CaseError, match=r"must be a readable file. Received: No such file"):
        preprocess_case(case, RAW.data, cache=tmp_path / "cache")


def scored(grid, seed, scale=1.0, masked=True):
    """A head's z-scores times a scale, inside the body and 0 outside, or over the whole image."""
    values, body = head(grid, seed), (distance(grid) < 1) | (not masked)
    return np.where(body, scale * (values - values[body].mean()) / values[body].std(), 0)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("scale", "dtype"), [(1, np.float32), (100, np.float32), (1000, np.int16)])
def test_z_scores_are_refused_with_their_scale(tmp_path, scale, dtype, masked):
    case = make_case(tmp_path)
    for seed, path in enumerate(case.images.values()):
        write(path, make_grid(), scored(make_grid(), seed, scale, masked).astype(dtype))
    message = refused(case, Recipe(), case.images["t1"])
    assert f"`--set data.normalised_scale={scale}`. Received: t1 with values from -" in message
    assert ", mean " in message
    assert "; cet1 with values" in message
    preprocess_case(case, Recipe().replace({"data.normalised_scale": scale}).data)


def test_raw_intensities_are_refused_where_z_scores_are_expected(tmp_path):
    case = make_case(tmp_path)
    message = refused(case, Recipe().replace({"data.normalised_scale": 1}), case.images["t1"])
    assert "must be z-scores times 1, since the recipe has `data.normalised_scale=1`" in message
    assert "Received: t1 with values from" in message
    message = refused(case, Recipe().replace({"data.normalised_scale": 10000}), case.images["t1"])
    assert "must be z-scores times 10000" in message
    # They could be numbers of another scale: a note.
    (note,) = preprocess_case(case, Recipe().replace({"data.normalised_scale": 1000}).data).notes
    assert note.startswith("t1, t2, cet1: values on one side of 0; raw intensities are not normalised")
    write(case.images["t2"], make_grid(), scored(make_grid(), 1).astype(np.float32))
    (note,) = preprocess_case(case, Recipe().replace({"data.normalised_scale": 1}).data).notes
    assert note.startswith("t1, cet1: values on one side of 0")


def test_one_image_of_z_scores_is_noted(tmp_path):
    case = make_case(tmp_path)
    write(case.images["t2"], make_grid(), scored(make_grid(), 1).astype(np.float32))
    (note,) = preprocess_case(case, Recipe().data).notes
    assert re.match(r"t2: has values from -.*; if all images are z-scores, set data.normalised_scale=1$", note)


def test_two_labels_after_an_interpolation_are_refused():
    z, y, x = np.indices((30, 40, 40))
    distance = np.sqrt((x - 20) ** 2 + (y - 20) ** 2 + (z - 15) ** 2)
    labels = np.where(distance < 4, 1, np.where(distance < 12, 2, 0))
    grid = make_grid((40, 40, 30), (1.0, 1.0, 1.0))
    other = Grid(grid.size, (0.93, 0.93, 0.93), tuple(grid.positions(np.array([0.3, 0.4, 0.2]))), grid.direction)
    images = (grid.image(some.astype(np.float32)) for some in (2 * (labels > 0), labels))
    one, both = (resample(image, other, background=0.0) for image in images)
    np.testing.assert_array_equal(structure_voxels(one), one > 1)
    with pytest.raises(ValueError, match="must hold whole numbers"):
        structure_voxels(both)


def test_magnitudes_that_an_interpolation_overshot_and_ct_are_no_z_scores(tmp_path):
    case = make_case(tmp_path)
    for seed, path in enumerate(case.images.values()):
        # No scanner has edges of one voxel.
        image = sitk.DiscreteGaussian(make_grid().image(head(make_grid(), seed)), [0.2, 0.2, 2.0])
        fine = sitk.Resample(image, [90, 75, 12], sitk.Transform(), sitk.sitkBSpline, (-22, -22, 16), [0.5, 0.5, 2.3])
        assert sitk.GetArrayViewFromImage(fine).min() < -5
        sitk.WriteImage(fine, str(path))
    assert preprocess_case(dataclasses.replace(case, mask=None), Recipe().data).notes == ()
    for path in case.images.values():
        write(path, make_grid(), (head(make_grid()) * 1.6 - 1000).astype(np.int16))
    assert preprocess_case(case, Recipe().data).notes == ()


# --- the mask


def test_one_value_besides_0_is_the_tumour():
    for dtype in (np.uint8, np.int16, np.float32, np.float64):
        for value in (1, 2, 100, 255 if dtype != np.int16 else -3):
            values = np.array([0, value, 0, value], dtype)
            np.testing.assert_array_equal(structure_voxels(values), [False, True, False, True])


def test_labels_are_chosen():
    values = np.array([0, 1, 2, 3, 4, 1])
    np.testing.assert_array_equal(structure_voxels(values, (1, 4)), [0, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(structure_voxels(values.astype(np.float32) * 0.99999994, (1, 4)), [0, 1, 0, 0, 1, 1])


def test_a_mask_of_fractions_is_cut_at_half():
    values = np.array([0, 0.2, 0.499, 0.51, 0.999, 1], np.float32)
    np.testing.assert_array_equal(structure_voxels(values), [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(structure_voxels(values * 254), [0, 0, 0, 1, 1, 1])
    for several in ([0.0, 1, 2, 0.5], [0.0, 1, 2, 2.5, 4], [0.0, 0.1, 0.3]):
        with pytest.raises(ValueError, match="must hold whole numbers"):
            structure_voxels(np.array(several))
    with pytest.raises(ValueError, match=r"must hold whole numbers. Received: 0, 0.2, "):
        structure_voxels(values, labels=(1,))


def test_several_labels_are_refused(tmp_path):
    case = make_case(tmp_path, mask=tumour(make_grid()) * np.arange(60, dtype=np.uint8))
    message = refused(case, RAW, case.mask)
    assert re.search(r"one label besides 0, .*`data.structures`.*Received: the labels 2\d, .*, \.\.\.$", message)
    with pytest.raises(ValueError, match=r"Received: the labels 1, 2, 4$"):
        structure_voxels(np.array([0.0, 1, 2, 4]))


def test_a_mask_without_the_wanted_labels_is_refused(tmp_path):
    case = make_case(tmp_path)
    message = refused(case, RAW.replace({"data.structures.tumour": (2, 4)}), case.mask)
    assert "must have a voxel with one of the labels 2, 4, unless" in message
    assert message.endswith("Received: 1")


@pytest.mark.parametrize("value", [1, 255, -1024])
def test_a_mask_whose_background_is_not_0_is_refused(value, tmp_path):
    case = make_case(tmp_path)
    inverted = sitk.Cast(sitk.ReadImage(str(case.mask)) == 0, sitk.sitkInt16) * value
    sitk.WriteImage(inverted, str(case.mask))
    message = refused(case, RAW, case.mask)
    assert re.search(r"must have a background, of the value 0. Received: tumour in 9\d\.\d% of the voxels$", message)


def test_a_patient_without_tumour(tmp_path):
    case = make_case(tmp_path)
    sitk.WriteImage(0 * sitk.ReadImage(str(case.mask)), str(case.mask))
    assert "`data.allow_empty` says that patients may have no tumour. Received: only 0" in refused(case, RAW, case.mask)
    able = RAW.replace({"data.allow_empty": True})
    patient = preprocess_case(case, able.data, tmp_path / "cache")
    assert (patient.mask.dtype, patient.mask.shape, patient.tumour_ml) == (np.uint8, patient.shape, 0)
    assert "mask: without tumour" in patient.notes
    assert not read_masks(case, able.data, patient)["tumour"].any()
    sitk.WriteImage(5 * (1 + sitk.ReadImage(str(case.mask))), str(case.mask))
    labelled = preprocess_case(case, able.replace({"data.structures.tumour": (1, 4)}).data)
    assert "mask: without tumour, but with the labels 5" in labelled.notes
    sitk.WriteImage(0 * sitk.ReadImage(str(case.mask)), str(case.mask))
    # What is in the cache is no way around a recipe that refuses it.
    with pytest.raises(CaseError, match="must have a voxel"):
        preprocess_case(case, RAW.data, tmp_path / "cache")
    write(case.mask, make_grid(), np.zeros(make_grid().shape, np.uint8))
    assert "`data.allow_empty` says that patients may have no tumour. Received: only 0" in refused(case, RAW, case.mask)


def test_a_mask_on_another_grid_is_resampled_and_noted(tmp_path):
    mask_grid = make_grid(size=(100, 90, 30), spacing=(0.5, 0.5, 1.5), direction=oblique())
    case = make_case(tmp_path, mask_grid=mask_grid)
    result = preprocess_case(case, RAW.data)
    (note,) = result.notes
    assert re.match(r"mask: lies on another grid than t1, resampled by position: 1\.\d+ ml, now 1\.\d+ ml", note)
    truth = tumour(result.grid)
    assert result.mask.dtype == np.uint8
    assert 2 * np.count_nonzero(truth & result.mask) / (truth.sum() + result.mask.sum()) > 0.9


@pytest.mark.parametrize("error", [RuntimeError("ITK ERROR: too large"), MemoryError()])
def test_what_fails_on_one_patient_is_that_patients_error(error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("keras_mmfnet.data.preprocess.upright_grid", fail)
    with pytest.raises(CaseError, match=r"^ann: must have images that can be preprocessed. Received: .*too large"):
        preprocess_case(make_case(tmp_path), RAW.data)


def test_a_mask_that_loses_a_third_of_its_volume_is_refused(tmp_path):
    case = make_case(tmp_path)
    # T1 has 8 slices, the 27th to the 34th of the mask's.
    beyond = make_grid(size=(60, 50, 60))
    for first, refusal in ((30, None), (32, r"0\.256 ml of tumour, of which 0\.102 ml are left")):
        mask = np.zeros(beyond.shape, np.uint8)
        mask[first : first + 5, 20:25, 20:24] = 1
        write(case.mask, beyond, mask)
        if refusal:
            assert re.search(refusal, refused(case, RAW, case.mask))
        else:
            assert np.count_nonzero(preprocess_case(case, RAW.data).mask) == 4 * 20


def test_a_mask_in_another_order_of_the_axes_is_not_another_grid(tmp_path):
    case = make_case(tmp_path)
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(case.mask)), "RAS"), str(case.mask))
    result = preprocess_case(case, RAW.data)
    assert result.notes == ()
    np.testing.assert_array_equal(result.mask, tumour(make_grid()))


def test_masks_of_several_modalities(tmp_path):
    case = make_case(tmp_path)
    whole = tumour(make_grid())
    half = whole.copy()
    half[: np.argwhere(whole)[:, 0].mean().astype(int)] = 0
    masks = {"t1": whole - half, "cet1": half}
    # On a grid of its own, as the one drawn on another sequence.
    fine = make_grid(spacing=(1.0, 1.0, 1.5))
    masks = {name: write(tmp_path / f"mask_{name}.nii.gz", make_grid(), array) for name, array in masks.items()}
    masks["t2"] = write(tmp_path / "mask_t2.nii.gz", fine, tumour(fine))
    case = dataclasses.replace(case, mask=masks)

    def found(mask_from=None):
        return preprocess_case(case, RAW.replace({"data.mask_from": mask_from}).data, cache=tmp_path / "cache").mask

    np.testing.assert_array_equal(found(), whole - half)
    np.testing.assert_array_equal(found("cet1"), half)
    assert np.count_nonzero(found("union") != whole) < 0.3 * whole.sum()
    assert not (whole & ~found("union")).any()
    with pytest.raises(CaseError, match=r"must overlap\..*none of which is left in all"):
        found("intersection")
    case = dataclasses.replace(case, mask={"t1": masks["t1"], "t2": masks["t2"]})
    both = found("intersection")
    assert both.any()
    assert not (both & ~(whole - half)).any()
    case = dataclasses.replace(case, mask={"t2": masks["t2"], "cet1": masks["cet1"]})
    with pytest.raises(
        CaseError, match=r"a mask drawn on t1 is expected, or another `mask_from`. Received: masks of t2, cet1"
    ):
        found()
    case = dataclasses.replace(case, mask={"t2": masks["t2"]})
    np.testing.assert_array_equal(found(), found("t2"))
    assert "mask: drawn on t2, there is none on t1" in preprocess_case(case, RAW.data).notes
    with pytest.raises(CaseError, match=r"a mask drawn on cet1 is expected, .*Received: masks of t2"):
        found("cet1")


def test_a_dicom_patient(tmp_path):
    """Series in one folder, on grids of their own, with masks beside them: what NIfTI files of the same give."""
    case = make_case(tmp_path, other_grid=make_grid(spacing=(1.5, 1.5, 5.0), direction=oblique()))
    for name, path in case.images.items():
        image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image) + 100
        write_series(tmp_path / "dicom", Grid.from_image(image), name, prefix=name, array=array, order=-1)
        sitk.WriteImage(Grid.from_image(image).image(array), str(path))
    sitk.WriteImage(sitk.ReadImage(str(case.mask)), str(tmp_path / "dicom" / "mask.nii.gz"))
    found = preprocess_case(
        read_case_folder(tmp_path / "dicom", Recipe().data), Recipe().data, cache=tmp_path / "cache"
    )
    expected = preprocess_case(case, Recipe().data)
    assert found.grid.matches(expected.grid)
    for name, image in expected.images.items():
        np.testing.assert_allclose(found.images[name], image, atol=1e-3)
    np.testing.assert_array_equal(found.mask, expected.mask)


def test_a_mask_outside_the_field_of_view_is_refused(tmp_path):
    case = make_case(tmp_path)
    write(case.mask, make_grid(middle=(1, -2, 300)), tumour(make_grid()))
    assert "must lie within t1 " in refused(case, RAW, case.mask)


@pytest.mark.parametrize("spacing", [None, 0.1])
def test_a_tumour_smaller_than_a_voxel_is_refused(spacing, tmp_path):
    """Also where only the reference modality's own grid, on which it is compared, is too coarse for it."""
    fine = make_grid(size=(80, 80, 8), spacing=(0.1, 0.1, 4.0))
    mask = np.zeros(fine.shape, np.uint8)
    mask[3, 40:44, 40:44] = 1
    case = make_case(tmp_path, mask_grid=fine)
    write(case.mask, fine, mask)
    recipe = RAW.replace({"data.spacing": spacing})
    assert re.search(r"voxels of 0\.8 x 0\.8 x 4 mm\. .*, of which 0 ml are left", refused(case, recipe, case.mask))
    patient = preprocess_case(dataclasses.replace(case, mask=None), recipe.data)
    with pytest.raises(CaseError, match="of which 0 ml are left"):
        read_masks(case, recipe.data, patient)


def test_an_empty_mask_beside_another_is_no_lost_tumour(tmp_path):
    case = make_case(tmp_path)
    empty = write(tmp_path / "mask_t2.nii.gz", make_grid(), 0 * tumour(make_grid()))
    case = dataclasses.replace(case, mask={"t1": case.mask, "t2": empty})
    for mask_from, voxels in (("union", tumour(make_grid()).sum()), ("intersection", 0)):
        recipe = RAW.replace({"data.mask_from": mask_from, "data.allow_empty": True}).data
        assert preprocess_case(case, recipe).mask.sum() == voxels


@pytest.mark.parametrize("align", ["header", "rigid"])
@pytest.mark.parametrize("mask_from", [None, "union", "t2"])
def test_a_mask_drawn_on_an_image_that_is_missing_counts_by_position(mask_from, align, tmp_path):
    case = make_case(tmp_path)
    images = {name: path for name, path in case.images.items() if name != "t2"}
    case = dataclasses.replace(case, images=images, mask={"t2": case.mask})
    recipe = RAW.data.model_copy(update={"allow_missing": True, "mask_from": mask_from, "align": align})
    assert survey_case(case, recipe).problems == ()
    patient = preprocess_case(case, recipe)
    np.testing.assert_array_equal(patient.mask, tumour(make_grid()))
    assert any("drawn on t2, whose image is missing" in note for note in patient.notes)


def test_a_patient_without_a_mask(tmp_path):
    case = dataclasses.replace(make_case(tmp_path), mask=None)
    assert preprocess_case(case, RAW.data).mask is None
    assert preprocess_case(case, RAW.data, cache=tmp_path / "cache").mask is None


# --- real images


@pytest.fixture
def brainix(test_data, tmp_path):
    """One head of three sequences on three oblique grids, with a lesion marked on the FLAIR's."""
    for series, name in (("T1", "t1"), ("T2", "t2"), ("FLAIR", "flair"), ("ROI", "mask")):
        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(test_data / "brainix" / series))
        sitk.WriteImage(sitk.ReadImage(files), str(tmp_path / f"{name}.nii"))
    return read_case_folder(tmp_path, Recipe().replace({"data.modalities": ("t1", "t2", "flair")}).data)


def test_brainix(brainix):
    recipe = Recipe().replace({"data.modalities": ("t1", "t2", "flair"), "data.spacing": 1.0})
    result = preprocess_case(brainix, recipe.data)
    assert result.shape == (22, 240, 240)
    assert result.spacing == pytest.approx((6, 1, 1))
    assert len(result.notes) == 1
    assert result.notes[0].startswith("mask: ")
    # The same head in every sequence: where one sees body, so do the others.
    bodies = [result.images[m] > -1 for m in recipe.data.modalities]
    for body in bodies[1:]:
        assert 2 * np.count_nonzero(body & bodies[0]) / (body.sum() + bodies[0].sum()) > 0.85
    # The lesion keeps its volume and place, and is bright on the FLAIR.
    roi = sitk.ReadImage(str(brainix.mask))
    volume = np.count_nonzero(sitk.GetArrayViewFromImage(roi)) * np.prod(roi.GetSpacing())
    assert result.mask.sum() * np.prod(result.spacing) == pytest.approx(volume, rel=0.03)
    where = np.argwhere(sitk.GetArrayViewFromImage(roi)).mean(axis=0)[::-1]
    np.testing.assert_allclose(
        result.grid.positions(np.argwhere(result.mask).mean(axis=0)[::-1]),
        roi.TransformContinuousIndexToPhysicalPoint(where.tolist()),
        atol=0.3,
    )
    assert result.images["flair"][result.mask == 1].mean() > 1
    # There and back on the oblique grid.
    drawn = result.source.resample(sitk.Cast(roi, sitk.sitkFloat32)) >= 0.5
    truth = result.source.image(drawn.astype(np.uint8))
    back = result.to_source(result.mask) >= 0.5
    assert back.GetSize() == (512, 512, 22)
    assert differs_only_at_rim(truth, back, [3, 3, 0])
    assert dice(back, truth) > 0.97


@pytest.mark.parametrize("patient", ["patient_1", "patient_2"])
def test_npc_masks_come_onto_another_grid(test_data, tmp_path, patient):
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(test_data / "npc_masks" / patient / "T1.nii.gz"))
    reader.ReadImageInformation()
    # An image of the T1's field of view in fewer pixels is enough to bring the T2's mask onto.
    own = Grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())
    grid = in_plane_grid(own, 4.0)
    image = write(tmp_path / "t1.nii.gz", grid, np.random.default_rng(0).normal(size=grid.shape).astype(np.float32))
    mask = test_data / "npc_masks" / patient / "T2.nii.gz"
    recipe = Recipe().replace({"data.modalities": ("t1",), "data.spacing": 1.0, "data.normalised_scale": 1.0})
    result = preprocess_case(Case(patient, {"t1": image}, mask), recipe.data)
    assert result.notes[0].startswith("mask: ")
    drawn = sitk.ReadImage(str(mask))
    voxels = np.argwhere(sitk.GetArrayViewFromImage(drawn) == 255)
    assert set(np.unique(result.mask)) == {0, 1}
    assert result.mask.sum() * np.prod(result.spacing) == pytest.approx(
        len(voxels) * np.prod(drawn.GetSpacing()), rel=0.05
    )
    np.testing.assert_allclose(
        result.grid.positions(np.argwhere(result.mask).mean(axis=0)[::-1]),
        drawn.TransformContinuousIndexToPhysicalPoint(voxels.mean(axis=0)[::-1].tolist()),
        atol=0.3,
    )


def test_brats_tumour_core(test_data):
    recipe = Recipe().replace({"data.modalities": ("t1",), "data.spacing": 2.0, "data.structures.tumour": (1, 3, 4)})
    case = read_case_folder(test_data / "brats2013_patient", recipe.data)
    result = preprocess_case(case, recipe.data)
    assert result.shape == (155, 120, 120)
    labels = sitk.ReadImage(str(case.mask))
    values = sitk.GetArrayViewFromImage(labels)
    truth = Grid.from_image(labels).image(np.isin(values, (1, 3, 4)).astype(np.uint8))
    back = result.to_source(result.mask) >= 0.5
    assert Grid.from_image(back) == Grid.from_image(labels)
    assert differs_only_at_rim(truth, back, [4, 4, 0])
    assert dice(back, truth) > 0.95
    brain = sitk.GetArrayViewFromImage(sitk.ReadImage(str(case.images["t1"]))) > 0
    expected = [(low + high) / 2 for low, high in bounding_box(brain)]
    np.testing.assert_allclose(np.array(result.centre) * (1, 2, 2), expected, atol=8)
    with pytest.raises(CaseError, match=r"brats2013_patient: .*mask.mha: .*the labels 1, 2, 3, 4$"):
        preprocess_case(case, recipe.replace({"data.structures.tumour": None}).data)


def test_normalised_cubes_are_read_as_they_are(test_data):
    folder = min((test_data / "tumour_core_cubes").iterdir())
    case = read_case_folder(folder, Recipe().data)
    result = preprocess_case(case, Recipe().replace({"data.spacing": None, "data.normalised_scale": 1000.0}).data)
    assert result.shape == (32, 32, 32)
    for modality in MODALITIES:
        raw = sitk.GetArrayFromImage(sitk.ReadImage(str(case.images[modality])))
        np.testing.assert_allclose(result.images[modality], raw / 1000, rtol=1e-6)
    np.testing.assert_array_equal(result.mask, sitk.GetArrayFromImage(sitk.ReadImage(str(case.mask))))
    np.testing.assert_allclose(result.centre, 16, atol=3)


def test_real_z_scores_are_refused(test_data):
    folders = sorted((test_data / "tumour_core_cubes").iterdir())[:20]
    for folder in folders:
        case = read_case_folder(folder, Recipe().data)
        assert "normalised_scale=1000`" in refused(case, Recipe().replace({"data.spacing": None}), case.images["t1"])


@pytest.mark.parametrize(
    ("folder", "modalities"),
    [
        ("lgg_patients", ("t1", "cet1", "flair")),
        ("sts_patients", ("t1", "ct", "pet")),
        ("sts_patients", ("ct",)),
        (".", ("t1", "t2", "cet1")),
    ],
)
def test_real_intensities_are_not_taken_for_z_scores(test_data, folder, modalities):
    recipe = Recipe().replace({"data.modalities": modalities, "data.spacing": 2.0}).data
    patients = ["brats2013_patient"] if folder == "." else sorted(os.listdir(test_data / folder))[:6]
    for patient in patients:
        case = read_case_folder(test_data / folder / patient, recipe)
        notes = preprocess_case(dataclasses.replace(case, mask=None), recipe).notes
        assert not any("z-scores" in note for note in notes)


@pytest.mark.parametrize(("drawn_on", "least"), [("ct", 0.999), ("pet", 0.94)])
def test_masks_drawn_on_ct_and_pet_agree_with_that_on_t1(drawn_on, least, test_data):
    # PET's pixels are 4 to 5.5 times T1's.
    recipe = Recipe().replace(
        {"data.modalities": ("t1", "ct", "pet"), "data.spacing": None, "data.normalised_scale": 1}
    )
    for folder in sorted((test_data / "sts_patients").iterdir()):
        case, masks = read_case_folder(folder, recipe.data), []
        for mask_from in ("t1", drawn_on):
            own = recipe.replace({"data.mask_from": mask_from}).data
            masks.append(read_masks(case, own, preprocess_case(case, own))["tumour"])
        truth, found = masks
        assert 2 * np.count_nonzero(truth & found) / (truth.sum() + found.sum()) >= least, folder.name


def shells(grid):
    """Labels 1, 4 and 2 from the middle of the tumour outwards."""
    away = distance(grid, (5.0, 0.0, 32.0), (7.0, 6.0, 7.0))
    return np.select([away < 0.5, away < 0.8, away < 1.2], [1, 4, 2], 0).astype(np.uint8)


BRATS = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4}


def test_each_structure_is_resampled_and_cut_by_itself(tmp_path):
    mask_grid = make_grid(size=(100, 90, 30), spacing=(0.5, 0.5, 1.5), direction=oblique())
    case = make_case(tmp_path, mask_grid=mask_grid, mask=shells(mask_grid))
    recipe = RAW.replace({"data.structures": BRATS})
    patient = preprocess_case(case, recipe.data, tmp_path / "cache")
    assert list(patient.masks) == ["whole", "core", "enhancing"]
    for name, labels in recipe.data.structures.items():
        # As if the structure's voxels had been the only ones of the mask.
        alone = make_case(
            tmp_path / name, mask_grid=mask_grid, mask=np.isin(shells(mask_grid), labels).astype(np.uint8)
        )
        expected = preprocess_case(alone, RAW.data)
        np.testing.assert_array_equal(patient.masks[name], expected.mask)
        np.testing.assert_array_equal(
            read_masks(case, recipe.data, patient)[name], read_masks(alone, RAW.data, expected)["tumour"]
        )
    np.testing.assert_array_equal(patient.mask, patient.masks["whole"])
    (note,) = patient.notes
    assert re.search(r"whole [\d.]+ ml, now [\d.]+ ml, core [\d.]+ ml, now [\d.]+ ml, enhancing", note)
    # The order of the structures is that of a network's channels, also from the cache.
    other = RAW.replace({"data.structures": dict(reversed(BRATS.items()))})
    assert list(preprocess_case(case, other.data, tmp_path / "cache").masks) == ["enhancing", "core", "whole"]


def test_exclusive_structures_never_share_a_voxel(tmp_path):
    grid = make_grid(size=(100, 90, 30), spacing=(0.5, 0.5, 1.5))
    # The image's voxels lie half-way between the mask's, in the middle column between the two labels.
    mask = tumour(grid) * np.where(np.indices(grid.shape)[2] < 59, 1, 2).astype(np.uint8)
    shifted = make_grid(size=(50, 45, 15), spacing=(1.0, 1.0, 3.0))
    case = make_case(tmp_path, grid=shifted, mask_grid=grid, mask=mask)
    recipe = RAW.replace({"data.structures": {"left": 1, "right": 2}})
    patient = preprocess_case(case, recipe.data)
    assert all(mask.any() for mask in patient.masks.values())
    assert not (patient.masks["left"] & patient.masks["right"]).any()
    # Regions may share them.
    shared = preprocess_case(case, RAW.replace({"data.structures": {"left": (1, 3), "right": (2, 3)}}).data)
    assert (shared.masks["left"] & shared.masks["right"]).any()


def test_a_patient_may_lack_one_structure_of_several(tmp_path):
    case = make_case(tmp_path)
    recipe = RAW.replace({"data.structures": {"gtv": 1, "node": 2}})
    patient = preprocess_case(case, recipe.data)
    assert (patient.masks["gtv"].any(), patient.masks["node"].any()) == (True, False)
    assert "mask: without node" in patient.notes
    message = refused(case, RAW.replace({"data.structures": {"gtv": 3, "node": 2}}), case.mask)
    assert "must have a voxel with one of the labels 2, 3, unless" in message
    # A few voxels may be lost on a coarser grid, a structure outside of the field of view may not.
    grid = make_grid(size=(120, 100, 16), spacing=(0.4, 0.4, 2.0))
    speck = tumour(grid)
    speck[8, 50, 20] = 2
    lost = preprocess_case(make_case(tmp_path / "speck", mask_grid=grid, mask=speck), recipe.data)
    assert any(re.match(r"mask: without node \(0.00032 ml, too small for the grid\)", note) for note in lost.notes)
    grid = make_grid(size=(200, 50, 8))
    far = tumour(grid)
    far[2:6, 20:30, :20] = 2
    case = make_case(tmp_path / "far", mask_grid=grid, mask=far)
    assert re.search(r"must lie within t1 .* ml of node, of which 0 ml are left", refused(case, recipe, case.mask))


def test_a_file_for_each_structure(tmp_path):
    grid = make_grid()
    whole = make_case(tmp_path / "labels", mask=shells(grid))
    labels = RAW.replace({"data.structures": BRATS})
    case = make_case(tmp_path / "bob")
    for name, values in labels.data.structures.items():
        write(tmp_path / "bob" / f"{name}_mask.nii.gz", grid, 255 * np.isin(shells(grid), values).astype(np.uint8))
    (tmp_path / "bob" / "mask.nii.gz").unlink()
    recipe = RAW.replace({"data.structures": {name: f"{name}_mask" for name in BRATS}})
    assert not recipe.data.exclusive
    case = read_case_folder(tmp_path / "bob", recipe.data)
    patient, expected = preprocess_case(case, recipe.data, tmp_path / "cache"), preprocess_case(whole, labels.data)
    for name in BRATS:
        np.testing.assert_array_equal(patient.masks[name], expected.masks[name])
    row = survey_case(case, recipe.data, deep=True)
    assert (row.problems, row.tumour_ml) == ((), patient.tumour_ml)
    with pytest.raises(CaseError, match="must be a file for each of the structures whole, core, enhancing"):
        preprocess_case(whole, recipe.data)
    (tmp_path / "bob" / "core_mask.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"core_mask: is missing"):
        read_case_folder(tmp_path / "bob", recipe.data)
    able = recipe.replace({"data.allow_empty": True})
    lacking = preprocess_case(read_case_folder(tmp_path / "bob", able.data), able.data)
    assert not lacking.masks["core"].any()
    assert "mask: without core" in lacking.notes
    # Drawn on several sequences.
    for name in BRATS:
        for modality in ("t1", "t2"):
            write(tmp_path / "eve" / f"{name}_mask_{modality}.nii.gz", grid, (shells(grid) > 0).astype(np.uint8))
    make_case(tmp_path / "eve")
    drawn = read_case_folder(tmp_path / "eve", recipe.data).mask
    assert {modality: list(files.files) for modality, files in drawn.items()} == {"t1": [*BRATS], "t2": [*BRATS]}
