"""Average, maximum and standard deviation over any axes: what both attentions look at."""

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


def statistics_over(x, statistics, axis):
    """Statistics of `x` over the axes `axis`, which stay with length 1, in float32 whatever the dtype of `x`.

    The standard deviation is the population's, `sqrt(mean((x - mean(x))**2) + 1e-6)` (eq. 10).

    Returns:
        A list with one float32 tensor for each name in `statistics`.
    """
    # A maximum is exact in any dtype, so it needs no copy of the input in float32.
    values = {}
    if "max" in statistics:
        values["max"] = ops.cast(ops.max(x, axis=axis, keepdims=True), "float32")
    if "avg" in statistics or "std" in statistics:
        x = ops.cast(x, "float32")
        values["avg"] = ops.mean(x, axis=axis, keepdims=True)
    if "std" in statistics:
        variance = ops.mean(ops.square(x - values["avg"]), axis=axis, keepdims=True)
        values["std"] = ops.sqrt(variance + EPSILON)
    return [values[name] for name in statistics]
