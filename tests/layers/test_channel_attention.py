import keras
import numpy as np
import pytest
from checks import check_layer, fill, named_weights, random_volume, to_numpy
from reference import channel_weights

from keras_mmfnet.layers import ChannelStdAttention3D

SHAPE = (2, 3, 4, 5, 6)
SUBSETS = [("avg",), ("max",), ("std",), ("avg", "max"), ("avg", "std"), ("std", "max"), ("std", "avg", "max")]


@pytest.mark.parametrize(
    ("arguments", "trainable"),
    [
        # Three MLPs, or one, of 6 x 3 + 3 and 3 x 6 + 6 weights.
        ({"reduction": 2, "statistics": ("max", "std", "avg")}, 3 * 45),
        ({"reduction": 2, "statistics": ("std", "max"), "shared_mlp": True}, 45),
    ],
)
def test_layer(arguments, trainable, tmp_path):
    def reference(w, x):
        return x * channel_weights(w, x, arguments["statistics"], arguments.get("shared_mlp", False))

    check_layer(ChannelStdAttention3D, arguments, SHAPE, reference, (trainable, 0), tmp_path)


@pytest.mark.parametrize("shared_mlp", [False, True])
@pytest.mark.parametrize("statistics", SUBSETS)
def test_scores(statistics, shared_mlp):
    x = random_volume(*SHAPE)
    layer = ChannelStdAttention3D(2, statistics, shared_mlp)
    layer.build(SHAPE)
    fill(layer)
    outputs, weights = layer(x, return_attention_scores=True)
    expected = channel_weights(named_weights(layer), x, statistics, shared_mlp)
    assert expected.shape == tuple(weights.shape) == (2, 1, 1, 1, 6)
    np.testing.assert_allclose(to_numpy(weights), expected, rtol=1e-4)
    np.testing.assert_allclose(to_numpy(outputs), x * expected, rtol=1e-4, atol=1e-6)
    assert len(layer.weights) == 4 * (1 if shared_mlp else len(statistics))


@pytest.mark.parametrize(
    ("data_format", "shape", "scores_shape"),
    [
        ("channels_last", (None, None, 8, None, 24), (None, 1, 1, 1, 24)),
        ("channels_first", (None, 24, None, 8, None), (None, 24, 1, 1, 1)),
    ],
)
def test_symbolic_scores(data_format, shape, scores_shape):
    layer = ChannelStdAttention3D(data_format=data_format, dtype="mixed_bfloat16")
    outputs, weights = layer(keras.Input(batch_shape=shape), return_attention_scores=True)
    assert outputs.shape == shape
    assert weights.shape == scores_shape
    assert outputs.dtype == weights.dtype == "bfloat16"


@pytest.mark.parametrize(("channels", "hidden"), [(24, 2), (12, 1), (5, 1)])
def test_hidden_units(channels, hidden):
    layer = ChannelStdAttention3D(reduction=12)
    layer.build((None, None, None, None, channels))
    assert {units.units for units in layer.hidden_layers} == {hidden}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": 0}, "`reduction` must be a positive integer. Received: 0"),
        ({"reduction": 2.0}, "`reduction` must be a positive integer. Received: 2.0"),
        ({"statistics": ()}, "each once. Received: ()"),
        ({"statistics": ("avg", "avg")}, "each once. Received: ('avg', 'avg')"),
        ({"statistics": ("avg", "median")}, "each once. Received: ('avg', 'median')"),
        ({"statistics": "mean"}, "each once. Received: 'mean'"),
        ({"data_format": "NCDHW"}, "`data_format` must be 'channels_last' or 'channels_first'. Received: 'NCDHW'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match="Received") as error:
        ChannelStdAttention3D(**arguments)
    assert str(error.value).endswith(message)


def test_unknown_channels():
    with pytest.raises(ValueError, match=r"number of channels must be known. Received: .*\(None, 4, 4, 4, None\)$"):
        ChannelStdAttention3D()(keras.Input((4, 4, 4, None)))


def test_wrong_inputs():
    layer = ChannelStdAttention3D()
    with pytest.raises(ValueError, match=r"expected ndim=5, found ndim=4.* received: \(2, 4, 4, 6\)"):
        layer(np.zeros((2, 4, 4, 6)))
    layer.build((None, 4, 4, 4, 6))
    with pytest.raises(ValueError, match="axis -1 of input shape to have value 6"):
        layer(np.zeros((2, 4, 4, 4, 5)))
