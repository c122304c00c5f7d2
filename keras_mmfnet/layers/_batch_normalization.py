import keras


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalization, with the backend's one operation for it, and with ReLU where one is to follow.

    The values are the same. Keras composes them of elementwise operations, each of which goes through the whole
    tensor, forward and backward, and the networks here are bound by just that. JAX fuses these by itself; TensorFlow's
    operation wants the channels last. ReLU is part of it because on PyTorch Keras holds every layer's output until the
    network has ended; here it takes the place of the normalised values.

    Args:
        rectify: Whether ReLU follows.
        **kwargs: As for Keras' batch normalization.
    """

    def __init__(self, rectify=False, **kwargs):
        super().__init__(**kwargs)
        self.rectify = rectify

    def call(self, inputs, training=None, mask=None):
        outputs = self._normalise(inputs, training, mask)
        if not self.rectify:
            return outputs
        # Nothing else has seen these values, nor does the gradient need them.
        return outputs.relu_() if keras.backend.backend() == "torch" else keras.ops.relu(outputs)

    def get_config(self):
        return {**super().get_config(), "rectify": self.rectify}

    def _normalise(self, inputs, training, mask):
        normalise = _OPERATIONS.get(keras.backend.backend())
        channels_last = self.axis in (-1, len(inputs.shape) - 1)
        if not normalise or not (channels_last or normalise is _torch):
            return super().call(inputs, training=training, mask=mask)
        affine = self.gamma.value, self.beta.value
        if not (training and self.trainable):
            moments = self.moving_mean.value, self.moving_variance.value
            return normalise(inputs, affine, moments, self.epsilon, channels_last)[0]
        outputs, mean, variance = normalise(inputs, affine, None, self.epsilon, channels_last)
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + batch * (1.0 - self.momentum))
        return outputs


def _tensorflow(x, affine, moments, epsilon, channels_last):
    """The normalised values, and the mean and population variance used: `moments`, or the batch's for `None`."""
    import tensorflow as tf

    shape, channels = tf.shape(x), x.shape[-1]
    # The operation wants four axes; which of the others come together is of no account.
    flat = tf.reshape(x, tf.stack([-1, shape[-3], shape[-2], channels]))
    mean, variance = moments or ([], [])
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=flat,
        scale=affine[0],
        offset=affine[1],
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format="NHWC",
        is_training=moments is None,
    )
    y = tf.reshape(y, shape)
    y.set_shape(x.shape)
    # It gives the sample's variance; Keras keeps the population's.
    count = tf.cast(tf.size(x) // channels, tf.float32)
    variance = variance * (count - 1) / count
    return y, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _torch(x, affine, moments, epsilon, channels_last):
    """The normalised values, and the mean and population variance used: `moments`, or the batch's for `None`."""
    import torch

    # The threads of PyTorch's operation keep their sums side by side; where those of two share a line of the
    # processor's cache, more threads take longer than one.
    if moments is None and channels_last and x.shape[-1] < 16 and x.dtype == torch.float32 and not x.is_cuda:
        return _torch_few_channels(x, affine, epsilon)
    x = x.movedim(-1, 1) if channels_last else x
    y, mean, inverse = torch.native_batch_norm(x, *affine, *(moments or (None, None)), moments is None, 0.0, epsilon)
    y = y.movedim(1, -1) if channels_last else y
    return y, mean.detach(), inverse.detach() ** -2 - epsilon


def _torch_few_channels(x, affine, epsilon):
    """The same in training, composed of operations in place, with its gradient by hand."""
    axes = tuple(range(x.ndim - 1))
    moments = []

    @keras.ops.custom_gradient
    def normalise(x, gamma, beta):
        mean = x.mean(axes)
        centred = x - mean
        variance = (centred * centred).mean(axes)
        inverse = (variance + epsilon).rsqrt()
        moments.extend([mean, variance])

        def gradient(x, gamma, beta, upstream):
            centred = x - mean
            by_beta = upstream.sum(axes)
            by_gamma = (centred * upstream).sum(axes) * inverse
            count = x.numel() // x.shape[-1]
            scale = gamma * inverse
            by_x = centred.mul_(-scale * inverse * by_gamma / count).sub_(scale * by_beta / count)
            return by_x.addcmul_(upstream, scale), by_gamma, by_beta

        return centred.mul_(gamma * inverse).add_(beta), gradient

    return normalise(x, *affine), *moments


_OPERATIONS = {"tensorflow": _tensorflow, "torch": _torch}
