import importlib
import json
import sys

import numpy as np
import pytest
from scipy import stats

from keras_mmfnet.recipe import Recipe


@pytest.fixture
def whole_patients(benchmarks, monkeypatch, tmp_path, tiny_cohort):
    """The script, with its results in a temporary folder and the recipes of the small patients."""
    script = importlib.import_module("whole_patients")
    monkeypatch.setattr(script, "RESULTS", tmp_path / "results")
    given = {"training.folds": 3, "data.align": "header", "patches.misalignment": (0, 0), "network.filters": (2, 4)}
    needed = {"data.spacing": 4.0, "patches.shape": (16, 16, 16)}
    monkeypatch.setitem(script.DATA, tiny_cohort.name, (given, needed))
    return script


def test_each_training_is_done_once_on_the_same_folds(whole_patients, tiny_cohort, tmp_path, monkeypatch, capsys):
    done, called = [], []
    rest = {"nsd": 0.5, "hd95": 3.0, "lesion_f1": 1.0, "seconds": 1.5}

    def result_of(run, name, fold, dice):
        patients = [{"patient": one, "structure": "tumour", "dsc": dice, **rest} for one in run.folds[fold].test]
        result = {"method": name, "title": name, "fold": fold, "parameters": 1, "updates": 2, "machine": {}}
        return result | {"history": [{"epoch": 0, "loss": 1.0, "seconds": 60.0}], "patients": patients}

    def run_fold(run, method, fold):
        done.append((run.folder.parts[-2:], fold, run.folds, run.recipe.training.seed))
        for name in (*method.encoders.values(), method.name):
            run.history(fold, name).parent.mkdir(exist_ok=True)
            run.history(fold, name).write_text("epoch,loss,val_loss,seconds\n0,1.0,1.0,60.0\n")
        return result_of(run, method.name, fold, 0.9 if run.folder.parts[-2] == "planned_40" else 0.4)

    def program(command, check):
        called.append(command)
        run = whole_patients.Run(command[command.index("--run") + 1])
        run.result(0, "nnunet_scaled").write_text(json.dumps(result_of(run, "nnunet_scaled", 0, 0.5)))

    monkeypatch.setattr(whole_patients, "run_fold", run_fold)
    monkeypatch.setattr(whole_patients.subprocess, "run", program)
    common = ["whole_patients.py", "--data", str(tiny_cohort), "--out", str(tmp_path / "out")]
    for options in (("--recipes", "planned_40,small"), ("--seeds", "0,1"), ("--methods", "nnunet_scaled")):
        monkeypatch.setattr(sys, "argv", [*common, *options])
        whole_patients.main()
    assert [(*place, fold, seed) for place, fold, _, seed in done] == [
        ("planned_40", "seed_0", 0, 0),
        ("small", "seed_0", 0, 0),
        ("planned_40", "seed_1", 0, 1),
    ]
    assert all(folds == done[0][2] for _, _, folds, _ in done)
    [command] = called
    assert command[-4:] == ["--minutes", "60", "--settings", "scaled"]
    [results] = (tmp_path / "results").iterdir()
    recipes = [Recipe.load(results / name / "recipe.json") for name in ("planned_40", "small")]
    assert [recipe.training.balance for recipe in recipes] == ["volume", None]
    assert recipes[0].reasons
    table = capsys.readouterr().out.splitlines()
    # Self-transfer has a network for each of three sequences, and MMFNet; the peer one.
    assert (
        "| planned_40 | mmfnet | tumour | 0.900 | 0.900 | 0% | 0.500 | 3.0 | 1.00 |  | 1 [1, 1] "
        "| 2 | 1 | 2 | 4 | 2 | 1.5 |" in table
    )
    assert any("| small | mmfnet | tumour | 0.400" in line for line in table)
    assert any("| nnunet_scaled | tumour | 0.500" in line and "-0.400 [-0.400, -0.400]" in line for line in table)


def test_methods_take_the_sequences_of_the_recipe(whole_patients):
    recipe = Recipe.small().replace({"data.modalities": ("flair", "t1")})
    for name in ("mmfnet", "mmfnet_scratch", "single_encoder", "multi_encoder", "unet3d_flair"):
        method = whole_patients.our_method(name, recipe)
        assert method.name == name
        network = method.build(method.adapt(recipe), "float32", None)
        assert set(network.input) == ({"flair"} if name == "unet3d_flair" else {"flair", "t1"})
        assert bool(method.encoders) == (name == "mmfnet")
    base = whole_patients.our_method("mmfnet_base_transfer", recipe)
    assert base.adapt(recipe).network.channel_statistics == ("avg", "max")
    assert base.adapt(recipe).data.modalities == ("flair", "t1")
    assert base.encoders == {"flair": "unet3d_flair", "t1": "unet3d_t1"}


def test_fewer_patients_to_learn_from(whole_patients, tiny_cohort, tmp_path):
    fold = whole_patients.Fold(tuple("abcdefghi"), tuple("jkl"), tuple("mno"))
    few, more = whole_patients.fewer(fold, 4), whole_patients.fewer(fold, 8)
    assert [len(few.train), len(few.validation), few.test] == [3, 1, fold.test]
    assert [len(more.train), len(more.validation)] == [6, 2]
    assert set(few.names) <= set(more.names)
    assert whole_patients.fewer(fold, 12) == whole_patients.fewer(fold, None) == fold
    with pytest.raises(ValueError, match="2 to 12 patients are expected"):
        whole_patients.fewer(fold, 13)
    results = tmp_path / "results"
    folder = tmp_path / "out" / "small_from_2" / "seed_0"
    for _ in range(2):
        run = whole_patients.start(folder, tiny_cohort, "small", 0, results, 2)
        assert [len(fold.train) + len(fold.validation) for fold in run.folds] == [2, 2, 2]
    everyone = whole_patients.start(tmp_path / "out" / "small" / "seed_0", tiny_cohort, "small", 0, results)
    assert [fold.test for fold in everyone.folds] == [fold.test for fold in run.folds]
    assert len(everyone.folds[0].train) > 2


def test_a_variant_is_the_kept_recipe_with_changes(whole_patients, tiny_cohort, tmp_path, monkeypatch):
    def make(name):
        return whole_patients.make_recipe(name, tiny_cohort, tmp_path / "results", tmp_path / "cache")

    assert make("small_uniform").patches.foreground == 0
    varied = make("planned_1_dropout")
    assert varied.network.modality_dropout == 0.3
    monkeypatch.setattr(whole_patients, "plan_recipe", None)
    base = make("planned_1")
    assert varied == base.replace({"network.modality_dropout": 0.3})
    assert make("planned_1_scratch").training.epochs == 2 * base.training.epochs
    assert make("planned_1_215_updates").training.epochs == max(1, round(215 / base.training.steps_per_epoch))
    assert make("planned_1_misaligned") == base.replace({"patches.misalignment": (4.0, 4.0)})
    monkeypatch.setattr(sys, "argv", ["", "--data", str(tiny_cohort), "--out", "out", "--recipes", "small_other"])
    with pytest.raises(SystemExit):
        whole_patients.main()


def test_the_second_table_is_at_the_same_updates(whole_patients, tmp_path):
    patient = {"structure": "tumour", "nsd": 0.5, "hd95": 3.0, "lesion_f1": 1.0, "seconds": 1.0}
    for place, dice, updates in (
        ("planned_40/seed_0/fold_0/mmfnet", 0.9, 400),
        ("planned_40/seed_0/fold_0/nnunet_scaled", 0.5, 104),
        ("planned_40_100_updates/seed_0/fold_0/mmfnet", 0.7, 100),
    ):
        path = tmp_path / "patients" / f"{place}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [patient | {"patient": name, "dsc": dice} for name in ("anna", "ben")]
        path.write_text(json.dumps({"title": path.stem, "updates": updates, "seconds": 60.0, "patients": rows}))
    first, second = whole_patients.tables(path.parents[3], ("planned_40", "mmfnet")).split(
        "\nAt the same number of updates, 100:\n\n"
    )
    rows = [[line.split(" | ")[3] for line in text.splitlines()[2:]] for text in (first, second)]
    assert rows == [["0.900", "0.500"], ["0.500", "0.700"]]
    assert "-0.200 [-0.200, -0.200], 2" in second
    assert "DSC minus that of planned_40_100_updates mmfnet" in second


def test_unknown_data(whole_patients, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["whole_patients.py", "--out", str(tmp_path), "--data", "other"])
    with pytest.raises(SystemExit):
        whole_patients.main()
    assert "Received: other" in capsys.readouterr().err


def test_patients_whom_not_all_trainings_have_are_left_out(whole_patients):
    scores = {"a": {"anna": {0: 1.0, 1: 2.0}, "ben": {0: 3.0}}, "b": {"anna": {0: 4.0}, "ben": {0: 5.0}}}
    tables = whole_patients.common(scores)
    np.testing.assert_array_equal(tables["a"], [[1.0], [2.0]])
    np.testing.assert_array_equal(tables["b"], [[4.0]])


def test_the_bootstrap_is_scipys_over_patients(benchmarks):
    bootstrap = importlib.import_module("bootstrap")
    rng = np.random.default_rng(0)
    a, b = rng.beta(4, 1, 60), rng.beta(4, 1.5, 60)
    means = bootstrap.resample({"a": a[None], "b": b[None]}, samples=20000)
    low, high = bootstrap.interval(means["a"] - means["b"])
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: (x - y).mean(axis), paired=True, method="percentile", n_resamples=20000, rng=rng
    ).confidence_interval
    np.testing.assert_allclose((low, high), theirs, atol=0.004)


def test_the_bootstrap_widens_with_the_spread_between_trainings(benchmarks):
    bootstrap = importlib.import_module("bootstrap")
    rng = np.random.default_rng(0)
    patients, shift = rng.normal(0.8, 0.1, 100), np.array([-0.1, 0.0, 0.1])
    means = bootstrap.resample({"alike": patients + 0 * shift[:, None], "other": patients + shift[:, None]})
    # Three trainings that are drawn with replacement have this standard error, patients another; they add up.
    within, between = patients.std() / 10, shift.std() / np.sqrt(3)
    assert means["alike"].std() == pytest.approx(within, rel=0.05)
    assert means["other"].std() == pytest.approx(np.hypot(within, between), rel=0.05)


def test_ranks(benchmarks):
    bootstrap = importlib.import_module("bootstrap")
    means = {"a": np.array([0.9, 0.9, 0.9, 0.4]), "b": np.array([0.5, 0.5, 0.5, 0.5]), "c": np.zeros(4)}
    found = bootstrap.ranks(means)
    assert found["c"] == (3, 3, 3)
    assert found["a"][1] == 1
    assert found["a"][2] > 1
