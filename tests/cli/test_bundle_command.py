"""A run that is shared: `mmfnet export --bundle`, `segment`, `explain` and `export` of it."""

import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.bundle import Bundle


@pytest.fixture
def finished(trained):
    """The folder of a run with two finished folds."""
    for fold in range(2):
        row = {"patient": f"patient_{fold:02d}", "structure": "tumour", "dsc": 0.5}
        result = {"method": "mmfnet", "fold": fold, "machine": {"keras": "3.12"}, "patients": [row]}
        (trained / f"fold_{fold}" / "mmfnet.json").write_text(json.dumps(result))
    return trained


def test_a_bundle_segments_as_its_run_does(mmfnet, finished, tiny_cohort, tmp_path):
    (tmp_path / "about.md").write_text("Heads of one hospital.")
    path, folder = tmp_path / "bundle.zip", tmp_path / "bundle"
    done = mmfnet("export", finished, "--bundle", "--about", tmp_path / "about.md", "--out", path)
    assert done.stdout == f"{path}\n"
    assert "Data and terms" in mmfnet("export", finished, "--bundle", "--out", folder).stdout
    assert "Heads of one hospital." in (Bundle(path).folder / "README.md").read_text()
    patient, out = tiny_cohort / "patient_00", tmp_path / "out"
    done = mmfnet("segment", path, patient, "--out", out, "--fold", 1)
    assert re.search(r"DSC \d\.\d{4}", done.stderr)
    assert "Segmented already: 1 of 1 patient" in mmfnet("segment", folder, patient, "--out", out, "--fold", 1).stderr
    mmfnet("segment", finished, patient, "--out", tmp_path / "own", "--fold", 1)
    assert (out / "patient_00.json").read_bytes() == (tmp_path / "own" / "patient_00.json").read_bytes()
    one, other = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(where / "patient_00.nii.gz"))) for where in (out, tmp_path / "own")
    )
    np.testing.assert_array_equal(one, other)
    assert one.any()


def test_bundles_that_are_refused(mmfnet, finished, tiny_cohort, tmp_path):
    folder, patient = tmp_path / "bundle", tiny_cohort / "patient_00"
    mmfnet("export", finished, "--bundle", "--out", folder)

    def refused(*arguments):
        return mmfnet(*arguments, code=1).stderr

    export = ("export", finished, "--bundle", "--out")
    assert "a new one in a folder that exists is expected" in refused(*export, folder)
    assert "--bundle: all folds, and a folder or .zip" in refused(*export, tmp_path / "b.onnx")
    assert "--bundle: all folds, and a folder or .zip" in refused(*export, tmp_path / "b", "--fold", 0)
    assert "--about: a file that exists, with --bundle" in refused(*export, tmp_path / "b", "--about", tmp_path / "no")
    assert "RUN: the folder of a run, with a recipe.json, is expected" in refused("export", tmp_path, *export[2:], "b")
    segment = ("segment", folder, patient, "--out", tmp_path / "out")
    assert "that is trained (0, 1) is expected. Received: 7" in refused(*segment, "--fold", 7)
    explain = ("explain", folder, patient, "--out", tmp_path / "out")
    assert "that is trained (0, 1) is expected. Received: 7" in refused(*explain, "--fold", 7, "--methods", "")
    train = ("train", tiny_cohort, "--out", tmp_path / "new", "--from")
    assert "--from: a bundle, or the folder of a run, with a recipe.json" in refused(*train, tmp_path / "nowhere")
    (folder / "recipe.json").write_text("{}")
    damaged = "recipe.json: the file whose SHA-256 is in bundle.json is expected"
    for arguments in (segment, (*train, folder)):
        assert damaged in refused(*arguments)
    shutil.copy(patient / "t1.nii.gz", tmp_path / "b.zip")
    assert "b.zip: must be an undamaged zip archive" in refused("segment", tmp_path / "b.zip", patient, *segment[-2:])
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "new").exists()
