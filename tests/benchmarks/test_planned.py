import importlib
import json
import sys

import pytest

from keras_mmfnet.recipe import Recipe


@pytest.fixture
def planned(benchmarks, monkeypatch, tmp_path, tiny_cohort):
    """The script, with its results in a temporary folder and the recipes of the small patients."""
    script = importlib.import_module("planned")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    given = {"training.folds": 3, "data.align": "header", "patches.misalignment": (0, 0), "network.filters": (2, 4)}
    needed = {"data.spacing": 4.0, "patches.shape": (16, 16, 16)}
    monkeypatch.setitem(script.DATA, tiny_cohort.name, (given, needed))
    return script


def test_each_recipe_and_fold_is_done_once_on_the_same_folds(planned, tiny_cohort, tmp_path, monkeypatch, capsys):
    done = []

    def run_fold(run, method, fold):
        done.append((run.folder.name, fold, run.folds))
        dice = 0.9 if run.folder.name == "planned" else 0.4
        patients = [{"patient": name, "structure": "tumour", "dsc": dice} for name in run.folds[fold].test]
        return {"fold": fold, "parameters": 1, "updates": 2, "machine": {}, "history": [], "patients": patients}

    monkeypatch.setattr(planned, "run_fold", run_fold)
    arguments = ["planned.py", "--data", str(tiny_cohort), "--out", str(tmp_path / "out"), "--folds"]
    for folds in ("0", "0,1"):
        monkeypatch.setattr(sys, "argv", [*arguments, folds])
        planned.main()
    assert [(name, fold) for name, fold, _ in done] == [("planned", 0), ("small", 0), ("planned", 1), ("small", 1)]
    assert all(folds == done[0][2] for *_, folds in done)
    [results] = (tmp_path / "results").iterdir()
    recipes = [Recipe.load(results / name / "recipe.json") for name in ("planned", "small")]
    assert [recipe.training.balance for recipe in recipes] == ["volume", None]
    assert recipes[0].reasons
    assert [*json.loads((results / "folds.json").read_text())[0]] == ["train", "validation", "test"]
    table = capsys.readouterr().out
    assert (
        "| planned | tumour | 0.900 | 0.900 | 0% | +0.500 [+0.500, +0.500] | +0.500 [+0.500, +0.500] | 4 | 2 |" in table
    )
    assert "| small | tumour | 0.400 | 0.400 | 100% |  |  | 4 | 2 | 0 |" in table


def test_unknown_data(planned, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["planned.py", "--out", str(tmp_path), "--data", "other"])
    with pytest.raises(SystemExit):
        planned.main()
    assert "Received: other" in capsys.readouterr().err
