import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from browser import chromium, needs_browser
from dicom_files import write_series

from keras_mmfnet.data import Grid, find_cases, preprocess_case
from keras_mmfnet.data.layouts import reviewed_patients
from keras_mmfnet.review.corrections import Correction
from keras_mmfnet.review.patients import find_reviewed, patients_of_run
from keras_mmfnet.run import Run

GRID = Grid((24, 20, 5), (2.0, 2.0, 4.0), (-24.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


@pytest.fixture(scope="module")
def run(mmfnet, tiny_cohort, tiny, tmp_path_factory):
    """A run of one finished fold."""
    out = tmp_path_factory.mktemp("reviewed") / "run"
    mmfnet("train", tiny_cohort, "--out", out, "--small", *tiny, "--fold", "0")
    return out


def test_the_patients_of_a_run(run, tmp_path):
    patients = patients_of_run(run)
    [result] = [json.loads((run / "fold_0" / "mmfnet.json").read_text())]
    assert [patient.name for patient in patients] == sorted(row["patient"] for row in result["patients"])
    for patient, row in zip(patients, sorted(result["patients"], key=lambda row: row["patient"]), strict=True):
        assert patient.scores["tumour"]["dsc"] == row["dsc"]
        assert patient.sequences == ("t1", "t2", "cet1")
        [mask] = patient.predicted()
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(run / "fold_0/masks/mmfnet" / f"{patient.name}.nii.gz")))
        assert np.count_nonzero(mask) == np.count_nonzero(written)
        np.testing.assert_array_equal(patient.map("probability", "tumour") >= 0.5, mask)
        assert list((run / "corrections" / patient.name).glob("probability_tumour_*.nii.gz"))
        patient.require_same_images()
    moved = shutil.copytree(json.loads((run / "cohort.json").read_text())["data"], tmp_path / "moved")
    [first, *_] = find_reviewed(run, moved)
    assert (first.place, first.case.images["t1"].parent.parent) == (moved, moved)
    first.require_same_images()
    shutil.copy(moved / patients[1].name / "t1.nii.gz", moved / first.name / "t1.nii.gz")
    with pytest.raises(ValueError, match=r"the images that were segmented are expected\. Received: other images"):
        Correction(find_reviewed(run, moved)[0], tmp_path / "corrections")
    away = Path(shutil.copytree(run, tmp_path / "away"))
    cohort = json.loads((away / "cohort.json").read_text())
    (away / "cohort.json").write_text(json.dumps(cohort | {"data": str(tmp_path / "nowhere")}))
    assert find_reviewed(away, moved)[0].place == moved
    shutil.rmtree(moved / first.name)
    with pytest.raises(
        ValueError, match=f"images of its patients are expected. Received: none of {first.name} in {moved}"
    ):
        find_reviewed(run, moved)
    (tmp_path / "run").mkdir()
    for name in ("recipe.json", "cohort.json"):
        shutil.copy(run / name, tmp_path / "run")
    with pytest.raises(ValueError, match=r"a finished fold of MMFNet is expected. Received: none"):
        patients_of_run(tmp_path / "run")


def test_what_was_segmented(mmfnet, trained, tiny_cohort, tmp_path):
    out = tmp_path / "contours"
    mmfnet("segment", trained, tiny_cohort / "patient_01", "--out", out, "--disagreement")
    mmfnet("segment", trained, tiny_cohort / "patient_00", "--out", out, "--probability")
    one, other = find_reviewed(out)
    assert (one.name, other.name) == ("patient_00", "patient_01")
    assert list(one.maps) == [("probability", "tumour")]
    assert list(other.maps) == [("disagreement", "tumour")]
    for patient in (one, other):
        numbers = patient.scores["tumour"]
        voxel_ml = np.prod(patient.source.spacing) / 1000
        assert numbers["predicted_ml"] == pytest.approx(patient.predicted()[0].sum() * voxel_ml, abs=1e-3)
    probability = one.map("probability", "tumour")
    spread = other.map("disagreement", "tumour").sum()
    assert 0 < numbers["disagreement"] < 1
    mmfnet("segment", trained, tiny_cohort / "patient_01", "--out", out, "--probability")
    [_, other] = find_reviewed(out)
    expected = spread / other.map("probability", "tumour").sum()
    assert other.scores["tumour"]["disagreement"] == pytest.approx(expected, rel=1e-3)
    assert probability.shape == one.grid.shape
    moved = tiny_cohort.rename(tmp_path / "moved")
    try:
        with pytest.raises(
            ValueError, match=r"images of the patients are expected.*none of patient_00 in .*patient_00"
        ):
            find_reviewed(out)
        assert [patient.name for patient in find_reviewed(out, moved)] == ["patient_00", "patient_01"]
    finally:
        moved.rename(tiny_cohort)


def test_corrected_masks_are_exported(mmfnet, trained, tmp_path):
    for seed, name in enumerate(("T1", "T2", "T1 Gd")):
        write_series(tmp_path / "ann", GRID, name, prefix=name, seed=seed)
    out, reviewed = tmp_path / "out", tmp_path / "reviewed"
    mmfnet("segment", trained, tmp_path / "ann", "--out", out)
    options = ("review", out, "--export", reviewed)
    assert "accepted or corrected are expected" in mmfnet(*options, code=1).stderr
    [patient] = find_reviewed(out)
    correction = Correction(patient, out / "corrections")
    mask = np.zeros(correction.drawing.shape, bool)
    mask[1:4, 3:9, 5:12] = True
    correction.draw(correction.replacing(0, mask), correction.state)
    correction.save("me", correction.state)
    mmfnet(*options, "--rtstruct", "--seg")
    assert sorted(path.name for path in reviewed.iterdir()) == [
        "ann.nii.gz",
        "ann_rtstruct.dcm",
        "ann_seg.dcm",
        "masks.json",
    ]
    written = sitk.ReadImage(str(reviewed / "ann.nii.gz"))
    np.testing.assert_array_equal(patient.grid.resample(written) > 0, mask)
    pixels = pydicom.dcmread(reviewed / "ann_seg.dcm").pixel_array
    assert np.count_nonzero(pixels) == mask.sum()
    [contours] = pydicom.dcmread(reviewed / "ann_rtstruct.dcm").ROIContourSequence
    assert len(contours.ContourSequence) == 3
    assert "a new one is expected" in mmfnet(*options, code=1).stderr
    assert "--export: a folder is expected" in mmfnet("review", out, "--seg", code=1).stderr


def test_corrected_masks_are_learned_from(mmfnet, run, tiny_cohort, tiny, tmp_path):
    """Patients who were not reviewed keep the expert's masks."""
    run = shutil.copytree(run, tmp_path / "run")
    patient = find_reviewed(run)[0]
    correction = Correction(patient, run / "corrections")
    mask = np.zeros(correction.drawing.shape, bool)
    mask[5:12, 10:20, 10:20] = True
    correction.draw(correction.replacing(0, mask), correction.state)
    correction.save("me", correction.state)
    mmfnet("review", run, "--export", tmp_path / "reviewed")
    own = patient.recipe.model_copy(update={"spacing": None})  # on the grid of the drawing
    cases = {case.name: case for case in find_cases(tmp_path / "reviewed", own)}
    assert sorted(cases) == sorted(path.name for path in tiny_cohort.iterdir())
    masks = {name: preprocess_case(case, own).mask for name, case in cases.items()}
    np.testing.assert_array_equal(masks.pop(patient.name), mask)
    before = {case.name: case for case in find_cases(tiny_cohort, own)}
    before = {case.name: case for case in find_cases(tiny_cohort, patient.recipe)}
    for name, found in masks.items():
        np.testing.assert_array_equal(found, preprocess_case(before[name], own).mask)
    wrong = mmfnet("train", tmp_path / "reviewed", "--from", run, "--corrections", "--out", tmp_path / "no", code=1)
    assert "--corrections: a reviewed run (--from) is expected with it, no DATA" in wrong.stderr
    (tmp_path / "second" / "reviewed").mkdir(parents=True)  # of a command that was interrupted
    assert reviewed_patients(tmp_path / "reviewed") == [patient.name]
    assert reviewed_patients(tiny_cohort) == []
    told = mmfnet("train", "--from", run, "--corrections", "--out", tmp_path / "second").stderr
    second = Run(tmp_path / "second")
    [number] = second.begun_folds
    assert patient.name in second.folds[number].train
    assert f"Fold {number} learns from 1 of 1 reviewed patients" in told
    for file in sorted((tmp_path / "reviewed").iterdir()):
        assert (tmp_path / "second" / "reviewed_2" / file.name).read_bytes() == file.read_bytes()
    [learned] = second.patients([patient.name])
    assert learned.tumour_ml == pytest.approx(mask.sum() * np.prod(patient.source.spacing) / 1000, rel=0.1)
    mmfnet("train", "--out", tmp_path / "second", "--resume", "--fold", "0")


def test_files_have_no_dicom_objects(mmfnet, trained, tiny_cohort, tmp_path):
    mmfnet("segment", trained, tiny_cohort / "patient_00", "--out", tmp_path / "out")
    [patient] = find_reviewed(tmp_path / "out")
    correction = Correction(patient, tmp_path / "out" / "corrections")
    correction.save("me", correction.state)
    refused = mmfnet("review", tmp_path / "out", "--export", tmp_path / "new", "--rtstruct", code=1)
    assert "patients of DICOM series are expected for rtstruct. Received: patient_00" in refused.stderr
    assert not (tmp_path / "new").exists()


@contextlib.contextmanager
def reviewing(run):
    """The process of the command, its arguments and its address."""
    command = [sys.executable, "-m", "keras_mmfnet.cli", "review", str(run), "--no-browser", "--reviewer", "Dr. Who"]
    # The output is a pipe, which is written when the process wants to.
    options = {"env": os.environ | {"PYTHONUNBUFFERED": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process, command, process.stdout.readline().strip()
        finally:
            process.kill()


@needs_browser
def test_from_the_report_to_a_patient(run):
    playwright = pytest.importorskip("playwright.sync_api")
    with reviewing(run) as (_, _, address), chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        playwright.expect(page.locator("#patients button")).to_have_count(2)
        names = page.locator("#patients button").all_inner_texts()
        page.get_by_role("link", name="Report").click()
        playwright.expect(page.get_by_text(f"mmfnet review {run}")).to_be_visible()
        for name in names:
            page.locator("h3").filter(has_text=name).get_by_role("link", name="Review").click()
            playwright.expect(page.locator("#message")).to_contain_text(f"{name}: t1, t2, cet1")
            page.go_back()
        page.goto((run / "report.html").as_uri())
        assert page.locator("h3 a").count() == len(names) == 2
        assert not page.locator("h3 a:visible").count()


def test_the_command(run):
    with reviewing(run) as (process, command, address):
        assert address.startswith("http://127.0.0.1:")
        assert len(address.rstrip("/").rsplit("/", 1)[1]) >= 32  # nobody guesses it
        with urllib.request.urlopen(f"{address}api/patients") as answer:
            listed = json.loads(answer.read())
        assert [row["state"] for row in listed["patients"]] == ["to do"] * 2
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address.rsplit("/", 2)[0] + "/wrong/api/patients")
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 1
        assert "one review at a time is expected" in again.stderr
        with urllib.request.urlopen(f"{address}api/patients/0") as answer:
            state = json.loads(answer.read())["state_of_drawing"]
        request = urllib.request.Request(f"{address}api/patients/0/save?after={state}", method="POST")
        with urllib.request.urlopen(request) as answer:
            assert json.loads(answer.read())["row"]["by"] == "Dr. Who"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    name = listed["patients"][0]["name"]
    assert name not in output + errors
    record = json.loads((run / "corrections" / name / "001.json").read_text())
    assert (record["state"], record["by"]) == ("accepted", "Dr. Who")


def test_what_is_refused(run, mmfnet, tmp_path, monkeypatch):
    assert "the folder of a run, or of masks" in mmfnet("review", tmp_path, code=1).stderr
    assert "FOLDER: a folder is expected" in mmfnet("review", tmp_path / "nowhere", code=1).stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'keras-mmfnet[review]'" in mmfnet("review", run, code=1).stderr
