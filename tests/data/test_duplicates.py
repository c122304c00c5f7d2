import re

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import change_series, write_series

from keras_mmfnet.data import duplicates, group_patients
from keras_mmfnet.data.case import Case
from keras_mmfnet.data.duplicates import check_ids, find_duplicates, refuse_duplicates, same_ids
from keras_mmfnet.data.image_io import Volume
from keras_mmfnet.data.layouts import find_cases
from keras_mmfnet.recipe import Recipe


def save(path, array, spacing=(1.0, 1.0, 4.0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path), **options)
    return path


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(0, 1000, (3, 8, 9)).astype(np.int16)


def test_finds_the_same_voxels_whatever_the_file(tmp_path, voxels):
    others = voxels.copy()
    others[1, 2, 3] += 1
    cases = [
        Case("ann", {"t1": save(tmp_path / "ann.nii.gz", voxels), "t2": save(tmp_path / "t2.nii", others)}),
        Case("bob", {"t1": save(tmp_path / "bob.nii.gz", others)}),
        Case("copy", {"t1": save(tmp_path / "copy.mha", voxels.astype(np.float32), useCompression=True)}),
        Case("dan", {"t1": save(tmp_path / "dan.nii", voxels[:2])}),
        Case("eve", {"t1": save(tmp_path / "eve.nii", voxels, spacing=(1.0, 1.0, 5.0))}),
        Case("volume", {"t1": Volume(save_volumes(tmp_path / "4d.nii.gz", others, voxels), 1)}),
    ]
    assert find_duplicates(cases) == [("ann", "copy", "volume")]
    assert find_duplicates(cases[1:2]) == find_duplicates([]) == []


def save_volumes(path, *arrays):
    images = [sitk.GetImageFromArray(array) for array in arrays]
    for image in images:
        image.SetSpacing((1.0, 1.0, 4.0))
    sitk.WriteImage(sitk.JoinSeries(images), str(path))
    return path


def test_reads_only_what_could_be_the_same(tmp_path, voxels, monkeypatch):
    cases = [Case(f"p{n}", {"t1": save(tmp_path / f"{n}.nii", voxels[:, n // 2 :])}) for n in range(5)]
    seen = []
    read = duplicates.read_image
    monkeypatch.setattr(
        duplicates, "read_image", lambda path, name, *rest: seen.append(name) or read(path, name, *rest)
    )
    assert find_duplicates(cases) == [("p0", "p1"), ("p2", "p3")]
    assert sorted(seen) == ["p0", "p1", "p2", "p3"]


def test_what_cannot_be_read_is_no_duplicate(tmp_path, voxels):
    whole = save(tmp_path / "whole.nii", voxels)
    for name in ("cut_1", "cut_2"):
        (tmp_path / f"{name}.nii").write_bytes(whole.read_bytes()[:-50])
    for name in ("empty_1.nii", "empty_2.mha"):
        (tmp_path / name).touch()
    assert find_duplicates([Case(path.stem, {"t1": path}) for path in tmp_path.iterdir()]) == []


def test_finds_the_same_voxels_in_another_order_of_the_axes(tmp_path, voxels):
    image = sitk.ReadImage(str(save(tmp_path / "a.nii.gz", voxels)))
    sitk.WriteImage(sitk.DICOMOrient(image, "SAR"), str(tmp_path / "b.nii.gz"))
    sitk.WriteImage(sitk.Flip(image, (True, False, False)), str(tmp_path / "turned.nii.gz"))
    cases = [Case(name, {"t1": tmp_path / f"{name}.nii.gz"}) for name in ("a", "b", "turned")]
    # A flipped image has its axis in the header: it is the same one.
    assert find_duplicates(cases) == [("a", "b", "turned")]
    sitk.WriteImage(sitk.GetImageFromArray(voxels[:, ::-1]), str(tmp_path / "turned.nii.gz"))
    assert find_duplicates(cases) == [("a", "b")]


def dicom_cases(folder):
    return find_cases(folder, Recipe().replace({"data.modalities": "t1"}).data, require_mask=False)


def test_finds_the_same_voxels_of_dicom_series_whatever_their_ids(tmp_path):
    for name, patient, seed in (("ann", "1", 1), ("again", "2", 1), ("bob", "3", 2)):
        write_series(tmp_path / name, patient=patient, seed=seed)
        study = f"1.2.3.{patient}"
        change_series(tmp_path / name, lambda image, _, study=study: setattr(image, "StudyInstanceUID", study))
    assert find_duplicates(dicom_cases(tmp_path)) == [("again", "ann")]


def test_the_same_study_or_id(tmp_path, caplog):
    # The files of `write_series` are all of one study.
    for name, patient in {"ann": "1", "bob": "2", "again": "1", "x": "", "y": "", "z_1": "ANON", "z_2": "ANON"}.items():
        write_series(tmp_path / name, patient=patient, seed=len(caplog.records) + ord(name[-1]))
    cases = dicom_cases(tmp_path)
    assert same_ids(cases) == [("again", "ann")]
    with pytest.raises(ValueError, match=r"each patient must occur once.*Received: again = ann; z_1 = z_2$"):
        check_ids(cases, {})
    check_ids(cases, {case.name: case.name for case in cases})
    assert not caplog.messages
    # Another visit.
    for name in ("again", "z_2"):
        change_series(tmp_path / name, lambda image, _: setattr(image, "StudyInstanceUID", "1.2.3"))
    check_ids(dicom_cases(tmp_path), {})
    [message] = caplog.messages
    assert re.search(r"same PatientID; .*--groups.*: again = ann$", message)


def test_duplicates_are_refused_unless_they_are_one_group(tmp_path, voxels):
    path = save(tmp_path / "t1.nii", voxels)
    cases = [Case(name, {"t1": path}) for name in ("p7_before", "p7_after")]
    cases += [Case("p8", {"t1": save(tmp_path / "other.nii", voxels + 1)})]
    # A list of groups names everybody: it does not say that these are different.
    for pattern in (None, "before", "p7_before|p8", ".+"):
        with pytest.raises(ValueError, match=r"by `training.group`, .*Received: p7_after = p7_before$"):
            refuse_duplicates(find_duplicates(cases), group_patients(cases, pattern))
    refuse_duplicates(find_duplicates(cases), group_patients(cases, r"^p7"))
    assert group_patients(cases, r"^(p\d+)") == {"p7_before": "p7", "p7_after": "p7", "p8": "p8"}
    assert group_patients(cases, ".+") == {name: name for name in ("p7_before", "p7_after", "p8")}
    assert group_patients(cases, r"^p7") == {"p7_before": "p7", "p7_after": "p7"}
    assert group_patients(cases[1:]) == {}
    assert group_patients(cases[1:], "(a)?p") == {"p7_after": "p", "p8": "p"}


def test_real_patients_are_all_different(test_data):
    recipe = Recipe().replace({"data.modalities": ("flair", "t1", "cet1")})
    assert find_duplicates(find_cases(test_data / "lgg_patients", recipe.data)[:20]) == []
