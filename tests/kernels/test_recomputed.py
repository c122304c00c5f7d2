"""What PyTorch saves for backward, and what the kernels recompute in its place."""

import gc
import weakref

import keras
import numpy as np
import pytest
from checks import BACKEND, random_volume, to_numpy

from keras_mmfnet.layers import BatchNormReLU, FusionBlock3D
from keras_mmfnet.layers.volumes import Conv3D, MaxPooling3D
from keras_mmfnet.models import MMFNet

if BACKEND != "torch":
    pytest.skip("the one backend whose layers choose what is saved for backward", allow_module_level=True)

import torch

from keras_mmfnet.kernels import torch as fast

pytestmark = pytest.mark.usefixtures("fast_kernels")


def features_shape(axis, filters):
    return (2, 4, 4, 6, filters) if axis == -1 else (2, filters, 4, 4, 6)


def filled_norm(shape, axis, **arguments):
    layer = BatchNormReLU(axis=axis, **arguments)
    layer.build(shape)
    rng = np.random.default_rng(0)
    layer.set_weights([rng.uniform(0.5, 2, shape[axis]) for _ in range(4)])
    return layer


@pytest.mark.parametrize("filters", [6, 16])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_the_output_of_batch_normalization_is_recomputed(data_format, filters):
    """It is not saved where layers of this package follow, and the gradients are those of PyTorch's own operations."""
    axis = -1 if data_format == "channels_last" else 1
    shape = features_shape(axis, filters)
    norm = filled_norm(shape, axis)
    conv = Conv3D(3, 3, padding="same", data_format=data_format)
    others = [MaxPooling3D(2, data_format=data_format), FusionBlock3D(2, reduction=2, data_format=data_format)]
    volume = keras.ops.convert_to_tensor(random_volume(*shape)).requires_grad_()

    def own(x):
        y = torch.nn.functional.batch_norm(
            x.movedim(axis, 1), None, None, norm.gamma.value, norm.beta.value, training=True, eps=1e-5
        )
        return torch.relu(y).movedim(1, axis)

    def gradients(normalize):
        rectified = normalize(2 * volume)
        storage = weakref.ref(rectified.untyped_storage())
        outputs = conv(rectified), *(layer(rectified) for layer in others), conv(rectified[1:] + 0)
        loss = sum(torch.tanh(output).sum() for output in outputs)
        del rectified, outputs
        gc.collect()  # Keras leaves lists of inputs in cycles of references
        alive = storage() is not None
        sources = [volume, norm.gamma.value, norm.beta.value, conv.kernel.value]
        first, second = (torch.autograd.grad(loss, sources, retain_graph=True) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(to_numpy(other), to_numpy(one))
        return [to_numpy(x) for x in first], alive

    expected, alive = gradients(own)
    assert alive
    found, alive = gradients(lambda x: norm(x, training=True))
    # Keras' own convolution, for the channels first, saves its input.
    assert alive == (data_format == "channels_first")
    for one, other in zip(expected, found, strict=True):
        assert np.abs(one).max() > 1e-4
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("filters", [6, 16])
@pytest.mark.parametrize("axis", [-1, 1])
def test_recomputed_bitwise(axis, filters, policy):
    """The gradient of a maximum compares the recomputed output with the maximum of the output."""
    shape = features_shape(axis, filters)
    layer = BatchNormReLU(axis=axis, dtype=policy)
    x = keras.ops.convert_to_tensor(3 * random_volume(*shape) + 1, layer.compute_dtype).requires_grad_()
    output = layer(x, training=True)
    again = output.recomputed.output().movedim(1, axis)
    assert again.stride() == output.stride()
    np.testing.assert_array_equal(to_numpy(again), to_numpy(output))


def test_an_output_without_a_gradient_is_saved():
    layer, conv = filled_norm(features_shape(-1, 6), -1), Conv3D(3, 3, padding="same")
    with torch.no_grad():
        features = layer(keras.ops.convert_to_tensor(random_volume(2, 4, 4, 6, 6)), training=True)
    (found,) = torch.autograd.grad(conv(features).sum(), [conv.kernel.value])
    # Of the voxel in the middle of the kernel, which meets every voxel of the volume.
    np.testing.assert_allclose(to_numpy(found)[1, 1, 1, :, 0], to_numpy(features).sum((0, 1, 2, 3)), rtol=1e-4)


def test_what_a_gradient_needs_is_released_once_it_is_known():
    x = torch.tensor(random_volume(2, 4, 4, 6, 6), requires_grad=True)
    doubled = 2 * x
    reference = weakref.ref(doubled.untyped_storage())
    output, *_ = fast.batch_norm_relu(doubled, torch.ones(6), torch.zeros(6), 1e-5, -1)
    del doubled
    assert reference() is not None
    output.square().sum().backward()
    assert reference() is None
    assert output.grad_fn is not None  # it is not for want of this that it was released


def test_no_second_derivative():
    x = torch.tensor(random_volume(2, 2, 2, 3, 6), requires_grad=True)
    output, *_ = fast.batch_norm_relu(x, torch.ones(6), torch.zeros(6), 1e-5, -1)
    outputs = [
        output,
        fast.statistics_over_space([x], ("std",), -1),
        fast.statistics_over_channels([x], ("std",), -1),
        fast.weighted_reduction([x], torch.ones(2, 1, 1, 1, 6), torch.ones(2, 2, 2, 3, 1), torch.ones(6, 2), -1),
    ]
    for output in outputs:
        (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_a_network_whose_user_recomputes_or_offloads():
    """The gradients are the same where PyTorch's own ways to save memory are used around the layers."""
    from torch.utils.checkpoint import checkpoint

    encoder = MMFNet(("t1", "t2"), (4, 8, 8), (2, 3), reduction=2).encoder("t1")
    volume = keras.ops.convert_to_tensor(random_volume(2, 4, 8, 8, 1))
    weights = [weight.value for weight in encoder.trainable_weights]

    def gradients(features):
        return [to_numpy(x) for x in torch.autograd.grad(sum(torch.tanh(x).sum() for x in features), weights)]

    expected = gradients(encoder(volume, training=True))
    recomputed = gradients(checkpoint(lambda x: encoder(x, training=True), volume, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(encoder(volume, training=True))
    for one, *others in zip(expected, recomputed, offloaded, strict=True):
        assert np.abs(one).max() > 1e-6
        for other in others:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 8), (48, 3), (7, 5), (6, 200), (1, 2)])
def test_moments_of_rows(shape):
    rows = 100 + random_volume(*shape)
    wide = fast.several_rows(torch.tensor(rows))
    np.testing.assert_array_equal(to_numpy(wide).reshape(shape), rows)
    assert wide.shape[1] <= max(128, shape[1])
    mean, variance = fast.moments_of_rows(torch.tensor(rows))
    np.testing.assert_allclose(to_numpy(mean), rows.mean(0, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(to_numpy(variance), rows.var(0, dtype="float64"), rtol=1e-4, atol=1e-8)
