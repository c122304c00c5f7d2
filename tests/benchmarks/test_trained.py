import dataclasses
import importlib
import json
import sys

import keras
import numpy as np
import pytest

from keras_mmfnet.data import find_cases, five_folds
from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory):
    """A folder as reproduce_tables.py leaves it, with a network that has been trained a little, and its recipe."""
    folder, recipe = (
        tmp_path_factory.mktemp("run"),
        Recipe.small().replace({"data.spacing": 4.0, "training.folds": 3, "patches.shape": (16, 16, 16)}),
    )
    cases = [case.name for case in find_cases(tiny_cohort, recipe.data)]
    fold = five_folds(cases, 3, recipe.training.validation_fraction, recipe.training.seed)[0]
    (folder / "recipe.json").write_text(recipe.to_json())
    cohort = {"data": str(tiny_cohort), "patients": dict.fromkeys(cases), "folds": [dataclasses.asdict(fold)]}
    (folder / "cohort.json").write_text(json.dumps(cohort))
    (folder / "fold_0").mkdir()
    keras.utils.set_random_seed(0)
    network = MMFNet(recipe.data.modalities, recipe.patches.shape, (2, 3), reduction=2)
    rng = np.random.default_rng(0)
    network.set_weights([weight + 0.3 * rng.normal(size=weight.shape) for weight in network.get_weights()])
    network.layers[-1].bias.assign([0.0])
    network.save(folder / "fold_0" / "mmfnet_mlp_std.keras")
    return folder


def run(name, trained, tmp_path, benchmarks, monkeypatch):
    script = importlib.import_module(name)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--run", str(trained)])
    script.main()
    return json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))


def test_what_a_missing_modality_costs(trained, tmp_path, benchmarks, monkeypatch):
    result = run("missing_modalities", trained, tmp_path, benchmarks, monkeypatch)
    assert list(result["without"]) == ["t1", "t2", "cet1", "t1, t2", "t1, cet1", "t2, cet1"]
    for name, numbers in result["without"].items():
        assert numbers["dsc"] - result["dsc"] == pytest.approx(numbers["mean"]), name
        assert numbers["patients"] == result["patients"] == 2
    load, recipe, _, test = importlib.import_module("trained").open_run(
        importlib.import_module("argparse").Namespace(run=trained, method="mmfnet_mlp_std", fold=0)
    )
    found = []
    for case in test:
        images = {**case.images, "t2": np.zeros_like(case.images["t2"])}
        volume = predict_volume(load(), images, recipe.patches.shape, recipe.patches.stride, case.centre)[..., 0]
        found.append(evaluate_case(volume, case.mask, case.spacing)["dsc"])
    assert result["without"]["t2"]["dsc"] == pytest.approx(np.mean(found))


def test_attention_that_is_the_same_for_all_loses_nothing_by_its_mean(trained, tmp_path, benchmarks, monkeypatch):
    path = trained / "fold_0" / "mmfnet_mlp_std.keras"
    kept, network = path.read_bytes(), keras.models.load_model(path, compile=False)
    for layer in network.layers:
        if layer.name.startswith("fusion"):
            # Weights of one half, whatever the patient.
            attention = layer.channel_attention
            attention.set_weights([np.zeros(weight.shape) for weight in attention.get_weights()])
    try:
        network.save(path)
        result = run("fixed_attention", trained, tmp_path, benchmarks, monkeypatch)
    finally:
        path.write_bytes(kept)
    lost = {name: abs(numbers["mean"]) for name, numbers in result["less_the_network's_own"].items()}
    assert lost["channel"] < 1e-6 < lost["spatial"] == pytest.approx(lost["both"])


def test_where_the_attention_looks(trained, tmp_path, benchmarks, monkeypatch):
    script = importlib.import_module("attention_maps")

    def weights_of(model, case, recipe, blocks):
        return dict.fromkeys(blocks, np.where(case.mask > 0, 0.75, 0.25))

    weights = script.weights_of
    monkeypatch.setattr(script, "weights_of", weights_of)
    result = run("attention_maps", trained, tmp_path, benchmarks, monkeypatch)
    assert len(result["inside_and_rest"]) == 2
    assert all(one == [0.75, 0.25] for blocks in result["inside_and_rest"].values() for one in blocks.values())
    assert all(sum(share.values()) == pytest.approx(1) for share in result["share"].values())
    assert (trained / "attention_maps.png").stat().st_size > 1000
    arguments = importlib.import_module("argparse").Namespace(run=trained, method="mmfnet_mlp_std", fold=0)
    load, recipe, _, [case, _] = importlib.import_module("trained").open_run(arguments)
    found = weights(load(), case, recipe, ["fusion1"])["fusion1"]
    assert found.shape == case.shape
    assert 0 < found.max() < 1


def test_a_network_that_is_not_there(trained, benchmarks, monkeypatch, tmp_path):
    script = importlib.import_module("missing_modalities")
    arguments = ["--run", str(trained), "--fold", "1"]
    monkeypatch.setattr(sys, "argv", ["missing_modalities.py", *arguments])
    with pytest.raises(SystemExit, match=r"a trained network is expected. Received: .*fold_1"):
        script.main()
