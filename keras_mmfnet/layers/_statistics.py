"""Average, maximum and standard deviation over space or over channels: what both attentions look at."""

import keras

from keras_mmfnet.layers._gradients import with_gradient

if keras.backend.backend() == "torch":
    from keras_mmfnet.layers import _statistics_torch as formulas
else:
    from keras_mmfnet.layers import _statistics_compiled as formulas

STATISTICS = ("avg", "max", "std")


def check_statistics(statistics):
    """The names as a tuple; raises `ValueError` unless they are distinct and known."""
    names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
    if not names or len(set(names)) != len(names) or not set(names) <= set(STATISTICS):
        raise ValueError(f"`statistics` must be one or more of {STATISTICS}, each once. Received: {statistics!r}")
    return names


def statistics_over_space(parts, statistics, axes, channel_axis, training=False):
    """Statistics of each channel over the axes `axes`, in float32 whatever the dtype of the parts (eq. 8-10).

    The standard deviation is the population's, `sqrt(mean((x - mean(x))**2) + 1e-6)`. Where several values are the
    largest, the gradient of the maximum is shared among them.

    Args:
        parts: Tensors with their channels along `channel_axis`, which count as side by side.
        statistics: Names of the statistics.
        axes: Axes of depth, height and width, which stay with length 1.
        channel_axis: Axis of the channels.
        training: Whether it may be compiled for speed; compiled, it could not be exported.

    Returns:
        A float32 tensor with the statistics side by side along `channel_axis`, in the order of the names.
    """

    def compute(*parts):
        return formulas.over_space(parts, statistics, axes, channel_axis, training)

    def differentiate(parts, values, upstream):
        return formulas.gradient_over_space(parts, values, upstream, statistics, axes, channel_axis)

    return with_gradient(compute, differentiate)(*parts)


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

    def compute(*tensors):
        return formulas.over_channels(tensors[:-count], tensors[-count:], statistics, axis, training)

    def differentiate(tensors, values, upstream):
        return formulas.gradient_over_channels(tensors[:-count], tensors[-count:], values, upstream, statistics, axis)

    return with_gradient(compute, differentiate)(*weights, *parts)
