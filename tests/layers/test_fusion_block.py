import keras
import numpy as np
import pytest
import torch
from checks import check_layer, fill, gradient_function, named_weights, random_volume, to_numpy
from reference import fusion_block, torch_fusion_block

from keras_mmfnet.layers import FusionBlock3D

SHAPES = [(2, 3, 4, 5, 1), (2, 3, 4, 5, 2), (2, 3, 4, 5, 3)]
# 1x1x1 convolution of 6 to 3 channels, the two refining ones, the normalization's scale and shift.
RESIDUAL = (6 * 3 + 3) + (9 * 3 * 3) + (9 * 3 * 3 + 3) + 6
MLP = 6 * 3 + 3 + 3 * 6 + 6


@pytest.mark.parametrize(
    ("arguments", "shapes", "attention"),
    [
        (
            {"reduction": 2, "channel_statistics": ("std", "avg", "max"), "spatial_statistics": ("std", "max")},
            SHAPES,
            3 * MLP + (27 * 2 + 1),
        ),
        (
            {
                "reduction": 2,
                "channel_statistics": ("max", "std"),
                "spatial_statistics": ("max", "avg"),
                "shared_mlp": True,
            },
            (2, 3, 4, 5, 6),
            MLP + (27 * 2 + 1),
        ),
    ],
    ids=["list", "tensor"],
)
def test_layer(arguments, shapes, attention, tmp_path):
    def reference(w, *features):
        settings = {name: value for name, value in arguments.items() if name != "reduction"}
        return fusion_block(w, *features, **settings)[0]

    weights = (attention + RESIDUAL, 6)
    check_layer(FusionBlock3D, {"filters": 3, **arguments}, shapes, reference, weights, tmp_path)


@pytest.fixture
def filled():
    """A block with all three statistics, and features for it."""
    layer = FusionBlock3D(filters=2, reduction=2)
    layer.build(SHAPES)
    fill(layer)
    return layer, [random_volume(*shape, seed=seed) for seed, shape in enumerate(SHAPES)]


def test_scores(filled):
    layer, features = filled
    found = layer(features, return_attention_scores=True)
    names = ("avg", "max", "std")
    expected = fusion_block(named_weights(layer), *features, channel_statistics=names, spatial_statistics=names)
    shapes = [(2, 3, 4, 5, 2), (2, 1, 1, 1, 6), (2, 3, 4, 5, 1)]
    for value, wanted, shape in zip(found, expected, shapes, strict=True):
        assert tuple(value.shape) == wanted.shape == shape
        np.testing.assert_allclose(to_numpy(value), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("data_format", "shapes", "expected"),
    [
        (
            "channels_last",
            [(None, None, 8, None, 2), (None, None, 8, None, 4)],
            [(None, None, 8, None, 5), (None, 1, 1, 1, 6), (None, None, 8, None, 1)],
        ),
        (
            "channels_first",
            [(None, 2, None, 8, None), (None, 4, None, 8, None)],
            [(None, 5, None, 8, None), (None, 6, 1, 1, 1), (None, 1, None, 8, None)],
        ),
    ],
)
def test_symbolic_scores(data_format, shapes, expected):
    layer = FusionBlock3D(5, data_format=data_format, dtype="mixed_bfloat16")
    found = layer([keras.Input(batch_shape=shape) for shape in shapes], return_attention_scores=True)
    assert [value.shape for value in found] == expected
    assert {value.dtype for value in found} == {"bfloat16"}


def test_order_of_inputs_matters(filled):
    layer, features = filled
    other = [features[0], features[1][..., ::-1].copy(), features[2]]
    assert np.abs(to_numpy(layer(other)) - to_numpy(layer(features))).max() > 0.01


def test_list_of_one_is_the_tensor(filled):
    layer, features = filled
    stacked = np.concatenate(features, -1)
    np.testing.assert_array_equal(to_numpy(layer([stacked])), to_numpy(layer(stacked)))
    # The features stay apart, so that sums are rounded in another order.
    np.testing.assert_allclose(to_numpy(layer(features)), to_numpy(layer(stacked)), rtol=1e-6, atol=1e-6)
    apart, together = (to_numpy(layer(x, training=True)) for x in (features, stacked))
    np.testing.assert_allclose(apart, together, rtol=1e-5, atol=1e-5)
    assert np.abs(together - to_numpy(layer(stacked))).max() > 0.01


def test_same_as_plain_pytorch(filled):
    layer, features = filled
    tensors = [torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in features]
    w = {path: torch.tensor(value) for path, value in named_weights(layer).items()}
    expected = torch_fusion_block(w, tensors).numpy()
    np.testing.assert_allclose(np.moveaxis(to_numpy(layer(features)), -1, 1), expected, rtol=1e-4, atol=1e-5)


def test_same_gradients_as_plain_pytorch(filled):
    layer, features = filled
    # In training the normalization follows the batch, which PyTorch's functions above do not; all but that is compared.
    layer.residual_fusion.norm.trainable = False
    found = gradient_function(layer)(features)
    tensors = [torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True) for x in features]
    trainable = [weight.path.removeprefix(f"{layer.name}/") for weight in layer.trainable_weights]
    w = {path: torch.tensor(value, requires_grad=path in trainable) for path, value in named_weights(layer).items()}
    mean = torch_fusion_block(w, tensors).mean()
    expected = torch.autograd.grad(mean, [*tensors, *(w[path] for path in trainable)])
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        other = other.numpy()
        other = np.moveaxis(other, 1, -1) if index < len(features) else other
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 0}, "`reduction` must be a positive integer. Received: 0"),
        ({"filters": 0}, "`filters` must be a positive integer. Received: 0"),
        ({"channel_statistics": ("avg", "avg")}, "each once. Received: ('avg', 'avg')"),
        ({"spatial_statistics": ()}, "each once. Received: ()"),
        ({"data_format": "last"}, "`data_format` must be 'channels_last' or 'channels_first'. Received: 'last'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match="Received") as error:
        FusionBlock3D(**{"filters": 2, **arguments})
    assert str(error.value).endswith(message)


@pytest.mark.parametrize("make", [keras.KerasTensor, keras.ops.ones])
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, 4, 6)], "with 5 axes. Received: shapes=[(2, 4, 4, 6)]"),
        ([(2, 4, 4, 4, 1), (2, 4, 8, 4, 1)], "Received: shapes=[(2, 4, 4, 4, 1), (2, 4, 8, 4, 1)]"),
    ],
)
def test_wrong_inputs(make, shapes, message):
    with pytest.raises(ValueError, match="Received: shapes=") as error:
        FusionBlock3D(2)([make(shape) for shape in shapes])
    assert str(error.value).endswith(message)


def test_sizes_unknown_in_one_input():
    inputs = [keras.Input((4, None, 8, 2)), keras.Input((4, 6, None, 2))]
    assert FusionBlock3D(3)(inputs).shape == (None, 4, None, 8, 3)


def test_unknown_channels():
    with pytest.raises(ValueError, match=r"numbers of channels must be known. Received: shapes=.*None\)\]$"):
        FusionBlock3D(2)([keras.Input((4, 4, 4, 2)), keras.Input((4, 4, 4, None))])
