import importlib
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from keras_mmfnet.cli._options import import_files
from keras_mmfnet.losses import DiceCrossEntropy, DiceLoss
from keras_mmfnet.methods import METHODS, Method
from keras_mmfnet.models._blocks import exclusive_softmax
from keras_mmfnet.recipe import Recipe


@pytest.fixture
def peers(benchmarks):
    """The module of MONAI's networks, which registers them; they are forgotten afterwards."""
    pytest.importorskip("monai")
    known = dict(METHODS)
    sys.modules.pop("monai_peers", None)
    yield importlib.import_module("monai_peers")
    METHODS.clear()
    METHODS.update(known)


def test_the_script_is_the_command_with_monais_networks(benchmarks, peers, monkeypatch, capsys):
    for name in ("monai_dynunet", "monai_segresnet", "monai_basicunet"):
        assert METHODS.pop(name).train
    monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", "--methods", "list"])
    monkeypatch.setattr("keras_mmfnet.cli.memory.keep_freed_memory", lambda: False)
    with pytest.raises(SystemExit) as end:
        importlib.import_module("reproduce_tables").main()
    assert not end.value.code
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == list(METHODS)
    assert names[-3:] == ["monai_dynunet", "monai_segresnet", "monai_basicunet"]


def test_self_transfer_at_one_rate(benchmarks):
    try:
        import_files([benchmarks / "transfer_rate.py"])
        method = METHODS["mmfnet_transfer_fast"]
        recipe = Recipe().replace({"training.pretrain_learning_rate": 1e-2, "training.learning_rate": 1e-3})
        assert method.adapt(recipe).training.learning_rate == 1e-2
        assert method.encoders == METHODS["mmfnet_mlp_std_transfer"].encoders
        assert METHODS["mmfnet_mlp_std_transfer"].adapt(recipe).training.learning_rate == 1e-3
    finally:
        METHODS.pop("mmfnet_transfer_fast", None)


def small_peer(channels, structures):
    from monai.networks.nets import SegResNet

    blocks = {"blocks_down": (1, 1), "blocks_up": (1,)}
    return SegResNet(3, init_filters=8, in_channels=channels, out_channels=structures, **blocks)


def test_a_peer_goes_on_after_an_interruption(peers, make_case, tmp_path, monkeypatch):
    peer = Method("tiny", "Tiny", small_peer, train=peers.train_peer)
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
    predict, parameters, history = peer.train(peer, cases[:2], cases[2:], recipe, tmp_path)
    assert len(history) == 3

    (tmp_path / "other").mkdir()
    save = peers.torch.save

    def stop(state, path):
        save(state, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(peers.torch, "save", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            peer.train(peer, cases[:2], cases[2:], recipe, tmp_path / "other")
        partial = tmp_path / "other" / "tiny.partial"
        partial.rename(tmp_path / "other" / "tiny.pt")
    monkeypatch.setattr(peers.torch, "save", save)
    again, _, repeated = peer.train(peer, cases[:2], cases[2:], recipe, tmp_path / "other")
    images = {name: np.random.default_rng(0).normal(size=(1, 16, 16, 16, 1)).astype("float32") for name in ("t1", "t2")}
    assert predict(images).shape == (1, 16, 16, 16, 1)
    np.testing.assert_allclose(again(images), predict(images), rtol=1e-4)
    assert [row["val_loss"] for row in repeated] == pytest.approx([row["val_loss"] for row in history], rel=1e-4)
    assert parameters == sum(weight.numel() for weight in small_peer(2, 1).parameters())


def test_peers_have_about_the_parameters_of_mmfnet(peers):
    ours = METHODS["mmfnet_mlp_std"].build(Recipe().replace({"patches.shape": (16, 32, 32)}), "float32").count_params()
    for name in ("monai_dynunet", "monai_segresnet", "monai_basicunet"):
        theirs = sum(weight.numel() for weight in METHODS[name].build(3, 1).parameters())
        assert 0.85 < theirs / ours < 1.15
    loss = peers.dice_loss(*(peers.torch.tensor(x) for x in ([0.5, 1.0, 0.0], [1.0, 1.0, 0.0])))
    assert loss.item() == pytest.approx(1 - (2 * 1.5 + 1) / (1.5 + 2 + 1))


def test_peers_of_several_structures(peers):
    torch = peers.torch
    logits = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for exclusive in (True, False):
        ours = keras.activations.sigmoid if not exclusive else exclusive_softmax
        expected = keras.ops.convert_to_numpy(ours(keras.ops.convert_to_tensor(logits.movedim(1, -1).numpy())))
        found = peers.Probability(torch.nn.Identity(), exclusive)(logits).movedim(1, -1).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    truth = (torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) > 0).float()
    pair = [x.movedim(1, -1).numpy() for x in (truth, torch.sigmoid(logits))]
    expected = float(keras.ops.convert_to_numpy(DiceLoss()(*pair)))
    assert peers.dice_loss(torch.sigmoid(logits), truth).item() == pytest.approx(expected, rel=1e-5)
    other = SimpleNamespace(training=SimpleNamespace(loss="dice_ce"), data=SimpleNamespace(exclusive=False))
    if keras.backend.backend() == "torch":
        expected = keras.ops.convert_to_numpy(DiceCrossEntropy(exclusive=False)(*pair))
        assert peers.loss_of(other)(torch.sigmoid(logits), truth).item() == pytest.approx(float(expected), rel=1e-5)
    else:
        with pytest.raises(ValueError, match=r"KERAS_BACKEND=torch only\. Received: dice_ce on "):
            peers.loss_of(other)
    for name in ("monai_dynunet", "monai_segresnet", "monai_basicunet"):
        network = METHODS[name].build(3, 2).eval()
        with torch.no_grad():
            assert network(torch.zeros(1, 3, 16, 32, 32)).shape == (1, 2, 16, 32, 32)
