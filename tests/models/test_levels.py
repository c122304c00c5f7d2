"""The options of the levels: strides, kernels, normalisation, residual blocks and deep supervision."""

import keras
import numpy as np
import pytest
import torch
from checks import BACKEND, check_model, fill, named_weights, random_volume, to_numpy
from torch.nn import functional

from keras_mmfnet import kernels
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.metrics import DiceScore
from keras_mmfnet.models import MMFNet, SliceWise3D, UNet2D, UNet3D, load_network
from keras_mmfnet.models._blocks import block_output

# Slices that are thick: pooled and seen across by the second level only.
THICK = {"strides": ((1, 2, 2), (2, 2, 2)), "kernel_sizes": ((1, 3, 3), (3, 3, 3))}
RESIDUAL = {"normalization": "instance", "residual": True}
SIZE = {"patch_shape": (4, 8, 8), "filters": (2, 3)}
THREE = {"patch_shape": (4, 16, 16), "filters": (2, 3, 2), "strides": ((1, 2, 2), (2, 2, 2), (2, 2, 1))}


def reference(model, x):
    """A `UNet3D` in inference as plain PyTorch; `x` is `(batch, depth, height, width, 1)`."""
    weights = {path: torch.tensor(array) for path, array in named_weights(model).items()}

    def conv(x, name, relu=True):
        kernel = weights[f"{name}_conv/kernel"].permute(4, 3, 0, 1, 2)
        x = functional.conv3d(x, kernel, padding=[n // 2 for n in kernel.shape[2:]])
        gamma, beta = weights[f"{name}_norm/gamma"], weights[f"{name}_norm/beta"]
        if model.normalization == "instance":
            x = functional.instance_norm(x, None, None, gamma, beta, eps=1e-5)
        else:
            moments = weights[f"{name}_norm/moving_mean"], weights[f"{name}_norm/moving_variance"]
            x = functional.batch_norm(x, *moments, gamma, beta, eps=1e-5)
        return functional.relu(x) if relu else x

    def block(x, name):
        y = conv(conv(x, f"{name}_1"), f"{name}_2", relu=not model.residual)
        if not model.residual:
            return y
        x = conv(x, f"{name}_shortcut", relu=False) if f"{name}_shortcut_conv/kernel" in weights else x
        return functional.relu(y + x)

    x, skips = torch.tensor(x).movedim(-1, 1), []
    for level, stride in enumerate(model.strides, start=1):
        skips.append(block(x, f"t1_block{level}"))
        x = functional.max_pool3d(skips[-1], stride)
    x = conv(x, "t1_bottom")
    for level in range(len(skips), 0, -1):
        kernel = weights[f"decoder_block{level}_up/kernel"].permute(4, 3, 0, 1, 2)
        x = functional.conv_transpose3d(
            x, kernel, weights[f"decoder_block{level}_up/bias"], stride=model.strides[level - 1]
        )
        x = conv(torch.cat([x, skips.pop()], 1), f"decoder_block{level}")
    x = functional.conv3d(x, weights["probability/kernel"].permute(4, 3, 0, 1, 2), weights["probability/bias"])
    return torch.sigmoid(x).movedim(1, -1).numpy()


@pytest.mark.parametrize("options", [THICK, RESIDUAL, {**THICK, "residual": True}])
def test_same_as_plain_pytorch(options, each_kind):
    model = UNet3D("t1", (4, 8, 8), (2, 2), **options)
    fill(model)
    x = random_volume(2, 4, 8, 8, 1)
    found = to_numpy(model({"t1": x}))
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(found, reference(model, x), rtol=1e-3, atol=1e-5)


def test_config_files_and_gradients(tmp_path):
    """Of a network of all options, whose kernels have 9 values on the first level and 27 on the second."""
    arguments = {"modality": "flair", **SIZE, **THICK, **RESIDUAL}
    encoder = 9 * (2 + 2 * 2) + 27 * (2 * 3 + 3 * 3 + 3 * 3) + (2 + 2 * 3) + 2 * (3 * 2 + 4 * 3)
    decoder = (8 * 3 * 3 + 3) + 27 * 6 * 3 + 6 + (4 * 3 * 2 + 2) + 9 * 4 * 2 + 4 + (2 + 1)
    check_model(UNet3D, arguments, "float32", (encoder + decoder, 0), tmp_path)


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend with kernels of its own for them")
def test_the_fast_kernels_take_every_stride(monkeypatch):
    monkeypatch.setattr(kernels, "_chosen", "fast")
    model = MMFNet(("t1", "t2"), **SIZE, **THICK)
    for name in ("conv", "max_pool"):
        monkeypatch.setattr(kernels.reference, name, lambda *_, name=name: pytest.fail(f"the plain {name}"))
    assert model({name: random_volume(1, 4, 8, 8, 1) for name in model.input}).shape == (1, 4, 8, 8, 1)


def test_encoders_and_their_names():
    model = MMFNet(("t1", "t2"), **SIZE, **THICK, **RESIDUAL)
    assert not any("moving" in weight.path for weight in model.weights)
    features = model.encoder("t2")(random_volume(1, 4, 8, 8, 1))
    assert [tuple(x.shape) for x in features] == [(1, 4, 8, 8, 2), (1, 4, 4, 4, 3), (1, 2, 2, 2, 3)]
    np.testing.assert_array_equal(to_numpy(features[0]) >= 0, True)
    assert model.get_layer(block_output("t2", 2, residual=True)).output is model.encoder("t2").outputs[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"strides": ((2, 2, 2),)},
            r"`strides` must have 3 numbers, each 1 or 2, for each of the 2 levels. Received: ",
        ),
        ({"strides": ((2, 2), (2, 2))}, "`strides` must have 3 numbers"),
        ({"strides": (1, 2)}, "`strides` must have 3 numbers"),
        ({"kernel_sizes": ((1, 3, 3), (2, 3, 3))}, "`kernel_sizes` must have 3 numbers, each 1 or 3, "),
        ({"normalization": "layer"}, "`normalization` must be 'batch' or 'instance'. Received: 'layer'"),
        (
            {"deep_supervision": True},
            r"`deep_supervision` must go with three or more levels. Received: filters=\(2, 3\)",
        ),
        ({"patch_shape": (4, 10, 8)}, r"the height a multiple of 4, .* halves it 2 times. Received: \(4, 10, 8\)"),
        (
            {**THICK, "patch_shape": (3, 8, 8)},
            r"the depth a multiple of 2, .* halves it 1 times. Received: \(3, 8, 8\)",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet3D(**{"patch_shape": (4, 8, 8), "filters": (2, 3), **arguments})


def dice(probability, mask):
    intersection, predicted, truth = (x.sum((0, 1, 2, 3)) for x in (probability * mask, probability, mask))
    return np.mean(1 - (2 * intersection + 1) / (predicted + truth + 1))


def test_deep_supervision(tmp_path):
    """The loss and the metrics of one update, its gradients, and what is saved."""
    keras.utils.set_random_seed(3)
    model = UNet3D("t1", **THREE, structures=("core", "rim"), deep_supervision=True)
    x = {name: random_volume(2, 4, 16, 16, 1, seed=seed) for seed, name in enumerate(model.input)}
    mask = np.zeros((2, 4, 16, 16, 2), "uint8")
    mask[:, 1, 4, 5, 0] = mask[:, 1:3, 4:9, 6:12, 1] = 1
    fine, coarse = (to_numpy(y) for y in model(x, training=True))
    assert coarse.shape == (2, 4, 8, 8, 2)
    # The maximum of each 1x2x2 voxels: the core is one voxel and is kept, beside the rim in another coarse voxel.
    pooled = mask.reshape(2, 4, 8, 2, 8, 2, 2).max((3, 5)).astype("float32")
    assert pooled[0, ..., 0].sum() == 1
    mask[:, 1, 4, 5, 1] = 0
    expected = 2 / 3 * dice(fine, mask) + 1 / 3 * dice(coarse, pooled)

    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1), DiceLoss(), metrics=[DiceScore(structures=2)])
    history = model.fit(x, mask, batch_size=2, validation_data=(x, mask), verbose=0).history
    assert history["loss"] == [pytest.approx(expected, rel=1e-4)]
    assert all((old != new).any() for old, new in zip(before, model.get_weights(), strict=True))
    found = to_numpy(model(x))
    assert history["val_loss"] == [pytest.approx(dice(found, mask), rel=1e-4)]

    model.save(tmp_path / "network.keras")
    model.save_weights(tmp_path / "network.weights.h5")
    plain = type(model).from_config(model.get_config())
    plain.load_weights(tmp_path / "network.weights.h5")
    for network in (load_network(tmp_path / "network.keras"), plain):
        assert len(network.weights) == len(model.weights) - 2
        assert not network.deep_supervision
        np.testing.assert_array_equal(to_numpy(network(x)), found)


def test_structures_that_meet_in_a_coarse_voxel():
    """Where they exclude each other they share it, so that what is left to the background is not negative."""
    losses = {}
    for exclusive in (True, False):
        model = UNet3D("t1", **THREE, structures=("core", "rim"), exclusive=exclusive)
        model.compile(loss=lambda mask, _: keras.ops.max(mask, axis=(1, 2, 3)))
        mask = np.zeros((1, 4, 16, 16, 2), "uint8")
        mask[0, 0, 0, 0, 0] = mask[0, 0, 0, 1, 1] = 1
        outputs = [np.ones((1, 4, 16, 16, 2)), np.ones((1, 4, 8, 8, 2))]
        losses[exclusive] = float(model.compute_loss(y=mask, y_pred=outputs))
    assert losses == {True: pytest.approx(2 / 3 + 1 / 3 * 0.5), False: pytest.approx(1)}


def test_deep_supervision_of_slices():
    network = UNet2D("t1", (8, 16), (2, 2, 2), strides=((1, 2), (2, 2), (2, 2)), deep_supervision=True)
    model = SliceWise3D(network, (3, 8, 16))
    x = random_volume(2, 3, 8, 16, 1)
    fine, coarse = (to_numpy(y) for y in model({"t1": x}, training=True))
    assert (fine.shape, coarse.shape) == ((2, 3, 8, 16, 1), (2, 3, 8, 8, 1))
    mask = (x > 1).astype("uint8")
    expected = 2 / 3 * dice(fine, mask) + 1 / 3 * dice(coarse, mask.reshape(2, 3, 8, 8, 2, 1).max(4))
    model.compile(loss=DiceLoss())
    loss = model.compute_loss(y=mask, y_pred=model({"t1": x}, training=True))
    assert to_numpy(loss) == pytest.approx(expected, rel=1e-4)
    assert to_numpy(model({"t1": x})).shape == (2, 3, 8, 16, 1)
    assert not SliceWise3D.from_config(model.get_config()).network.deep_supervision
