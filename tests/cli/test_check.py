import csv
import json
import shutil

import pytest
import SimpleITK as sitk

from keras_mmfnet.data.folds import five_folds
from keras_mmfnet.data.image_io import read_image


@pytest.fixture
def cohort(tiny_cohort, tmp_path):
    shutil.copytree(tiny_cohort, tmp_path / "cohort")
    return tmp_path / "cohort"


def test_patients_that_can_be_used(mmfnet, cohort, tmp_path):
    done = mmfnet("check", cohort, "--csv", tmp_path / "c.csv", "--json", tmp_path / "c.json", "--deep")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["patient_00", "t1", "cet1", "32x32x20", "3x3x4", "LPS", "no", "11.6", "yes"] in lines
    assert ["t2", "38x38x20", "2.5x2.5x4", "LPS", "yes"] in lines
    assert "6 patients can be used" in done.stdout
    with open(tmp_path / "c.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["patient"] for row in rows] == [f"patient_{number:02d}" for number in range(6)]
    assert (rows[0]["t2_voxels"], rows[0]["t2_spacing_mm"], rows[0]["usable"]) == ("38x38x20", "2.5x2.5x4", "True")
    found = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert found[0]["images"]["t1"]["size"] == [32, 32, 20]
    assert 11 < found[0]["tumour_ml"] < 13
    again = mmfnet("check", cohort, "--csv", tmp_path / "c.csv", code=1)
    assert f"Received: {tmp_path / 'c.csv'}" in again.stderr
    # Without --deep no voxel is read.
    assert not any(" 11.6 " in line for line in mmfnet("check", cohort).stdout.splitlines())


def test_what_a_training_would_divide(mmfnet, cohort, tmp_path):
    for name in ("patient_00", "patient_04"):
        (cohort / name / "t2.nii.gz").unlink()
    for name in ("patient_01", "patient_02"):
        mask = read_image(cohort / name / "mask.nii.gz", name)
        sitk.WriteImage(0 * mask, str(cohort / name / "mask.nii.gz"))
    names = [f"patient_{number:02d}" for number in range(6)]
    splits = [{"train": [names[0], names[4]], "validation": [names[1], names[2]], "test": [names[3]]}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    groups = {**dict(zip(names, names, strict=True)), "patient_02": "patient_01"}
    (tmp_path / "groups.csv").write_text("\n".join(["patient,group", *map(",".join, groups.items())]))
    changes = ("data.allow_missing=true", "network.modality_dropout=0.3", "data.allow_empty=true", "training.folds=3")
    able = [part for change in changes for part in ("--set", change)]
    files = "--splits", tmp_path / "splits.json", "--groups", tmp_path / "groups.csv"
    done = mmfnet("check", cohort, "--deep", *able, *files)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "lacking t2: 2 patients: patient_00, patient_04" in done.stdout
    assert "without tumour: 2 patients: patient_01, patient_02" in done.stdout
    assert "groups: 4 of 5 patients, the largest of 2" in done.stdout
    assert ["fold", "part", "patients", "lacking", "t2", "without", "tumour", "tumour", "ml,", "median"] in lines
    assert [line[:5] for line in lines if line[:1] == ["0"]] == [
        ["0", "train", "2", "2", "0"],
        ["0", "validation", "2", "0", "2"],
        ["0", "test", "1", "0", "0"],
    ]
    assert ["0", "validation", "2", "0", "2", "0.0"] in lines
    assert "note: fold 0, train: all lacking t2; its training with self-transfer will be refused\n" in done.stdout
    assert "note: fold 0, validation: all without tumour; its training will be refused\n" in done.stdout
    done = mmfnet("check", cohort, "--deep", *able, *files, "--set", "training.self_transfer=false")
    assert "note: fold 0, train: all lacking t2\n" in done.stdout
    # As a training would divide them.
    done = mmfnet("check", cohort, *able)
    test = five_folds(names, 3)[2].test
    assert ["2", "test", "2", str(len({names[0], names[4]} & set(test)))] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert "which --deep reads" in mmfnet("check", cohort, *able, "--set", "training.balance=volume").stdout
    assert "no folds: 7 folds need" in mmfnet("check", cohort, *able, "--set", "training.folds=7").stdout
    (tmp_path / "groups.csv").write_text("patient,group\npatient_00,a\n")
    assert "must be those of every patient" in mmfnet("check", cohort, *able, *files[2:], code=1).stderr


def test_several_structures(mmfnet, cohort, tmp_path):
    for number, path in enumerate(sorted(cohort.glob("*/mask.nii.gz"))):
        image = sitk.ReadImage(str(path))
        mask = sitk.GetArrayFromImage(image)
        mask[:, :, ::2] *= 3 if number else 2
        labels = sitk.GetImageFromArray(mask)
        labels.CopyInformation(image)
        sitk.WriteImage(labels, str(path))
    shutil.copytree(cohort / "patient_05", cohort / "patient_06")  # the same images
    structures = "--structure", "whole=1,2", "--structure", "inner=2"
    done = mmfnet("check", cohort, "--deep", *structures, "--csv", tmp_path / "c.csv", "--json", tmp_path / "c.json")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["patient", "sequence", "voxels", "mm", "axes", "resampled", "whole", "ml", "inner", "ml", "usable"] in lines
    with open(tmp_path / "c.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert float(row["tumour_ml"]) == pytest.approx(float(row["whole_ml"]))
    assert float(row["whole_ml"]) > float(row["inner_ml"]) > 0
    line = next(line for line in lines if line[:1] == ["patient_00"])
    assert line[-3:] == [f"{float(row['whole_ml']):.1f}", f"{float(row['inner_ml']):.1f}", "yes"]
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))[1]["structures_ml"]["inner"] == 0
    # What is left out by mistake is said, and who is without which structure.
    note = "note: patient_01: mask: has labels that belong to no structure: 3 (likewise for 5 others"
    assert note in done.stdout
    assert "without inner: 6 patients: patient_01, " in done.stdout
    splits = [{"train": ["patient_01"], "validation": ["patient_02"], "test": ["patient_00"]}]
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    notes = mmfnet("check", cohort, "--deep", *structures, "--splits", tmp_path / "splits.json").stdout
    assert "note: fold 0, train: all without inner; its training will be refused\n" in notes
    assert "note: fold 0, validation: all without inner\n" in notes
    assert "without tumour" not in done.stdout
    assert "without whole" not in done.stdout


def test_patients_that_cannot_be_used(mmfnet, cohort, monkeypatch):
    (cohort / "patient_02" / "t2.nii.gz").unlink()
    (cohort / "patient_03" / "t1.nii.gz").write_bytes(b"no image")
    shutil.copytree(cohort / "patient_00", cohort / "patient_00_again")
    monkeypatch.setattr("keras_mmfnet.data.survey.read_image", lambda *_: pytest.fail("voxels were read"))
    # A plan takes patients without a sequence; other recipes refuse them.
    planned = mmfnet("check", cohort, code=1)
    assert "unusable: patient_02: " not in planned.stdout
    assert "lacking t2: 1 patient: patient_02" in planned.stdout
    done = mmfnet("check", cohort, "--set", "data.allow_missing=false", code=1)
    assert "unusable: patient_02: " in done.stdout
    assert "unusable: patient_03: " in done.stdout
    assert "the same images: patient_00, patient_00_again" in done.stdout
    assert ["patient_00", "t1", "cet1", "32x32x20", "3x3x4", "LPS", "no", "-", "yes"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 2 of 7 patients cannot be used; mmfnet train --skip-bad leaves them out: patient_02")
    assert mmfnet("check", cohort, "--quiet", code=1).stdout == ""
    assert read_image(cohort / "patient_00" / "t1.nii.gz", "x").GetSize() == (32, 32, 20)


def test_patients_without_a_mask_and_one_patient(mmfnet, cohort):
    one = mmfnet("check", cohort / "patient_00")
    assert "1 patient can be used" in one.stdout
    for mask in cohort.glob("*/mask.nii.gz"):
        mask.unlink()
    done = mmfnet("check", cohort, code=1)
    assert ["patient_05", "t1", "cet1", "32x32x20", "3x3x4", "LPS", "no", "-", "no"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("unusable: ")]
    assert line.startswith("unusable: patient_00: a mask is needed to train on this patient; --no-mask")
    assert line.endswith("(likewise for 5 others: patient_01, patient_02, patient_03, patient_04, patient_05)")
    assert "error: 6 of 6 patients cannot be used: patient_00, " in done.stderr
    assert "6 patients can be used" in mmfnet("check", cohort, "--no-mask").stdout
    assert "1 patient can be used" in mmfnet("check", cohort / "patient_00", "--no-mask", "--deep").stdout
    for image in cohort.glob("*/t2.nii.gz"):
        image.unlink()
    done = mmfnet("check", cohort, "--no-mask", code=1)
    assert "t2: is missing" in done.stdout
