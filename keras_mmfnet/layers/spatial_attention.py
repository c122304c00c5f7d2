from collections.abc import Sequence
from typing import Any

import keras

from keras_mmfnet import _axes, kernels
from keras_mmfnet.layers.volumes import Conv3D


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class SpatialStdAttention3D(keras.layers.Layer):
    """Weights each voxel of a volume by its statistics over the channels (eq. 5 and 11).

    `F_s = W_s * F_c` with `W_s = sigmoid(conv([avg; max; std]))`, where avg, max and std are taken over the channels.

    Args:
        kernel_size: Size of the convolution's kernel, an integer or three.
        statistics: Statistics to use, of `"avg"`, `"max"` and `"std"`.
        data_format: `"channels_last"`, `"channels_first"`, or `None` for Keras' setting.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(batch, depth, height, width, channels)`, or with the channels second for
            `"channels_first"`.
        return_attention_scores: Return `(outputs, weights)` instead of only the outputs.

    Returns:
        A tensor of the inputs' shape. The weights have 1 channel and are in (0, 1).

    Raises:
        ValueError: An argument is invalid.

    Example:
    ```python
    features = keras.random.normal((2, 8, 32, 32, 24))
    weighted, weights = SpatialStdAttention3D()(features, return_attention_scores=True)
    ```
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int] = 3,
        statistics: Sequence[str] = ("avg", "max", "std"),
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size if isinstance(kernel_size, int) else tuple(kernel_size)
        self.statistics = kernels.check_statistics(statistics)
        self.data_format = _axes.standardize(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=5)
        common = {"data_format": self.data_format, "dtype": self.dtype_policy}
        self.conv = Conv3D(1, kernel_size, padding="same", activation="sigmoid", name="conv", **common)

    def build(self, input_shape):
        self.conv.build(_axes.with_channels(input_shape, len(self.statistics), self.data_format))

    def scores(self, features: Sequence[Any], channel_weights: Any = None, training: bool | None = False) -> Any:
        """Computes `W_s` of a list of features, concatenated and multiplied by `W_c` if it is given (eq. 11)."""
        axis = _axes.channel_axis(self.data_format)
        return self.conv(kernels.statistics_over_channels(features, self.statistics, axis, channel_weights, training))

    def call(self, inputs, training=None, return_attention_scores=False):
        weights = self.scores([inputs], training=training)  # W_s
        outputs = weights * inputs  # F_s = W_s * F_c (eq. 5)
        return (outputs, weights) if return_attention_scores else outputs

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(self, inputs, training=None, return_attention_scores=False):
        weights = _axes.with_channels(inputs.shape, 1, self.data_format)
        return _axes.output_spec(self, [inputs.shape, weights], return_attention_scores)

    def get_config(self):
        config = {"kernel_size": self.kernel_size, "statistics": self.statistics, "data_format": self.data_format}
        return {**super().get_config(), **config}
