"""The statistics of `_statistics.py` for backends whose compiler makes few passes of many operations."""

import functools
import itertools
import math

import keras
from keras import ops

from keras_mmfnet.layers._gradients import EPSILON, by_part, compiled, join, shift_and_scale, split_as

# Up to so many channels are unrolled.
_FEW_CHANNELS = 8


def over_space(parts, statistics, axes, channel_axis, training):
    """The statistics side by side, and by name what the gradient needs."""
    # Compiled, it could not be exported. TensorFlow then takes less time over the last axis first.
    if training:
        return _compiled_over_space(parts, statistics, axes, channel_axis)
    return _over_space(parts, statistics, axes[::-1], channel_axis)


def _over_space(parts, statistics, axes, channel_axis):
    # A maximum is exact in any dtype, so it needs no copy of the input in float32.
    values = {}
    if "max" in statistics:
        largest = [ops.max(part, axis=axes, keepdims=True) for part in parts]
        values["max"] = ops.cast(join(largest, channel_axis), "float32")
    if "avg" in statistics or "std" in statistics:
        parts = [ops.cast(part, "float32") for part in parts]
        averages = [_mean(part, axes) for part in parts]
        values["avg"] = join(averages, channel_axis)
    if "std" in statistics:
        differences = (part - average for part, average in zip(parts, averages, strict=True))
        variances = [_mean(difference * difference, axes) for difference in differences]
        values["std"] = ops.sqrt(join(variances, channel_axis) + EPSILON)
    return join([values[name] for name in statistics], channel_axis), values


_compiled_over_space = compiled(_over_space)


def _mean(x, axes):
    if keras.backend.backend() == "tensorflow":
        # It adds up one value after the other, and loses digits where they are many. Compiled, half the time, too.
        x = ops.mean(x, axis=axes[0], keepdims=True)
    return ops.mean(x, axis=axes, keepdims=True)


def _number_of_voxels(x, axes):
    return ops.cast(math.prod(ops.shape(x)[axis] for axis in axes), "float32")


# The backends would go through the whole tensor a dozen times for these gradients, which takes longer than the
# convolutions beside them, and keep the differences from the average until then. By hand they are a scale and a shift.
@compiled
def gradient_over_space(parts, values, upstream, statistics, axes, channel_axis):
    """The gradient by each part, from that by the statistics side by side."""
    upstream = dict(zip(statistics, ops.split(upstream, len(statistics), axis=channel_axis), strict=True))
    voxels = _number_of_voxels(parts[0], axes)
    gradients = []
    own = zip(parts, by_part(parts, values, channel_axis), by_part(parts, upstream, channel_axis), strict=True)
    for part, values, upstream in own:
        x = ops.cast(part, "float32")
        gradient, scale = shift_and_scale(values, upstream, voxels)
        if "max" in upstream:
            where = _where_equal(x, values["max"])
            gradient = gradient + where * _among(upstream["max"], voxels * _mean(where, axes))
        if "std" in upstream:
            gradient = gradient + x * scale
        gradients.append(ops.cast(ops.broadcast_to(gradient, ops.shape(part)), part.dtype))
    return tuple(gradients)


def _where_equal(x, value):
    """1 where `x` equals `value`, else 0, in float32."""
    return ops.cast(ops.equal(x, value), "float32")


def _among(gradient, count):
    """The gradient of a maximum for each of the `count` values that are as large."""
    # A compiler may compute a value twice and round it in two ways; then none seems to be.
    return gradient / ops.maximum(count, 1.0)


def over_channels(weights, parts, statistics, axis, training):
    """The statistics side by side, and by name what the gradient needs."""
    return (_compiled_over_channels if training else _over_channels)(weights, parts, statistics, axis)


def _over_channels(weights, parts, statistics, axis, unroll=False):
    over_parts = functools.partial(_over_parts, axis=axis, unroll=unroll)
    weighted = [_weigh(part, share) for part, share in zip(parts, _shares(weights, parts, axis), strict=True)]
    values, count = {}, sum(part.shape[axis] for part in parts)
    if "max" in statistics:
        values["max"] = over_parts(weighted, ops.maximum, ops.max)
    if "avg" in statistics or "std" in statistics:
        values["avg"] = over_parts(weighted, ops.add, ops.sum) / count
    if "std" in statistics:
        differences = [part - values["avg"] for part in weighted]
        squares = [difference * difference for difference in differences]
        values["std"] = ops.sqrt(over_parts(squares, ops.add, ops.sum) / count + EPSILON)
    return join([values[name] for name in statistics], axis), values


_compiled_over_channels = compiled(functools.partial(_over_channels, unroll=True))


def _over_parts(values, combine, reduce, axis, unroll):
    """The channels of all `values` reduced by `reduce`; `combine` does that of two, voxel by voxel."""
    if len({value.shape[axis] for value in values}) == 1:
        # Over a few channels a reduction takes longer than combining the parts before it.
        values = [functools.reduce(combine, values)]
    if unroll and max(value.shape[axis] for value in values) <= _FEW_CHANNELS:
        # A loop over few channels is most of the work.
        channels = (ops.split(value, value.shape[axis], axis=axis) for value in values)
        return functools.reduce(combine, itertools.chain.from_iterable(channels))
    return functools.reduce(combine, [reduce(value, axis=axis, keepdims=True) for value in values])


@compiled
def gradient_over_channels(weights, parts, values, upstream, statistics, axis):
    """The gradients by the weights, if there are any, and by each part, from that by the statistics side by side."""
    upstream = dict(zip(statistics, ops.split(upstream, len(statistics), axis=axis), strict=True))
    shift, scale = shift_and_scale(values, upstream, sum(part.shape[axis] for part in parts))
    shares = _shares(weights, parts, axis)
    weighted = [_weigh(part, share) for part, share in zip(parts, shares, strict=True)]
    if "max" in upstream:
        where = [_where_equal(part, values["max"]) for part in weighted]
        by_largest = _among(upstream["max"], _over_parts(where, ops.add, ops.sum, axis, unroll=True))
    # The last axis first: so it takes less time, compiled.
    space = tuple(number for number in (3, 2, 1, 4) if number != axis % 5)
    by_weights, by_parts = [], []
    for index, (part, share) in enumerate(zip(parts, shares, strict=True)):
        gradient = weighted[index] * scale + shift
        if "max" in upstream:
            gradient = gradient + where[index] * by_largest
        if weights:
            products = gradient * ops.cast(part, "float32")
            by_weights.append(_number_of_voxels(part, space) * _mean(products, space))
        by_parts.append(ops.cast(gradient * share, part.dtype))
    return (*([ops.cast(join(by_weights, axis), weights[0].dtype)] if weights else []), *by_parts)


def _shares(weights, parts, axis):
    """Each part's weights, in float32; none are ones."""
    if not weights:
        return [1.0] * len(parts)
    return split_as(parts, ops.cast(weights[0], "float32"), axis)


def _weigh(part, share):
    """A part times its weights, in float32; also in half precision the products are exact."""
    return ops.cast(part, "float32") * share
