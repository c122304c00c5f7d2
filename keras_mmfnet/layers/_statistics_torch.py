"""The statistics of `_statistics.py` on PyTorch, where each operation is a pass of its own.

A result takes several times as long where it goes to memory that no operation has just used: so what is not needed any
more is written over. Keras' operations on the small tensors would take as long as PyTorch's on the large ones.
"""

import functools
import math

import torch

from keras_mmfnet.layers._gradients import EPSILON, by_part, shift_and_scale


def over_space(parts, statistics, axes, channel_axis, training):
    """The statistics side by side, and by name what the gradient needs."""
    # A maximum is exact in any dtype, so it needs no copy of the input in float32.
    values = {}
    if "max" in statistics:
        # Axis by axis it takes a tenth of the time.
        largest = [functools.reduce(lambda x, axis: x.amax(axis, keepdim=True), axes, part) for part in parts]
        values["max"] = torch.cat(largest, channel_axis).float()
    if "avg" in statistics or "std" in statistics:
        parts = [part.float() for part in parts]
        averages = [part.mean(axes, keepdim=True) for part in parts]
        values["avg"] = torch.cat(averages, channel_axis)
    if "std" in statistics:
        differences = (part - average for part, average in zip(parts, averages, strict=True))
        variances = [difference.square_().mean(axes, keepdim=True) for difference in differences]
        values["std"] = (torch.cat(variances, channel_axis) + EPSILON).sqrt_()
    return torch.cat([values[name] for name in statistics], channel_axis), values


def gradient_over_space(parts, values, upstream, statistics, axes, channel_axis):
    """The gradient by each part, from that by the statistics side by side."""
    upstream = dict(zip(statistics, upstream.chunk(len(statistics), channel_axis), strict=True))
    voxels = math.prod(parts[0].shape[axis] for axis in axes)
    gradients = []
    own = zip(parts, by_part(parts, values, channel_axis), by_part(parts, upstream, channel_axis), strict=True)
    for part, values, upstream in own:
        x, out = part.float(), None
        gradient, scale = shift_and_scale(values, upstream, voxels)
        if "max" in upstream:
            out = where = _where_largest(x, values["max"])
            by_largest = upstream["max"] / where.sum(axes, keepdim=True).clamp_(min=1)
            gradient = torch.addcmul(gradient, where, by_largest, out=out)
        if "std" in upstream:
            gradient = torch.addcmul(gradient, x, scale, out=out)
        gradients.append(gradient.expand_as(part).to(part.dtype))
    return tuple(gradients)


def _where_largest(x, largest):
    """1 where `x` is `largest`, else 0."""
    # It is never larger, and to ask whether it is equal takes four times as long.
    return torch.ge(x, largest, out=torch.empty_like(x))


def over_channels(weights, parts, statistics, axis, training):
    """The statistics side by side, and by name what the gradient needs."""
    weighted = [_weigh(part, share) for part, share in zip(parts, _shares(weights, parts, axis), strict=True)]
    values, count = {}, sum(part.shape[axis] for part in parts)
    if "max" in statistics:
        values["max"] = _over_parts(weighted, parts, axis, torch.maximum, torch.amax)
    if "avg" in statistics or "std" in statistics:
        values["avg"] = _over_parts(weighted, parts, axis, torch.add, torch.sum).div_(count)
    if "std" in statistics:
        squares = (part.sub_(values["avg"]).square_() for part in weighted)
        values["std"] = (
            _over_parts(squares, parts, axis, torch.Tensor.add_, torch.sum).div_(count).add_(EPSILON).sqrt_()
        )
    return torch.cat([values[name] for name in statistics], axis), values


def _shares(weights, parts, axis):
    """Each part's weights, in float32; none are ones."""
    if not weights:
        return [1.0] * len(parts)
    return weights[0].float().split([part.shape[axis] for part in parts], axis)


def _weigh(part, share):
    """A part times its weights, in float32; also in half precision the products are exact."""
    return part.float() * share


def _over_parts(values, parts, axis, combine, reduce):
    """The channels of all `values`, one for each part, reduced by `reduce`; `combine` does that of two, voxel by voxel.

    The values may be a generator: then few of them need be there at a time.
    """
    if len({part.shape[axis] for part in parts}) == 1:
        # Over a few channels a reduction takes longer than combining the parts before it.
        values = [functools.reduce(combine, values)]
    return functools.reduce(combine, [reduce(value, axis, keepdim=True) for value in values])


def gradient_over_channels(weights, parts, values, upstream, statistics, axis):
    """The gradients by the weights, if there are any, and by each part, from that by the statistics side by side."""
    upstream = dict(zip(statistics, upstream.chunk(len(statistics), axis), strict=True))
    shift, scale = shift_and_scale(values, upstream, sum(part.shape[axis] for part in parts))
    pairs = list(zip(parts, _shares(weights, parts, axis), strict=True))
    if "max" in upstream:
        where = (_where_largest(_weigh(*pair), values["max"]) for pair in pairs)
        by_largest = upstream["max"] / _over_parts(where, parts, axis, torch.Tensor.add_, torch.sum).clamp_(min=1)
    space = tuple(number for number in range(1, 5) if number != axis % 5)
    by_weights, by_parts = [], []
    # One part after the other, and the same twice: so little memory is needed at a time.
    for part, share in pairs:
        weighted, spare = _weigh(part, share), None
        if "max" in upstream:
            spare = _where_largest(weighted, values["max"])
        gradient = torch.addcmul(shift, weighted, scale, out=weighted)
        if "max" in upstream:
            gradient.addcmul_(spare, by_largest)
        if weights:
            by_weights.append(torch.mul(gradient, part, out=spare).sum(space, keepdim=True))
            gradient.mul_(share)
        by_parts.append(gradient.to(part.dtype))
    return (*([torch.cat(by_weights, axis).to(weights[0].dtype)] if weights else []), *by_parts)
