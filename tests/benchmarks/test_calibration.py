import importlib
import json
import sys

import numpy as np
import pytest
from scipy import special

from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture
def calibration(benchmarks, monkeypatch, tmp_path):
    script = importlib.import_module("calibration")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    return script


def test_the_expected_dsc_is_that_of_masks_drawn_from_the_probabilities(calibration):
    rng = np.random.default_rng(0)
    probability = rng.beta(0.5, 0.5, (1, 10, 20, 20))
    found = calibration.numbers_of(probability)
    drawn = [
        calibration.dice(probability[0] >= 0.5, rng.random(probability[0].shape) < probability[0]) for _ in range(50)
    ]
    assert found["expected_dsc"] == pytest.approx(np.mean(drawn), abs=0.01)
    assert set(found) == {"expected_dsc", "uncertainty"}


def test_networks_that_differ(calibration):
    one, other = np.zeros((2, 1, 2, 4))
    one[0, 0], other[0, 0, :2] = 1.0, 1.0
    found = calibration.numbers_of(np.stack([one, other]))
    assert found["agreement"] == pytest.approx(2 * 2 / (4 + 2))
    assert found["spread"] == pytest.approx((0 + 0 + 0.5 + 0.5) / 4)
    nothing = calibration.numbers_of(np.zeros((2, 1, 2, 4)))
    assert nothing == {"expected_dsc": 0.0, "uncertainty": 1.0, "spread": 0.5, "agreement": 0.0}


def test_a_number_that_finds_the_failures(calibration):
    dsc = [0.9, 0.8, 0.3, 0.7, 0.1]
    rows = [{"dsc": one, "expected_dsc": one / 2, "uncertainty": one} for one in dsc]
    found = calibration.judge(rows)
    assert found["expected_dsc"] == {"auroc": 1.0, "spearman": pytest.approx(1.0)}
    assert found["uncertainty"] == {"auroc": 0.0, "spearman": pytest.approx(-1.0)}
    assert calibration.judge(rows[:2])["expected_dsc"] == {"auroc": None, "spearman": pytest.approx(1.0)}
    assert calibration.judge([{"dsc": one, "agreement": 1.0} for one in dsc]) == {
        "agreement": {"auroc": 0.5, "spearman": None}
    }


def test_from_runs_to_the_chart(calibration, tiny_cohort, tmp_path, monkeypatch):
    changes = {"data.modalities": ("t1", "t2"), "data.spacing": None, "training.folds": 3}
    runs = []
    for seed in (0, 1):
        recipe = Recipe.small().replace({**changes, "training.seed": seed})
        splits = runs[0].folds if runs else None
        runs.append(Run.start(tmp_path / f"seed_{seed}", tiny_cohort, recipe, splits=splits))

    def load(path):
        steepness = 2.0 if "seed_0" in str(path) else 8.0
        return lambda images: special.expit(steepness * (np.asarray(images["t2"]) - 1.0))

    monkeypatch.setattr(calibration, "load_network", load)
    folders = ",".join(str(run.folder) for run in runs)
    options = ["--runs", folders, "--folds", "0,1", "--name", "tiny"]
    monkeypatch.setattr(sys, "argv", ["calibration.py", *options])
    calibration.main()
    result = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert [row["patient"] for row in result["patients"]] == [*runs[0].folds[0].test, *runs[0].folds[1].test]
    [found] = result["structures"].values()
    assert set(found["finds"]) == {"expected_dsc", "uncertainty", "spread", "agreement"}
    assert 0 < found["expected_calibration_error"] < 1
    assert (tmp_path / "results" / "tiny.png").stat().st_size > 1000
