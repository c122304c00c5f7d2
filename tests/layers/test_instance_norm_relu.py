import keras
import numpy as np
import pytest
from checks import POLICIES, TOLERANCES, dtype_of, fill, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers import InstanceNormReLU

SHAPE = (2, 3, 4, 5, 6)


def expected(layer, x):
    """The formula, with channels last."""
    gamma, beta = layer.get_weights()
    mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    outputs = (x - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta
    return np.maximum(outputs, 0) if layer.relu else outputs


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_formula(axis, relu, training):
    layer, x = InstanceNormReLU(axis, relu=relu), 3 * random_volume(*SHAPE) + 10
    inputs = np.moveaxis(x, -1, axis)
    layer.build(inputs.shape)
    fill(layer)
    found = np.moveaxis(to_numpy(layer(inputs, training=training)), axis, -1)
    np.testing.assert_allclose(found, expected(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision_and_constant_patches(policy):
    layer = InstanceNormReLU(dtype=policy)
    layer.build(SHAPE)
    fill(layer)
    x = random_volume(*SHAPE)
    symbol, found = layer(keras.KerasTensor(SHAPE)), layer(x)
    assert dtype_of(symbol) == dtype_of(found) == layer.compute_dtype
    assert np.abs(to_numpy(found) - expected(layer, x)).max() <= TOLERANCES.get(policy, 1e-5) * to_numpy(found).max()
    # Squares overflow in float16; the rounding errors of a large constant's average must not make a variance negative.
    for value in (0, 2.5, 300, 3e4):
        constant = np.full(SHAPE, value, "float32")
        np.testing.assert_allclose(to_numpy(layer(constant)), expected(layer, constant), rtol=0.01)
        assert all(np.isfinite(gradient).all() for gradient in gradient_function(layer)(constant))


def test_config_and_wrong_arguments():
    layer = InstanceNormReLU(axis=1, epsilon=1e-3, relu=False, name="norm", dtype="mixed_bfloat16", trainable=False)
    again = InstanceNormReLU.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert (again.axis, again.epsilon, again.relu, again.trainable) == (1, 1e-3, False, False)
    assert layer(keras.Input((3, 4, 5))).shape == (None, 3, 4, 5)
    with pytest.raises(ValueError, match=r"number of channels must be known. Received: .*\(None, 4, None\)$"):
        InstanceNormReLU()(keras.Input((4, None)))
