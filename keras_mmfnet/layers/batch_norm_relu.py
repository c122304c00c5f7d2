from typing import Any

import keras

from keras_mmfnet import devices, kernels


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class BatchNormReLU(keras.layers.Layer):
    """Batch normalization and ReLU: `relu(gamma * (x - mean) / sqrt(variance + epsilon) + beta)`.

    The moments are those of the batch in training; in inference, or if the layer is frozen, the moving averages. Where
    several devices share a batch, they are those of the whole batch, or of each share with `sync_batch_norm=False`; see
    `keras_mmfnet.devices`.

    Args:
        axis: Axis of the channels.
        momentum: Share of the old value in each update of a moving average.
        epsilon: Added to the variance.
        relu: Whether ReLU follows the normalization.
        **kwargs: `name`, `dtype` and `trainable`, as in `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of any rank; the number of channels must be known.
        training: Whether to use the moments of the batch.

    Returns:
        A tensor of the inputs' shape and dtype.

    Raises:
        ValueError: The number of channels is unknown.
    """

    def __init__(self, axis: int = -1, momentum: float = 0.9, epsilon: float = 1e-5, relu: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.relu = relu

    def build(self, input_shape):
        channels = input_shape[self.axis]
        if channels is None:
            raise ValueError(f"the number of channels must be known. Received: input_shape={input_shape}")

        def add(name, initializer, trainable=True):
            return self.add_weight((channels,), initializer, trainable=trainable, autocast=False, name=name)

        self.gamma = add("gamma", "ones")
        self.beta = add("beta", "zeros")
        self.moving_mean = add("moving_mean", "zeros", trainable=False)
        self.moving_variance = add("moving_variance", "ones", trainable=False)

    def call(self, inputs, training=None):
        of_batch = training and self.trainable
        moments = None if of_batch else (self.moving_mean.value, self.moving_variance.value)
        outputs, mean, variance = kernels.batch_norm_relu(
            inputs, self.gamma.value, self.beta.value, self.epsilon, self.axis, moments, self.relu
        )
        if of_batch:
            if not devices.synchronises_batch_norm():
                mean, variance = devices.mean_over_devices(mean), devices.mean_over_devices(variance)
            for average, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
                average.assign(average.value * self.momentum + value * (1 - self.momentum))
        return outputs

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = {"axis": self.axis, "momentum": self.momentum, "epsilon": self.epsilon, "relu": self.relu}
        return {**super().get_config(), **config}
