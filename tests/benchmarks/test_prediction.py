import importlib
import json
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture
def prediction(benchmarks, monkeypatch, tmp_path):
    script = importlib.import_module("prediction")
    monkeypatch.syspath_prepend(benchmarks / "peers")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    yield script
    sys.modules.pop("nnunet", None)


def test_each_command_gets_the_same_patients(prediction, tiny_cohort, tmp_path, monkeypatch):
    recipe = Recipe.small().replace({"data.modalities": ("t1", "t2"), "training.folds": 3})
    run = Run.start(tmp_path / "seed_0", tiny_cohort, recipe)
    names, called = run.folds[1].test, []
    (run.folder / "nnunet").mkdir()  # as the training makes it
    monkeypatch.setattr(prediction.subprocess, "run", lambda command, **options: called.append(command))
    for method in ("mmfnet", "nnunet_scaled"):
        (tmp_path / method).mkdir()
        prediction.prepare(run, 1, method, names, tmp_path / method)()
    ours, theirs = called
    assert ours[1:4] == ["segment", str(run.folder), str(tmp_path / "mmfnet" / "images")]
    assert ours[ours.index("--fold") + 1] == "1"
    assert {path.name for path in (tmp_path / "mmfnet" / "images").iterdir()} == set(names)
    assert theirs[theirs.index("-d") + 1] == "101"
    assert theirs[theirs.index("-p") + 1] == "nnUNetPlans_scaled"
    for name in names:
        [t1, t2] = (tmp_path / "nnunet_scaled" / "images" / f"{name}_{n:04d}.nii.gz" for n in range(2))
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(run.cases[name].images["t1"])))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(t1))), expected)
        assert t2.exists()


def test_seconds_and_memory(prediction, tiny_cohort, tmp_path, monkeypatch):
    run = Run.start(tmp_path / "seed_0", tiny_cohort, Recipe.small().replace({"data.modalities": ("t1", "t2")}))

    def prepare(run, fold, method, names, folder):
        # Takes at least 100 MB.
        return lambda: prediction.subprocess.run([sys.executable, "-c", "bytes(range(256)) * 400_000"], check=True)

    monkeypatch.setattr(prediction, "prepare", prepare)
    seconds, memory = prediction.measure(run.folder, 0, "mmfnet", 1)
    assert 0 < seconds < 20
    assert 97 < memory < 20_000


def test_the_start_is_told_from_each_further_patient(prediction, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "in_a_process", lambda run, fold, method, count: (10.0 + 2.0 * count, 500.0))
    monkeypatch.setattr(sys, "argv", ["prediction.py", "--run", str(tmp_path), "--name", "tiny"])
    prediction.main()
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert result["methods"] == {"mmfnet": {"seconds of one": 12.0, "seconds of each further": 2.0, "memory, MB": 500}}
