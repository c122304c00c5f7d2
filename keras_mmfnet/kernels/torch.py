"""The operations on PyTorch, with explicit gradients that save little for backward.

Writing to freshly allocated memory is several times slower than to memory in the cache, so tensors are overwritten when
they are no longer needed.

The operations of this module do not save the output of `batch_norm_relu` for backward. The output has an attribute
`recomputed`, a `Recomputed` that recomputes it from the tensors saved by its own backward. Other operations ignore the
attribute and save the output as usual.
"""

import contextlib
import functools
import math
import weakref

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keras_mmfnet.kernels import reference
from keras_mmfnet.kernels.reference import EPSILON, spatial_axes


class Recomputed:
    """The output of a function, recomputed for the backward of the operations that use it.

    Args:
        recompute: Function that computes the output from the function's saved tensors.
    """

    def __init__(self, recompute):
        self._recompute, self._context, self._saved, self._output = recompute, None, None, None

    def attach(self, context, output):
        """Sets the context and the output of the function; called in its forward."""
        # A weak reference: the graph keeps the context alive as long as it is needed for backward.
        self._context = weakref.ref(context)
        self._layout = output.size(), output.stride()

    def saved(self):
        """The saved tensors. With PyTorch's checkpointing and offloading they can be read only once."""
        if self._saved is None:
            self._saved = self._context().saved_tensors
        return self._saved

    def output(self):
        """The recomputed output, which is cached until `release`."""
        if self._output is None:
            with torch.no_grad():
                output = self._recompute(*self.saved())
            if (output.size(), output.stride()) != self._layout:  # the saved tensors were offloaded
                output = output.new_empty_strided(*self._layout).copy_(output)
            self._output = output
        return self._output

    def release(self):
        """Releases the output and the saved tensors; called when the gradient of the output is complete."""
        self._saved = self._output = None


def _saving_no_recomputed(*tensors):
    """A context in which PyTorch does not save those of the tensors for backward that can be recomputed."""
    recomputed = {x.untyped_storage().data_ptr(): x.recomputed for x in tensors if hasattr(x, "recomputed")}
    if not recomputed:
        return contextlib.nullcontext()

    def pack(tensor):
        found = recomputed.get(tensor.untyped_storage().data_ptr())
        return (found, tensor.size(), tensor.stride(), tensor.storage_offset()) if found else tensor

    def unpack(packed):
        if isinstance(packed, torch.Tensor):
            return packed
        found, *view = packed
        return found.output().as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _apply(function, settings, *tensors):
    with _saving_no_recomputed(*tensors):
        return function.apply(settings, *tensors)


def _split(x, features, axis, x_axis=None):
    """Splits `x` along `x_axis` (default `axis`) into as many channels as each of the features has along `axis`."""
    return x.split([feature.shape[axis] for feature in features], axis if x_axis is None else x_axis)


def _where_largest(x, largest):
    """1 where `x` equals its maximum `largest`, else 0."""
    # `x` is never larger, and `eq` is four times slower than `ge`.
    return torch.ge(x, largest, out=torch.empty_like(x))


def _shift_and_scale(values, grads, count):
    """The gradient of average and standard deviation by a value `x` is `shift + scale * x`."""
    zero = torch.zeros_like(next(iter(grads.values())))
    shift = grads["avg"] / count if "avg" in grads else zero
    if "std" not in grads:
        return shift, zero
    scale = grads["std"] / (values["std"] * count)
    return shift - values["avg"] * scale, scale


def statistics_over_space(features, statistics, axis, training=False):
    """Saves the features and one value per statistic and channel for backward.

    With `reference` a training step takes 7% longer and its tensors take 32% more memory.
    """
    output = _apply(_StatisticsOverSpace, (statistics, axis), *features)
    return output.reshape(len(output), len(statistics), -1)


class _StatisticsOverSpace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *features):
        statistics, axis = settings
        axes, values = spatial_axes(axis), {}
        if "max" in statistics:
            # Exact in any dtype. Reducing axis by axis is ten times faster.
            largest = [functools.reduce(lambda x, axis: x.amax(axis, keepdim=True), axes, x) for x in features]
            values["max"] = torch.cat(largest, axis).float()
        if "avg" in statistics or "std" in statistics:
            averages = [x.float().mean(axes, keepdim=True) for x in features]
            values["avg"] = torch.cat(averages, axis)
        if "std" in statistics:
            differences = (x.float() - average for x, average in zip(features, averages, strict=True))
            variances = [difference.square_().mean(axes, keepdim=True) for difference in differences]
            values["std"] = (torch.cat(variances, axis) + EPSILON).sqrt_()
        ctx.save_for_backward(*features, *values.values())
        ctx.settings, ctx.names = settings, tuple(values)
        return torch.cat([values[name] for name in statistics], axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        statistics, axis = ctx.settings
        saved, axes = ctx.saved_tensors, spatial_axes(axis)
        features, values = saved[: -len(ctx.names)], dict(zip(ctx.names, saved[-len(ctx.names) :], strict=True))
        grads = dict(zip(statistics, grad_output.chunk(len(statistics), axis), strict=True))
        shift, scale = _shift_and_scale(values, grads, math.prod(features[0].shape[axis] for axis in axes))
        parts = shift, scale, values.get("max", shift), grads.get("max", shift)
        parts = [_split(tensor, features, axis) for tensor in parts]
        results = []
        for feature, gradient, scale, largest, by_largest in zip(features, *parts, strict=True):
            x, out = feature.float(), None
            if "max" in grads:
                out = where = _where_largest(x, largest)
                by_largest = by_largest / where.sum(axes, keepdim=True).clamp_(min=1)
                gradient = torch.addcmul(gradient, where, by_largest, out=out)
            if "std" in grads:
                gradient = torch.addcmul(gradient, x, scale, out=out)
            results.append(gradient.expand_as(feature).to(feature.dtype))
        return None, *results


def statistics_over_channels(features, statistics, axis, weights=None, training=False):
    """Saves only the features; with `reference` a step takes 5% longer and its tensors 58% more memory."""
    tensors = features if weights is None else [*features, weights]
    return _apply(_StatisticsOverChannels, (statistics, axis, len(features)), *tensors)


class _StatisticsOverChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, *tensors):
        statistics, axis, number = settings
        features, values = tensors[:number], {}
        weighted = [_weighted(*pair) for pair in _pairs(tensors, number, axis)]
        count = sum(x.shape[axis] for x in features)
        if "max" in statistics:
            values["max"] = _over_all(weighted, features, axis, torch.maximum, torch.amax)
        if "avg" in statistics or "std" in statistics:
            values["avg"] = _over_all(weighted, features, axis, torch.add, torch.sum).div_(count)
        if "std" in statistics:
            squares = (x.sub_(values["avg"]).square_() for x in weighted)
            variance = _over_all(squares, features, axis, torch.Tensor.add_, torch.sum).div_(count)
            values["std"] = variance.add_(EPSILON).sqrt_()
        ctx.save_for_backward(*tensors, *values.values())
        ctx.settings, ctx.names = settings, tuple(values)
        return torch.cat([values[name] for name in statistics], axis)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        statistics, axis, number = ctx.settings
        saved = ctx.saved_tensors
        tensors, values = saved[: -len(ctx.names)], dict(zip(ctx.names, saved[-len(ctx.names) :], strict=True))
        features, weights, pairs = tensors[:number], tensors[number:], list(_pairs(tensors, number, axis))
        grads = dict(zip(statistics, grad_output.chunk(len(statistics), axis), strict=True))
        shift, scale = _shift_and_scale(values, grads, sum(x.shape[axis] for x in features))
        if "max" in grads:
            where = (_where_largest(_weighted(*pair), values["max"]) for pair in pairs)
            ties = _over_all(where, features, axis, torch.Tensor.add_, torch.sum)
            by_largest = grads["max"] / ties.clamp_(min=1)
        by_weights, by_features = [], []
        # One tensor at a time, with its weighted values recomputed, to save memory.
        for feature, share in pairs:
            weighted, spare = _weighted(feature, share), None
            if "max" in grads:
                spare = _where_largest(weighted, values["max"])
            gradient = torch.addcmul(shift, weighted, scale, out=weighted)
            if "max" in grads:
                gradient.addcmul_(spare, by_largest)
            if weights:
                by_share = torch.mul(gradient, feature, out=spare)
                by_weights.append(by_share.sum(spatial_axes(axis), keepdim=True))
                gradient.mul_(share)
            by_features.append(gradient.to(feature.dtype))
        return None, *by_features, *(torch.cat(by_weights, axis).to(x.dtype) for x in weights)


def _pairs(tensors, number, axis):
    """Pairs each of the `number` features with its float32 weights, or with 1 if there are no weights."""
    features, weights = tensors[:number], tensors[number:]
    shares = _split(weights[0].float(), features, axis) if weights else [1.0] * number
    return zip(features, shares, strict=True)


def _weighted(feature, share):
    """The weighted feature as a new float32 tensor, in which products of half precision are exact."""
    return feature.float() * share


def _over_all(values, features, axis, combine, reduce):
    """Reduces all channels of the tensors `values` by `reduce`; `combine` reduces two tensors elementwise.

    The values may be a generator of one tensor per feature, so that few of them exist at a time.
    """
    if len({x.shape[axis] for x in features}) == 1:
        # Combine the tensors first: a reduction over few channels is slow.
        values = [functools.reduce(combine, values)]
    return functools.reduce(combine, [reduce(x, axis, keepdim=True) for x in values])


def weighted_reduction(features, channel_weights, spatial_weights, kernel, axis):
    """`K F + W_s ((K W_c) F)`, in which no intermediate tensor has the size of the features.

    With `reference` a training step takes 2% longer and its tensors take 36% more memory.
    """
    return _apply(_WeightedReduction, axis, channel_weights, spatial_weights, kernel, *features)


class _WeightedReduction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis, channel_weights, spatial_weights, kernel, *features):
        weights = channel_weights.reshape(-1, len(kernel), 1)
        kernels = torch.cat([kernel.expand_as(weights * kernel), weights * kernel], -1)
        plain, weighted = _product(features, kernels, axis).chunk(2, axis)
        ctx.axis = axis
        ctx.save_for_backward(channel_weights, spatial_weights, kernel, kernels, weighted, *features)
        return torch.addcmul(plain, weighted, spatial_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        axis = ctx.axis
        channel_weights, spatial_weights, kernel, kernels, weighted, *features = ctx.saved_tensors
        by_spatial = (grad_output * weighted).sum(axis, keepdim=True)
        both = torch.cat([grad_output, grad_output * spatial_weights], axis)
        equation = "bnc,bnf->bcf" if axis == -1 else "bcn,bfn->bcf"
        by_kernels = [torch.einsum(equation, _matrix(x, axis), _matrix(both, axis)) for x in features]
        by_plain, by_weighted = torch.cat(by_kernels, 1).chunk(2, -1)
        weights = channel_weights.reshape(-1, len(kernel), 1)
        by_kernel = (by_plain + weights * by_weighted).sum(0)
        by_channel = (kernel * by_weighted).sum(-1).reshape(channel_weights.shape)
        # One product for all features: eight columns take as long as all of them.
        by_features = _split(_product([both], kernels.mT, axis), features, axis)
        return None, by_channel, by_spatial, by_kernel, *by_features


def _matrix(x, axis):
    """A batch of volumes as one matrix per patch: voxels by channels, or channels by voxels."""
    return x.reshape(len(x), -1, x.shape[-1]) if axis == -1 else x.reshape(*x.shape[:2], -1)


def _product(features, kernels, axis):
    """Multiplies the channels of each voxel by the matrix of its patch, `(batch, channels, filters)`."""
    pairs = zip(features, _split(kernels, features, axis, 1), strict=True)
    pairs = [(_matrix(x, -1), part) if axis == -1 else (part.mT, _matrix(x, 1)) for x, part in pairs]
    product = torch.bmm(*pairs[0])
    for pair in pairs[1:]:
        torch.baddbmm(product, *pair, out=product)
    shape = list(features[0].shape)
    shape[axis] = kernels.shape[-1]
    return product.reshape(shape)


def batch_norm_relu(x, gamma, beta, epsilon, axis, moments=None):
    """With `reference` a training step takes 17% longer and its tensors take 82% more memory."""
    x = x.movedim(axis, 1)
    if moments is not None:
        y, recomputed = _normalized(x, gamma, beta, *moments, epsilon), None
    else:
        recomputed = Recomputed(functools.partial(_normalized, epsilon=epsilon))
        y, *moments = _BatchNormReLU.apply((epsilon, axis == -1, recomputed), x, gamma, beta)
    y = y.movedim(1, axis)
    if recomputed and y.requires_grad:
        y.recomputed = recomputed
    return y, *moments


def _normalized(x, gamma, beta, mean, variance, epsilon):
    # In-place: nothing else uses the normalized values, and the gradient does not need them.
    return torch.native_batch_norm(x, gamma, beta, mean, variance, False, 0.0, epsilon)[0].relu_()


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, x, gamma, beta):
        epsilon, channels_last, recomputed = settings
        ctx.few = channels_last and x.shape[1] < 16 and x.dtype == torch.float32 and x.device.type == "cpu"
        if ctx.few:
            mean, variance = moments_of_rows(_rows(x))
        else:
            _, mean, inverse = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, epsilon)
            variance = inverse**-2 - epsilon
        ctx.save_for_backward(x, gamma, beta, mean, variance)
        ctx.mark_non_differentiable(mean, variance)
        ctx.epsilon, ctx.recomputed = epsilon, recomputed
        # Must equal the recomputed output bitwise: the gradient of the maximum compares against the stored maximum.
        y = _normalized(x, gamma, beta, mean, variance, epsilon)
        recomputed.attach(ctx, y)
        return y, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        y = ctx.recomputed.output()
        x, gamma, _, mean, variance = ctx.recomputed.saved()
        ctx.recomputed.release()
        grad_output = torch.ops.aten.threshold_backward(grad_output, y, 0, grad_input=y)
        grad = _grad_of_few if ctx.few else _grad
        return None, *grad(grad_output, x, gamma, mean, (variance + ctx.epsilon).rsqrt(), ctx.epsilon)


def _grad(grad_output, x, gamma, mean, inverse, epsilon, wanted=(True, True, True)):
    """The gradients of `x`, gamma and beta, or those of them that are wanted."""
    return torch.ops.aten.native_batch_norm_backward(
        grad_output, x, gamma, None, None, mean, inverse, True, epsilon, wanted
    )


def _grad_of_few(grad_output, x, gamma, mean, inverse, epsilon):
    """`_grad` for few channels; without it and `moments_of_rows` a training step takes 14% longer."""
    rows, grad_rows = several_rows(_rows(x)), several_rows(_rows(grad_output))
    number, channels = rows.shape[1] // x.shape[1], x.shape[1]

    def repeat(*each):
        return [values.repeat(number) for values in each]

    sums = _grad(grad_rows, rows, *repeat(gamma, mean, inverse), epsilon, wanted=(False, True, True))[1:]
    by_gamma, by_beta = (each.reshape(-1, channels).sum(0) for each in sums)
    scale, count = gamma * inverse, x.numel() // channels
    slope = -scale * inverse * by_gamma / count
    shift = -scale * by_beta / count - mean * slope
    scale, slope, shift = repeat(scale, slope, shift)
    by_rows = torch.addcmul(shift, rows, slope).addcmul_(grad_rows, scale)
    return by_rows.reshape(x.movedim(1, -1).shape).movedim(-1, 1), by_gamma, by_beta


def _rows(x):
    """A matrix with the channels of each voxel as a row, from `x` with the channels second."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def moments_of_rows(x):
    """The mean and the population variance of each column of a matrix."""
    means, variances = torch.batch_norm_update_stats(several_rows(x), None, None, 0.0)
    means, variances = means.reshape(-1, x.shape[1]), variances.reshape(-1, x.shape[1])
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def several_rows(x):
    """Reshapes a matrix with few columns: joins several rows into one.

    This avoids false sharing: the threads of PyTorch's batch normalization store their sums per column next to each
    other, and are slower than a single thread if their sums share a cache line.
    """
    rows, columns = x.shape
    return x.reshape(-1, columns * math.gcd(rows, max(1, 128 // columns)))


def conv(x, kernel, strides, padding, data_format, dilation_rate):
    """Avoids Keras' transposed copies; with `reference` a step's tensors take 23% more memory."""
    in_float32 = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] < kernel.shape[0]
    usual = len(x.shape) == 5 and data_format == "channels_last" and padding == "same" and set(strides) == {1}
    if not usual or in_float32 or x.shape[-1] != kernel.shape[-2]:
        return reference.conv(x, kernel, strides, padding, data_format, dilation_rate)
    with _saving_no_recomputed(x):
        if set(kernel.shape[:3]) == {1}:
            # In this layout the gradient of the kernel is computed many times faster.
            return functional.linear(x, kernel[0, 0, 0].T.contiguous())
        kernel = kernel.permute(4, 3, 0, 1, 2)
        return functional.conv3d(x.movedim(-1, 1), kernel, padding="same", dilation=dilation_rate).movedim(1, -1)


def max_pool(x, pool_size, strides, padding, data_format):
    """Avoids Keras' copies and does not save its input.

    With `reference` a training step takes 30% longer and its tensors take 15% more memory.
    """
    if data_format != "channels_last" or len(x.shape) != 5 or padding != "valid":
        return reference.max_pool(x, pool_size, strides, padding, data_format)
    with _saving_no_recomputed(x):
        return functional.max_pool3d(x.movedim(-1, 1), pool_size, strides).movedim(1, -1)
