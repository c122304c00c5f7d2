from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mmfnet import _axes, kernels


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class ChannelStdAttention3D(keras.layers.Layer):
    """Weights each channel of a volume by its statistics over the volume (eq. 4 and 7-10).

    `F_c = W_c * F_ori` with `W_c = sigmoid(MLP_avg(avg) + MLP_max(max) + MLP_std(std))`, where avg, max and std are
    taken over depth, height and width. Each MLP has one hidden layer of `channels // reduction` units with ReLU.

    Args:
        reduction: Ratio `r` of the channels to the hidden units.
        statistics: Statistics to use, of `"avg"`, `"max"` and `"std"`.
        shared_mlp: Whether all statistics share one MLP, as in CBAM.
        data_format: `"channels_last"`, `"channels_first"`, or `None` for Keras' setting.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(batch, depth, height, width, channels)`, or with the channels second for
            `"channels_first"`; the number of channels must be known.
        return_attention_scores: Return `(outputs, weights)` instead of only the outputs.

    Returns:
        A tensor of the inputs' shape. The weights have size 1 along depth, height and width, and are in (0, 1).

    Raises:
        ValueError: An argument is invalid, or the number of channels is unknown.

    Example:
    ```python
    features = keras.random.normal((2, 8, 32, 32, 24))
    weighted = ChannelStdAttention3D(reduction=12)(features)  # (2, 8, 32, 32, 24)
    ```
    """

    def __init__(
        self,
        reduction: int = 12,
        statistics: Sequence[str] = ("avg", "max", "std"),
        shared_mlp: bool = False,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not isinstance(reduction, int) or reduction < 1:
            raise ValueError(f"`reduction` must be a positive integer. Received: {reduction!r}")
        self.reduction = reduction
        self.statistics = kernels.check_statistics(statistics)
        self.shared_mlp = bool(shared_mlp)
        self.data_format = _axes.standardize(data_format)
        self.input_spec = keras.layers.InputSpec(ndim=5)

    def build(self, input_shape):
        axis = _axes.channel_axis(self.data_format)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(f"the number of channels must be known. Received: input_shape={input_shape}")
        self.input_spec = keras.layers.InputSpec(ndim=5, axes={axis: channels})
        hidden = max(1, channels // self.reduction)
        self.hidden_layers, self.score_layers = [], []
        for name in ["shared"] if self.shared_mlp else self.statistics:
            options = {"dtype": self.dtype_policy}
            self.hidden_layers.append(keras.layers.Dense(hidden, "relu", name=f"{name}_hidden", **options))
            self.score_layers.append(keras.layers.Dense(channels, name=f"{name}_scores", **options))
            self.hidden_layers[-1].build((None, channels))
            self.score_layers[-1].build((None, hidden))

    def scores(self, features: Sequence[Any], training: bool | None = False) -> Any:
        """Computes `W_c` of a list of features, which are concatenated along the channels (eq. 7)."""
        axis = _axes.channel_axis(self.data_format)
        pooled = kernels.statistics_over_space(features, self.statistics, axis, training)
        mlps = list(zip(self.hidden_layers, self.score_layers, strict=True))
        if self.shared_mlp:
            mlps *= len(self.statistics)
        logits = sum(score(hidden(pooled[:, index])) for index, (hidden, score) in enumerate(mlps))
        shape = _axes.with_channels((-1, 1, 1, 1, 1), pooled.shape[-1], self.data_format)
        return ops.reshape(ops.sigmoid(logits), shape)

    def call(self, inputs, training=None, return_attention_scores=False):
        weights = self.scores([inputs], training)  # W_c
        outputs = weights * inputs  # F_c = W_c * F_ori (eq. 4)
        return (outputs, weights) if return_attention_scores else outputs

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def compute_output_spec(self, inputs, training=None, return_attention_scores=False):
        channels = inputs.shape[_axes.channel_axis(self.data_format)]
        weights = _axes.with_channels((inputs.shape[0], 1, 1, 1, 1), channels, self.data_format)
        return _axes.output_spec(self, [inputs.shape, weights], return_attention_scores)

    def get_config(self):
        return {
            **super().get_config(),
            "reduction": self.reduction,
            "statistics": self.statistics,
            "shared_mlp": self.shared_mlp,
            "data_format": self.data_format,
        }
