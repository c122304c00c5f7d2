from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mmfnet import _axes, kernels
from keras_mmfnet.layers.channel_attention import ChannelStdAttention3D
from keras_mmfnet.layers.residual_fusion import ResidualFusion3D
from keras_mmfnet.layers.spatial_attention import SpatialStdAttention3D


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class FusionBlock3D(keras.layers.Layer):
    """Fuses the features of several modalities into `filters` channels (eq. 4-6).

    `F_ori` is the concatenated features. The channel attention gives `F_c`, the spatial attention of `F_c` gives `F_s`,
    and the output is `Res(F_s + F_ori)`.

    Args:
        filters: Channels of the output.
        reduction: Ratio `r` of the channel attention's hidden layer.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: Statistics of the spatial attention.
        shared_mlp: Whether the statistics of the channel attention share one MLP, as in CBAM.
        data_format: `"channels_last"`, `"channels_first"`, or `None` for Keras' setting.
        normalization: `"batch"` or `"instance"`, that of the residual fusion.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: A list of tensors `(batch, depth, height, width, channels)`, one per modality, or with the channels
            second for `"channels_first"`. They may differ only in the number of channels. A single tensor is treated
            as a list of one.
        training: Whether the batch normalization uses the batch's statistics.
        return_attention_scores: Return `(outputs, channel_weights, spatial_weights)` instead of only the outputs.
            The channel weights are in the order of the inputs.

    Returns:
        A tensor `(batch, depth, height, width, filters)`, or with the channels second.

    Raises:
        ValueError: An argument is invalid, or the shapes of the inputs do not match.

    Example:
    ```python
    t1, t2, cet1 = (keras.random.normal((2, 8, 32, 32, 8)) for _ in range(3))
    fused = FusionBlock3D(filters=8)([t1, t2, cet1])  # (2, 8, 32, 32, 8)
    ```
    """

    def __init__(
        self,
        filters: int,
        reduction: int = 12,
        channel_statistics: Sequence[str] = ("avg", "max", "std"),
        spatial_statistics: Sequence[str] = ("avg", "max", "std"),
        shared_mlp: bool = False,
        data_format: str | None = None,
        normalization: str = "batch",
        **kwargs: Any,
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
        self.residual_fusion = ResidualFusion3D(filters, normalization=normalization, name="residual_fusion", **common)
        self.filters = filters
        self.reduction = reduction
        self.channel_statistics = self.channel_attention.statistics
        self.spatial_statistics = self.spatial_attention.statistics
        self.shared_mlp = shared_mlp
        self.normalization = normalization

    def build(self, input_shape):
        merged = self._merged_shape(input_shape)
        self.channel_attention.build(merged)
        self.spatial_attention.build(merged)
        self.residual_fusion.build(merged)

    def call(self, inputs, training=None, return_attention_scores=False):
        features = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]  # F_ori, concatenated
        w_c = self.channel_attention.scores(features, training)  # F_c = W_c * F_ori (eq. 4)
        w_s = self.spatial_attention.scores(features, w_c, training)  # F_s = W_s * F_c (eq. 5)
        reduced = self._reduce(features, w_c, w_s)
        outputs = self.residual_fusion.refine(reduced, training=training)  # Res(F_s + F_ori) (eq. 6)
        return (outputs, w_c, w_s) if return_attention_scores else outputs

    def _reduce(self, features, w_c, w_s):
        """`F_r` of `F_s + F_ori`, which is `F_ori * (1 + W_s * W_c)` (eq. 12)."""
        conv, axis = self.residual_fusion.reduce, _axes.channel_axis(self.data_format)
        kernel, bias = (ops.cast(weight, features[0].dtype) for weight in (conv.kernel, conv.bias))
        reduced = kernels.weighted_reduction(features, w_c, w_s, kernel[0, 0, 0], axis)
        return reduced + ops.reshape(bias, _axes.with_channels((1,) * 5, self.filters, self.data_format))

    def compute_output_shape(self, input_shape):
        return _axes.with_channels(self._merged_shape(input_shape), self.filters, self.data_format)

    def compute_output_spec(self, inputs, training=None, return_attention_scores=False):
        input_shape = [x.shape for x in inputs] if isinstance(inputs, (list, tuple)) else inputs.shape
        merged = self._merged_shape(input_shape)
        channels = merged[_axes.channel_axis(self.data_format)]
        channel_weights = _axes.with_channels((merged[0], 1, 1, 1, 1), channels, self.data_format)
        spatial_weights = _axes.with_channels(merged, 1, self.data_format)
        shapes = [self.compute_output_shape(input_shape), channel_weights, spatial_weights]
        return _axes.output_spec(self, shapes, return_attention_scores)

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
            "normalization": self.normalization,
        }
