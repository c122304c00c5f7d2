"""What gradients written by hand need, on every backend."""

import functools
import itertools

import keras
from keras import ops


def compiled(function):
    """The function, on TensorFlow compiled as one by XLA, where else each of its operations makes a pass."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


# Values of one tensor that are gone through at a time: 1 MiB on a processor, so that a dozen such are in its cache, and
# 64 MiB on a GPU, so that they take little of its memory.
SLAB, GPU_SLAB = 2**18, 2**24


def in_slabs(function):
    """The function, on PyTorch called for one slab of the volumes after the other.

    So each of its operations finds in the processor's cache what the one before it left there, and what they leave
    takes little memory.

    Args:
        function: From tensors with 5 axes, or lists of such of which the last is features, and `axis`, that of the
            channels, to two lists: sums over the space of each patch, and values of each voxel. What has length 1
            along the depth is the same for each slab.
    """
    if keras.backend.backend() != "torch":
        return function
    return functools.partial(_in_slabs, function)


def _in_slabs(function, *volumes, axis, **options):
    features = volumes[-1][0]
    batch, depth_axis = len(features), 2 if axis == 1 else 1
    depth, limit = features.shape[depth_axis], GPU_SLAB if features.is_cuda else SLAB
    if features.numel() <= limit:
        return function(*volumes, axis=axis, **options)
    thickness = max(1, limit * batch * depth // features.numel())

    def cut(tensors, patch, start, size):
        if isinstance(tensors, (list, tuple)):
            return [cut(tensor, patch, start, size) for tensor in tensors]
        tensor = tensors[patch : patch + 1] if len(tensors) > 1 else tensors
        return tensor.narrow(depth_axis, start, size) if tensor.shape[depth_axis] > 1 else tensor

    sums, values = [], []
    for patch in range(batch):
        for start in range(0, depth, thickness):
            size = min(thickness, depth - start)
            slab_sums, slab_values = function(*cut(volumes, patch, start, size), axis=axis, **options)
            if not patch and not start:
                sums = [x.new_zeros((batch, *x.shape[1:])) for x in slab_sums]
                shapes = [[*x.shape] for x in slab_values]
                for shape in shapes:
                    shape[0], shape[depth_axis] = batch, depth
                values = [x.new_empty(shape) for x, shape in zip(slab_values, shapes, strict=True)]
            for whole, slab in zip(sums, slab_sums, strict=True):
                whole[patch] += slab[0]
            for whole, slab in zip(values, slab_values, strict=True):
                whole[patch : patch + 1].narrow(depth_axis, start, size).copy_(slab)
    return sums, values


def upstream_of(args, upstream):
    """What a gradient function got: PyTorch hands it over by name, the others as the one argument."""
    return args[0] if upstream is None else upstream


def multiply_add(x, factor, summand, out=None):
    """`x * factor + summand`; on PyTorch in one pass too, and into `out`, a tensor of one's own, if that is given."""
    if keras.backend.backend() != "torch":
        return x * factor + summand
    import torch

    return torch.addcmul(summand, x, factor, out=out)


def into(out, operation, x, y):
    """`keras.ops`' operation of that name on `x` and `y`; on PyTorch into `out`, a tensor of one's own.

    A result takes several times as long where it goes to memory that no operation has just used.
    """
    if keras.backend.backend() != "torch":
        return getattr(ops, operation)(x, y)
    import torch

    return getattr(torch, operation)(x, y, out=out)


def add(x, y):
    """`x + y`, on PyTorch into `x`, a tensor of one's own."""
    return into(x, "add", x, y)


def join(parts, axis):
    """The parts side by side; a single one as it is, not copied."""
    return ops.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


def split_as(parts, x, axis, part_axis=None):
    """`x` along `axis` in parts as large as `parts` are along `part_axis`, by default the same."""
    part_axis = axis if part_axis is None else part_axis
    ends = list(itertools.accumulate(part.shape[part_axis] for part in parts[:-1]))
    return ops.split(x, ends, axis=axis) if ends else [x]


def _are_alike(parts, axis):
    return len({part.shape[axis] for part in parts}) == 1


def over_parts(parts, axis, combine, reduce):
    """The channels of all parts, reduced by `reduce`; `combine` does that of two tensors, voxel by voxel."""
    parts = list(parts)
    if _are_alike(parts, axis):
        # Over a few channels a reduction takes longer than combining the parts before it.
        parts = [functools.reduce(combine, parts)]
    return functools.reduce(combine, [reduce(part, axis=axis, keepdims=True) for part in parts])


def spread(x, parts, axis):
    """What has one value a voxel, for each channel of a part.

    On PyTorch without a GPU it takes less time to make that once than to broadcast it for each part.
    """
    if keras.backend.backend() != "torch" or x.is_cuda or not _are_alike(parts, axis):
        return x
    return x.expand(parts[0].shape).contiguous()
