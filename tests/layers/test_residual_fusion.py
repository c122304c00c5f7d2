import keras
import numpy as np
import pytest
from checks import check_layer, fill, named_weights, random_volume, to_numpy
from reference import conv, residual_fusion

from keras_mmfnet.layers import ResidualFusion3D

SHAPE = (2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "kernel"),
    [({"filters": 3, "kernel_size": (3, 1, 3)}, 9), ({"filters": 2, "kernel_size": 3}, 27)],
)
def test_layer(arguments, kernel, tmp_path):
    filters = arguments["filters"]
    # 1x1x1 convolution with bias; two refining ones, the first without; scale and shift of the normalization.
    trainable = (6 * filters + filters) + (2 * kernel * filters**2 + filters) + 2 * filters
    check_layer(ResidualFusion3D, arguments, SHAPE, residual_fusion, (trainable, 2 * filters), tmp_path)


def test_instance_normalization():
    layer = ResidualFusion3D(3, normalization="instance")
    x = random_volume(*SHAPE)
    outputs = to_numpy(layer(x, training=True))
    assert ResidualFusion3D.from_config(layer.get_config()).normalization == "instance"
    np.testing.assert_allclose(to_numpy(layer(x[1:])), outputs[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`normalization` must be 'batch' or 'instance'. Received: 'group'$"):
        ResidualFusion3D(3, normalization="group")


def test_paper_kernels():
    layer = ResidualFusion3D(4)
    layer.build((None, None, None, None, 12))
    kernels = [tuple(c.kernel.shape) for c in (layer.reduce, layer.refine1, layer.refine2)]
    assert kernels == [(1, 1, 1, 12, 4), (1, 3, 3, 4, 4), (1, 3, 3, 4, 4)]


def test_training_uses_the_batch_and_updates_the_moving_averages():
    x = random_volume(*SHAPE)
    layer = ResidualFusion3D(3)
    layer.build(SHAPE)
    fill(layer)
    w = named_weights(layer)
    np.testing.assert_allclose(
        to_numpy(layer(x, training=True)), residual_fusion(w, x, training=True), rtol=1e-3, atol=1e-4
    )
    refined = conv(conv(x, w["reduce/kernel"], w["reduce/bias"]), w["refine1/kernel"])
    mean, variance = refined.mean((0, 1, 2, 3)), refined.var((0, 1, 2, 3))
    np.testing.assert_allclose(to_numpy(layer.norm.moving_mean), 0.9 * w["norm/moving_mean"] + 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(
        to_numpy(layer.norm.moving_variance), 0.9 * w["norm/moving_variance"] + 0.1 * variance, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": 2, "data_format": "last"}, "must be 'channels_last' or 'channels_first'. Received: 'last'"),
        ({"filters": 0}, "`filters` must be a positive integer. Received: 0"),
        ({"filters": 2.5}, "`filters` must be a positive integer. Received: 2.5"),
        ({"filters": 2, "kernel_size": (1, 3)}, "must be a tuple of 3 integers. Received kernel_size=(1, 3)"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match="Received") as error:
        ResidualFusion3D(**arguments)
    assert str(error.value).endswith(message)


def test_unknown_channels():
    with pytest.raises(ValueError, match=r"number of channels must be known. Received: .*\(None, 4, 4, 4, None\)$"):
        ResidualFusion3D(2)(keras.Input((4, 4, 4, None)))


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"expected ndim=5, found ndim=4.* received: \(2, 4, 4, 6\)"):
        ResidualFusion3D(2)(np.zeros((2, 4, 4, 6)))
