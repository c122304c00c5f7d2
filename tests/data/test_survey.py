import dataclasses
import json
import time

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import GRID, write_series
from patients import RAW, head, make_case, make_grid, only, tumour, write

from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.layouts import find_cases, read_case_folder
from keras_mmfnet.data.preprocess import preprocess_case
from keras_mmfnet.data.survey import survey, survey_case
from keras_mmfnet.recipe import Recipe

REVERSED = np.diag([-1.0, -1.0, 1.0])


def refusal(case, recipe):
    with pytest.raises(CaseError) as caught:
        preprocess_case(case, recipe)
    return str(caught.value)


def test_a_patient_from_the_headers(tmp_path):
    other = make_grid(size=(70, 60, 20), spacing=(0.9, 1.1, 3.0), direction=REVERSED)
    case = make_case(tmp_path, other_grid=other, mask_grid=other)
    row = survey_case(case, RAW.data)
    assert row.name == "ann"
    assert row.problems == ()
    assert row.notes == ("mask: lies on another grid than t1, resampled by position",)
    assert (row.mask, row.labels, row.tumour_ml) == (str(case.mask), None, None)
    t1, t2 = row.images["t1"], row.images["t2"]
    assert (t1.path, t1.size, t1.orientation) == (str(case.images["t1"]), (60, 50, 8), "LPS")
    assert t1.spacing_xyz == pytest.approx((0.8, 0.8, 4.0))
    assert (t1.coverage, t1.resampled) == (1, False)
    assert (t2.size, t2.orientation, t2.resampled) == ((70, 60, 20), "RAS", True)
    assert t2.coverage == 1
    assert json.loads(json.dumps(dataclasses.asdict(row)))["images"]["t1"]["size"] == [60, 50, 8]
    assert survey_case(case, RAW.replace({"data.spacing": 1.0}).data).images["t1"].resampled


def test_an_image_in_another_order_of_the_axes_is_not_resampled(tmp_path):
    case = make_case(tmp_path)
    for path in (case.images["t2"], case.mask):
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "RAI"), str(path))
    row = survey_case(case, RAW.data)
    assert row.images["t2"].orientation == "RAI"
    assert not row.images["t2"].resampled
    assert row.notes == ()
    assert survey_case(case, RAW.replace({"data.align": "rigid"}).data).images["t2"].resampled


def test_no_voxel_is_read_unless_deep(tmp_path):
    case = make_case(tmp_path, suffix=".mhd")
    for path in tmp_path.glob("*.zraw"):
        path.write_bytes(bytes(path.stat().st_size))
    for path in tmp_path.glob("*.raw"):
        path.write_bytes(bytes(path.stat().st_size))
    assert survey_case(case, RAW.data).problems == ()
    [problem] = survey_case(case, RAW.data, deep=True).problems
    assert "must not be constant" in problem


def test_what_preprocessing_would_refuse_in_its_words(tmp_path):
    case = make_case(tmp_path, other_grid=make_grid(middle=(1, -2, 300)))
    problems = survey_case(case, RAW.data).problems
    assert len(problems) == 2, "that of each image"
    assert problems[0] == refusal(case, RAW.data)
    lacking = only(case, "t1")
    assert survey_case(lacking, RAW.data).problems == (refusal(lacking, RAW.data),)
    assert list(survey_case(lacking, RAW.data).images) == ["t1"]
    none = dataclasses.replace(case, images={})
    assert survey_case(none, RAW.data, deep=True).problems == (refusal(none, RAW.data),)
    case.images["t1"].write_bytes(b"no image")
    row = survey_case(case, RAW.data, deep=True)
    assert row.problems == (refusal(case, RAW.data),)
    assert row.images["t2"].coverage is None
    masks = dataclasses.replace(make_case(tmp_path / "b"), mask={"t2": case.mask, "cet1": case.mask})
    assert survey_case(masks, RAW.data).problems == (refusal(masks, RAW.data),)


def test_deep_reads_the_tumour_and_finds_what_only_voxels_show(tmp_path):
    grid = make_grid()
    case = make_case(tmp_path)
    row = survey_case(case, RAW.data, deep=True)
    assert row.labels == (1,)
    assert row.tumour_ml == pytest.approx(np.count_nonzero(tumour(grid)) * np.prod(grid.spacing) / 1000)
    assert row.problems == ()
    write(case.mask, grid, tumour(grid) * np.arange(60, dtype=np.uint8) % 3)
    row = survey_case(case, RAW.data, deep=True)
    assert row.labels == (1, 2)
    assert row.problems == (refusal(case, RAW.data),)
    assert row.tumour_ml is None
    values = head(grid)
    values[2, 3, 4] = np.nan
    write(case.images["t2"], grid, values)
    assert "1 voxels with NaN" in survey_case(case, RAW.data, deep=True).problems[0]


def test_the_notes_are_preprocessings(tmp_path):
    case = make_case(tmp_path, other_grid=make_grid(middle=(1, -2, 30 + 20)))
    assert survey_case(case, RAW.data).notes == preprocess_case(case, RAW.data).notes
    case = dataclasses.replace(make_case(tmp_path / "b"), mask={"t2": case.mask})
    assert survey_case(case, RAW.data).notes == preprocess_case(case, RAW.data).notes
    assert survey_case(case, RAW.data, deep=True).notes == preprocess_case(case, RAW.data).notes


def test_a_dicom_patient(tmp_path):
    folder = tmp_path / "ann"
    for name in ("t1", "t2", "cet1"):
        write_series(folder / name, description=name, order=-1)
    case = read_case_folder(folder, RAW.data, require_mask=False)
    row = survey_case(case, RAW.data)
    assert row.problems == ()
    assert row.images["t2"].size == GRID.size
    assert row.images["t2"].spacing_xyz == pytest.approx(GRID.spacing)
    assert row.mask is None
    next(case.images["t2"].folder.iterdir()).unlink()
    assert survey_case(case, RAW.data).problems == (refusal(case, RAW.data),)


def test_a_cohort_in_order_with_progress(tiny_cohort, caplog):
    recipe = Recipe().data
    cases = find_cases(tiny_cohort, recipe)
    with caplog.at_level("DEBUG", "keras_mmfnet.progress"):
        rows = survey(cases, recipe)
    assert [row.name for row in rows] == [case.name for case in cases]
    assert [record.done for record in caplog.records] == list(range(1, len(cases) + 1))
    assert survey([], recipe) == []


def test_real_cohorts_take_seconds(test_data):
    recipe = Recipe().data
    cases = find_cases(test_data / "tumour_core_cubes", recipe)
    start = time.monotonic()
    rows = survey(cases, recipe)
    assert time.monotonic() - start < 0.05 * len(cases) + 5
    assert len(rows) == len(cases)
    assert not any(row.problems for row in rows)
    assert {image.size for row in rows for image in row.images.values()} == {(32, 32, 32)}


def test_real_oblique_series(test_data):
    recipe = Recipe().replace({"data.modalities": ("t1", "t2", "flair")}).data
    case = read_case_folder(test_data / "brainix", recipe)
    row = survey_case(case, recipe)
    assert row.problems == ()
    assert {name: image.size for name, image in row.images.items()} == {
        "t1": (512, 512, 22),
        "t2": (512, 512, 22),
        "flair": (288, 288, 22),
    }
    assert all(image.resampled for image in row.images.values())
