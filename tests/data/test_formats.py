import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.formats import IMAGE_SUFFIXES, find_cases, read_case_folder, read_image
from keras_mmfnet.recipe import Recipe

RECIPE = Recipe()
FILES = ("t1.nii.gz", "t2.nii.gz", "cet1.nii.gz", "mask.nii.gz")


def make_patient(folder, files=FILES):
    """A patient's folder of empty files: nothing here may read them."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
    return folder


def make_image(seed=0, shape=(4, 12, 16), dtype=np.int16):
    image = sitk.GetImageFromArray((np.random.default_rng(seed).random(shape) * 1000).astype(dtype))
    image.SetSpacing([0.5, 0.7, 4.0, 1.0][: len(shape)])
    return image


def write(path, image, compress=False):
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


def refused(path):
    """The message of the error that names the patient first and then the file."""
    with pytest.raises(CaseError) as caught:
        read_image(path, "ann", sitk.sitkFloat32)
    message = str(caught.value)
    assert message.startswith(f"ann: {path}: ")
    assert "Received: " in message
    return message


# --- finding the files


def test_finds_patients_sorted_and_passes_over_the_rest(tmp_path):
    make_patient(tmp_path / "b", ("t1.nii", "t2.MHA", "cet1.nrrd", "mask.mhd", "mask.raw", "t1.json", "t1_old.nii"))
    make_patient(tmp_path / "a")
    make_patient(tmp_path / ".hidden", ())
    (tmp_path / "notes.txt").touch()
    (tmp_path / "a" / "._t1.nii.gz").touch()
    (tmp_path / "a" / ".t2.nii.gz").touch()
    cases = find_cases(tmp_path, RECIPE)
    assert [case.name for case in cases] == ["a", "b"]
    assert {m: path.name for m, path in cases[1].images.items()} == {
        "t1": "t1.nii",
        "t2": "t2.MHA",
        "cet1": "cet1.nrrd",
    }
    assert cases[1].mask == tmp_path / "b" / "mask.mhd"


def test_names_come_from_the_recipe(tmp_path):
    make_patient(tmp_path / "a", ("T1.5.nii.gz", "flair.nii.gz", "seg.nii.gz"))
    recipe = Recipe(modalities=("T1.5", "flair"), mask="seg")
    (case,) = find_cases(str(tmp_path), recipe)
    assert list(case.images) == ["T1.5", "flair"]
    assert case.mask.name == "seg.nii.gz"


def test_a_mask_may_be_left_out(tmp_path):
    folder = make_patient(tmp_path / "a", FILES[:3])
    assert find_cases(tmp_path, RECIPE, require_mask=False)[0].mask is None
    assert read_case_folder(folder, RECIPE, require_mask=False).name == "a"
    with pytest.raises(CaseError, match=r"^a: .*mask: is missing; .*Received: cet1.nii.gz, t1.nii.gz, t2.nii.gz$"):
        find_cases(tmp_path, RECIPE)


def test_a_missing_or_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist. Received: .*nowhere"):
        find_cases(tmp_path / "nowhere", RECIPE)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file. Received: .*file"):
        find_cases(tmp_path / "file", RECIPE)
    with pytest.raises(ValueError, match=r"one folder per patient with the files t1, t2, cet1, mask .*Received: "):
        find_cases(tmp_path, RECIPE)


def test_a_patients_own_folder_is_not_a_directory_of_patients(tmp_path):
    folder = make_patient(tmp_path / "a")
    with pytest.raises(ValueError, match="one folder per patient"):
        find_cases(folder, RECIPE)


def test_a_missing_modality_names_patient_and_file(tmp_path):
    make_patient(tmp_path / "a", ("t1.nii.gz", "cet1.nii.gz", "mask.nii.gz", "T2.nii.gz", "t2.img"))
    with pytest.raises(CaseError, match=r"^a: .*t2: is missing; .*\.nii\.gz.*Received: T2.nii.gz, .*t2.img$"):
        find_cases(tmp_path, RECIPE)


def test_an_empty_patient_folder_is_refused(tmp_path):
    make_patient(tmp_path / "a", ())
    with pytest.raises(CaseError, match=r"^a: .*t1: is missing; .*Received: an empty folder$"):
        find_cases(tmp_path, RECIPE)


def test_two_files_for_one_modality_are_refused(tmp_path):
    make_patient(tmp_path / "a", (*FILES, "t1.mha"))
    with pytest.raises(CaseError, match=r"^a: .*t1: must be one file. Received: t1.mha, t1.nii.gz$"):
        find_cases(tmp_path, RECIPE)


def test_bad_patients_can_be_left_out(tmp_path):
    make_patient(tmp_path / "a", FILES[1:])
    make_patient(tmp_path / "b")
    errors = []
    assert [case.name for case in find_cases(tmp_path, RECIPE, on_error=errors.append)] == ["b"]
    assert [str(error)[:3] for error in errors] == ["a: "]
    (tmp_path / "b" / "t1.nii.gz").unlink()
    with pytest.raises(ValueError, match="with 2 folders and no such patient"):
        find_cases(tmp_path, RECIPE, on_error=errors.append)


def test_a_missing_patient_folder_is_refused(tmp_path):
    with pytest.raises(CaseError, match=r"^nobody: .*Received: .*nobody$"):
        read_case_folder(tmp_path / "nobody", RECIPE)


# --- reading a file


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_reads_every_format(tmp_path, suffix):
    image = make_image()
    image.SetOrigin((3.0, -4.0, 5.0))
    image.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))
    back = read_image(write(tmp_path / f"t1{suffix}", image), "ann", sitk.sitkFloat32)
    assert back.GetPixelID() == sitk.sitkFloat32
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(back.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-6)


def test_keeps_the_files_pixel_type(tmp_path):
    assert read_image(write(tmp_path / "mask.nii.gz", make_image(dtype=np.uint8)), "ann").GetPixelID() == sitk.sitkUInt8


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_one_volume_of_four_dimensions_is_that_volume(tmp_path, suffix):
    image = make_image()
    image.SetOrigin((3.0, -4.0, 5.0))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    back = read_image(write(tmp_path / f"t1{suffix}", sitk.JoinSeries([image])), "ann")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), rtol=1e-6)
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-6)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_other_dimensions_are_refused(tmp_path, suffix):
    series = sitk.JoinSeries([make_image(), make_image(1)])
    assert "a 3D image. Received: an image of 16 x 12 x 4 x 2 voxels" in refused(
        write(tmp_path / f"t1{suffix}", series)
    )
    flat = make_image(shape=(12, 16))
    assert "a 3D image. Received: an image of 16 x 12 voxels" in refused(write(tmp_path / f"t2{suffix}", flat))


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha"])
def test_several_numbers_per_voxel_are_refused(tmp_path, suffix):
    vectors = sitk.Compose(make_image(), make_image(1))
    assert "one number per voxel. Received: 2 numbers" in refused(write(tmp_path / f"t1{suffix}", vectors))
    part = sitk.Cast(make_image(), sitk.sitkFloat32)
    numbers = sitk.RealAndImaginaryToComplex(part, part)
    assert "one number per voxel" in refused(write(tmp_path / f"t2{suffix}", numbers))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".nrrd"])
@pytest.mark.parametrize("compress", [False, True])
def test_a_truncated_file_is_refused(tmp_path, suffix, compress, share):
    path = write(tmp_path / f"t1{suffix}", make_image(shape=(6, 40, 50)), compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path)


def test_a_truncated_volume_in_a_whole_gzip_file_is_refused(tmp_path):
    content = write(tmp_path / "t1.nii", make_image()).read_bytes()
    path = tmp_path / "t1.nii.gz"
    path.write_bytes(gzip.compress(content[:-100]))
    assert "a whole file. Received: a truncated file, 100 bytes too short" in refused(path)
    path.write_bytes(gzip.compress(content + bytes(100)))
    read_image(path, "ann")


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = write(tmp_path / "t1.nii.gz", make_image(shape=(10, 250, 250)))
    content = path.read_bytes()
    assert len(content) > 600000
    for damaged in (content[:-1], content[:600000] + b"damage" + content[600006:]):
        path.write_bytes(damaged)
        assert "undamaged file. Received: a file that breaks off or is damaged" in refused(path)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "t1.nii.gz").write_bytes(b"not an image" * 100)
    assert "an undamaged image file" in refused(tmp_path / "t1.nii.gz")
    assert "an undamaged image file" in refused(tmp_path / "gone.mha")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("step", [0.0, -0.5, np.nan, np.inf])
def test_a_nifti_spacing_that_is_not_positive_is_refused(tmp_path, step, order):
    content = bytearray(write(tmp_path / "t1.nii", make_image()).read_bytes())
    if order == ">":
        content = swap_nifti_bytes(content)
    path = tmp_path / "t2.nii"
    path.write_bytes(content)
    assert read_image(path, "ann").GetSize() == (16, 12, 4)
    struct.pack_into(f"{order}f", content, 88, step)
    path.write_bytes(content)
    assert f"a positive spacing. Received: 0.5, 0.7, {step:g} mm" in refused(path)


def swap_nifti_bytes(content):
    """The same NIfTI-1 file of 16-bit integers with the other byte order; numpy leaves fields of bytes as they are."""
    header = np.dtype("i4,V28,i4,i2,V2,8i2,3f4,4i2,8f4,3f4,i2,V2,4f4,2i4,V104,2i2,18f4,V20")
    assert header.itemsize == 348
    swapped = np.frombuffer(bytes(content[:348]), header).byteswap().tobytes()
    return bytearray(swapped + content[348:352] + np.frombuffer(content[352:], "<i2").byteswap().tobytes())


@pytest.mark.parametrize("step", ["0", "-0.5"])
def test_another_spacing_that_is_not_positive_is_refused(tmp_path, step):
    path = write(tmp_path / "t1.mha", make_image())
    path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 0.5 ", f"ElementSpacing = {step} ".encode()))
    assert f"a positive spacing. Received: {step}, 0.7, 4 mm" in refused(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nan_and_infinity_are_refused(tmp_path, value, suffix, dtype):
    values = np.random.default_rng(0).random((4, 12, 16)).astype(dtype)
    values[1, 2, 3:5] = value
    path = write(tmp_path / f"t1{suffix}", sitk.GetImageFromArray(values))
    assert "finite numbers. Received: 2 voxels with NaN or infinity" in refused(path)
