from collections.abc import Sequence
from typing import Any

import keras

from keras_mmfnet import _axes
from keras_mmfnet.layers._norm import norm_relu
from keras_mmfnet.layers.volumes import Conv3D


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class ResidualFusion3D(keras.layers.Layer):
    """Reduces the channels of several modalities to `filters` and refines the result (eq. 12-13).

    `F_r = conv_1x1x1(F)`, then `F_r + conv_1x3x3(relu(batch_norm(conv_1x3x3(F_r))))`.

    Args:
        filters: Channels of the output.
        kernel_size: Kernel of the two refining convolutions, an integer or three.
        data_format: `"channels_last"`, `"channels_first"`, or `None` for Keras' setting.
        normalization: `"batch"`, or `"instance"` instead of the paper's batch normalization.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(batch, depth, height, width, channels)`, or with the channels second for
            `"channels_first"`; the number of channels must be known.
        training: Whether the batch normalization uses the batch's statistics.

    Returns:
        A tensor `(batch, depth, height, width, filters)`, or with the channels second.

    Raises:
        ValueError: An argument is invalid, or the number of channels is unknown.

    Example:
    ```python
    features = keras.random.normal((2, 8, 32, 32, 24))
    fused = ResidualFusion3D(filters=8)(features)  # (2, 8, 32, 32, 8)
    ```
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int] = (1, 3, 3),
        data_format: str | None = None,
        normalization: str = "batch",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not isinstance(filters, int) or filters < 1:
            raise ValueError(f"`filters` must be a positive integer. Received: {filters!r}")
        self.filters = filters
        self.kernel_size = kernel_size if isinstance(kernel_size, int) else tuple(kernel_size)
        self.data_format = _axes.standardize(data_format)
        self.normalization = normalization
        self.input_spec = keras.layers.InputSpec(ndim=5)

        common = {"data_format": self.data_format, "dtype": self.dtype_policy}

        def conv(kernel, name, **options):
            options |= common
            return Conv3D(filters, kernel, padding="same", kernel_initializer="he_normal", name=name, **options)

        self.reduce = conv(1, "reduce")
        self.refine1 = conv(kernel_size, "refine1", use_bias=False)
        axis = _axes.channel_axis(self.data_format)
        self.norm = norm_relu(normalization, axis, dtype=self.dtype_policy, name="norm")
        self.refine2 = conv(kernel_size, "refine2")

    def build(self, input_shape):
        if input_shape[_axes.channel_axis(self.data_format)] is None:
            raise ValueError(f"the number of channels must be known. Received: input_shape={input_shape}")
        self.reduce.build(input_shape)
        reduced = self.compute_output_shape(input_shape)
        for layer in (self.refine1, self.norm, self.refine2):
            layer.build(reduced)

    def call(self, inputs, training=None):
        return self.refine(self.reduce(inputs), training=training)  # F_r = conv(F) (eq. 12)

    def refine(self, reduced: Any, training: bool | None = None) -> Any:
        """`F_r + conv(relu(batch_norm(conv(F_r))))` (eq. 13)."""
        return reduced + self.refine2(self.norm(self.refine1(reduced), training=training))

    def compute_output_shape(self, input_shape):
        return _axes.with_channels(input_shape, self.filters, self.data_format)

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "data_format": self.data_format,
            "normalization": self.normalization,
        }
