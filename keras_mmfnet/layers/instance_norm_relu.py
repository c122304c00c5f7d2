from typing import Any

import keras
from keras import ops

from keras_mmfnet import kernels


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class InstanceNormReLU(keras.layers.Layer):
    """Instance normalization and ReLU: `BatchNormReLU` with the moments of each sample, also in inference.

    Args:
        axis: Axis of the channels.
        epsilon: Added to the variance.
        relu: Whether ReLU follows the normalization.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of any rank, with the batch as its first axis; the number of channels must be known.

    Returns:
        A tensor of the inputs' shape and dtype.

    Raises:
        ValueError: The number of channels is unknown.
    """

    def __init__(self, axis: int = -1, epsilon: float = 1e-5, relu: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = axis
        self.epsilon = epsilon
        self.relu = relu

    def build(self, input_shape):
        channels = input_shape[self.axis]
        if channels is None:
            raise ValueError(f"the number of channels must be known. Received: input_shape={input_shape}")
        self.gamma = self.add_weight((channels,), "ones", autocast=False, name="gamma")
        self.beta = self.add_weight((channels,), "zeros", autocast=False, name="beta")

    def call(self, inputs):
        outputs = kernels.instance_norm(inputs, self.gamma.value, self.beta.value, self.epsilon, self.axis)
        return ops.relu(outputs) if self.relu else outputs

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return {**super().get_config(), "axis": self.axis, "epsilon": self.epsilon, "relu": self.relu}
