"""The operations of `kernels` in plain Keras ops with automatic gradients. The fast kernels must equal them."""

import keras
from keras import ops

from keras_mmfnet import devices

# ruff: noqa: D103  (documented in `kernels`)

# Added to the variance, so that the gradient of the standard deviation is finite at a variance of 0.
EPSILON = 1e-6


def spatial_axes(axis):
    """The axes of depth, height and width of a 5D tensor with the channels at `axis`."""
    return (1, 2, 3) if axis == -1 else (2, 3, 4)


def concatenate(features, axis):
    """Concatenates the features; returns a single tensor unchanged."""
    return ops.concatenate(features, axis=axis) if len(features) > 1 else features[0]


def _statistics(x, statistics, axes):
    """The statistics in float32: squares overflow in float16."""
    x = ops.cast(x, "float32")
    # Reduce the last axis first: TensorFlow sums sequentially, which is inaccurate over many values.
    average = ops.mean(ops.mean(x, axis=axes[-1], keepdims=True), axis=axes, keepdims=True)
    square = ops.square(x - average)
    variance = ops.mean(ops.mean(square, axis=axes[-1], keepdims=True), axis=axes, keepdims=True)
    values = {"avg": average, "max": ops.max(x, axis=axes, keepdims=True), "std": ops.sqrt(variance + EPSILON)}
    return [values[name] for name in statistics]


def statistics_over_space(features, statistics, axis, training=False):
    x = concatenate(features, axis)
    values = ops.concatenate(_statistics(x, statistics, spatial_axes(axis)), axis=axis)
    return ops.reshape(values, (-1, len(statistics), x.shape[axis]))


def statistics_over_channels(features, statistics, axis, weights=None, training=False):
    x = ops.cast(concatenate(features, axis), "float32")
    x = x if weights is None else x * ops.cast(weights, "float32")
    return ops.concatenate(_statistics(x, statistics, (axis,)), axis=axis)


def weighted_reduction(features, channel_weights, spatial_weights, kernel, axis):
    x = concatenate(features, axis)
    x = x + spatial_weights * (channel_weights * x)
    return ops.einsum("bdhwc,cf->bdhwf" if axis == -1 else "bcdhw,cf->bfdhw", x, kernel)


def batch_norm_relu(x, gamma, beta, epsilon, axis, moments=None, relu=True):
    dtype, x = x.dtype, ops.cast(x, "float32")
    if moments is None:
        axes = [number for number in range(len(x.shape)) if number != axis % len(x.shape)]
        over = devices.mean_over_devices if devices.synchronises_batch_norm() else (lambda values: values)
        mean = over(ops.mean(x, axis=axes, keepdims=True))
        moments = ops.squeeze(mean, axes), over(ops.mean(ops.square(x - mean), axis=axes))
    y = ops.batch_normalization(x, *moments, axis, offset=beta, scale=gamma, epsilon=epsilon)
    return ops.cast(ops.relu(y) if relu else y, dtype), *map(ops.stop_gradient, moments)


def instance_norm(x, gamma, beta, epsilon, axis):
    dtype, x, rank = x.dtype, ops.cast(x, "float32"), len(x.shape)
    axes = [number for number in range(1, rank) if number != axis % rank]
    # Reduce the last axis first, and compute the variance from differences: see `_statistics`.
    x = x - ops.mean(ops.mean(x, axis=axes[-1], keepdims=True), axis=axes, keepdims=True)
    variance = ops.mean(ops.mean(ops.square(x), axis=axes[-1], keepdims=True), axis=axes, keepdims=True)
    gamma, beta = (
        ops.reshape(each, [-1 if number == axis % rank else 1 for number in range(rank)]) for each in (gamma, beta)
    )
    return ops.cast(x * (ops.rsqrt(variance + epsilon) * gamma) + beta, dtype)


def conv(x, kernel, strides, padding, data_format, dilation_rate):
    if keras.backend.backend() == "torch" and keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        depth = x.shape[1 if data_format == "channels_last" else 2]
        # PyTorch's CPU gradient is wrong if the kernel is deeper than the volume.
        if x.device.type == "cpu" and depth < kernel.shape[0]:
            x, kernel = ops.cast(x, "float32"), ops.cast(kernel, "float32")
            return ops.cast(ops.conv(x, kernel, strides, padding, data_format, dilation_rate), "bfloat16")
    return ops.conv(x, kernel, strides, padding, data_format, dilation_rate)


def max_pool(x, pool_size, strides, padding, data_format):
    return ops.max_pool(x, pool_size, strides, padding, data_format)
