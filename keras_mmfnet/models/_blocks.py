import dataclasses
import functools

import keras

from keras_mmfnet import _axes
from keras_mmfnet.layers import _volumes
from keras_mmfnet.layers._batch_normalization import RectifiedBatchNormalization


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Adds the blocks of one network to its graph (section III-A): 2D or 3D, in one layout and one dtype policy."""

    dtype: keras.dtype_policies.DTypePolicy
    rank: int = 3
    data_format: str = "channels_last"

    def _layer(self, kind):
        layer = getattr(_volumes if self.rank == 3 else keras.layers, kind.format(f"{self.rank}D"))
        return functools.partial(layer, data_format=self.data_format)

    def conv(self, x, filters, name, kernel_size=3, padding="same", dilation=1):
        """A convolution, batch normalization and ReLU."""
        # Without a bias: the normalization that follows takes away whatever it would add.
        x = self._layer("Conv{}")(
            filters,
            kernel_size,
            padding=padding,
            dilation_rate=dilation,
            use_bias=False,
            kernel_initializer="he_normal",
            dtype=self.dtype,
            name=f"{name}_conv",
        )(x)
        return RectifiedBatchNormalization(
            axis=_axes.channel_axis(self.data_format),
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            name=f"{name}_norm",
        )(x)

    def encode(self, x, filters, name):
        """The encoder: the features of each block before its pooling, then those after the last pooling."""
        features = []
        for level, count in enumerate(filters, start=1):
            x = self.conv(x, count, f"{name}_block{level}_1")
            x = self.conv(x, count, f"{name}_block{level}_2")
            features.append(x)
            x = self._layer("MaxPooling{}")(2, dtype=self.dtype, name=f"{name}_block{level}_pool")(x)
        return [*features, self.conv(x, filters[-1], f"{name}_bottom")]

    def decode(self, features, filters):
        """The decoder over the features of each level, and the head: probabilities in float32."""
        *skips, x = features
        for level in range(len(skips), 0, -1):
            count, name = filters[level - 1], f"decoder_block{level}"
            up = self._layer("Conv{}Transpose")(count, 2, strides=2, dtype=self.dtype, name=f"{name}_up")(x)
            x = self.conv(self.join([up, skips[level - 1]], f"{name}_join"), count, name)
        return self.head(x)

    def head(self, x):
        """Probabilities of each voxel, from its features."""
        # Always float32: in float16 a sigmoid cannot tell probabilities near 1 apart. Tumour is rare: a network that
        # starts from a probability of 5% (logit -3) need not first learn that most voxels are none.
        return self._layer("Conv{}")(
            1,
            1,
            padding="same",
            activation="sigmoid",
            bias_initializer=keras.initializers.Constant(-3.0),
            dtype="float32",
            name="probability",
        )(x)

    def join(self, features, name):
        """Features side by side."""
        axis = _axes.channel_axis(self.data_format)
        return keras.layers.Concatenate(axis=axis, dtype=self.dtype, name=name)(features)
