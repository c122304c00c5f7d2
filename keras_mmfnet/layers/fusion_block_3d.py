import keras
from keras import ops

from keras_mmfnet import _axes
from keras_mmfnet.layers._gradients import join, split_as, with_gradient
from keras_mmfnet.layers.channel_std_attention_3d import ChannelStdAttention3D
from keras_mmfnet.layers.residual_fusion_3d import ResidualFusion3D
from keras_mmfnet.layers.spatial_std_attention_3d import SpatialStdAttention3D


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class FusionBlock3D(keras.layers.Layer):
    """Fuses the features of several modalities into as many channels as one of them has (eq. 4-6).

    `F_ori` is the features side by side, `F_c` these weighted by channel, `F_s` these weighted by voxel, and the
    output `Res(F_s + F_ori)`.

    Args:
        filters: Channels of the output.
        reduction: Ratio `r` of the channel attention's hidden layer.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: The same for the spatial attention.
        shared_mlp: One MLP for all statistics of the channel attention, as in CBAM.
        data_format: `"channels_last"`, `"channels_first"`, or `None` for Keras' setting.
        **kwargs: As for every layer: `name`, `dtype`, `trainable`.

    Call arguments:
        inputs: A list of tensors `(batch, depth, height, width, channels)`, one for each modality, or with the
            channels second for `"channels_first"`; they may differ in the channels only. A single tensor stands for
            a list of one.
        training: Whether the batch normalization uses the batch's statistics.
        return_attention_scores: Return `(outputs, channel_weights, spatial_weights)` in place of the outputs alone.
            The channel weights are in the order of the inputs.

    Returns:
        A tensor `(batch, depth, height, width, filters)`, or with the channels second.

    Raises:
        ValueError: An argument is outside its range, or the inputs do not fit together.

    Example:
    ```python
    t1, t2, cet1 = (keras.random.normal((2, 8, 32, 32, 8)) for _ in range(3))
    fused = FusionBlock3D(filters=8)([t1, t2, cet1])  # (2, 8, 32, 32, 8)
    ```

    Reference: Chen et al., MMFNet, section III-B.
    """

    def __init__(
        self,
        filters,
        reduction=12,
        channel_statistics=("avg", "max", "std"),
        spatial_statistics=("avg", "max", "std"),
        shared_mlp=False,
        data_format=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.data_format = _axes.standardize(data_format)
        common = {"data_format": self.data_format, "dtype": self.dtype_policy}
        self.channel_attention = ChannelStdAttention3D(
            reduction, channel_statistics, shared_mlp, name="channel_attention", **common
        )
        self.spatial_attention = SpatialStdAttention3D(
            statistics=spatial_statistics, name="spatial_attention", **common
        )
        self.residual_fusion = ResidualFusion3D(filters, name="residual_fusion", **common)
        self.filters = filters
        self.reduction = reduction
        self.channel_statistics = self.channel_attention.statistics
        self.spatial_statistics = self.spatial_attention.statistics
        self.shared_mlp = shared_mlp

    def build(self, input_shape):
        merged = self._merged_shape(input_shape)
        self.channel_attention.build(merged)
        self.spatial_attention.build(merged)
        self.residual_fusion.build(merged)

    def call(self, inputs, training=None, return_attention_scores=False):
        parts = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        channel_weights = self.channel_attention.scores(*parts, training=training)
        spatial_weights = self.spatial_attention.scores(*parts, weights=channel_weights, training=training)
        reduce = self.residual_fusion.reduce
        reduced = _reduce(parts, channel_weights, spatial_weights, reduce.kernel, self.data_format)
        bias = ops.reshape(reduce.bias, _axes.with_channels((1,) * 5, self.filters, self.data_format))
        reduced = reduced + ops.cast(bias, reduced.dtype)
        outputs = self.residual_fusion.refine(reduced, training=training)
        return (outputs, channel_weights, spatial_weights) if return_attention_scores else outputs

    def compute_output_shape(self, input_shape):
        return _axes.with_channels(self._merged_shape(input_shape), self.filters, self.data_format)

    def compute_output_spec(self, inputs, training=None, return_attention_scores=False):
        shapes = [x.shape for x in inputs] if isinstance(inputs, (list, tuple)) else inputs.shape
        merged = keras.KerasTensor(self._merged_shape(shapes), dtype=self.compute_dtype)
        outputs = keras.KerasTensor(self.compute_output_shape(shapes), dtype=self.compute_dtype)
        if not return_attention_scores:
            return outputs
        _, channel_weights = self.channel_attention.compute_output_spec(merged, return_attention_scores=True)
        _, spatial_weights = self.spatial_attention.compute_output_spec(merged, return_attention_scores=True)
        return outputs, channel_weights, spatial_weights

    def _merged_shape(self, input_shape):
        several = isinstance(input_shape[0], (list, tuple))
        shapes = [tuple(shape) for shape in (input_shape if several else [input_shape])]
        axis = _axes.channel_axis(self.data_format)
        if any(len(shape) != 5 for shape in shapes):
            raise ValueError(f"each input must be a batch of volumes, with 5 axes. Received: shapes={shapes}")
        if any(shape[axis] is None for shape in shapes):
            raise ValueError(f"the numbers of channels must be known. Received: shapes={shapes}")
        sizes = zip(*(_axes.with_channels(shape, None, self.data_format) for shape in shapes), strict=True)
        if any(len(set(size) - {None}) > 1 for size in sizes):
            raise ValueError(f"the inputs may differ in their channels only. Received: shapes={shapes}")
        return _axes.with_channels(shapes[0], sum(shape[axis] for shape in shapes), self.data_format)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "reduction": self.reduction,
            "channel_statistics": self.channel_statistics,
            "spatial_statistics": self.spatial_statistics,
            "shared_mlp": self.shared_mlp,
            "data_format": self.data_format,
        }


def _reduce(parts, channel_weights, spatial_weights, kernel, data_format):
    """The 1x1x1 convolution of `F_s + F_ori`, of which neither is computed nor kept for the gradient.

    It is linear, so that it may come before the spatial weights: `K F_ori + W_s * ((K * W_c) F_ori)`.
    """
    axis = _axes.channel_axis(data_format)

    def compute(channel_weights, spatial_weights, kernel, *parts):
        weights = ops.reshape(channel_weights, (-1, kernel.shape[0], 1))
        kernels = ops.concatenate([ops.broadcast_to(kernel, ops.shape(weights * kernel)), weights * kernel], -1)
        plain, weighted = ops.split(_transform(parts, kernels, axis), 2, axis=axis)
        reduced = _multiply_add(weighted, spatial_weights, plain)
        return reduced, {"weights": weights, "kernels": kernels, "weighted": weighted}

    def differentiate(tensors, kept, upstream):
        channel_weights, spatial_weights, kernel, *parts = tensors
        by_spatial = ops.sum(upstream * kept["weighted"], axis=axis, keepdims=True)
        upstreams = ops.concatenate([upstream, upstream * spatial_weights], axis=axis)
        by_plain, by_weighted = ops.split(_products(parts, upstreams, axis), 2, axis=-1)
        by_kernel = ops.sum(by_plain + kept["weights"] * by_weighted, axis=0)
        by_channel = ops.reshape(ops.sum(kernel * by_weighted, axis=-1), ops.shape(channel_weights))
        return by_channel, by_spatial, by_kernel, *_transform_back(upstreams, kept["kernels"], parts, axis)

    kernel = ops.cast(ops.convert_to_tensor(kernel)[0, 0, 0], parts[0].dtype)
    return with_gradient(compute, differentiate)(channel_weights, spatial_weights, kernel, *parts)


def _multiply_add(x, factor, summand):
    """`x * factor + summand`, on PyTorch in one pass too."""
    if keras.backend.backend() != "torch":
        return x * factor + summand
    import torch

    return torch.addcmul(summand, x, factor)


def _rows(x, axis):
    """A volume as one matrix for each patch, whose other side is the channels."""
    return ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]) if axis == -1 else (*ops.shape(x)[:2], -1))


def _transform(parts, kernels, axis):
    """The channels of all parts times a matrix for each patch, `(batch, channels, filters)`."""
    shape, filters = ops.shape(parts[0]), kernels.shape[-1]
    shape = (*shape[:-1], filters) if axis == -1 else (shape[0], filters, *shape[2:])
    rows = [_rows(part, axis) for part in parts]
    if keras.backend.backend() != "torch":
        product = "bnc,bcf->bnf" if axis == -1 else "bcn,bcf->bfn"
        return ops.reshape(ops.einsum(product, join(rows, axis), kernels), shape)
    import torch

    # The parts side by side would be a copy.
    pairs = zip(rows, split_as(parts, kernels, 1, axis), strict=True)
    first, *others = pairs if axis == -1 else [(kernel.mT, rows) for rows, kernel in pairs]
    product = torch.bmm(*first)
    for pair in others:
        torch.baddbmm(product, *pair, out=product)
    return product.reshape(shape)


def _products(parts, upstreams, axis):
    """The gradient by the matrices of `_transform`."""
    product = "bnc,bnf->bcf" if axis == -1 else "bcn,bfn->bcf"
    return join([ops.einsum(product, _rows(part, axis), _rows(upstreams, axis)) for part in parts], 1)


def _transform_back(upstreams, kernels, parts, axis):
    """The gradients by the parts of `_transform`."""
    kernels = ops.transpose(kernels, (0, 2, 1))
    if keras.backend.backend() == "torch":
        # Eight columns alone take as long as all together.
        return split_as(parts, _transform([upstreams], kernels, axis), axis)
    return [_transform([upstreams], part, axis) for part in split_as(parts, kernels, 2, axis)]
