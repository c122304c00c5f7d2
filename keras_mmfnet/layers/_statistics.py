"""Average, maximum and standard deviation over space or over channels: what both attentions look at."""

import functools
import math

import keras
from keras import ops

from keras_mmfnet.layers._gradients import add, compiled, into, join, multiply_add, split_as, with_gradient

STATISTICS = ("avg", "max", "std")
# Keeps the gradient of the square root finite where the input is constant.
EPSILON = 1e-6


def check_statistics(statistics):
    """The names as a tuple; raises `ValueError` unless they are distinct and known."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    if not names or len(set(names)) != len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"`statistics` must be one or more of {STATISTICS}, each once. Received: {statistics!r}")
    return names


def statistics_over_space(parts, statistics, axes, channel_axis):
    """Statistics of each channel over the axes `axes`, in float32 whatever the dtype of the parts (eq. 8-10).

    The standard deviation is the population's, `sqrt(mean((x - mean(x))**2) + 1e-6)`. Where several values are the
    largest, the gradient of the maximum is shared among them.

    Args:
        parts: Tensors with their channels along `channel_axis`, which count as side by side.
        statistics: Names of the statistics.
        axes: Axes of depth, height and width, which stay with length 1.
        channel_axis: Axis of the channels.

    Returns:
        A float32 tensor with the statistics side by side along `channel_axis`, in the order of the names.
    """

    def values_of(*parts):
        return _over_space(parts, statistics, axes, channel_axis)

    def gradients_of(parts, values, upstream):
        return _gradient_over_space(parts, values, upstream, axes, channel_axis)

    return _side_by_side(statistics, channel_axis, values_of, gradients_of)(*parts)


def statistics_over_channels(parts, statistics, axis, weights=None, training=False):
    """Statistics of each voxel over the channels of `parts`, in float32 whatever their dtype (eq. 11).

    They are those of the parts side by side, times `weights`; neither is kept for the gradient, nor need be made.

    Args:
        parts: Tensors with their channels along `axis`, which count as side by side.
        statistics: Names of the statistics, which are those of `statistics_over_space`.
        axis: Axis of the channels.
        weights: A factor for each channel, of length 1 along the axes of space.
        training: Whether it may be compiled for speed; compiled, it could not be exported.

    Returns:
        A float32 tensor with the statistics side by side along `axis`.
    """
    weights, count = [] if weights is None else [weights], len(parts)
    over_channels = _compiled_over_channels if training else _over_channels

    def values_of(*tensors):
        return over_channels(tensors[:-count], tensors[-count:], statistics, axis)

    def gradients_of(tensors, values, upstream):
        return _gradient_over_channels(tensors[:-count], tensors[-count:], values, upstream, axis)

    return _side_by_side(statistics, axis, values_of, gradients_of)(*weights, *parts)


def moments_of_rows(x):
    """The mean and the population variance of each column of a matrix, on PyTorch without a GPU."""
    import torch

    means, variances = torch.batch_norm_update_stats(several_rows(x), None, None, 0.0)
    means, variances = means.reshape(-1, x.shape[1]), variances.reshape(-1, x.shape[1])
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def several_rows(x):
    """A matrix of few columns with several of its rows side by side.

    The threads of PyTorch's batch normalization keep a sum for each column side by side. Where the sums of two threads
    share a line of the processor's cache, more threads take longer than one.
    """
    rows, columns = x.shape
    return x.reshape(-1, columns * math.gcd(rows, max(1, 128 // columns)))


def _side_by_side(statistics, axis, values_of, gradients_of):
    """A function from tensors to the statistics side by side along `axis`, with its gradient by hand.

    Args:
        statistics: Names of the statistics.
        axis: Axis of the channels.
        values_of: From the tensors to the statistics by name.
        gradients_of: From the tensors, the statistics and the gradients by these, to those by the tensors.
    """

    def compute(*tensors):
        values = values_of(*tensors)
        return ops.concatenate([values[name] for name in statistics], axis=axis), values

    def differentiate(tensors, values, upstream):
        upstream = ops.split(upstream, len(statistics), axis=axis)
        return gradients_of(tensors, values, dict(zip(statistics, upstream, strict=True)))

    return with_gradient(compute, differentiate)


def _where_equal(x, value):
    """1 where `x` equals `value`, else 0, in float32."""
    if keras.backend.backend() != "torch":
        return ops.cast(ops.equal(x, value), "float32")
    import torch

    return torch.eq(x, value, out=torch.empty_like(x))


def _among(gradient, count):
    """The gradient of a maximum for each of the `count` values that are as large."""
    # A compiler may compute a value twice and round it in two ways; then none seems to be.
    return gradient / ops.maximum(count, 1.0)


def _over_space(parts, statistics, axes, channel_axis):
    """The statistics by name, and the average where the standard deviation needs it."""
    # A maximum is exact in any dtype, so it needs no copy of the input in float32.
    values = {}
    if "max" in statistics:
        values["max"] = ops.cast(join([_max(part, axes) for part in parts], channel_axis), "float32")
    if "avg" in statistics or "std" in statistics:
        parts = [ops.cast(part, "float32") for part in parts]
        averages = [ops.mean(part, axis=axes, keepdims=True) for part in parts]
        values["avg"] = join(averages, channel_axis)
    if "std" in statistics:
        differences = (part - average for part, average in zip(parts, averages, strict=True))
        squares = (into(difference, "multiply", difference, difference) for difference in differences)
        variances = [ops.mean(square, axis=axes, keepdims=True) for square in squares]
        values["std"] = ops.sqrt(join(variances, channel_axis) + EPSILON)
    return values


def _max(x, axes):
    if keras.backend.backend() == "torch":
        # Axis by axis it takes a tenth of the time there.
        return functools.reduce(lambda x, axis: ops.max(x, axis=axis, keepdims=True), axes, x)
    return ops.max(x, axis=axes, keepdims=True)


# The backends would go through the whole tensor a dozen times for these gradients, which takes longer than the
# convolutions beside them, and keep the differences from the average until then. By hand they are a scale and a shift.
@compiled
def _gradient_over_space(parts, values, upstream, axes, channel_axis):
    """The gradient by each part, from that by each of the statistics."""
    shape = ops.shape(parts[0])
    count = ops.cast(math.prod(shape[axis] for axis in axes), "float32")
    shift, scale = _shift_and_scale(values, upstream, count)

    def split(x):
        return [None] * len(parts) if x is None else split_as(parts, x, channel_axis)

    gradients = []
    by_part = (split(x) for x in (shift, scale, values.get("max"), upstream.get("max")))
    for part, gradient, scale, largest, by_largest in zip(parts, *by_part, strict=True):
        x, out = ops.cast(part, "float32"), None
        if "max" in upstream:
            out = where = _where_equal(x, largest)
            by_largest = _among(by_largest, ops.sum(where, axis=axes, keepdims=True))
            gradient = multiply_add(where, by_largest, gradient, out)
        if "std" in upstream:
            gradient = multiply_add(x, scale, gradient, out)
        gradients.append(ops.cast(ops.broadcast_to(gradient, ops.shape(part)), part.dtype))
    return tuple(gradients)


def _shift_and_scale(values, upstream, count):
    """What the average and the standard deviation add to a value's gradient, and by what they multiply the value."""
    zero = ops.zeros_like(next(iter(upstream.values())))
    shift = upstream["avg"] / count if "avg" in upstream else zero
    if "std" not in upstream:
        return shift, zero
    scale = upstream["std"] / (count * values["std"])
    return shift - values["avg"] * scale, scale


def _shares(weights, parts, axis):
    """Each part's weights, in float32; none are ones."""
    if not weights:
        return [ops.ones([part.shape[axis] if number == axis % 5 else 1 for number in range(5)]) for part in parts]
    return split_as(parts, ops.cast(weights[0], "float32"), axis)


def _weigh(part, share):
    """A part times its weights, in float32; also in half precision the products are exact."""
    return ops.cast(part, "float32") * share


def _over_parts(values, parts, axis, combine, reduce):
    """The channels of all `values`, one for each part, reduced by `reduce`; `combine` does that of two, voxel by voxel.

    The values may be a generator: then few of them need be there at a time.
    """
    if len({part.shape[axis] for part in parts}) == 1:
        # Over a few channels a reduction takes longer than combining the parts before it.
        values = [functools.reduce(combine, values)]
    return functools.reduce(combine, [reduce(value, axis=axis, keepdims=True) for value in values])


def _over_channels(weights, parts, statistics, axis):
    """The statistics by name, and the average where the standard deviation needs it."""
    weighted = [_weigh(part, share) for part, share in zip(parts, _shares(weights, parts, axis), strict=True)]
    values, count = {}, sum(part.shape[axis] for part in parts)
    if "max" in statistics:
        values["max"] = _over_parts(weighted, parts, axis, ops.maximum, ops.max)
    if "avg" in statistics or "std" in statistics:
        values["avg"] = _over_parts(weighted, parts, axis, ops.add, ops.sum) / count
    if "std" in statistics:
        differences = (into(part, "subtract", part, values["avg"]) for part in weighted)
        squares = (into(difference, "multiply", difference, difference) for difference in differences)
        values["std"] = ops.sqrt(_over_parts(squares, parts, axis, add, ops.sum) / count + EPSILON)
    return values


_compiled_over_channels = compiled(_over_channels)


@compiled
def _gradient_over_channels(weights, parts, values, upstream, axis):
    """The gradients by the weights, if there are any, and by each part, from that by each statistic."""
    shift, scale = _shift_and_scale(values, upstream, sum(part.shape[axis] for part in parts))
    shares = _shares(weights, parts, axis)
    if "max" in upstream:
        pairs = zip(parts, shares, strict=True)
        where = (_where_equal(_weigh(part, share), values["max"]) for part, share in pairs)
        by_largest = _among(upstream["max"], _over_parts(where, parts, axis, add, ops.sum))
    space = tuple(number for number in range(1, 5) if number != axis % 5)
    by_weights, by_parts = [], []
    # One part after the other, and the same twice: so little memory is needed at a time.
    for part, share in zip(parts, shares, strict=True):
        weighted, spare = _weigh(part, share), None
        if "max" in upstream:
            spare = _where_equal(weighted, values["max"])
        gradient = multiply_add(weighted, scale, shift, out=weighted)
        if "max" in upstream:
            gradient = multiply_add(spare, by_largest, gradient, out=gradient)
        if weights:
            products = into(spare, "multiply", gradient, ops.cast(part, "float32"))
            by_weights.append(ops.sum(products, axis=space, keepdims=True))
            gradient = into(gradient, "multiply", gradient, share)
        by_parts.append(ops.cast(gradient, part.dtype))
    return (*([ops.cast(join(by_weights, axis), weights[0].dtype)] if weights else []), *by_parts)
