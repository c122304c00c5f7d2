import dataclasses
import importlib
import json
import multiprocessing
import re
import sys

import numpy as np
import pytest

from keras_mmfnet import training
from keras_mmfnet.methods import METHODS
from keras_mmfnet.models import methods as registry
from keras_mmfnet.recipe import Recipe

MINE = """
from keras_mmfnet.methods import METHODS, Method, register_method
from keras_mmfnet.models import UNet3D


def build(recipe, dtype, encoders=None):
    return UNet3D(recipe.data.modalities[0], recipe.patches.shape, (3,), dtype=dtype)


if "mine" not in METHODS:
    register_method(Method("mine", "My U-net", build, {"modalities": ("t2",)}))
"""


@pytest.fixture
def script(benchmarks, monkeypatch):
    """The script as a module, with networks small enough for a test."""
    module = importlib.import_module("reproduce_tables")
    choose = module.choose_recipe

    def tiny(parsed):
        changes = {"filters": (2,), "warmup_epochs": 1, "batch_size": 2, "patch_shape": (16, 16, 16), "spacing": 4.0}
        return choose(parsed).replace(changes)

    monkeypatch.setattr(module, "choose_recipe", tiny)
    monkeypatch.setattr(registry, "METHODS", METHODS)
    return module


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", *map(str, arguments)])
    script.main()


@pytest.mark.slow
def test_from_patients_to_a_table(script, tiny_cohort, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MINE)
    out, names = tmp_path / "out", ["mmfnet_t1_t2", "unet3d_t1", "multi_encoder", "monai_segresnet", "mine"]
    arguments = ["--data", tiny_cohort, "--out", out, "--epochs", 2, "--steps-per-epoch", 2, "--folds", 3]
    arguments += ["--fold", 0, "--import", tmp_path / "mine.py", "--methods", *names]
    peer = dataclasses.replace(script.PEERS["monai_segresnet"], build=small_peer)
    monkeypatch.setitem(script.PEERS, "monai_segresnet", peer)
    try:
        run(script, monkeypatch, *arguments)
        assert "| My U-net |" in capsys.readouterr().out
        results = {path.stem: json.loads(path.read_text()) for path in (out / "fold_0").glob("*.json")}
        assert set(results) == set(names)
        fold = json.loads((out / "cohort.json").read_text())["folds"][0]
        for name, result in results.items():
            assert result["method"] == name
            assert [row["patient"] for row in result["patients"]] == fold["test"]
            for row in result["patients"]:
                assert set(row) == {"patient", "dsc", "ap", "dice_loss", "hd95", "assd", "seconds"}
                assert row["seconds"] > 0
            assert result["updates"] == 4
            assert len(result["history"]) == 2
            assert result["training_seconds"] == pytest.approx(sum(row["seconds"] for row in result["history"]))
            assert result["parameters"] > 0
            for share in result["shares"].values():
                np.testing.assert_allclose(np.add(share["t1"], share["t2"]), np.ones(len(fold["test"])), rtol=1e-5)
        assert [name for name, result in results.items() if result["shares"]] == ["mmfnet_t1_t2"]
        # The single-modality networks are trained once, for the row of their own and for the one that borrows them.
        assert (out / "fold_0" / "unet3d_t2.keras").exists()
        table = (out / "table.md").read_text()
        assert "| **Multi-encoder multi-modality network** | 0.7005 |" in table
        page = (out / "report.html").read_text(encoding="utf-8")
        assert page.count("data:image/png;base64,") == 3
        assert "<td>My U-net</td>" in page
        for name in ("table.csv", "methods.png", "run.log"):
            assert (out / name).stat().st_size > 100

        # What is finished is not done again, even where only its numbers are left.
        for path in (out / "fold_0").glob("*.keras"):
            path.unlink()
        monkeypatch.setattr(script, "run_method", lambda *_: pytest.fail("a finished method was run again"))
        run(script, monkeypatch, *arguments)
        with pytest.raises(SystemExit, match="another recipe"):
            run(script, monkeypatch, *arguments, "--seed", 1)
    finally:
        METHODS.pop("mine", None)


def small_peer(channels):
    from monai.networks.nets import SegResNet

    return SegResNet(3, init_filters=8, in_channels=channels, out_channels=1, blocks_down=(1, 1), blocks_up=(1,))


def test_every_update_is_made_and_none_stops_early(benchmarks):
    script = importlib.import_module("reproduce_tables")
    parsed = script.parse_arguments(["--data", "x", "--out", "y", "--epochs", "7", "--learning-rate", "0.002"])
    recipe = script.choose_recipe(parsed)
    assert (recipe.training.epochs, recipe.training.patience, recipe.training.schedule) == (7, 7, "cosine")
    assert (
        recipe.training.pretrain_learning_rate,
        recipe.training.warmup_learning_rate,
        recipe.training.learning_rate,
    ) == (0.002, 0.002, 0.0002)
    assert script.choose_recipe(script.parse_arguments(["--data", "x", "--out", "y", "--paper"])) == Recipe()
    assert [method.name for method in parsed.methods][:23] == list(METHODS)


def test_self_transfer_at_one_rate(script, benchmarks, monkeypatch):
    monkeypatch.setattr(registry, "METHODS", METHODS)
    try:
        script.import_file(benchmarks / "transfer_rate.py")
        method, recipe = (
            METHODS["mmfnet_transfer_fast"],
            Recipe().replace({"training.pretrain_learning_rate": 1e-2, "training.learning_rate": 1e-3}),
        )
        assert method.adapt(recipe).learning_rate == 1e-2
        assert method.encoders == METHODS["mmfnet_mlp_std_transfer"].encoders
        assert METHODS["mmfnet_mlp_std_transfer"].adapt(recipe).learning_rate == 1e-3
    finally:
        METHODS.pop("mmfnet_transfer_fast", None)


def test_list_of_the_methods(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(script, monkeypatch, "--methods", "list")
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*METHODS, *script.PEERS]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "unet3d_t1", "unet4d"], "--methods, .*Received: unet4d"),
        (["--baseline", "unet4d"], "--baseline: .*Received: unet4d"),
        (["--paper", "--learning-rate", "0.1"], "--learning-rate: .*Received: 0.1"),
        (["--import", "nowhere.py"], "--import: .*Received: nowhere.py"),
        (["--folds", "3", "--fold", "3"], "--fold: numbers from 0 to 2 .*Received: .3."),
    ],
)
def test_bad_arguments(script, tiny_cohort, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(training, "_fit", lambda *_, **__: pytest.fail("the training started"))
    with pytest.raises(SystemExit) as error:
        run(script, monkeypatch, "--data", tiny_cohort, "--out", tmp_path / "out", *arguments)
    said = capsys.readouterr().err if error.value.code == 2 else str(error.value.code)
    assert re.search(message, said)


def hold(path, held, done):
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.set()
        done.wait(120)


def test_a_method_is_claimed_by_one_process(script, tmp_path):
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "lock", held, done))
    other.start()
    assert held.wait(120)
    with script.claim(tmp_path / "lock", wait=False) as free:
        assert not free
    other.kill()  # a process that dies gives its claim up
    other.join()
    with script.claim(tmp_path / "lock", wait=True) as free:
        assert free


def test_a_peer_goes_on_after_an_interruption(benchmarks, make_case, tmp_path, monkeypatch):
    peers = importlib.import_module("monai_peers")
    peer = peers.Peer("tiny", "Tiny", small_peer)
    recipe = Recipe().replace(
        {
            "data.modalities": ("t1", "t2"),
            "patches.shape": (16, 16, 16),
            "training.batch_size": 2,
            "training.steps_per_epoch": 2,
            "training.epochs": 3,
            "training.schedule": "cosine",
        }
    )
    cases = [make_case(f"patient {seed}", seed=seed) for seed in range(3)]
    predict, parameters, history = peers.train_peer(peer, cases[:2], cases[2:], recipe, tmp_path)
    assert len(history) == 3

    (tmp_path / "other").mkdir()
    save = peers.torch.save

    def stop(state, path):
        save(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers.torch, "save", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            peers.train_peer(peer, cases[:2], cases[2:], recipe, tmp_path / "other")
        partial = tmp_path / "other" / "tiny.partial"
        partial.rename(tmp_path / "other" / "tiny.pt")
    monkeypatch.setattr(peers.torch, "save", save)
    again, _, repeated = peers.train_peer(peer, cases[:2], cases[2:], recipe, tmp_path / "other")
    images = {name: np.random.default_rng(0).normal(size=(1, 16, 16, 16, 1)).astype("float32") for name in ("t1", "t2")}
    assert predict(images).shape == (1, 16, 16, 16, 1)
    np.testing.assert_allclose(again(images), predict(images), rtol=1e-4)
    assert [row["val_loss"] for row in repeated] == pytest.approx([row["val_loss"] for row in history], rel=1e-4)
    assert parameters == sum(weight.numel() for weight in small_peer(2).parameters())


def test_peers_have_about_the_parameters_of_mmfnet(benchmarks):
    peers = importlib.import_module("monai_peers")
    ours = METHODS["mmfnet_mlp_std"].build(Recipe().replace({"patches.shape": (16, 32, 32)}), "float32").count_params()
    for peer in peers.PEERS.values():
        theirs = sum(weight.numel() for weight in peer.build(3).parameters())
        assert 0.85 < theirs / ours < 1.15
    loss = peers.dice_loss(*(peers.torch.tensor(x) for x in ([0.5, 1.0, 0.0], [1.0, 1.0, 0.0])))
    assert loss.item() == pytest.approx(1 - (2 * 1.5 + 1) / (1.5 + 2 + 1))
