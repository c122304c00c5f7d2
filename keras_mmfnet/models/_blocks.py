import dataclasses

import keras

from keras_mmfnet import _axes
from keras_mmfnet.layers import BatchNormReLU, volumes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of one network (section III-A), in 2D or 3D, in one layout and one dtype policy.

    Called with symbolic tensors they add their layers to the network's graph; called again, with symbols or with data,
    they use the layers of the same names.
    """

    dtype: keras.dtype_policies.DTypePolicy
    rank: int = 3
    data_format: str = "channels_last"
    layers: dict = dataclasses.field(default_factory=dict)

    def layer(self, name, kind, *args, **options):
        """The layer of that name, made by `kind` with these arguments where there is none yet."""
        if name not in self.layers:
            self.layers[name] = kind(*args, **{"dtype": self.dtype, "name": name, **options})
        return self.layers[name]

    def _kind(self, name):
        """Class of a layer over the network's number of axes, such as `Conv3D` for `"Conv{}"`."""
        name = name.format(f"{self.rank}D")
        return getattr(volumes, name, None) or getattr(keras.layers, name)

    def conv(self, x, filters, name, kernel_size=3, padding="same", dilation=1):
        """A convolution, batch normalization and ReLU."""
        # Without a bias: the normalization that follows would subtract it.
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
        """The encoder: yields the features of each block before its pooling, then those after the last pooling."""
        for level, count in enumerate(filters, start=1):
            x = self.conv(x, count, f"{name}_block{level}_1")
            x = self.conv(x, count, f"{name}_block{level}_2")
            yield x
            pool = self._kind("MaxPooling{}")
            x = self.layer(f"{name}_block{level}_pool", pool, 2, data_format=self.data_format)(x)
        yield self.conv(x, filters[-1], f"{name}_bottom")

    def decode(self, features, filters):
        """The decoder over the features of each level, and the head: probabilities in float32."""
        *skips, x = features
        del features  # each is released after its last use
        for level in range(len(filters), 0, -1):
            count, name = filters[level - 1], f"decoder_block{level}"
            up = self._kind("Conv{}Transpose")
            x = self.layer(f"{name}_up", up, count, 2, strides=2, data_format=self.data_format)(x)
            x = self.conv(self.join([x, skips.pop()], f"{name}_join"), count, name)
        return self.head(x)

    def head(self, x):
        """Probabilities of each voxel, from its features."""
        # Always float32: in float16 a sigmoid cannot tell probabilities near 1 apart. Tumour is rare: a network that
        # starts from a probability of 5% (logit -3) need not first learn that most voxels are none.
        return self.layer(
            "probability",
            self._kind("Conv{}"),
            1,
            1,
            padding="same",
            activation="sigmoid",
            bias_initializer=keras.initializers.Constant(-3.0),
            data_format=self.data_format,
            dtype="float32",
        )(x)

    def join(self, features, name):
        """The features concatenated; a single tensor as it is."""
        if len(features) == 1:
            return features[0]
        axis = _axes.channel_axis(self.data_format)
        return self.layer(name, keras.layers.Concatenate, axis=axis)(features)
