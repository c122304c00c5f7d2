import re

import keras
import numpy as np
import pytest
from checks import POLICIES, check_model, count, fill, random_volume, to_numpy

from keras_mmfnet import models
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.models import MMFNet, MultiEncoderUNet3D, SingleEncoderUNet3D, UNet2D, UNet3D

PATCH = (4, 8, 8)
FILTERS = (2, 3)
# Per encoder: five 3x3x3 convolutions without bias, each with a scale and a shift for every channel.
ENCODER = 27 * (1 * 2 + 2 * 2 + 2 * 3 + 3 * 3 + 3 * 3) + 2 * (2 + 2 + 3 + 3 + 3)
ENCODER_MOVING = 2 * (2 + 2 + 3 + 3 + 3)
DECODER_MOVING = 2 * (3 + 2)


def decoder(skips, bottom):
    """Weights of the decoder on `skips` and `bottom` channels, the head included."""
    first = (8 * bottom * 3 + 3) + 27 * (3 + skips[1]) * 3 + 2 * 3
    second = (8 * 3 * 2 + 2) + 27 * (2 + skips[0]) * 2 + 2 * 2
    return first + second + (2 + 1)


def fusion(channels, filters, channel_mlps, reduction, spatial):
    """Weights of a fusion block of `channels` to `filters` channels."""
    hidden = channels // reduction
    attention = channel_mlps * (2 * channels * hidden + hidden + channels) + (27 * spatial + 1)
    return attention + (channels * filters + filters) + (18 * filters**2 + filters) + 2 * filters


@pytest.mark.parametrize(
    ("bottleneck", "policy"), [("concat", "float32"), *(("fusion", policy) for policy in POLICIES)]
)
def test_mmfnet(bottleneck, policy, tmp_path):
    arguments = {
        "modalities": ("flair", "dwi"),
        "patch_shape": PATCH,
        "filters": FILTERS,
        "reduction": 2,
        "channel_statistics": ("std", "max"),
        "spatial_statistics": ("std", "avg"),
        "shared_mlp": bottleneck == "concat",
        "bottleneck": bottleneck,
    }
    mlps = 1 if arguments["shared_mlp"] else 2
    blocks = [fusion(2 * filters, filters, mlps, 2, 2) for filters in FILTERS]
    moving = 2 * ENCODER_MOVING + 2 * (2 + 3) + DECODER_MOVING
    if bottleneck == "fusion":
        blocks.append(blocks[-1])
        moving += 2 * 3
    trainable = 2 * ENCODER + sum(blocks) + decoder((2, 3), bottom=3 if bottleneck == "fusion" else 6)
    check_model(MMFNet, arguments, policy, (trainable, moving), tmp_path)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_multi_encoder(policy, tmp_path):
    arguments = {"modalities": ("flair", "dwi"), "patch_shape": PATCH, "filters": FILTERS}
    weights = 2 * ENCODER + decoder((4, 6), bottom=6), 2 * ENCODER_MOVING + DECODER_MOVING
    check_model(MultiEncoderUNet3D, arguments, policy, weights, tmp_path)


def test_one_modality():
    model = MultiEncoderUNet3D(("t1",), PATCH, FILTERS)
    assert model.count_params() == UNet3D("t1", PATCH, FILTERS).count_params()
    assert MMFNet(("t1",), PATCH, FILTERS)({"t1": random_volume(1, *PATCH, 1)}).shape == (1, *PATCH, 1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("model_class", "arguments", "trainable", "moving"),
    [
        (MMFNet, {}, 1_587_125, 2432),
        (MMFNet, {"shared_mlp": True}, 1_587_125 - 2 * (122 + 436 + 1640 + 6352 + 6352), 2432),
        (MultiEncoderUNet3D, {}, 1_700_313, 2064),
    ],
)
def test_paper_size(model_class, arguments, trainable, moving):
    model = model_class(**arguments)
    assert (count(model.trainable_weights), count(model.non_trainable_weights)) == (trainable, moving)
    assert list(model.input) == ["t1", "t2", "cet1"]
    assert {tuple(x.shape) for x in model.input.values()} == {(None, 16, 256, 256, 1)}
    assert tuple(model.output.shape) == (None, 16, 256, 256, 1)


@pytest.mark.parametrize("model_class", [MMFNet, MultiEncoderUNet3D])
def test_encoders_are_apart(model_class):
    model = model_class(("t1", "t2"), PATCH, FILTERS)
    one, other = (model.encoder(name) for name in model.modalities)
    assert not {id(w) for w in one.weights} & {id(w) for w in other.weights}
    assert len(one.outputs) == len(FILTERS) + 1
    with pytest.raises(ValueError, match=r"has no encoder for this modality alone. Received: 'cet1'$"):
        model.encoder("cet1")


def test_modality_dropout():
    arguments = {"modalities": ("t1", "t2"), "patch_shape": PATCH, "filters": FILTERS, "reduction": 2}
    model = MMFNet(**arguments, modality_dropout=0.5)
    plain = MMFNet(**arguments)
    fill(plain)
    model.set_weights([*plain.get_weights(), *model.get_weights()[len(plain.weights) :]])
    inputs = {name: random_volume(256, *PATCH, 1, seed=seed) for seed, name in enumerate(model.modalities)}
    few = {name: x[:4] for name, x in inputs.items()}
    np.testing.assert_array_equal(to_numpy(model(few)), to_numpy(plain(few)))

    dropped = {name: to_numpy(x) for name, x in model._drop(inputs).items()}
    stays = {name: x.any(axis=(1, 2, 3, 4)) for name, x in dropped.items()}
    for name, x in dropped.items():
        np.testing.assert_array_equal(x[stays[name]], inputs[name][stays[name]])
        # Half of them by their own number, and of the quarter in which both numbers are low, half.
        assert stays[name].mean() == pytest.approx(0.625, abs=0.12)
    assert (stays["t1"] | stays["t2"]).all()
    again = {name: to_numpy(x).any(axis=(1, 2, 3, 4)) for name, x in model._drop(inputs).items()}
    assert any((again[name] != stays[name]).any() for name in stays)

    # Of a patient without t1, t2 stays; one without any is no error.
    lacking = {"t1": 0 * inputs["t1"], "t2": np.where(np.arange(256)[:, None, None, None, None], inputs["t2"], 0)}
    np.testing.assert_array_equal(to_numpy(model._drop(lacking)["t2"]), lacking["t2"])

    model.compile(keras.optimizers.Adam(1e-3), DiceLoss())
    assert np.isfinite(model.fit(few, (few["t1"] > 0).astype("uint8"), batch_size=2, verbose=0).history["loss"]).all()
    config = model.get_config()
    assert config["modality_dropout"] == 0.5
    assert MMFNet.from_config(config).modality_dropout == 0.5
    for wrong in (1, {"t1": 1.0}, {"cet1": 0.5}):
        with pytest.raises(ValueError, match=r"`modality_dropout` must be in \[0, 1\).*Received: "):
            MMFNet(**arguments, modality_dropout=wrong)

    model = MMFNet.from_config(MMFNet(**arguments, modality_dropout={"t2": 0.75}).get_config())
    stays = {name: to_numpy(x).any(axis=(1, 2, 3, 4)) for name, x in model._drop(inputs).items()}
    assert stays["t1"].all()
    assert stays["t2"].mean() == pytest.approx(0.25, abs=0.1)


def test_frozen_encoder_stays_through_a_fit():
    model = MMFNet(("t1", "t2"), PATCH, FILTERS, reduction=2)
    fill(model)
    frozen = model.encoder("t1")
    frozen.trainable = False
    model.compile(keras.optimizers.Adam(1e-3), loss=DiceLoss())
    kept = {id(weight) for weight in frozen.weights}
    assert len(kept) == 5 * 5  # a kernel, a scale, a shift, a mean and a variance, in each of five blocks
    before = model.get_weights()
    inputs = {name: random_volume(4, *PATCH, 1, seed=seed) for seed, name in enumerate(model.modalities)}
    model.fit(inputs, (inputs["t1"] + inputs["t2"] > 0).astype("uint8"), batch_size=2, epochs=2, verbose=0)
    for weight, old, new in zip(model.weights, before, model.get_weights(), strict=True):
        assert (old == new).all() == (id(weight) in kept), weight.path

    frozen.trainable = True
    assert len(model.trainable_weights) == len(model.weights) - len([w for w in model.weights if "moving" in w.path])


@pytest.fixture
def donors():
    networks = {name: UNet3D(name, PATCH, FILTERS) for name in ("t1", "t2")}
    for seed, network in enumerate(networks.values()):
        fill(network, seed)
    return networks


@pytest.mark.parametrize("kind", ["models", "str", "Path"])
def test_self_transfer(kind, donors, tmp_path):
    sources = dict(donors)
    if kind != "models":
        for name, donor in donors.items():
            donor.save(tmp_path / f"{name}.keras")
            sources[name] = tmp_path / f"{name}.keras"
    if kind == "str":
        sources = {name: str(path) for name, path in sources.items()}
    model = MMFNet.from_pretrained_encoders(sources, reduction=2, bottleneck="concat")
    assert model.modalities == ("t1", "t2")
    assert (model.patch_shape, model.filters, model.reduction, model.bottleneck) == (PATCH, FILTERS, 2, "concat")
    for name, donor in donors.items():
        x = random_volume(1, *PATCH, 1)
        features = zip(model.encoder(name)(x), donor.encoder(name)(x), strict=True)
        assert all((to_numpy(one) == to_numpy(other)).all() for one, other in features)
        assert all(weight.trainable for weight in model.encoder(name).weights if "moving" not in weight.path)
        # Copies: what happens to the network leaves the donor as it is.
        kernel = model.encoder(name).weights[0]
        kernel.assign(kernel + 1)
        assert (to_numpy(donor.encoder(name).weights[0]) != to_numpy(kernel)).all()


def test_self_transfer_settings(donors):
    model = MMFNet.from_pretrained_encoders(
        donors, modalities=("t2", "t1"), patch_shape=(8, 8, 8), dtype="mixed_bfloat16"
    )
    assert model.modalities == ("t2", "t1")
    assert model.patch_shape == (8, 8, 8)
    assert model.dtype_policy.name == "mixed_bfloat16"
    for name, donor in donors.items():
        pairs = zip(model.encoder(name).get_weights(), donor.encoder(name).get_weights(), strict=True)
        assert all((one == other).all() for one, other in pairs)


def test_self_transfer_from_a_network_of_several(donors):
    source = MultiEncoderUNet3D(("t1", "t2"), PATCH, FILTERS)
    model = MMFNet.from_pretrained_encoders({"t1": source, "t2": donors["t2"]})
    pairs = zip(model.encoder("t1").get_weights(), source.encoder("t1").get_weights(), strict=True)
    assert all((one == other).all() for one, other in pairs)


def test_self_transfer_of_other_settings_and_sequences():
    """From an MMFNet of two sequences, one of which is taken, and with a sequence that nobody has seen."""
    levels = {"strides": ((1, 2, 2), (2, 2, 2)), "kernel_sizes": ((1, 3, 3), (3, 3, 3))}
    donor = MMFNet(("t1", "t2"), PATCH, FILTERS, **levels, normalization="instance", residual=True)
    fill(donor)
    model = MMFNet.from_pretrained_encoders({"flair": None, "t2": donor})
    assert model.modalities == ("flair", "t2")
    assert (model.strides, model.kernel_sizes) == (donor.strides, donor.kernel_sizes)
    assert (model.normalization, model.residual) == ("instance", True)
    x = random_volume(1, *PATCH, 1)
    for one, other in zip(model.encoder("t2")(x), donor.encoder("t2")(x), strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    assert (model.encoder("flair").get_weights()[0] != donor.encoder("t2").get_weights()[0]).any()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"t1": lambda: None, "t2": lambda: None}, {}, "must have at least one network. Received: {'t1': None, .*"),
        ({}, {"residual": True}, "for 't1' must have the residual True, as the argument `residual`. Received: False"),
        (
            {"t2": lambda: UNet3D("t2", PATCH, FILTERS, strides=((1, 2, 2), (2, 2, 2)))},
            {},
            "the strides ((2, 2, 2), (2, 2, 2)), as the encoder for 't1'. Received: ((1, 2, 2), (2, 2, 2))",
        ),
        (
            {},
            {"modalities": ("t1", "t2", "cet1")},
            "each of the modalities ('t1', 't2', 'cet1'). Received: ('t1', 't2')",
        ),
        ({}, {"modalities": ("t1",)}, "each of the modalities ('t1',). Received: ('t1', 't2')"),
        ({}, {"filters": (2, 4)}, "for 't1' must have the filters (2, 4), .* Received: (2, 3)"),
        ({"t2": lambda: UNet3D("t2", PATCH, (2, 4))}, {}, "for 't2' must have the filters (2, 3), .* Received: (2, 4)"),
        ({"t2": lambda: UNet3D("t2", (8, 8, 8), (2,))}, {}, "for 't2' must have the filters (2, 3), .* Received: (2,)"),
        ({"t2": lambda: UNet2D("t2", (8, 8), (2, 3))}, {}, "for 't2' must be 3D. Received: patch_shape=(8, 8)"),
        ({"t1": lambda: UNet2D("t1", (8, 8), (2, 3))}, {}, "for 't1' must be 3D. Received: patch_shape=(8, 8)"),
        ({"t2": lambda: UNet3D("flair", PATCH, (2, 3))}, {}, "for 't2' has no encoder for it. Received: <UNet3D .*"),
        ({"t2": lambda: SingleEncoderUNet3D(("t1", "t2"), PATCH, (2, 3))}, {}, "for 't2' has no encoder for it. .*"),
        ({"t2": lambda: keras.Sequential()}, {}, "for 't2' must be a UNet3D, or the path of one. Received: <Seq.*"),
        ({"t2": lambda: 3}, {}, "for 't2' must be a UNet3D, or the path of one. Received: 3"),
    ],
)
def test_wrong_encoders(change, arguments, message, donors):
    expected = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=f"{expected}$"):
        MMFNet.from_pretrained_encoders({**donors, **{name: make() for name, make in change.items()}}, **arguments)


def test_no_encoders():
    with pytest.raises(ValueError, match=r"^`encoders` must have at least one network. Received: {}$"):
        MMFNet.from_pretrained_encoders({})


def test_a_file_that_holds_another_model(tmp_path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "other.keras")
    with pytest.raises(ValueError, match=r"for 't1' must be a UNet3D, .* Received: .*other.keras"):
        MMFNet.from_pretrained_encoders({"t1": tmp_path / "other.keras"})


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing.keras"):
        MMFNet.from_pretrained_encoders({"t1": tmp_path / "nothing.keras"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bottleneck": "add"}, "`bottleneck` must be 'fusion' or 'concat'. Received: 'add'"),
        ({"modalities": ("t1", "t1")}, "distinct names, at least one. Received: ('t1', 't1')"),
        ({"patch_shape": (4, 8, 6)}, "2 times. Received: (4, 8, 6)"),
        ({"filters": (2, -3)}, "positive integers. Received: (2, -3)"),
        ({"reduction": 0}, "`reduction` must be a positive integer. Received: 0"),
        ({"channel_statistics": ("mean",)}, "each once. Received: ('mean',)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        MMFNet(**{"modalities": ("t1", "t2"), "patch_shape": PATCH, "filters": FILTERS, **arguments})


def test_every_public_model_is_registered():
    public = {name: getattr(models, name) for name in models.__all__}
    networks = {name for name, found in public.items() if isinstance(found, type) and issubclass(found, keras.Model)}
    assert set(public) - networks == {"load_network"}
    assert {keras.saving.get_registered_name(public[name]) for name in networks} == {
        f"keras_mmfnet>{name}" for name in networks
    }
