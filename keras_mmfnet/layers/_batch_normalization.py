import math

import keras

from keras_mmfnet.layers._gradients import Remade, with_gradient


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class RectifiedBatchNormalization(keras.layers.BatchNormalization):
    """Keras' batch normalization and the ReLU that follows it, by the backend's one operation for the former.

    The values are the same. Keras composes the normalization of elementwise operations, each of which goes through the
    whole tensor, forward and backward, and the networks here are bound by just that. JAX fuses these by itself;
    TensorFlow's operation wants the channels last. ReLU is part of it so that on PyTorch no more than its input
    is kept for the gradient: the output is made again from it.
    """

    def call(self, inputs, training=None, mask=None):
        normalise = _OPERATIONS.get(keras.backend.backend())
        channels_last = self.axis in (-1, len(inputs.shape) - 1)
        if not normalise or not (channels_last or normalise is _torch):
            return keras.ops.relu(super().call(inputs, training=training, mask=mask))
        affine = self.gamma.value, self.beta.value
        if not (training and self.trainable):
            moments = self.moving_mean.value, self.moving_variance.value
            return normalise(inputs, affine, moments, self.epsilon, channels_last)[0]
        outputs, mean, variance = normalise(inputs, affine, None, self.epsilon, channels_last)
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            # Of the variable itself a product with a number would wait for the number to be on the GPU.
            moving.assign(moving.value * self.momentum + batch * (1.0 - self.momentum))
        return outputs


def _tensorflow(x, affine, moments, epsilon, channels_last):
    """The outputs, and the mean and population variance used: `moments`, or the batch's for `None`."""
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
    y = tf.nn.relu(tf.reshape(y, shape))
    y.set_shape(x.shape)
    # It gives the sample's variance; Keras keeps the population's.
    count = tf.cast(tf.size(x) // channels, tf.float32)
    variance = variance * (count - 1) / count
    return y, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _torch(x, affine, moments, epsilon, channels_last):
    """The outputs, and the mean and population variance used: `moments`, or the batch's for `None`."""
    x = x.movedim(-1, 1) if channels_last else x
    if moments is None:
        y, *moments = _torch_training(x, affine, epsilon, few=channels_last and x.shape[1] < 16)
    else:
        y = _torch_inference(x, *affine, *moments, epsilon)
    y = y.movedim(1, -1) if channels_last else y
    return y, *moments


def _torch_inference(x, gamma, beta, mean, variance, epsilon):
    import torch

    # Nothing else has seen the normalised values, nor does the gradient need them.
    return torch.native_batch_norm(x, gamma, beta, mean, variance, False, 0.0, epsilon)[0].relu_()


def _torch_training(x, affine, epsilon, few):
    """The outputs and the batch's moments, where the channels come second; they may be `few` and lie last."""
    import torch

    few = few and x.dtype == torch.float32 and not x.is_cuda
    moments = []

    def compute(x, gamma, beta):
        if few:
            mean, variance = moments_of_rows(_rows(x))
        else:
            _, mean, inverse = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, epsilon)
            variance = inverse**-2 - epsilon
        moments.extend([mean, variance])
        # As it is made again, to the last bit: the attention finds by comparing where a maximum was.
        return _torch_inference(x, gamma, beta, mean, variance, epsilon), {"mean": mean, "variance": variance}

    def make_again(tensors, kept):
        return _torch_inference(*tensors, kept["mean"], kept["variance"], epsilon)

    def differentiate(tensors, kept, upstream):
        x, gamma, _ = tensors
        rectified = remade.take()
        upstream = torch.ops.aten.threshold_backward(upstream, rectified, 0, grad_input=rectified)
        gradients = _gradients_of_few if few else _torch_gradients
        return gradients(upstream, x, gamma, kept["mean"], (kept["variance"] + epsilon).rsqrt(), epsilon)

    y = with_gradient(compute, differentiate)(x, *affine)
    remade = Remade(y, make_again) if y.requires_grad else None
    return y, *moments


def _torch_gradients(upstream, x, gamma, mean, inverse, epsilon, wanted=(True, True, True)):
    """The gradients by the input, gamma and beta, or those of them that are wanted."""
    import torch

    return torch.ops.aten.native_batch_norm_backward(
        upstream, x, gamma, None, None, mean, inverse, True, epsilon, wanted
    )


def _gradients_of_few(upstream, x, gamma, mean, inverse, epsilon):
    import torch

    rows, upstream = several_rows(_rows(x)), several_rows(_rows(upstream))
    number, channels = rows.shape[1] // x.shape[1], x.shape[1]

    def repeat(*each):
        return [values.repeat(number) for values in each]

    sums = _torch_gradients(upstream, rows, *repeat(gamma, mean, inverse), epsilon, wanted=(False, True, True))[1:]
    by_gamma, by_beta = (each.reshape(-1, channels).sum(0) for each in sums)
    scale, count = gamma * inverse, x.numel() // channels
    slope = -scale * inverse * by_gamma / count
    shift = -scale * by_beta / count - mean * slope
    scale, slope, shift = repeat(scale, slope, shift)
    by_rows = torch.addcmul(shift, rows, slope).addcmul_(upstream, scale)
    return by_rows.reshape(x.movedim(1, -1).shape).movedim(-1, 1), by_gamma, by_beta


def _rows(x):
    """The channels of each voxel, which come second in `x`, as a row."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def moments_of_rows(x):
    """The mean and the population variance of each column of a matrix, on PyTorch without a GPU."""
    import torch

    means, variances = torch.batch_norm_update_stats(several_rows(x), None, None, 0.0)
    means, variances = means.reshape(-1, x.shape[1]), variances.reshape(-1, x.shape[1])
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def several_rows(x):
    """A matrix of few columns with several of its rows side by side.

    The threads of PyTorch's batch normalization keep a sum for each column side by side. Where the sums of two threads
    share a line of the processor's cache, more threads take longer than one.
    """
    rows, columns = x.shape
    return x.reshape(-1, columns * math.gcd(rows, max(1, 128 // columns)))


_OPERATIONS = {"tensorflow": _tensorflow, "torch": _torch}
