import gc
import weakref

import keras
import numpy as np
import pytest
from checks import BACKEND, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers import FusionBlock3D
from keras_mmfnet.layers._batch_normalization import RectifiedBatchNormalization, moments_of_rows, several_rows
from keras_mmfnet.layers._volumes import Conv3D, Conv3DTranspose, MaxPooling3D


def pair(shape, **arguments):
    """Keras' layer, without ReLU, and ours with the same weights."""
    kinds = keras.layers.BatchNormalization, RectifiedBatchNormalization
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


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend whose layers choose what is kept for the gradient")
@pytest.mark.parametrize("filters", [6, 16])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_what_is_made_again_for_the_gradient(data_format, filters):
    """The output is not kept where volumes' layers follow, and the gradients are those of Keras' layers."""
    import torch

    axis = -1 if data_format == "channels_last" else 1
    shape = (2, 4, 4, 6, filters) if axis == -1 else (2, filters, 4, 4, 6)
    theirs, ours = pair(shape, axis=axis)
    conv = Conv3D(3, 3, padding="same", data_format=data_format)
    others = [
        MaxPooling3D(2, data_format=data_format),
        Conv3DTranspose(2, 2, strides=2, data_format=data_format),
        FusionBlock3D(2, reduction=2, data_format=data_format),
    ]
    volume = keras.ops.convert_to_tensor(random_volume(*shape)).requires_grad_()  # on a GPU where there is one

    def gradients(normalise):
        rectified = normalise(2 * volume)
        kept = weakref.ref(rectified if rectified._base is None else rectified._base)
        outputs = conv(rectified[:, 2:]), *(layer(rectified) for layer in others)
        loss = sum(torch.tanh(output).sum() for output in outputs)
        del rectified, outputs
        gc.collect()
        alive = kept() is not None
        sources = [volume, ours.gamma.value, theirs.gamma.value, conv.kernel.value]
        first, second = (torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True) for _ in range(2))
        found, again = ([to_numpy(x) for x in gradients if x is not None] for gradients in (first, second))
        for one, other in zip(found, again, strict=True):
            np.testing.assert_array_equal(other, one)
        return found, alive

    (expected, _), (found, alive) = (
        gradients(lambda x: torch.relu(theirs(x, training=True))),
        gradients(lambda x: ours(x, training=True)),
    )
    # Keras' own layers, for the channels first, keep what they get.
    assert alive == (data_format == "channels_first")
    for one, other in zip(expected, found, strict=True):
        assert np.abs(one).max() > 1e-4
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend whose layers choose what is kept for the gradient")
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("filters", [6, 16])
@pytest.mark.parametrize("axis", [-1, 1])
def test_made_again_to_the_last_bit(axis, filters, policy):
    """The gradient of a maximum compares what is made again with the maximum of what was there."""
    shape = (2, 4, 4, 6, filters) if axis == -1 else (2, filters, 4, 4, 6)
    layer = RectifiedBatchNormalization(axis=axis, epsilon=1e-5, dtype=policy)
    x = keras.ops.convert_to_tensor(3 * random_volume(*shape) + 1, layer.compute_dtype).requires_grad_()
    output = layer(x, training=True)
    output = output if output._base is None else output._base
    np.testing.assert_array_equal(to_numpy(output.remade.values()), to_numpy(output))


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend whose layers choose what is kept for the gradient")
def test_an_output_without_a_gradient_is_kept():
    import torch

    _, layer = pair((2, 4, 4, 6, 6))
    conv = Conv3D(3, 3, padding="same")
    with torch.no_grad():
        features = layer(keras.ops.convert_to_tensor(random_volume(2, 4, 4, 6, 6)), training=True)
    (found,) = torch.autograd.grad(conv(features).sum(), [conv.kernel.value])
    # Of the voxel in the middle of the kernel, which meets every voxel of the volume.
    np.testing.assert_allclose(to_numpy(found)[1, 1, 1, :, 0], to_numpy(features).sum((0, 1, 2, 3)), rtol=1e-4)


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
    layer = RectifiedBatchNormalization(epsilon=1e-5, momentum=0.9, dtype=policy)
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


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend on which it is used")
@pytest.mark.parametrize("shape", [(64, 8), (48, 3), (7, 5), (6, 200), (1, 2)])
def test_moments_of_rows(shape):
    import torch

    rows = 100 + random_volume(*shape)
    wide = several_rows(torch.tensor(rows))
    np.testing.assert_array_equal(to_numpy(wide).reshape(shape), rows)
    assert wide.shape[1] <= max(128, shape[1])
    mean, variance = moments_of_rows(torch.tensor(rows))
    np.testing.assert_allclose(to_numpy(mean), rows.mean(0, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(variance), rows.var(0, dtype="float64"), rtol=1e-4, atol=1e-8)
