"""Positions, units and right angles in image headers; damaged files are tested in test_layouts and test_fuzz."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import change_series, write_series
from patients import make_case, make_grid, only, tumour

from keras_mmfnet.data import find_cases
from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import Volume, position_problems, read_grid, read_image, write_image
from keras_mmfnet.data.preprocess import preprocess_case
from keras_mmfnet.data.survey import survey_case
from keras_mmfnet.recipe import Recipe

RAW = Recipe().replace({"data.spacing": None}).data
ROTATED = sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3).GetMatrix()
GRID = make_grid((30, 24, 10), (0.8, 0.7, 4.0), ROTATED)
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def affine(grid):
    """The 4x4 matrix of a grid in NIfTI's coordinates."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = grid.axes, grid.origin
    return TO_RAS @ matrix


def save(path, matrix, array=None, sform=1, qform=1, **header):
    """Writes a NIfTI file by nibabel."""
    array = np.random.default_rng(0).integers(0, 1000, GRID.size).astype(np.int16) if array is None else array
    image = nibabel.Nifti1Image(array, matrix)
    image.set_sform(matrix if sform else None, sform)
    if isinstance(qform, int):
        image.set_qform(matrix if qform else None, qform)
    else:
        image.set_qform(qform, 1)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def refused(path):
    with pytest.raises(CaseError, match=r"^ann: .*Received: ") as caught:
        read_image(path, "ann")
    with pytest.raises(CaseError):
        read_grid(path, "ann")
    return str(caught.value)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("order", "<>")
def test_nifti_is_read_as_nibabel_reads_it(order, dtype, kind, tmp_path):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 100, (*GRID.size, 3)).astype(dtype)
    image = kind(array, affine(GRID), kind.header_class(endianness=order))
    image.header.set_data_dtype(dtype)
    if dtype == np.int16:
        image.header.set_slope_inter(1.5, -3)
    nibabel.save(image, tmp_path / "t1.nii.gz")
    expected = nibabel.load(tmp_path / "t1.nii.gz").get_fdata()
    found = read_image(Volume(tmp_path / "t1.nii.gz", 2), "ann")
    np.testing.assert_allclose(sitk.GetArrayFromImage(found).T, expected[..., 2], rtol=1e-6)
    np.testing.assert_allclose(affine(Grid.from_image(found)), image.affine, atol=1e-4)


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (2, 1), (0, 0)])
def test_the_position_is_nibabels(sform, qform, tmp_path):
    moved = affine(GRID)
    moved[:3, 3] += (3, 4, 12)
    path = save(tmp_path / "t1.nii", affine(GRID), sform=sform, qform=moved if qform else 0)
    np.testing.assert_allclose(affine(read_grid(path, "ann")), nibabel.load(path).affine, atol=1e-4)
    problem = "sform and qform differ by 13 mm" if sform and qform else ""
    assert position_problems(path, "ann") == (bool(sform or qform), problem)


def test_positions_that_differ_are_noted_with_the_distance(tmp_path):
    case = make_case(tmp_path, suffix=".nii")
    image = nibabel.load(case.images["t2"])
    moved = image.affine.copy()
    moved[:3, 3] += (3, 4, 12)
    image.set_sform(image.affine, 2)
    image.set_qform(moved, 1)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata().astype(np.int16), None, image.header), case.images["t2"])
    note = f"t2: sform and qform differ by 13 mm in {case.images['t2']}; the sform counts, as in nibabel, "
    note += "but not in all programs"
    assert note in preprocess_case(case, RAW).notes
    assert note in survey_case(case, RAW).notes


@pytest.mark.parametrize("qform", [0, 1])
@pytest.mark.parametrize(
    ("steps", "differs"),
    [((0.8, 0.7, 5.0), True), ((0.81, 0.7, 4.0), True), ((0.8008, 0.7, 4.0), False), ((0.0, 0.0, 0.0), True)],
)
def test_a_voxel_size_that_differs_from_the_sforms_is_noted(steps, differs, qform, tmp_path):
    """Programs built on ITK take it: SimpleITK sees another image than nibabel, which is what is read here."""
    path = save(tmp_path / "t1.nii", affine(GRID), qform=qform)
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, 80, *steps)
    path.write_bytes(content)
    assert read_grid(path, "ann").matches(GRID)
    what = "qform" if qform else "pixdim"
    assert position_problems(path, "ann")[1].startswith(f"sform and {what} differ by " if differs else "")
    assert bool(position_problems(path, "ann")[1]) == differs
    case = Case("ann", {"t1": path})
    notes = survey_case(case, RAW.model_copy(update={"modalities": ("t1",)})).notes
    assert any(f"in {path}; the sform counts" in note for note in notes) == differs


def test_a_position_that_only_some_have_is_refused(tmp_path):
    case = make_case(tmp_path, suffix=".nii")
    image = nibabel.load(case.mask)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata().astype(np.int16), None, image.header), case.mask)
    with pytest.raises(
        CaseError, match=r"must have a position in their headers.*Received: mask \(.*mask.nii\) without"
    ):
        preprocess_case(case, RAW)
    assert "Received: mask" in survey_case(case, RAW).problems[0]


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.01])
def test_axes_nearly_at_right_angles_are_straightened(share, suffix, tmp_path):
    """No voxel moves further than half a mm."""
    sheared = GRID.axes.copy()
    sheared[:, 1] += share * sheared[:, 0]
    if suffix == ".nii":
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = sheared, GRID.origin
        path = save(tmp_path / "t1.nii", TO_RAS @ matrix, qform=0)
    else:
        image = GRID.image(np.arange(7200, dtype=np.int16).reshape(GRID.shape))
        image.SetDirection((sheared / np.linalg.norm(sheared, axis=0)).ravel())
        sitk.WriteImage(image, str(path := tmp_path / f"t1{suffix}"))
    for grid in (read_grid(path, "ann"), Grid.from_image(read_image(path, "ann"))):
        direction = np.reshape(grid.direction, (3, 3))
        np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-5)
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in GRID.size]), -1).reshape(-1, 3)
        off = np.linalg.norm(grid.positions(corners) - corners @ sheared.T - GRID.origin, axis=1)
        assert off.max() < 0.5


@pytest.mark.parametrize("suffix", [".nii", ".nrrd"])
def test_sheared_axes_are_refused_as_that(suffix, tmp_path):
    sheared = GRID.axes.copy()
    sheared[:, 2] += 0.1 * sheared[:, 1] * 4 / 0.7
    if suffix == ".nii":
        matrix = np.eye(4)
        matrix[:3, :3] = sheared
        path = save(tmp_path / "t1.nii", matrix, qform=0)
    else:
        image = GRID.image(np.zeros(GRID.shape, np.int16))
        image.SetDirection((sheared / np.linalg.norm(sheared, axis=0)).ravel())
        sitk.WriteImage(image, str(path := tmp_path / f"t1{suffix}"))
    assert "must be an image of axes at right angles, to within 0.5 mm" in refused(path)


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000), (2, 1), (3, 0.001), (0, 1)])
def test_units(unit, factor, tmp_path):
    """In the header's unit the image is 24 x 16.8 x 40 mm."""
    matrix = affine(GRID)
    matrix[:3] /= factor
    path = save(tmp_path / "t1.nii", matrix, xyzt_units=unit)
    found = read_grid(path, "ann")
    np.testing.assert_allclose(found.spacing, GRID.spacing, rtol=1e-5)
    np.testing.assert_allclose(found.origin, GRID.origin, rtol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(("unit", "extent"), [(1, "24000.0 x 16800.0 x 40000.0"), (3, "0.024 x 0.017 x 0.04")])
def test_a_unit_that_cannot_be(unit, extent, suffix, tmp_path):
    path = save(tmp_path / f"t1{suffix}", affine(GRID), xyzt_units=unit)
    assert f"an image of 1 to 3000 mm, as the unit of its header says. Received: {extent} mm" in refused(path)


def test_a_field_of_view_is_bounded_in_other_formats(tmp_path):
    image = GRID.image(np.zeros(GRID.shape, np.int16))
    image.SetSpacing((1e6, 1.0, 1.0))
    sitk.WriteImage(image, str(tmp_path / "t1.mha"))
    assert "an image of 1 to 3000 mm" in refused(tmp_path / "t1.mha")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_matrix_that_is_none(value, tmp_path):
    content = bytearray(save(tmp_path / "t1.nii", affine(GRID)).read_bytes())
    struct.pack_into("<4f", content, 280, *[value] * 4)
    struct.pack_into("<4f", content, 296, *[value] * 4)
    (tmp_path / "t1.nii").write_bytes(content)
    refused(tmp_path / "t1.nii")


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_slope_that_is_none_counts_as_1(value, tmp_path):
    path = save(tmp_path / "t1.nii", affine(GRID))
    expected = sitk.GetArrayFromImage(read_image(path, "ann"))
    content = bytearray(path.read_bytes())
    struct.pack_into("<2f", content, 112, value, value)
    path.write_bytes(content)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path, "ann")), expected)


def test_sizes_that_the_file_cannot_hold_take_no_memory(tmp_path):
    content = bytearray(save(tmp_path / "t1.nii", affine(GRID)).read_bytes())
    struct.pack_into("<3h", content, 42, 30000, 30000, 30000)
    (tmp_path / "t1.nii.gz").write_bytes(gzip.compress(content))
    assert "must be a whole file. Received: 30000 x 30000 x 30000 voxels in" in refused(tmp_path / "t1.nii.gz")


@pytest.mark.parametrize("code", [128, 32, 1536, 1])
def test_a_data_type_that_is_not_read(code, tmp_path):
    path = save(tmp_path / "t1.nii", affine(GRID))
    content = bytearray(path.read_bytes())
    struct.pack_into("<h", content, 70, code)
    path.write_bytes(content)
    assert f"one number per voxel. Received: the NIfTI data type {code}" in refused(path)


def test_a_mask_as_slicer_calls_it_is_found(tmp_path):
    case = make_case(tmp_path / "cohort" / "ann", suffix=".nrrd")
    case.mask.rename(case.mask.with_name("mask.seg.nrrd"))
    [found] = find_cases(tmp_path / "cohort", Recipe().data)
    assert found.mask.name == "mask.seg.nrrd"
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(found.mask, "ann")), tumour(make_grid()))
    write_image(read_image(found.mask, "ann"), tmp_path / "other.seg.nrrd")


@pytest.mark.parametrize("suffix", ["mha", "nrrd", "mhd", "nhdr"])
def test_damaged_compressed_voxels_are_refused(suffix, tmp_path):
    """SimpleITK fills what is missing with zeros."""
    path = tmp_path / f"image.{suffix}"
    array = np.random.default_rng(0).integers(0, 9, (10, 24, 30), np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path), True)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path, "ann")), array)
    file = max(tmp_path.iterdir(), key=lambda one: one.stat().st_size)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2].ljust(len(whole), b"\0"), whole[:-300] + bytes(20) + whole[-280:]):
        file.write_bytes(damaged)
        with pytest.raises(CaseError, match=r"^ann: .*Received: compressed voxels that"):
            read_image(path, "ann")


@pytest.mark.parametrize("suffix", ["mha", "nrrd", "nii.gz"])
def test_headers_without_a_position(suffix, tmp_path):
    image, path = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.int16)), tmp_path / f"t1.{suffix}"
    image.SetOrigin((1, 2, 3))
    sitk.WriteImage(image, str(path))
    assert position_problems(path, "ann")[0]
    if suffix == "nii.gz":
        save(path, affine(GRID), sform=0, qform=0)
    else:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(line for line in lines if not line.startswith((b"Offset", b"space origin"))))
        assert len(lines) > len(path.read_bytes().splitlines())
    assert not position_problems(path, "ann")[0]


def test_images_without_a_position_must_be_alike(tmp_path):
    for name, size in (("t1", (30, 24, 10)), ("t2", (30, 24, 5))):
        array = np.random.default_rng(0).integers(0, 1000, size).astype(np.int16)
        save(tmp_path / f"{name}.nii.gz", affine(GRID), array, sform=0, qform=0)
    case = Case("ann", {name: tmp_path / f"{name}.nii.gz" for name in ("t1", "t2")}, None)
    with pytest.raises(
        CaseError, match=r"the same size and spacing. Received: t1 of 30 x 24 x 10 .*; t2 of 30 x 24 x 5"
    ):
        preprocess_case(case, RAW.model_copy(update={"modalities": ("t1", "t2")}))


def test_voxels_of_a_nifti_file_come_after_its_header(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, GRID.size).astype(np.int16)
    path = save(tmp_path / "t1.nii", affine(GRID), array)
    content = bytearray(path.read_bytes())
    content[108:112] = struct.pack("<f", 0.0)
    path.write_bytes(content)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path, "ann")), array.T)


@pytest.mark.parametrize("align", ["header", "rigid"])
def test_another_frame_of_reference_is_noted(align, tmp_path):
    for name in ("T1", "T2"):
        array = np.random.default_rng(0).integers(0, 1000, (5, 12, 16)) + np.arange(16) * 50
        write_series(tmp_path / "ann" / name, description=name, array=array)
    other = "1.2.826.0.1.3680043.2.1125.99"
    change_series(tmp_path / "ann" / "T2", lambda image, _: setattr(image, "FrameOfReferenceUID", other))
    recipe = RAW.model_copy(update={"modalities": ("t1", "t2"), "align": align})
    [case] = find_cases(tmp_path, recipe, require_mask=False)
    notes = [note for note in survey_case(case, recipe).notes if "frame of reference" in note]
    note = "t2: in another frame of reference than t1, so positions may not fit"
    assert notes == ([f"{note}; register the images with data.align=rigid"] if align == "header" else [])
    if align == "header":
        assert notes[0] in preprocess_case(case, recipe).notes


def test_what_simpleitk_raises_is_an_error_of_the_patient(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Exception thrown in SimpleITK\nITK ERROR: no memory")

    monkeypatch.setattr("keras_mmfnet.data.preprocess.resample", fail)
    case = only(make_case(tmp_path), "t1")
    with pytest.raises(CaseError, match=r"^ann: .*Received: ITK ERROR: no memory"):
        preprocess_case(Case("ann", case.images), RAW.model_copy(update={"modalities": ("t1",)}))
