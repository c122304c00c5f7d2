import importlib
import json
import sys

import pytest
from checks import to_numpy


@pytest.fixture
def learning(benchmarks, monkeypatch, tmp_path, tiny_cohort):
    """The script, with its results in a temporary folder and the recipe of the small patients."""
    script = importlib.import_module("learning")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    small = {"data.spacing": 4.0, "patches.shape": (16, 16, 16), "network.filters": (2,), "training.folds": 3}
    monkeypatch.setitem(script.DATA, tiny_cohort.name, small)
    return script


def test_each_training_is_done_once(learning, tiny_cohort, tmp_path, monkeypatch, capsys):
    done = []

    def run_fold(run, method, fold):
        model = method.build(method.adapt(run.recipe), "float32")
        done.append((method.name, fold, float(to_numpy(model.get_layer("probability").bias)[0])))
        assert method.adapt(run.recipe).training.seed == 5
        assert (run.recipe.training.steps_per_epoch, run.recipe.training.epochs) == (40, 2)
        rows = [{"patient": name, "dsc": 0.5 + 0.1 * len(done)} for name in run.folds[fold].test]
        history = [{"val_loss": 0.3}]
        return {"fold": fold, "updates": 80, "training_seconds": 1.0, "machine": {}, "history": history} | {
            "patients": rows
        }

    monkeypatch.setattr(learning, "run_fold", run_fold)
    arguments = ["--data", str(tiny_cohort), "--out", str(tmp_path / "out"), "--updates", "80", "--seeds", "5"]
    for names in ("reference,cosine", "reference,cosine,bias_-3"):
        monkeypatch.setattr(sys, "argv", ["learning.py", *arguments, "--only", names])
        learning.main()
    assert done == [("reference_seed5", 0, 0.0), ("cosine_seed5", 0, 0.0), ("bias_-3_seed5", 0, -3.0)]
    [folder] = (tmp_path / "results").iterdir()
    found = json.loads((folder / "cosine_fold0_seed5.json").read_text(encoding="utf-8"))
    assert found["recipe"]["training"]["schedule"] == "cosine"
    assert "| bias_-3 | 0.800 | 0.800 | 0.800 | +0.200 [+0.200, +0.200] | +0.200" in capsys.readouterr().out


def test_the_table_by_hand(learning, tmp_path):
    for name, seed, scores in (
        ("reference", 0, [0.2, 0.4, 0.9]),
        ("reference", 1, [0.4, 0.4, 0.9]),
        ("cosine", 0, [0.4, 0.4, 0.8]),
        ("cosine", 1, [0.4, 0.6, 0.8]),
        ("cosine", 2, [0.1, 0.1, 0.1]),  # a seed that the reference lacks
    ):
        one = {"training": name, "recipe": {"training": {"seed": seed}}}
        one["dsc"] = dict(zip("abc", scores, strict=True)) | {"without tumour": None}
        (tmp_path / f"{name}_{seed}.json").write_text(json.dumps(one))
    *_, reference, cosine = learning.table(tmp_path, learning.STARTS).splitlines()
    assert reference == "| reference | 0.533 | 0.500 0.567 | 0.400 |  |  | 3 |"
    # By patient 0.4, 0.5 and 0.8, less 0.3, 0.4 and 0.9.
    assert cosine.startswith("| cosine | 0.567 | 0.533 0.600 0.100 | 0.500 | +0.033 [-0.100, +0.100] | +0.100 [-0.1")


def test_unknown_names(learning, monkeypatch, capsys, tmp_path):
    for arguments, message in (
        (["--data", "lgg_patients", "--only", "adam"], "Received: adam"),
        (["--data", "other"], "Received: other"),
    ):
        monkeypatch.setattr(sys, "argv", ["learning.py", "--out", str(tmp_path), *arguments])
        with pytest.raises(SystemExit):
            learning.main()
        assert message in capsys.readouterr().err
