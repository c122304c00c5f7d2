"""The operations on TensorFlow. XLA compiles their gradients and, in training, their forward passes.

Without XLA every TensorFlow operation reads and writes whole tensors, and the automatic gradient of a statistic has a
dozen operations. A function compiled by XLA cannot be exported, so the forward pass is compiled only in training.
"""

import functools
import itertools

import tensorflow as tf

from keras_mmfnet.kernels import reference
from keras_mmfnet.kernels.reference import EPSILON, concatenate, spatial_axes

# A loop over at most this many channels is unrolled.
_FEW_CHANNELS = 8

_compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


def _float32(x):
    return tf.cast(x, tf.float32)


def _split(x, features, axis, x_axis=None):
    """Splits `x` along `x_axis` (default `axis`) into as many channels as each of the features has along `axis`."""
    return tf.split(x, [feature.shape[axis] for feature in features], axis if x_axis is None else x_axis)


def _mean(x, axes):
    # TensorFlow sums sequentially, which is inaccurate over many values. Compiled, this order is also twice as fast.
    return tf.reduce_mean(tf.reduce_mean(x, axes[0], keepdims=True), axes, keepdims=True)


def _count(x, axes):
    """The number of values of `x` along the axes, in float32."""
    return _float32(tf.reduce_prod([tf.shape(x)[axis] for axis in axes]))


def _where_equal(x, value):
    """1 where `x` equals `value`, else 0, in float32."""
    return _float32(tf.equal(x, value))


def _share(grad_output, count):
    """The gradient of a maximum for each of the `count` values that tie for it."""
    # XLA may compute a value twice with different rounding, so that no value equals the maximum.
    return grad_output / tf.maximum(count, 1.0)


def _shift_and_scale(values, grads, count):
    """The gradient of average and standard deviation by a value `x` is `shift + scale * x`."""
    zero = tf.zeros_like(next(iter(grads.values())))
    shift = grads["avg"] / count if "avg" in grads else zero
    scale = grads["std"] / (values["std"] * count) if "std" in grads else zero
    return (shift - values["avg"] * scale if "std" in grads else shift), scale


def statistics_over_space(features, statistics, axis, training=False):
    """The gradient is one compiled pass over the features; with `reference` a training step takes 7% longer."""
    axes = spatial_axes(axis)

    @tf.custom_gradient
    def compute(*features):
        # Without XLA it is faster to reduce the last axis first.
        output, values = (_compiled_over_space if training else _over_space)(
            features, statistics, axes if training else axes[::-1], axis
        )
        return output, lambda grad_output: _grad_over_space(features, values, grad_output, statistics, axes, axis)

    return tf.reshape(compute(*features), (-1, len(statistics), sum(feature.shape[axis] for feature in features)))


def _over_space(features, statistics, axes, axis):
    """The statistics concatenated along the channels, and a dict of the values that the gradient needs."""
    values = {}
    if "max" in statistics:  # exact in any dtype
        largest = [tf.reduce_max(x, axes, keepdims=True) for x in features]
        values["max"] = _float32(concatenate(largest, axis))
    if "avg" in statistics or "std" in statistics:
        features = [_float32(x) for x in features]
        averages = [_mean(x, axes) for x in features]
        values["avg"] = concatenate(averages, axis)
    if "std" in statistics:
        variances = [_mean(tf.square(x - average), axes) for x, average in zip(features, averages, strict=True)]
        values["std"] = tf.sqrt(concatenate(variances, axis) + EPSILON)
    return concatenate([values[name] for name in statistics], axis), values


_compiled_over_space = _compiled(_over_space)


@_compiled
def _grad_over_space(features, values, grad_output, statistics, axes, axis):
    grads = dict(zip(statistics, tf.split(grad_output, len(statistics), axis), strict=True))
    count = _count(features[0], axes)
    shift, scale = _shift_and_scale(values, grads, count)
    parts = {"shift": shift, "scale": scale, "max": values.get("max", shift), "by_max": grads.get("max", shift)}
    parts = [_split(tensor, features, axis) for tensor in parts.values()]
    results = []
    for feature, shift, scale, largest, by_largest in zip(features, *parts, strict=True):
        x = _float32(feature)
        gradient = x * scale + shift
        if "max" in grads:
            where = _where_equal(x, largest)
            gradient += where * _share(by_largest, count * _mean(where, axes))
        results.append(tf.cast(gradient, feature.dtype))
    return results


def statistics_over_channels(features, statistics, axis, weights=None, training=False):
    """Neither the concatenated features nor their products with the weights are stored.

    With `reference` a training step takes 7% longer and its process 9% more memory.
    """
    run = _compiled_over_channels if training else _over_channels
    number = len(features)

    @tf.custom_gradient
    def compute(*tensors):
        weights, features = tensors[:-number], tensors[-number:]
        output, values = run(weights, features, statistics, axis)
        return output, lambda grad_output: _grad_over_channels(weights, features, values, grad_output, statistics, axis)

    return compute(*([] if weights is None else [weights]), *features)


def _over_channels(weights, features, statistics, axis, unroll=False):
    """The statistics concatenated along the channels, and a dict of the values that the gradient needs."""
    over = functools.partial(_over_all, axis=axis, unroll=unroll)
    weighted, _ = _weighted(weights, features, axis)
    values, count = {}, sum(x.shape[axis] for x in features)
    if "max" in statistics:
        values["max"] = over(weighted, tf.maximum, tf.reduce_max)
    if "avg" in statistics or "std" in statistics:
        values["avg"] = over(weighted, tf.add, tf.reduce_sum) / count
    if "std" in statistics:
        squares = [tf.square(x - values["avg"]) for x in weighted]
        values["std"] = tf.sqrt(over(squares, tf.add, tf.reduce_sum) / count + EPSILON)
    return concatenate([values[name] for name in statistics], axis), values


_compiled_over_channels = _compiled(functools.partial(_over_channels, unroll=True))


def _over_all(values, combine, reduce, axis, unroll):
    """Reduces all channels of the tensors `values` by `reduce`; `combine` reduces two tensors elementwise."""
    if len({x.shape[axis] for x in values}) == 1:
        # Combine the tensors first: a reduction over few channels is slow.
        values = [functools.reduce(combine, values)]
    if unroll and max(x.shape[axis] for x in values) <= _FEW_CHANNELS:
        values = itertools.chain.from_iterable(tf.split(x, x.shape[axis], axis) for x in values)
        return functools.reduce(combine, values)
    return functools.reduce(combine, [reduce(x, axis, keepdims=True) for x in values])


def _weighted(weights, features, axis):
    """The weighted features in float32, and the weights of each."""
    shares = _split(_float32(weights[0]), features, axis) if weights else [1.0] * len(features)
    return [_float32(x) * share for x, share in zip(features, shares, strict=True)], shares


@_compiled
def _grad_over_channels(weights, features, values, grad_output, statistics, axis):
    grads = dict(zip(statistics, tf.split(grad_output, len(statistics), axis), strict=True))
    shift, scale = _shift_and_scale(values, grads, sum(x.shape[axis] for x in features))
    weighted, shares = _weighted(weights, features, axis)
    where = [_where_equal(x, values["max"]) if "max" in grads else None for x in weighted]
    if "max" in grads:
        by_largest = _share(grads["max"], _over_all(where, tf.add, tf.reduce_sum, axis, unroll=True))
    axes = spatial_axes(axis)[::-1]  # compiled, the last axis first is faster
    by_weights, by_features = [], []
    for feature, x, share, largest in zip(features, weighted, shares, where, strict=True):
        gradient = x * scale + shift
        if "max" in grads:
            gradient += largest * by_largest
        by_weights.append(_count(x, axes) * _mean(gradient * _float32(feature), axes))
        by_features.append(tf.cast(gradient * share, feature.dtype))
    return [*(tf.cast(concatenate(by_weights, axis), x.dtype) for x in weights), *by_features]


def weighted_reduction(features, channel_weights, spatial_weights, kernel, axis):
    """`K F + W_s ((K W_c) F)`: no tensor of the features' size is saved for backward except the features.

    With `reference` the process of a training step takes 18% more memory.
    """

    @tf.custom_gradient
    def compute(channel_weights, spatial_weights, kernel, *features):
        weights = tf.reshape(channel_weights, (-1, kernel.shape[0], 1))
        kernels = tf.concat([tf.broadcast_to(kernel, tf.shape(weights * kernel)), weights * kernel], -1)
        plain, weighted = tf.split(_product(concatenate(features, axis), kernels, axis), 2, axis)

        def grad(grad_output):
            by_spatial = tf.reduce_sum(grad_output * weighted, axis, keepdims=True)
            both = tf.concat([grad_output, grad_output * spatial_weights], axis)
            equation = "bdhwc,bdhwf->bcf" if axis == -1 else "bcdhw,bfdhw->bcf"
            by_kernels = concatenate([tf.einsum(equation, x, both) for x in features], 1)
            by_plain, by_weighted = tf.split(by_kernels, 2, -1)
            by_kernel = tf.reduce_sum(by_plain + weights * by_weighted, 0)
            by_channel = tf.reshape(tf.reduce_sum(kernel * by_weighted, -1), tf.shape(channel_weights))
            transposed = [tf.transpose(part, (0, 2, 1)) for part in _split(kernels, features, axis, 1)]
            return by_channel, by_spatial, by_kernel, *(_product(both, part, axis) for part in transposed)

        return plain + spatial_weights * weighted, grad

    return compute(channel_weights, spatial_weights, kernel, *features)


def _product(x, kernels, axis):
    """Multiplies the channels of each voxel by the matrix of its patch, `(batch, channels, filters)`."""
    return tf.einsum("bdhwc,bcf->bdhwf" if axis == -1 else "bcdhw,bcf->bfdhw", x, kernels)


def batch_norm_relu(x, gamma, beta, epsilon, axis, moments=None):
    """TensorFlow's fused operation, for float32 with channels last; with `reference` a step takes 12% longer."""
    # In half precision XLA computes a negative variance for large constants.
    if axis % len(x.shape) != len(x.shape) - 1 or x.dtype != tf.float32:
        return reference.batch_norm_relu(x, gamma, beta, epsilon, axis, moments)
    shape, channels = tf.shape(x), x.shape[-1]
    # The operation takes 4D tensors; which axes are merged makes no difference.
    mean, variance = moments or ([], [])
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, tf.stack([-1, shape[-3], shape[-2], channels])),
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format="NHWC",
        is_training=moments is None,
    )
    y = tf.ensure_shape(tf.nn.relu(tf.reshape(y, shape)), x.shape)
    if moments is None:  # the operation returns the sample variance, Keras uses the population variance
        count = _float32(tf.size(x) // channels)
        variance *= (count - 1) / count
    return y, tf.stop_gradient(mean), tf.stop_gradient(variance)
