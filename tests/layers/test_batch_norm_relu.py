import keras
import numpy as np
import pytest
from checks import BACKEND, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers import BatchNormReLU

pytestmark = pytest.mark.usefixtures("each_kind")


def pair(shape, **arguments):
    """Keras' layer, without ReLU, and ours with the same weights."""
    kinds = keras.layers.BatchNormalization, BatchNormReLU
    layers = [kind(epsilon=1e-5, momentum=0.9, **arguments) for kind in kinds]
    rng = np.random.default_rng(0)
    weights = [rng.uniform(0.5, 2, shape[arguments.get("axis", -1)]) for _ in range(4)]
    for layer in layers:
        layer.build(shape)
        layer.set_weights(weights)
    return layers


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (3, 4, 5, 6), (1, 2, 2, 2, 1)])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("training", [True, False])
def test_same_as_keras(shape, axis, training):
    theirs, ours = pair(shape, axis=axis)
    x = 3 * random_volume(*shape) + 10
    expected = np.maximum(to_numpy(theirs(x, training=training)), 0)
    np.testing.assert_allclose(to_numpy(ours(x, training=training)), expected, rtol=1e-4, atol=1e-5)
    for weight, expected in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5)


def test_without_relu():
    theirs, ours = pair((2, 3, 4, 5, 6))
    ours.relu = False
    x = random_volume(2, 3, 4, 5, 6)
    expected = to_numpy(theirs(x, training=True))
    assert expected.min() < 0
    np.testing.assert_allclose(to_numpy(ours(x, training=True)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("filters", [6, 16])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("trainable", [True, False])
def test_same_gradients_as_keras(trainable, axis, filters):
    shape = (2, 3, 4, 5, filters) if axis == -1 else (2, filters, 3, 4, 5)
    x = 3 * random_volume(*shape) + 10
    theirs, ours = pair(shape, axis=axis, trainable=trainable)
    # Of tanh, as the mean of the normalised values is always the same.
    found = [
        gradient_function(keras.Sequential([keras.Input(shape[1:]), *layers, keras.layers.Activation("tanh")]))(x)
        for layers in ([theirs, keras.layers.ReLU()], [ours])
    ]
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        assert np.abs(one).max() > 1e-4
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-6)


def test_equals_the_formula():
    _, layer = pair((2, 3, 4, 5, 6))
    gamma, beta, mean, variance = layer.get_weights()
    x = random_volume(2, 3, 4, 5, 6)
    batch_mean, batch_variance = x.mean((0, 1, 2, 3)), x.var((0, 1, 2, 3))
    expected = np.maximum((x - batch_mean) / np.sqrt(batch_variance + 1e-5) * gamma + beta, 0)
    np.testing.assert_allclose(to_numpy(layer(x, training=True)), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.get_weights()[2], 0.9 * mean + 0.1 * batch_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.get_weights()[3], 0.9 * variance + 0.1 * batch_variance, rtol=1e-5)


def test_a_frozen_layer_keeps_its_statistics():
    theirs, ours = pair((2, 3, 4, 5, 6))
    theirs.trainable = ours.trainable = False
    before, x = ours.get_weights(), random_volume(2, 3, 4, 5, 6)
    expected = np.maximum(to_numpy(theirs(x, training=True)), 0)
    np.testing.assert_allclose(to_numpy(ours(x, training=True)), expected, rtol=1e-5, atol=1e-6)
    for weight, old in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, old)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision(policy):
    layer = BatchNormReLU(epsilon=1e-5, momentum=0.9, dtype=policy)
    x = random_volume(2, 3, 4, 5, 6)
    found = layer(x, training=True)
    assert keras.backend.standardize_dtype(found.dtype) == layer.compute_dtype
    expected = np.maximum((x - x.mean((0, 1, 2, 3))) / np.sqrt(x.var((0, 1, 2, 3)) + 1e-5), 0)
    np.testing.assert_allclose(to_numpy(found).astype("float32"), expected, atol=0.05)
    assert {weight.dtype for weight in layer.weights} == {"float32"}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the one backend whose graphs hold sizes that are not known")
def test_sizes_that_are_not_known():
    import tensorflow as tf

    theirs, ours = pair((None, None, None, None, 6))
    x = random_volume(2, 3, 4, 5, 6)
    graph = tf.function(lambda x: ours(x, training=True), input_signature=[tf.TensorSpec((None,) * 4 + (6,))])
    assert graph.get_concrete_function().output_shapes == tf.TensorShape((None,) * 4 + (6,))
    expected = np.maximum(to_numpy(theirs(x, training=True)), 0)
    np.testing.assert_allclose(to_numpy(graph(x)), expected, rtol=1e-4, atol=1e-5)


def test_config_and_wrong_arguments():
    layer = BatchNormReLU(axis=1, momentum=0.8, epsilon=1e-3, relu=False, dtype="mixed_bfloat16", trainable=False)
    again = BatchNormReLU.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert (again.axis, again.momentum, again.epsilon, again.relu, again.trainable) == (1, 0.8, 1e-3, False, False)
    assert layer(keras.Input((3, 4, 5))).shape == (None, 3, 4, 5)
    assert [weight.name for weight in layer.weights] == ["gamma", "beta", "moving_mean", "moving_variance"]
    with pytest.raises(ValueError, match=r"number of channels must be known. Received: .*\(None, 4, None\)$"):
        BatchNormReLU()(keras.Input((4, None)))
    for unknown in ("center", "scale", "renorm"):  # which it would not honour
        with pytest.raises((TypeError, ValueError)):
            BatchNormReLU(**{unknown: False})
