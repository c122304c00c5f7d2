import gzip
import hashlib
import json
import os
import re
import shutil
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import change_series, write_series

from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import IMAGE_SUFFIXES, Volume, read_grid, read_image, write_image
from keras_mmfnet.data.layouts import find_cases, find_patients, read_case_folder
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
    cases = find_cases(tmp_path, RECIPE.data)
    assert [case.name for case in cases] == ["a", "b"]
    assert {m: path.name for m, path in cases[1].images.items()} == {
        "t1": "t1.nii",
        "t2": "t2.MHA",
        "cet1": "cet1.nrrd",
    }
    assert cases[1].mask == tmp_path / "b" / "mask.mhd"


def test_names_come_from_the_recipe(tmp_path):
    make_patient(tmp_path / "a", ("T1-5.nii.gz", "flair.nii.gz", "seg.nii.gz"))
    recipe = Recipe().replace({"data.modalities": ("T1-5", "flair"), "data.mask": "seg"})
    (case,) = find_cases(str(tmp_path), recipe.data)
    assert list(case.images) == ["T1-5", "flair"]
    assert case.mask.name == "seg.nii.gz"


def test_a_mask_may_be_left_out(tmp_path):
    folder = make_patient(tmp_path / "a", FILES[:3])
    assert find_cases(tmp_path, RECIPE.data, require_mask=False)[0].mask is None
    assert read_case_folder(folder, RECIPE.data, require_mask=False).name == "a"
    with pytest.raises(CaseError, match=r"^a: .*mask: is missing; .*Received: cet1.nii.gz, t1.nii.gz, t2.nii.gz$"):
        find_cases(tmp_path, RECIPE.data)


def test_a_missing_or_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not exist. Received: .*nowhere"):
        find_cases(tmp_path / "nowhere", RECIPE.data)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"is a file. Received: .*file"):
        find_cases(tmp_path / "file", RECIPE.data)
    with pytest.raises(ValueError, match=r"one folder per patient with the files t1, t2, cet1, mask .*Received: "):
        find_cases(tmp_path, RECIPE.data)


def test_a_patients_own_folder_is_not_a_directory_of_patients(tmp_path):
    folder = make_patient(tmp_path / "a")
    with pytest.raises(ValueError, match="one folder per patient"):
        find_cases(folder, RECIPE.data)


def test_a_missing_modality_names_patient_and_file(tmp_path):
    make_patient(tmp_path / "a", ("t1.nii.gz", "cet1.nii.gz", "mask.nii.gz", "T2.nii.gz", "t2.img"))
    with pytest.raises(CaseError, match=r"^a: .*t2: is missing; .*\.nii\.gz.*Received: T2.nii.gz, .*t2.img$"):
        find_cases(tmp_path, RECIPE.data)
    (tmp_path / "a" / "T2.nii.gz").unlink()
    expected = r"t2: is missing; .*endings \.nii, \.nii\.gz.* patients may lack it with `data.allow_missing`, .*. Rec"
    with pytest.raises(CaseError, match=expected):
        find_cases(tmp_path, RECIPE.data)
    able = RECIPE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3}).data
    [case] = find_cases(tmp_path, able)
    assert list(case.images) == ["t1", "cet1"]
    # A file that is only misspelt is not missing.
    (tmp_path / "a" / "t2w.nii.gz").touch()
    with pytest.raises(CaseError, match=r"^a: .*t2: is missing; did you mean t2w.nii.gz for t2\?"):
        find_cases(tmp_path, able)


@pytest.mark.parametrize(
    ("modality", "name"),
    [
        *[("cet1", name) for name in ("t1c", "t1ce", "t1gd", "T1_CE", "t1_km", "a_T1Gd", "CE-T1WI", "CET1")],
        *[("t1", name) for name in ("T1", "t1w", "a-T1WI")],
        ("t2", "a_T2w"),
        ("t1c", "cet1"),
        ("pet", "PET_ac"),
    ],
)
def test_a_missing_modality_suggests_the_file_whose_name_is_near(modality, name, tmp_path):
    others = ("t1", "t2") if modality not in ("t1", "t2") else ("cet1",)
    files = [f"{one}.nii.gz" for one in (*others, "flair", name, "mask_t1", "ROI-CE-T1", "t2_seg")]
    make_patient(tmp_path / "a", files)
    data = RECIPE.replace({"data.modalities": (*others, modality)}).data
    with pytest.raises(CaseError, match=rf"did you mean {name}.nii.gz for {modality}\? Rename it, .*`data.modalities`"):
        find_patients(tmp_path, data)


def test_a_missing_mask_suggests_the_file_whose_name_is_near(tmp_path):
    make_patient(tmp_path / "a", (*FILES[:3], "Seg.nii.gz"))
    with pytest.raises(CaseError, match=r"did you mean Seg.nii.gz for mask\? Rename it, or say in `data.mask`"):
        find_cases(tmp_path, RECIPE.data)


def test_an_empty_patient_folder_is_refused(tmp_path):
    make_patient(tmp_path / "a", ())
    with pytest.raises(CaseError, match=r"^a: .*t1: is missing; .*Received: an empty folder$"):
        find_cases(tmp_path, RECIPE.data)


def test_two_files_for_one_modality_are_refused(tmp_path):
    make_patient(tmp_path / "a", (*FILES, "t1.mha"))
    with pytest.raises(CaseError, match=r"^a: .*t1: must be one file. Received: t1.mha, t1.nii.gz$"):
        find_cases(tmp_path, RECIPE.data)


def test_bad_patients_can_be_left_out(tmp_path):
    make_patient(tmp_path / "a", FILES[1:])
    make_patient(tmp_path / "b")
    errors = []
    assert [case.name for case in find_cases(tmp_path, RECIPE.data, on_error=errors.append)] == ["b"]
    assert [str(error)[:3] for error in errors] == ["a: "]
    (tmp_path / "b" / "t1.nii.gz").unlink()
    with pytest.raises(CaseError, match="2 of 2 patients cannot be used:\n  a: "):
        find_cases(tmp_path, RECIPE.data, on_error=errors.append)


def test_all_bad_patients_are_listed_at_once(tmp_path):
    for number in range(25):
        make_patient(tmp_path / f"p{number:02d}", FILES if number == 3 else FILES[1:])
    for find in (find_cases, find_patients):
        with pytest.raises(CaseError, match=r"^24 of 25 patients cannot be used; --skip-bad") as caught:
            find(tmp_path, RECIPE.data)
        _, line = str(caught.value).splitlines()
        assert line.startswith("  p00: ")
        assert "t1: is missing" in line
        assert line.endswith(" (likewise for 23 others: p01, p02, p04, p05, p06, ...)")
        errors = []
        assert [case.name for case in find(tmp_path, RECIPE.data, on_error=errors.append)] == ["p03"]
        assert len(errors) == 24


@pytest.mark.parametrize("find", [find_cases, find_patients])
def test_a_folder_above_the_patients_is_refused_with_the_one_that_is_meant(find, tmp_path):
    make_patient(tmp_path / "hospital" / "a")
    make_patient(tmp_path / "hospital" / "b")
    with pytest.raises(ValueError, match=r"one folder deeper: did you mean .*hospital. Received: "):
        find(tmp_path, RECIPE.data)
    make_dataset(tmp_path / "hospital", {}, {}, [])
    with pytest.raises(ValueError, match=r"one folder deeper: did you mean .*hospital. Received: "):
        find(tmp_path, RECIPE.data)


def test_a_folder_below_the_patients_is_refused_with_the_one_that_is_meant(tmp_path):
    make_patient(tmp_path / "plain" / "a")
    for description in ("T1", "T2", "T1 Gd"):
        write_series(tmp_path / "dicom" / "a" / description, description=description)
    for layout in ("plain", "dicom"):
        with pytest.raises(ValueError, match=rf"did you mean the parent folder .*{layout}. Received: "):
            find_cases(tmp_path / layout / "a", RECIPE.data)
    (tmp_path / "imagesTr").mkdir()
    make_dataset(tmp_path, {}, {}, [])
    with pytest.raises(ValueError, match=rf"did you mean the dataset {tmp_path}. Received: "):
        find_cases(tmp_path / "imagesTr", RECIPE.data)


def test_a_missing_patient_folder_is_refused(tmp_path):
    with pytest.raises(CaseError, match=r"^nobody: .*Received: .*nobody$"):
        read_case_folder(tmp_path / "nobody", RECIPE.data)


# --- other layouts


@pytest.mark.parametrize(
    ("endings", "mask"), [(("_t1", "_t2", "_t1ce"), "_seg"), (("-t1n", "-t2w", "-t1c"), "-seg")], ids=["2020", "2023"]
)
def test_brats(endings, mask, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("BraTS-1", "BraTS-2"):
        make_patient(tmp_path / name, [f"{name}{ending}.nii.gz" for ending in (*endings, mask, "_flair", "-t2f")])
    cases = find_cases(tmp_path, RECIPE.data)
    assert [case.name for case in cases] == ["BraTS-1", "BraTS-2"]
    assert [path.name for path in cases[0].images.values()] == [f"BraTS-1{ending}.nii.gz" for ending in endings]
    assert cases[0].mask.name == f"BraTS-1{mask}.nii.gz"
    assert caplog.messages == ["BraTS: 2 patients"]


def test_a_mask_of_each_modality(tmp_path):
    make_patient(tmp_path / "a", (*FILES[:3], "mask_t1.nii.gz", "t2_mask.nii.gz"))
    [case] = find_cases(tmp_path, RECIPE.data)
    assert {modality: path.name for modality, path in case.mask.items()} == {
        "t1": "mask_t1.nii.gz",
        "t2": "t2_mask.nii.gz",
    }


def make_dataset(folder, described, images, labels):
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(described))
    for name, image in images.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, image)
    for name in labels:
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, make_image(dtype=np.uint8))


def test_nnunet(tmp_path, caplog):
    caplog.set_level("INFO")
    described = {"channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1Gd", "3": "T2w"}, "labels": {}}
    images = {f"imagesTr/{name}_{n:04d}.nii.gz": make_image(n) for name in ("x_01", "x_02") for n in range(4)}
    images |= {f"imagesTs/x_03_{n:04d}.nii.gz": make_image(n) for n in range(4)}
    make_dataset(tmp_path, described, images, ["labelsTr/x_01.nii.gz", "labelsTr/x_02.nii.gz"])
    cases = find_cases(tmp_path, RECIPE.data)
    assert [case.name for case in cases] == ["x_01", "x_02"]
    assert {modality: path.name for modality, path in cases[1].images.items()} == {
        "t1": "x_02_0001.nii.gz",
        "t2": "x_02_0003.nii.gz",
        "cet1": "x_02_0002.nii.gz",
    }
    assert cases[1].mask == tmp_path / "labelsTr" / "x_02.nii.gz"
    assert caplog.messages == ["nnU-Net: 2 patients"]
    # As editors of Windows begin a file.
    text = (tmp_path / "dataset.json").read_text()
    (tmp_path / "dataset.json").write_text(text, encoding="utf-8-sig")
    assert find_cases(tmp_path, RECIPE.data) == cases
    assert [case.name for case in find_cases(tmp_path, RECIPE.data, require_mask=False)] == ["x_01", "x_02", "x_03"]
    shutil.copy(tmp_path / "imagesTr" / "x_01_0002.nii.gz", tmp_path / "imagesTr" / "x_01_0002.nii")
    with pytest.raises(CaseError, match=r"x_01_0002: must be one file. Received: x_01_0002.nii, x_01_0002.nii.gz"):
        find_cases(tmp_path, RECIPE.data)
    for path in (tmp_path / "imagesTr").glob("x_01_0002.*"):
        path.unlink()
    with pytest.raises(CaseError, match=r"^x_01: .*must hold x_01_0001, .*Received: .*, a label \(--skip-bad "):
        find_cases(tmp_path, RECIPE.data)


def test_decathlon(tmp_path):
    described = {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, "labels": {}}
    volumes = [make_image(n) for n in range(4)]
    make_dataset(tmp_path, described, {"imagesTr/x_1.nii.gz": sitk.JoinSeries(volumes)}, ["labelsTr/x_1.nii.gz"])
    [case] = find_cases(tmp_path, RECIPE.data)
    for modality, number in (("t1", 1), ("t2", 3), ("cet1", 2)):
        image = read_image(case.images[modality], case.name)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(volumes[number]))
        np.testing.assert_allclose(image.GetSpacing(), volumes[number].GetSpacing())
    with pytest.raises(CaseError, match=r"x_1.nii.gz \(volume 4\): must be an image of 5 or more volumes. Received: "):
        read_image(Volume(tmp_path / "imagesTr" / "x_1.nii.gz", 4), "x_1")


def test_cases_whose_names_end_like_channels(tmp_path):
    """The Decathlon's files have all channels, whatever the cases are called."""
    names = ("case_0000", "case_0001")
    recipe = RECIPE.replace({"data.modalities": ("t1",)}).data
    files = {f"imagesTr/{name}.nii.gz": make_image(n) for n, name in enumerate(names)}
    make_dataset(tmp_path, {"modality": {"0": "T1"}}, files, [f"labelsTr/{name}.nii.gz" for name in names])
    for cases in (find_cases(tmp_path, recipe), find_patients(tmp_path, recipe)):
        assert [case.name for case in cases] == list(names)
        image = read_image(cases[1].images["t1"], "")
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(make_image(1)))
    assert [case.name for case in find_patients(tmp_path / "imagesTr" / "case_0001.nii.gz", recipe)] == ["case_0001"]
    # Without labels, a second channel of one case would be left out in silence.
    shutil.rmtree(tmp_path / "labelsTr")
    with pytest.raises(CaseError, match=r"the channels that dataset.json names, case_0000. Received: case_0001"):
        find_patients(tmp_path, recipe)


def test_image_files_beside_dicom_series(tmp_path):
    write_series(tmp_path / "ann" / "DICOM" / "T2", description="T2")
    write(tmp_path / "ann" / "t1.nii.gz", make_image())
    able = RECIPE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3}).data
    with pytest.raises(CaseError, match=r"or all as DICOM series. Received: t1.nii.gz, and DICOM series of t2"):
        read_case_folder(tmp_path / "ann", able, require_mask=False)
    write(tmp_path / "ann" / "t2.nii.gz", make_image())
    assert list(read_case_folder(tmp_path / "ann", able, require_mask=False).images) == ["t1", "t2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must name the channels of the images. Received: "),
        ("[]", "must name the channels of the images. Received: "),
        ('{"modality": {"0": "T1", "1": "T2"}}', "one channel of cet1; `data.series.cet1` may .*Received: t1, t2"),
        ('{"modality": {"0": "t1", "1": "t2", "2": "cet1"}}', "beside imagesTr with images. Received: no patient"),
    ],
)
def test_a_dataset_that_cannot_be_used(content, message, tmp_path):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=rf"dataset.json: .*{message}"):
        find_cases(tmp_path, RECIPE.data)


@pytest.mark.parametrize(
    "folders",
    [
        {"T1WI": "", "T2WI": "", "CE-T1WI": ""},
        {"1": "t1_tse_tra", "2": "t2_tse_tra", "3": "t1_tse_tra+C"},
        {"": "ax T1|ax T2|ax T1 post"},
        {"a": "T1|FLAIR|T1 Gd", "b": "T2"},
    ],
)
def test_dicom_series_find_their_modality(folders, tmp_path, caplog):
    caplog.set_level("INFO")
    for folder, descriptions in folders.items():
        for number, description in enumerate(descriptions.split("|")):
            write_series(tmp_path / "a" / folder, description=description, prefix=f"s{number}")
    [case] = find_cases(tmp_path, RECIPE.data, require_mask=False)
    assert caplog.messages == ["DICOM: 1 patient"]
    names = {m: f"{series.folder.relative_to(tmp_path)} {series.description}" for m, series in case.images.items()}
    assert "T1" in names["t1"].upper()
    assert "T2" in names["t2"].upper()
    assert len(set(names.values())) == 3
    assert any(word in names["cet1"] for word in ("CE-T1WI", "+C", "post", "Gd"))
    assert case.mask is None


@pytest.mark.parametrize("pattern", ["t1.*602", "number 602", "T1 tra$", "10:23:11"])
def test_a_pattern_chooses_among_series_of_one_description_by_number_or_time(pattern, tmp_path):
    for number, time in ((601, "102000"), (602, "102311")):
        folder = tmp_path / "ann" / f"S{number}"
        write_series(folder, description="T1 tra" if number == 602 or "$" not in pattern else "T1 tra fs")
        change_series(folder, lambda one, _, n=number, t=time: one.update({"SeriesNumber": n, "SeriesTime": t}))
    recipe = Recipe().data.model_copy(update={"modalities": ("t1",)})
    with pytest.raises(CaseError) as caught:
        read_case_folder(tmp_path / "ann", recipe, require_mask=False)
    for text in ("number 601, 10:20:00", "number 602, 10:23:11"):
        assert text in str(caught.value)
    chosen = recipe.model_copy(update={"series": {"t1": pattern}})
    assert read_case_folder(tmp_path / "ann", chosen, require_mask=False).images["t1"].folder.name == "S602"


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "lost+found", "System Volume Information", "$RECYCLE.BIN"])
def test_a_folder_of_the_system_is_no_patient(name, tmp_path):
    make_patient(tmp_path / "ann")
    (tmp_path / name / "ann").mkdir(parents=True)
    (tmp_path / name / "desktop.ini").touch()
    assert [case.name for case in find_cases(tmp_path, RECIPE.data)] == ["ann"]


def test_a_fault_in_a_series_that_is_not_chosen_stops_nothing(tmp_path):
    write_series(tmp_path / "ann" / "1", description="T1")
    write_series(tmp_path / "ann" / "2", description="DWI")
    change_series(tmp_path / "ann" / "2", lambda one, _: one.update({"SpacingBetweenSlices": 0, "PixelSpacing": None}))
    (tmp_path / "ann" / "2" / "slice_02.dcm").write_bytes(b"damaged")
    (tmp_path / "__MACOSX" / "ann").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "ann" / "._slice.dcm").write_bytes(b"x")
    recipe = Recipe().data.model_copy(update={"modalities": ("t1",)})
    [case] = find_cases(tmp_path, recipe, require_mask=False)
    assert case.images["t1"].description == "T1"


@pytest.mark.parametrize(
    ("change", "received"),
    [
        (gzip.compress, "gzipped DICOM, which must be unpacked"),
        (lambda content: content[128:], "DICOM that does not begin with 128 bytes and DICM"),
    ],
)
@pytest.mark.parametrize("named", ["{}.gz", "{}", "hash"])
def test_dicom_files_that_are_not_read_as_they_are(named, change, received, tmp_path):
    folder, sequences = tmp_path / "all" / "ann", ("T1", "T2", "T1 Gd")

    def change_all(place):
        for path in sorted(place.rglob("*.dcm")):
            name = hashlib.md5(path.name.encode()).hexdigest() if named == "hash" else named.format(path.stem)
            path.with_name(name).write_bytes(change(path.read_bytes()))
            path.unlink()

    # One of the series.
    for sequence in sequences:
        write_series(folder / sequence, description=sequence)
    change_all(folder / "T2")
    for find in (find_cases, find_patients):
        with pytest.raises(CaseError, match=rf"^ann: .*one series of t2 .*Received: .*; and 5 files of {received} \("):
            find(tmp_path / "all", RECIPE.data)
    # All of them, in one folder and in one each.
    write_dicom_patient(tmp_path / "one" / "ann", sequences, inner=False)
    change_all(tmp_path / "one")
    change_all(folder)
    match = r"^ann: .*one series of t1 .*Received: no series; and 15 files of " + received
    for place in (tmp_path / "one", tmp_path / "all"):
        for find in (find_cases, find_patients):
            with pytest.raises(CaseError, match=match if find == find_cases else f"; and 15 files of {received}"):
                find(place, RECIPE.data)
        with pytest.raises(CaseError, match=match):
            find_patients(place / "ann", RECIPE.data)


def test_a_gzipped_mask_is_named(tmp_path):
    write_dicom_patient(tmp_path / "ann")
    write_series(tmp_path / "ann" / "mask", description="mask")
    for path in sorted((tmp_path / "ann" / "mask").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    with pytest.raises(CaseError, match=r"one mask, .*Received: none; and 5 files of gzipped DICOM, which must be unp"):
        find_cases(tmp_path, RECIPE.data)
    structures = RECIPE.replace({"data.structures": {"gtv": "GTV"}}).data
    with pytest.raises(CaseError, match=r"as --structure says. Received: none; and 5 files of gzipped DICOM"):
        find_cases(tmp_path, structures)


def test_masks_of_dicom_series(tmp_path):
    for folder in ("T1WI", "T2WI", "CE-T1WI"):
        write_series(tmp_path / "a" / folder, description=folder)
    for name in ("ROI-T1WI.nii", "ROI-CE-T1WI.nii", "ROI-T2WI.nii"):
        write(tmp_path / "a" / name, make_image(dtype=np.uint8))
    [case] = find_cases(tmp_path, RECIPE.data)
    assert {modality: path.name for modality, path in case.mask.items()} == {
        "t1": "ROI-T1WI.nii",
        "t2": "ROI-T2WI.nii",
        "cet1": "ROI-CE-T1WI.nii",
    }
    for name in ("ROI-CE-T1WI.nii", "ROI-T2WI.nii"):
        (tmp_path / "a" / name).unlink()
    path = tmp_path / "a" / "ROI-T1WI.nii"
    # The only one, drawn on what its name says.
    for name, drawn_on in (("ROI-T1WI.nii", "t1"), ("ROI-T2WI.nii", "t2")):
        path = path.rename(tmp_path / "a" / name)
        assert find_cases(tmp_path, RECIPE.data)[0].mask == {drawn_on: path}
    path = path.rename(tmp_path / "a" / "roi.nii")
    assert find_cases(tmp_path, RECIPE.data)[0].mask == path
    path.unlink()
    with pytest.raises(CaseError, match=r"^a: .*must hold one mask, named 'mask' or ROI, .*Received: none$"):
        find_cases(tmp_path, RECIPE.data)


def test_series_whose_names_speak_of_segmentation(tmp_path):
    folder = tmp_path / "Segmentation study"
    for description in ("T1 Segmented", "T2 tse", "T1 Gd protocol for roiling"):
        write_series(tmp_path / "a" / folder.name / description, description=description)
    [case] = find_cases(tmp_path, RECIPE.data, require_mask=False)
    assert {modality: series.description for modality, series in case.images.items()} == {
        "t1": "T1 Segmented",
        "t2": "T2 tse",
        "cet1": "T1 Gd protocol for roiling",
    }
    assert case.mask is None
    path = tmp_path / "a" / folder.name / "T2 tse"
    change_series(path, lambda image, _: setattr(image, "SeriesDescription", "T2 tse seg"))
    with pytest.raises(CaseError, match=r"one series of t2 .*; and taken for masks: .*'T2 tse seg'"):
        find_cases(tmp_path, RECIPE.data, require_mask=False)
    recipe = RECIPE.replace({"data.series": {"t2": "t2 tse seg"}}).data
    [case] = find_cases(tmp_path, recipe, require_mask=False)
    assert (case.images["t2"].description, case.mask) == ("T2 tse seg", None)
    # A pattern that does not speak of masks takes none for an image.
    with pytest.raises(CaseError, match=r"matches 't2'; .*taken for masks: .*'T2 tse seg'"):
        find_cases(tmp_path, RECIPE.replace({"data.series": {"t2": "t2"}}).data, require_mask=False)
    write_series(tmp_path / "a" / "2", description="T2")
    for description in ("Tumour Segmentation", "ROI 1", "GTVp", "seg_t1", "mask"):
        change_series(path, lambda image, _, text=description: setattr(image, "SeriesDescription", text))
        [case] = find_cases(tmp_path, RECIPE.data)
        [mask] = case.mask.values() if isinstance(case.mask, dict) else [case.mask]
        assert mask.description == description


def test_series_that_could_be_the_same_are_listed_and_refused(tmp_path):
    for description in ("T1 ax", "T1 cor", "T2", "T1 Gd"):
        write_series(tmp_path / "a", description=description, prefix=description)
    with pytest.raises(CaseError, match=r"^a: .*one series of t1 .*.*Received: .*'T1 ax', 5 files.*; .*'T1 cor', 5"):
        find_cases(tmp_path, RECIPE.data, require_mask=False)
    recipe = Recipe().replace({"data.series": {"t1": "t1 AX"}})
    assert find_cases(tmp_path, recipe.data, require_mask=False)[0].images["t1"].description == "T1 ax"
    recipe = Recipe().replace({"data.series": {"t1": "t1 ax", "t2": "pd"}})
    with pytest.raises(CaseError, match=r"matches 'pd'; .*Received: .*T1 Gd"):
        find_cases(tmp_path, recipe.data, require_mask=False)


def test_a_real_dicom_patient(test_data):
    recipe = Recipe().replace({"data.modalities": ("t1", "t2", "flair"), "data.mask": "roi"})
    case = read_case_folder(test_data / "brainix", recipe.data)
    assert {m: series.folder.name for m, series in case.images.items()} == {"t1": "T1", "t2": "T2", "flair": "FLAIR"}
    assert {modality: series.folder.name for modality, series in case.mask.items()} == {"flair": "ROI"}


# --- the patients to segment


def names_of(cases):
    return [case.name for case in cases]


def test_segments_one_patient_or_many(tmp_path, monkeypatch):
    make_patient(tmp_path / "cohort" / "ann")
    make_patient(tmp_path / "cohort" / "bob", [f"bob_{end}.nii.gz" for end in ("t1", "t2", "t1ce")])
    assert names_of(find_patients(tmp_path / "cohort", RECIPE.data)) == ["ann", "bob"]
    [ann] = find_patients(tmp_path / "cohort" / "ann", RECIPE.data)
    assert (ann.name, ann.mask.name) == ("ann", "mask.nii.gz")
    [bob] = find_patients(str(tmp_path / "cohort" / "bob"), RECIPE.data)
    assert (bob.name, bob.mask, bob.images["cet1"].name) == ("bob", None, "bob_t1ce.nii.gz")
    monkeypatch.chdir(tmp_path / "cohort" / "ann")
    assert names_of(find_patients(".", RECIPE.data)) == ["ann"]
    assert names_of(find_patients("../bob", RECIPE.data)) == ["bob"]
    assert names_of(find_patients("..", RECIPE.data)) == ["ann", "bob"]


def write_dicom_patient(folder, modalities=("T1", "T2", "T1 Gd"), patient="1", inner=True):
    for description in modalities:
        path = folder / description if inner else folder
        write_series(path, description=description, patient=patient, prefix=description)


@pytest.mark.parametrize("patient", ["1", "2"], ids=["same PatientID", "other PatientID"])
@pytest.mark.parametrize("inner", [True, False], ids=["folder per series", "one folder"])
def test_tells_a_dicom_patient_from_a_folder_of_them(inner, patient, tmp_path):
    able = RECIPE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3}).data
    write_dicom_patient(tmp_path / "one" / "ann", inner=inner)
    write_dicom_patient(tmp_path / "two" / "ann", inner=inner)
    write_dicom_patient(tmp_path / "two" / "bob", patient=patient, inner=inner)
    for data in (RECIPE.data, able):
        [case] = find_patients(tmp_path / "one" / "ann", data)
        assert (case.name, list(case.images)) == ("ann", ["t1", "t2", "cet1"])
        assert names_of(find_patients(tmp_path / "one", data)) == ["ann"]
        assert names_of(find_patients(tmp_path / "two", data)) == ["ann", "bob"]
    (tmp_path / "visits" / "other").mkdir(parents=True)
    write_dicom_patient(tmp_path / "visits" / "first", inner=inner)
    assert names_of(find_patients(tmp_path / "visits", RECIPE.data)) == ["visits"]


def test_dicom_patients_who_lack_something(tmp_path):
    write_dicom_patient(tmp_path / "ann")
    write_dicom_patient(tmp_path / "bob", ("T1", "T2"), patient="2")
    with pytest.raises(CaseError, match=r"^bob: .*one series of cet1 .*`data.series.cet1` .*allow_missing"):
        find_patients(tmp_path, RECIPE.data)
    with pytest.raises(CaseError, match=r"^bob: .*one series of cet1 .*"):
        find_patients(tmp_path / "bob", RECIPE.data)
    able = RECIPE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3}).data
    assert [list(case.images) for case in find_patients(tmp_path, able)] == [["t1", "t2", "cet1"], ["t1", "t2"]]
    write_series(tmp_path / "none" / "ADC", description="ADC")
    with pytest.raises(CaseError, match=r"^none: .*one series of t1 .*"):
        find_patients(tmp_path / "none", able)


@pytest.mark.parametrize("patient", ["", "ANONYMOUS", "Unknown_ID", "000", "1", "Anon-7"])
def test_studies_of_which_nobody_knows_whose_they_are(patient, tmp_path):
    """Two incomplete patients without an ID do not become one; a patient's own folder may have several studies."""
    for number, (folder, sequence) in enumerate((("a", "T1"), ("a", "T2"), ("b", "T1 Gd"))):
        place = tmp_path / "all" / folder / sequence
        write_series(place, description=sequence, patient=patient, uid=f"1.2.{number}")
        study = {"a": "1.2.826.0.1.0", "b": "1.2.826.0.1.1"}[folder]
        change_series(place, lambda image, _, study=study: setattr(image, "StudyInstanceUID", study))
    assert len(read_case_folder(tmp_path / "all", RECIPE.data, require_mask=False).images) == 3
    if patient in ("1", "Anon-7"):
        assert [case.name for case in find_patients(tmp_path / "all", RECIPE.data)] == ["all"]
    else:
        with pytest.raises(CaseError, match="2 of 2 patients cannot be used"):
            find_patients(tmp_path / "all", RECIPE.data)


@pytest.mark.parametrize("name", ["brain_mask.nii.gz", "HD-BET/t1_brain_mask.nii.gz", "wm_seg.nii.gz"])
def test_a_mask_of_the_brain_is_none_of_the_tumour(name, tmp_path):
    for sequence in ("T1", "T2", "T1 Gd"):
        write_series(tmp_path / "ann" / sequence, description=sequence)
    path = tmp_path / "ann" / name
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(sitk.Image(16, 12, 5, sitk.sitkUInt8), str(path))
    assert read_case_folder(tmp_path / "ann", RECIPE.data, require_mask=False).mask is None
    tumour = tmp_path / "ann" / "brain_tumour_mask.nii.gz"
    sitk.WriteImage(sitk.Image(16, 12, 5, sitk.sitkUInt8), str(tumour))
    assert read_case_folder(tmp_path / "ann", RECIPE.data).mask == tumour
    named = RECIPE.data.model_copy(update={"mask": path.name.removesuffix(".nii.gz")})
    tumour.unlink()
    assert read_case_folder(tmp_path / "ann", named).mask in (path, {"t1": path})


def test_an_ambiguous_mask_stops_no_segmentation(tmp_path, caplog):
    make_patient(tmp_path / "ann", (*FILES, "mask.mha"))
    write_dicom_patient(tmp_path / "bob")
    for name in ("roi_1.nii", "roi_2.nii"):
        (tmp_path / "bob" / name).touch()
    make_dataset(tmp_path / "set", CHANNELS, nnunet_files(), ["labelsTs/x_03.nii.gz"])
    write(tmp_path / "set" / "labelsTs" / "x_03.nrrd", make_image())
    for path in ("ann", "bob", "set"):
        assert [case.mask for case in find_patients(tmp_path / path, RECIPE.data)] == [None]
    assert [message.split(":")[0] for message in caplog.messages] == ["ann", "bob", "x_03"]
    assert all(message.endswith("; the mask is not used") for message in caplog.messages)
    with pytest.raises(CaseError, match=r"ann: .*mask: must be one file"):
        find_cases(tmp_path, RECIPE.data)


CHANNELS = {"channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1Gd", "3": "T2w"}}


def nnunet_files(training=(), test=("x_03",)):
    names = [*(f"imagesTr/{name}" for name in training), *(f"imagesTs/{name}" for name in test)]
    return {f"{name}_{n:04d}.nii.gz": make_image(n) for name in names for n in range(4)}


def test_segments_a_dataset_its_folders_and_its_cases(tmp_path):
    labels = ["labelsTr/x_01.nii.gz", "labelsTs/x_03.nii.gz"]
    make_dataset(tmp_path, CHANNELS, nnunet_files(("x_01", "x_02"), ("x_03", "x_04")), labels)
    for path, names in {
        "": ["x_03", "x_04"],
        "imagesTs": ["x_03", "x_04"],
        "imagesTr": ["x_01", "x_02"],
        "x_01": ["x_01"],
        "imagesTs/x_03": ["x_03"],
        "imagesTr/x_02": ["x_02"],
        "imagesTs/x_04_0002.nii.gz": ["x_04"],
    }.items():
        cases = find_patients(tmp_path / path, RECIPE.data)
        assert names_of(cases) == names
        for case in cases:
            folder = "imagesTr" if case.name in ("x_01", "x_02") else "imagesTs"
            assert case.images["t2"] == tmp_path / folder / f"{case.name}_0003.nii.gz"
            label = tmp_path / folder.replace("images", "labels") / f"{case.name}.nii.gz"
            assert case.mask == (label if case.name in ("x_01", "x_03") else None)
    for path in ("labelsTr", "labelsTr/x_01.nii.gz"):
        with pytest.raises(ValueError, match=r"did you mean .*imagesTr. Received: a folder of masks"):
            find_patients(tmp_path / path, RECIPE.data)
    shutil.rmtree(tmp_path / "imagesTs")
    assert names_of(find_patients(tmp_path, RECIPE.data)) == ["x_01", "x_02"]
    for path in ("x_09", "imagesTr/x_09"):
        with pytest.raises(ValueError, match="x_09: does not exist"):
            find_patients(tmp_path / path, RECIPE.data)


def test_segments_files_of_four_axes(tmp_path):
    described = {"modality": {"0": "T1w", "1": "T2w", "2": "t1gd"}}
    volumes = sitk.JoinSeries([make_image(n) for n in range(3)])
    make_dataset(tmp_path, described, {"imagesTs/case_1.nii.gz": volumes}, [])
    for path in ("", "imagesTs", "imagesTs/case_1", "imagesTs/case_1.nii.gz"):
        [case] = find_patients(tmp_path / path, RECIPE.data)
        assert (case.name, case.mask) == ("case_1", None)
        assert case.images["cet1"] == Volume(tmp_path / "imagesTs" / "case_1.nii.gz", 2)


@pytest.mark.parametrize("inside", [True, False], ids=["beside", "above"])
def test_segments_a_folder_of_channels_with_a_dataset_json(inside, tmp_path):
    for name in nnunet_files(test=("x_1", "x_2")):
        (tmp_path / "inbox").mkdir(exist_ok=True)
        (tmp_path / "inbox" / name.split("/")[1]).touch()
    for path in ("inbox", "inbox/x_1_0000.nii.gz"):
        with pytest.raises(ValueError, match=r"must have a dataset.json beside the images or one folder above, .*Rece"):
            find_patients(tmp_path / path, RECIPE.data)
    make_dataset(tmp_path / "inbox" if inside else tmp_path, CHANNELS, {}, [])
    assert names_of(find_patients(tmp_path / "inbox", RECIPE.data)) == ["x_1", "x_2"]
    for path in ("inbox/x_2", "inbox/x_2_0000.nii.gz"):
        [case] = find_patients(tmp_path / path, RECIPE.data)
        assert (case.name, case.mask) == ("x_2", None)
        assert case.images["t1"] == tmp_path / "inbox" / "x_2_0001.nii.gz"
    (tmp_path / "inbox" / "x_1_0002.nii.gz").unlink()
    with pytest.raises(CaseError, match=r"^x_1: .*x_1_0002 or x_1; .*`data.allow_missing`.*Received: x_1_0000"):
        find_patients(tmp_path / "inbox", RECIPE.data)
    able = RECIPE.replace({"data.allow_missing": True, "network.modality_dropout": 0.3}).data
    assert list(find_patients(tmp_path / "inbox", able)[0].images) == ["t1", "t2"]


def test_what_is_no_patient_is_refused(tmp_path):
    make_patient(tmp_path / "ann")
    write_series(tmp_path / "bob", description="T1", prefix="t1")
    write_series(tmp_path / "bob", description="T2", prefix="t2")
    (tmp_path / "notes.txt").touch()
    make_patient(tmp_path / "empty", ())
    for path, message in {
        "anna": "does not exist; did you mean ann. Received: anna",
        "nowhere/x": "does not exist. Received: x",
        "notes.txt": "must be a folder, or a case of a dataset. Received: a file",
        "ann/t1.nii.gz": "must be a folder; did you mean the patient's, .*ann. Received: a file",
        "bob/t1_00.dcm": "must be a folder; did you mean the patient's, .*bob. Received: a file",
        "empty": "must hold one folder per patient .*, with 0 folders and no such patient",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_patients(tmp_path / path, RECIPE.data)


@pytest.mark.parametrize(
    ("path", "modalities", "count"),
    [
        ("tumour_core_cubes", ("t1", "t2", "cet1"), 284),
        ("tumour_core_cubes/BraTS20_Training_001", ("t1", "t2", "cet1"), 1),
        ("lgg_patients", ("flair", "t1", "cet1"), 75),
        ("sts_patients", ("t1", "ct", "pet"), 3),
        ("brats2013_patient", ("t1", "t2", "cet1"), 1),
        ("brainix", ("t1", "t2", "flair"), 1),
    ],
)
def test_real_patients_to_segment(path, modalities, count, test_data):
    cases = find_patients(test_data / path, RECIPE.replace({"data.modalities": modalities}).data)
    assert len(cases) == count
    assert all(case.mask and tuple(case.images) == modalities for case in cases)


def test_real_masks_with_other_names(test_data):
    with pytest.raises(CaseError, match=r"^2 of 2 patients .*\n  patient_1: .*did you mean T1.nii.gz for t1\?"):
        find_patients(test_data / "npc_masks", RECIPE.data)


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


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_reads_the_grid_from_the_header(tmp_path, suffix):
    image = make_image()
    image.SetOrigin((3.0, -4.0, 5.0))
    image.SetDirection((0, 0, 1, -1, 0, 0, 0, -1, 0))
    path = write(tmp_path / f"t1{suffix}", image)
    volume = Volume(write(tmp_path / f"volumes{suffix}", sitk.JoinSeries([image, image])), 1)
    for source in (path, volume):
        assert read_grid(source, "ann").matches(Grid.from_image(image))
    with pytest.raises(CaseError, match=r"^ann: .*must be a 3D image. Received: an image of 16 x 12 x 4 x 2 voxels"):
        read_grid(volume.path, "ann")
    path.write_bytes(b"no image")
    with pytest.raises(CaseError, match=r"^ann: .*Received: "):
        read_grid(path, "ann")


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
    assert "an undamaged image file" in refused(tmp_path / "gone.nii")
    assert "a readable file. Received: No such file" in refused(tmp_path / "gone.mha")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("step", [0.0, -0.5, np.nan, np.inf])
def test_a_nifti_spacing_that_is_not_positive_is_refused(tmp_path, step, order):
    content = bytearray(write(tmp_path / "t1.nii", make_image()).read_bytes())
    if order == ">":
        content = swap_nifti_bytes(content)
    path = tmp_path / "t2.nii"
    path.write_bytes(content)
    expected = read_image(path, "ann")
    struct.pack_into(f"{order}f", content, 88, step)
    # The sform, which has steps of its own, counts; without it nothing tells the step.
    for codes in ((0, 1), (0, 0), (1, 0)):
        struct.pack_into(f"{order}2h", content, 252, *codes)
        path.write_bytes(content)
        if codes[1]:
            assert Grid.from_image(read_image(path, "ann")).matches(Grid.from_image(expected))
            assert read_grid(path, "ann").matches(Grid.from_image(expected))
            continue
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


@pytest.mark.parametrize(
    ("suffix", "line", "replaced", "message"),
    [
        (".mha", "NDims = .*", "NDims = 99999", "must be an image of 1 to 10 axes. Received: NDims = 99999"),
        (".mhd", "ElementDataFile = .*", "ElementDataFile = %n%s", "with files numbered as by %03d. Received: %n%s"),
        (
            ".mhd",
            "ElementDataFile = .*",
            "ElementDataFile = pipe",
            "voxels lie in files. Received: {pipe}, which",
        ),
        (".nhdr", "data file: .*", "data file: pipe", "voxels lie in files. Received: {pipe}, which"),
        (".nrrd", "sizes: .*", "sizes: 4 4 400000000", "must be a whole file. Received: 4 x 4 x 400000000 voxels in"),
    ],
)
def test_a_header_that_would_crash_or_stall_the_reader_is_refused(tmp_path, suffix, line, replaced, message):
    path = write(tmp_path / f"t1{suffix}", make_image())
    os.mkfifo(tmp_path / "pipe")
    path.write_bytes(re.sub(line.encode(), replaced.encode(), path.read_bytes(), count=1))
    assert message.format(pipe=tmp_path / "pipe") in refused(path)


def test_voxels_in_numbered_files(tmp_path):
    """As other programs write them; the header names a pattern."""
    image = make_image()
    path = write(tmp_path / "t1.mhd", image)
    for number, voxels in enumerate(sitk.GetArrayFromImage(image)):
        (tmp_path / f"t1_{number:03d}.raw").write_bytes(voxels.tobytes())
    (tmp_path / "t1.raw").unlink()
    path.write_text(path.read_text(encoding="utf-8").replace("t1.raw", f"t1_%03d.raw 0 {number} 1"))
    back = read_image(path, "ann")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


# --- writing a file


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd"])
def test_an_image_is_written_whole_or_not_at_all(tmp_path, suffix, full_disk):
    """SimpleITK would leave half of a NIfTI file without a word."""
    image = make_image(shape=(10, 50, 50), dtype=np.uint16)
    path = tmp_path / "out" / f"mask{suffix}"
    with pytest.raises(FileNotFoundError):
        write_image(image, path)
    path.parent.mkdir()
    with (
        full_disk(5000),
        pytest.raises(OSError, match=rf"{path}: the file must be complete when read again; .*Received: "),
    ):
        write_image(image, path)
    assert not list(path.parent.iterdir())
    write_image(image, path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_image(path, "ann")), sitk.GetArrayFromImage(image))
    names = {path.name: path.stat().st_size for path in path.parent.iterdir()}
    # What is there stays where another cannot be written.
    with full_disk(5000), pytest.raises(OSError, match="must be complete when read again"):
        write_image(image, path)
    assert {path.name: path.stat().st_size for path in path.parent.iterdir()} == names


def test_an_image_that_no_format_is_for(tmp_path):
    with pytest.raises(OSError, match=r"mask.xyz: the file must be complete.*Received: "):
        write_image(make_image(), tmp_path / "mask.xyz")
