import keras
import numpy as np
import pytest
from checks import check_layer, fill, named_weights, random_volume, to_numpy
from reference import spatial_weights

from keras_mmfnet.layers import SpatialStdAttention3D

SHAPE = (2, 3, 4, 5, 6)
SUBSETS = [("avg",), ("max",), ("std",), ("avg", "max"), ("avg", "std"), ("std", "max"), ("std", "avg", "max")]


@pytest.mark.parametrize(
    ("arguments", "trainable"),
    [
        ({"kernel_size": (1, 3, 5), "statistics": ("max", "std", "avg")}, 15 * 3 + 1),
        ({"kernel_size": 5, "statistics": ("std", "max")}, 125 * 2 + 1),
    ],
)
def test_layer(arguments, trainable, tmp_path):
    def reference(w, x):
        return x * spatial_weights(w, x, arguments["statistics"])

    check_layer(SpatialStdAttention3D, arguments, SHAPE, reference, (trainable, 0), tmp_path)


@pytest.mark.parametrize("statistics", SUBSETS)
def test_scores(statistics):
    x = random_volume(*SHAPE)
    layer = SpatialStdAttention3D(statistics=statistics)
    layer.build(SHAPE)
    fill(layer)
    outputs, weights = layer(x, return_attention_scores=True)
    expected = spatial_weights(named_weights(layer), x, statistics)
    assert expected.shape == tuple(weights.shape) == (2, 3, 4, 5, 1)
    np.testing.assert_allclose(to_numpy(weights), expected, rtol=1e-4)
    np.testing.assert_allclose(to_numpy(outputs), x * expected, rtol=1e-4, atol=1e-6)
    assert tuple(layer.conv.kernel.shape) == (3, 3, 3, len(statistics), 1)


@pytest.mark.parametrize(
    ("data_format", "shape", "scores_shape"),
    [
        ("channels_last", (None, None, 8, None, 24), (None, None, 8, None, 1)),
        ("channels_first", (None, 24, None, 8, None), (None, 1, None, 8, None)),
        # The channels are reduced away, so that their number need not be known.
        ("channels_last", (None, None, None, None, None), (None, None, None, None, 1)),
    ],
)
def test_symbolic_scores(data_format, shape, scores_shape):
    layer = SpatialStdAttention3D(data_format=data_format, dtype="mixed_bfloat16")
    outputs, weights = layer(keras.Input(batch_shape=shape), return_attention_scores=True)
    assert outputs.shape == shape
    assert weights.shape == scores_shape
    assert outputs.dtype == weights.dtype == "bfloat16"


def test_any_number_of_channels():
    symbol = keras.Input((3, 4, 5, None))
    layer = SpatialStdAttention3D()
    model = keras.Model(symbol, layer(symbol))
    fill(layer)
    for channels in (1, 4):
        x = random_volume(2, 3, 4, 5, channels)
        expected = x * spatial_weights(named_weights(layer), x)
        np.testing.assert_allclose(to_numpy(model(x)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistics": ()}, "each once. Received: ()"),
        ({"statistics": ("std", "std")}, "each once. Received: ('std', 'std')"),
        ({"statistics": ("avg", "median")}, "each once. Received: ('avg', 'median')"),
        ({"data_format": 1}, "`data_format` must be 'channels_last' or 'channels_first'. Received: 1"),
        ({"kernel_size": (3, 3)}, "must be a tuple of 3 integers. Received kernel_size=(3, 3)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match="Received") as error:
        SpatialStdAttention3D(**arguments)
    assert str(error.value).endswith(message)


def test_wrong_rank():
    with pytest.raises(ValueError, match=r"expected ndim=5, found ndim=4.* received: \(2, 4, 4, 6\)"):
        SpatialStdAttention3D()(np.zeros((2, 4, 4, 6)))
