"""Keras' convolutions and pooling of volumes, computed by `kernels`."""

import keras

from keras_mmfnet import kernels


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class Conv3D(keras.layers.Conv3D):
    """A convolution, with the arguments of Keras' own."""

    def convolution_op(self, inputs, kernel):
        strides, dilation = list(self.strides), self.dilation_rate
        return kernels.conv(inputs, kernel, strides, self.padding, self.data_format, dilation)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class MaxPooling3D(keras.layers.MaxPooling3D):
    """The maximum of each box of voxels, with the arguments of Keras' own."""

    def call(self, inputs):
        return kernels.max_pool(inputs, self.pool_size, self.strides, self.padding, self.data_format)
