import numpy as np
import pytest
from checks import POLICIES, check_model, count, fill, global_policy, random_volume, to_numpy

from keras_mmfnet.models import SingleEncoderUNet3D, UNet2D, UNet3D


def norm(filters):
    return 2 * filters


def conv(inputs, filters, kernel=27):
    """Weights of a convolution without bias and of the normalization after it."""
    return kernel * inputs * filters + norm(filters)


def decoder(f1, f2, bottom, skips, rank=3):
    """Weights of a decoder over two levels with the filters `f1` and `f2`, on `bottom` channels."""
    kernel, up = 3**rank, 2**rank
    return (
        (up * bottom * f2 + f2)
        + conv(f2 + skips[1], f2, kernel)
        + (up * f2 * f1 + f1)
        + conv(f1 + skips[0], f1, kernel)
        + (f1 + 1)
    )


def encoder(f1, f2, channels=1, rank=3):
    kernel = 3**rank
    return sum(conv(a, b, kernel) for a, b in [(channels, f1), (f1, f1), (f1, f2), (f2, f2), (f2, f2)])


CONFIGURATIONS = {
    "2d": (UNet2D, {"modality": "flair", "patch_shape": (8, 12), "filters": (2, 3)}, 2),
    "3d": (UNet3D, {"modality": "flair", "patch_shape": (4, 8, 8), "filters": (2, 3)}, 3),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_single_modality(name, policy, tmp_path):
    model_class, arguments, rank = CONFIGURATIONS[name]
    trainable = encoder(2, 3, rank=rank) + decoder(2, 3, bottom=3, skips=(2, 3), rank=rank)
    # Moving mean and variance of each convolution's channels: in the encoder, then in the decoder.
    moving = 2 * (2 * 2 + 3 * 3 + 2 + 3)
    check_model(model_class, arguments, policy, (trainable, moving), tmp_path)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_single_encoder(policy, tmp_path):
    arguments = {"modalities": ("flair", "dwi"), "patch_shape": (4, 8, 8), "filters": (2, 3)}
    trainable = encoder(4, 6, channels=2) + decoder(2, 3, bottom=6, skips=(4, 6))
    moving = 2 * (2 * 4 + 3 * 6 + 2 + 3)
    check_model(SingleEncoderUNet3D, arguments, policy, (trainable, moving), tmp_path)


@pytest.mark.parametrize(
    ("model_class", "trainable", "moving"),
    [(UNet2D, 236_121, 848), (UNet3D, 679_273, 848), (SingleEncoderUNet3D, 3_681_897, 2064)],
)
def test_paper_size(model_class, trainable, moving):
    model = model_class()
    assert (count(model.trainable_weights), count(model.non_trainable_weights)) == (trainable, moving)
    assert all(tuple(x.shape[1:-1]) == model.patch_shape for x in model.input.values())
    assert tuple(model.output.shape[1:]) == (*model.patch_shape, 1)


def test_first_probability():
    # The paper's head has no bias at the start: the first probabilities scatter around one half.
    model = UNet3D("t1", (4, 8, 8), (2, 3))
    model.get_layer("probability").kernel.assign(np.zeros((1, 1, 1, 2, 1)))
    outputs = to_numpy(model({"t1": random_volume(1, 4, 8, 8, 1)}))
    np.testing.assert_allclose(outputs, 0.5, rtol=1e-5)


def test_encoder_is_a_view():
    model = UNet3D("t1", (4, 8, 8), (2, 3))
    fill(model)
    x = random_volume(1, 4, 8, 8, 1)
    encoder = model.encoder("t1")
    features = [to_numpy(y) for y in encoder(x)]
    assert [y.shape for y in features] == [(1, 4, 8, 8, 2), (1, 2, 4, 4, 3), (1, 1, 2, 2, 3)]
    assert all((y >= 0).all() and (y > 0).any() for y in features)
    assert {id(weight) for weight in encoder.weights} < {id(weight) for weight in model.weights}

    encoder.trainable = False
    frozen = {layer.name for layer in model.layers if layer.weights and not layer.trainable}
    assert frozen == {layer.name for layer in model.layers if layer.weights and layer.name.startswith("t1_")}
    encoder.set_weights([np.zeros_like(weight) for weight in encoder.get_weights()])
    assert not to_numpy(model.encoder("t1")(x)[0]).any()


@pytest.mark.parametrize(
    ("make", "modality"),
    [
        (lambda: UNet3D("t1", (4, 4, 4), (1, 2)), "t2"),
        (lambda: UNet3D("t1", (4, 4, 4), (1, 2)), "decoder"),
        (lambda: SingleEncoderUNet3D(("t1", "t2"), (4, 4, 4), (1, 2)), "t1"),
        (lambda: SingleEncoderUNet3D(("t1", "t2"), (4, 4, 4), (1, 2)), "stacked"),
    ],
)
def test_no_such_encoder(make, modality):
    with pytest.raises(ValueError, match=f"has no encoder for this modality alone. Received: '{modality}'$"):
        make().encoder(modality)


@pytest.mark.parametrize(
    ("model_class", "arguments", "message"),
    [
        (UNet3D, {"patch_shape": (8, 8)}, "must have 3 sizes, .* of 4, .* 2 times. Received: (8, 8)"),
        (UNet3D, {"patch_shape": (8, 8, 6)}, "must have 3 sizes, .* of 4, .* 2 times. Received: (8, 8, 6)"),
        (UNet3D, {"patch_shape": (0, 8, 8)}, "must have 3 sizes, .* of 4, .* 2 times. Received: (0, 8, 8)"),
        (UNet2D, {"patch_shape": (8, 8, 8)}, "must have 2 sizes, .* of 4, .* 2 times. Received: (8, 8, 8)"),
        (UNet3D, {"filters": ()}, "`filters` must be one or more positive integers. Received: ()"),
        (UNet3D, {"filters": (2, 0)}, "`filters` must be one or more positive integers. Received: (2, 0)"),
        (UNet3D, {"filters": (2, 2.5)}, "`filters` must be one or more positive integers. Received: (2, 2.5)"),
        (SingleEncoderUNet3D, {"modalities": ()}, "`modalities` must be distinct names, at least one. Received: ()"),
        (SingleEncoderUNet3D, {"modalities": ("a", "a")}, "distinct names, at least one. Received: ('a', 'a')"),
    ],
)
def test_wrong_arguments(model_class, arguments, message):
    expected = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"{expected}$"):
        model_class(**{"patch_shape": (8, 8, 8), "filters": (2, 2), **arguments})


def test_global_policy_is_followed():
    with global_policy("mixed_bfloat16"):
        model = UNet3D("t1", (4, 4, 4), (1, 2))
        kept = UNet3D("t1", (4, 4, 4), (1, 2), dtype="float32")
    assert model.get_layer("t1_block1_1_conv").compute_dtype == "bfloat16"
    assert model.output.dtype == "float32"
    assert kept.get_layer("t1_block1_1_conv").compute_dtype == "float32"
    # The policy belongs to the model, not to the moment in which it is made again.
    assert type(model).from_config(model.get_config()).dtype_policy.name == "mixed_bfloat16"
