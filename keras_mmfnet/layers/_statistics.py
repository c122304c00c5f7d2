"""Average, maximum and standard deviation over any axes: what both attentions look at."""

import functools
import math

import keras
from keras import ops

STATISTICS = ("avg", "max", "std")
# Keeps the gradient of the square root finite where the input is constant.
EPSILON = 1e-6


def check_statistics(statistics):
    """The names as a tuple; raises `ValueError` unless they are distinct and known."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    if not names or len(set(names)) != len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"`statistics` must be one or more of {STATISTICS}, each once. Received: {statistics!r}")
    return names


def statistics_over(x, statistics, axis, channel_axis=-1):
    """Statistics of `x` over the axes `axis`, which stay with length 1, in float32 whatever the dtype of `x`.

    The standard deviation is the population's, `sqrt(mean((x - mean(x))**2) + 1e-6)` (eq. 10). Where several values
    are the largest, the gradient of the maximum is shared among them.

    Returns:
        A float32 tensor with the statistics side by side along `channel_axis`, in the order of their names.
    """
    axes = (axis,) if isinstance(axis, int) else axis

    @ops.custom_gradient
    def compute(x):
        values = _values(x, statistics, axes)

        def gradient(*args, upstream=None):
            # PyTorch hands it over by this name, the others as the one argument.
            upstream = args[0] if upstream is None else upstream
            parts = ops.split(upstream, len(statistics), axis=channel_axis)
            return _gradient(x, values, dict(zip(statistics, parts, strict=True)), axes)

        return ops.concatenate([values[name] for name in statistics], axis=channel_axis), gradient

    return compute(x)


def _values(x, statistics, axes):
    """The statistics by name, and the average where the standard deviation needs it."""
    # A maximum is exact in any dtype, so it needs no copy of the input in float32.
    values = {}
    if "max" in statistics:
        values["max"] = ops.cast(_max(x, axes), "float32")
    if "avg" in statistics or "std" in statistics:
        x = ops.cast(x, "float32")
        values["avg"] = ops.mean(x, axis=axes, keepdims=True)
    if "std" in statistics:
        variance = ops.mean(ops.square(x - values["avg"]), axis=axes, keepdims=True)
        values["std"] = ops.sqrt(variance + EPSILON)
    return values


def _max(x, axes):
    if keras.backend.backend() == "torch":
        # Axis by axis it takes a tenth of the time there.
        return functools.reduce(lambda x, axis: ops.max(x, axis=axis, keepdims=True), axes, x)
    return ops.max(x, axis=axes, keepdims=True)


def _gradient(x, values, upstream, axes):
    """The gradient by `x` of the statistics, from that by each of them.

    The backends would go through the whole tensor a dozen times for it, which takes longer than the convolutions
    beside it, and keep the differences from the average until then. By hand it is a scale and a shift.
    """
    dtype, x = x.dtype, ops.cast(x, "float32")
    shape = ops.shape(x)
    count = ops.cast(math.prod(shape[axis] for axis in axes), "float32")
    gradient = upstream["avg"] / count if "avg" in upstream else 0.0
    if "std" in upstream:
        scale = upstream["std"] / (count * values["std"])
        gradient = x * scale + (gradient - values["avg"] * scale)
    if "max" in upstream:
        largest = ops.cast(ops.equal(x, values["max"]), "float32")
        gradient = gradient + largest * (upstream["max"] / ops.sum(largest, axis=axes, keepdims=True))
    return ops.cast(ops.broadcast_to(gradient, shape), dtype)
