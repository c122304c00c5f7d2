"""What statistics and gradients written by hand need, on every backend."""

import itertools

import keras
from keras import ops


def compiled(function):
    """The function, on TensorFlow compiled as one by XLA, where else each of its operations makes a pass."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


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
