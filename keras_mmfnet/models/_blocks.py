import dataclasses

import keras

from keras_mmfnet import _axes
from keras_mmfnet.layers import BatchNormReLU, volumes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The building blocks of a network (section III-A) in 2D or 3D.

    The first call of a method creates its layers. Later calls, with symbolic tensors or with data, reuse the layers of
    the same names.
    """

    dtype: keras.dtype_policies.DTypePolicy
    rank: int = 3
    data_format: str = "channels_last"
    layers: dict = dataclasses.field(default_factory=dict)

    def layer(self, name, kind, *args, **options):
        """Returns the layer `name`; creates it by `kind(*args, **options)` if it does not exist."""
        if name not in self.layers:
            self.layers[name] = kind(*args, **{"dtype": self.dtype, "name": name, **options})
        return self.layers[name]

    def _kind(self, name):
        """The layer class of the network's rank, such as `Conv3D` for `"Conv{}"`."""
        name = name.format(f"{self.rank}D")
        return getattr(volumes, name, None) or getattr(keras.layers, name)

    def conv(self, x, filters, name, kernel_size=3, padding="same", dilation=1):
        """Convolution, batch normalization and ReLU."""
        # No bias: the batch normalization would subtract it.
        x = self.layer(
            f"{name}_conv",
            self._kind("Conv{}"),
            filters,
            kernel_size,
            padding=padding,
            dilation_rate=dilation,
            use_bias=False,
            kernel_initializer="he_normal",
            data_format=self.data_format,
        )(x)
        axis = _axes.channel_axis(self.data_format)
        return self.layer(f"{name}_norm", BatchNormReLU, axis, momentum=0.9, epsilon=1e-5)(x)

    def encode(self, x, filters, name):
        """The encoder. Yields the features of each block before its pooling, then the bottom features."""
        for level, count in enumerate(filters, start=1):
            x = self.conv(x, count, f"{name}_block{level}_1")
            x = self.conv(x, count, f"{name}_block{level}_2")
            yield x
            pool = self._kind("MaxPooling{}")
            x = self.layer(f"{name}_block{level}_pool", pool, 2, data_format=self.data_format)(x)
        yield self.conv(x, filters[-1], f"{name}_bottom")

    def decode(self, features, filters):
        """The decoder and the head: float32 probabilities from the features of each level, finest first."""
        *skips, x = features
        del features  # so that each tensor is released after its last use
        for level in range(len(filters), 0, -1):
            count, name = filters[level - 1], f"decoder_block{level}"
            up = self._kind("Conv{}Transpose")
            x = self.layer(f"{name}_up", up, count, 2, strides=2, data_format=self.data_format)(x)
            x = self.conv(self.join([x, skips.pop()], f"{name}_join"), count, name)
        return self.head(x)

    def head(self, x):
        """The probability of each voxel, from its features."""
        # float32 under every policy: in float16 a sigmoid rounds probabilities near 1 to 1.
        return self.layer(
            "probability",
            self._kind("Conv{}"),
            1,
            1,
            padding="same",
            activation="sigmoid",
            data_format=self.data_format,
            dtype="float32",
        )(x)

    def join(self, features, name):
        """Concatenates features along the channels; returns a single tensor unchanged."""
        if len(features) == 1:
            return features[0]
        axis = _axes.channel_axis(self.data_format)
        return self.layer(name, keras.layers.Concatenate, axis=axis)(features)
