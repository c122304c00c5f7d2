"""What gradients written by hand need on every backend, and what need not be kept for them on PyTorch."""

import contextlib
import functools
import itertools
import weakref

import keras
from keras import ops

# Keeps the gradient of a square root finite where that of nothing is taken.
EPSILON = 1e-6


def compiled(function):
    """The function, on TensorFlow compiled as one by XLA, where else each of its operations makes a pass."""
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def with_gradient(compute, differentiate):
    """A function of tensors whose gradient is written by hand.

    It is Keras' `ops.custom_gradient`, but on PyTorch what the gradient needs is let go as soon as it is known.

    Args:
        compute: From the tensors to the output, and tensors by name that the gradient needs besides.
        differentiate: From the tensors, those by name, and the gradient by the output, to a tuple of those by each
            tensor.
    """
    if keras.backend.backend() == "torch":

        def function(*tensors):
            with not_kept(*tensors):
                return _torch_function().apply(compute, differentiate, *tensors)

        return function

    @ops.custom_gradient
    def function(*tensors):
        output, kept = compute(*tensors)

        def gradient(upstream):
            gradients = differentiate(tensors, kept, upstream)
            return gradients if len(gradients) > 1 else gradients[0]

        return output, gradient

    return function


@functools.cache
def _torch_function():
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(context, compute, differentiate, *tensors):
            output, kept = compute(*tensors)
            context.save_for_backward(*tensors, *kept.values())
            context.differentiate, context.count, context.names = differentiate, len(tensors), tuple(kept)
            return output

        @staticmethod
        def backward(context, upstream):
            gradients = context.differentiate(*_kept_by(context), upstream)
            context.asked = None
            return None, None, *gradients

    return Function


def _kept_by(context):
    """The tensors that the function of `with_gradient` was given, and those by name, which it keeps."""
    # Where its user recomputes or offloads what is kept, PyTorch lets it be asked for once.
    if getattr(context, "asked", None) is None:
        saved = context.saved_tensors
        context.asked = saved[: context.count], dict(zip(context.names, saved[context.count :], strict=True))
    return context.asked


class Remade:
    """An output of `with_gradient` on PyTorch that is made again for the gradients that need it, and not kept.

    Args:
        output: The output.
        make: A function that makes it again, from the tensors and those by name that its own gradient needs.
    """

    def __init__(self, output, make):
        self._make, self._values = make, None
        self._layout = output.size(), output.stride()
        # What is made from it comes before it on the way back, so that it is still there.
        self._context = weakref.ref(output.grad_fn)
        output.remade = self

    def values(self):
        """The output, made again where that was not done yet."""
        import torch

        if self._values is None:
            with torch.no_grad():
                values = self._make(*_kept_by(self._context()))
            same = (values.size(), values.stride()) == self._layout
            self._values = values if same else values.new_empty_strided(*self._layout).copy_(values)
        return self._values

    def take(self):
        """The output, to do with it as one likes: the gradient by it is known."""
        values, self._values = self.values(), None
        return values


def not_kept(*tensors):
    """A context in which PyTorch does not keep those of the tensors for a gradient that can be made again."""
    import torch

    remade = {tensor.data_ptr(): _remade(tensor) for tensor in tensors if _remade(tensor)}
    if not remade:
        return contextlib.nullcontext()

    def pack(tensor):
        found = remade.get(tensor.data_ptr())
        return (found, tensor.size(), tensor.stride(), tensor.storage_offset()) if found else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        found, *view = packed
        return found.values().as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _remade(tensor):
    return getattr(tensor if tensor._base is None else tensor._base, "remade", None)


def join(parts, axis):
    """The parts side by side; a single one as it is, not copied."""
    return ops.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]


def split_as(parts, x, axis, part_axis=None):
    """`x` along `axis` in parts as large as `parts` are along `part_axis`, by default the same."""
    part_axis = axis if part_axis is None else part_axis
    ends = itertools.accumulate((part.shape[part_axis] for part in parts), initial=0)
    before = (slice(None),) * (axis % len(x.shape))
    # Keras' own would have a GPU tell where the parts end.
    return [x[(*before, slice(*pair))] for pair in itertools.pairwise(ends)]


def by_part(parts, tensors, axis):
    """For each part those channels of the tensors, which come by name, that are its own."""
    split = {name: split_as(parts, tensor, axis) for name, tensor in tensors.items()}
    return [dict(zip(split, own, strict=True)) for own in zip(*split.values(), strict=True)]


def shift_and_scale(values, upstream, count):
    """What the average and the standard deviation add to a value's gradient, and by what they multiply the value.

    Args:
        values: The statistics of `count` values, by name.
        upstream: The gradients by those of them that were asked for.
        count: The number of values.
    """
    zero = ops.zeros_like(next(iter(upstream.values())))
    shift = upstream["avg"] / count if "avg" in upstream else zero
    if "std" not in upstream:
        return shift, zero
    scale = upstream["std"] / (values["std"] * count)
    return shift - values["avg"] * scale, scale
