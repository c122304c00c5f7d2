"""Keras' convolutions and pooling of volumes, without the copies Keras makes on PyTorch.

The values are the same. On PyTorch Keras brings every input with the channels last into the order with the channels
first, and for a convolution back again, though PyTorch's operations take it as it lies; in a network that is bound by
memory these copies take up to a tenth of a step.
"""

import keras
from keras import ops

from keras_mmfnet.layers._gradients import not_kept


def _lies_well(layer):
    return keras.backend.backend() == "torch" and layer.data_format == "channels_last"


def _gradient_is_wrong(inputs, kernel_depth, data_format):
    """Whether PyTorch gives garbage for a kernel's gradient: in bfloat16 on a processor, deeper than its volume."""
    if keras.backend.backend() != "torch" or keras.backend.standardize_dtype(inputs.dtype) != "bfloat16":
        return False
    return 1 < inputs.shape[1 if data_format == "channels_last" else 2] < kernel_depth and not inputs.is_cuda


def _ones(sizes):
    return set(sizes) == {1}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class Conv3D(keras.layers.Conv3D):
    """A convolution; one of a single voxel is the product of matrices it is."""

    def convolution_op(self, inputs, kernel):
        if _gradient_is_wrong(inputs, self.kernel_size[0], self.data_format):
            inputs, kernel = ops.cast(inputs, "float32"), ops.cast(kernel, "float32")
            return ops.cast(self.convolution_op(inputs, kernel), "bfloat16")
        if not (_lies_well(self) and self.padding == "same" and _ones(self.strides) and self.groups == 1):
            return super().convolution_op(inputs, kernel)
        from torch.nn import functional

        kernel = ops.convert_to_tensor(kernel)
        with not_kept(inputs):
            if _ones(self.kernel_size):
                # Stored so, the kernel's gradient is taken in the order that is many times as fast.
                return functional.linear(inputs, kernel[0, 0, 0].T.contiguous())
            kernel = kernel.permute(4, 3, 0, 1, 2)
            outputs = functional.conv3d(inputs.movedim(-1, 1), kernel, padding="same", dilation=self.dilation_rate)
        return outputs.movedim(1, -1)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class Conv3DTranspose(keras.layers.Conv3DTranspose):
    """A transposed convolution."""

    def call(self, inputs):
        if not (_lies_well(self) and self.padding == "valid" and tuple(self.strides) == tuple(self.kernel_size)):
            return super().call(inputs)
        from torch.nn import functional

        kernel = ops.convert_to_tensor(self.kernel).permute(4, 3, 0, 1, 2)
        bias = ops.convert_to_tensor(self.bias) if self.use_bias else None
        with not_kept(inputs):
            outputs = functional.conv_transpose3d(inputs.movedim(-1, 1), kernel, bias, stride=self.strides)
        return self.activation(outputs.movedim(1, -1))


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class MaxPooling3D(keras.layers.MaxPooling3D):
    """The largest value of each box of voxels."""

    def call(self, inputs):
        if not (_lies_well(self) and self.padding == "valid"):
            return super().call(inputs)
        from torch.nn import functional

        with not_kept(inputs):
            return functional.max_pool3d(inputs.movedim(-1, 1), self.pool_size, self.strides).movedim(1, -1)
