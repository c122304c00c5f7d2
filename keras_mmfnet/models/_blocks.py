import dataclasses
from collections.abc import Sequence

import keras
from keras import ops

from keras_mmfnet import _axes
from keras_mmfnet.layers import volumes
from keras_mmfnet.layers._norm import norm_relu


@keras.saving.register_keras_serializable(package="keras_mmfnet")
def exclusive_softmax(logits):
    """The probabilities of structures that exclude each other: `exp(l_k) / (1 + sum_j exp(l_j))`.

    A softmax with the background, whose logit is 0 and whose probability is `1 - sum(p)`. With one structure it is
    the sigmoid.
    """
    background = ops.zeros_like(logits[..., :1])
    return ops.softmax(ops.concatenate([background, logits], axis=-1), axis=-1)[..., 1:]


def block_output(modality, level, residual=False):
    """The name of the layer that gives the features of a level of a modality's encoder before their pooling."""
    return f"{modality}_block{level}_{'relu' if residual else '2_norm'}"


class _AuxiliaryHeads(keras.layers.Layer):
    """Heads of the coarser levels, for deep supervision.

    Called with the finest probabilities and the features of the coarser levels, it returns those probabilities; in
    training, a list of them and of those of the coarser levels.
    """

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, input_shape):
        for head, shape in zip(self.heads, input_shape[1:], strict=True):
            head.build(shape)

    def call(self, inputs, training=None):
        probability, *features = inputs
        if not training:
            return probability
        return [probability, *(head(x) for head, x in zip(self.heads, features, strict=True))]

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs[0].shape, dtype=self.compute_dtype)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The building blocks of a network (section III-A) in 2D or 3D.

    The first call of a method creates its layers. Later calls, with symbolic tensors or with data, reuse the layers of
    the same names.
    """

    dtype: keras.dtype_policies.DTypePolicy
    rank: int = 3
    structures: int = 1
    exclusive: bool = True
    data_format: str = "channels_last"
    strides: Sequence[Sequence[int]] = ()
    kernel_sizes: Sequence[Sequence[int]] = ()
    normalization: str = "batch"
    residual: bool = False
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

    def conv(self, x, filters, name, kernel_size=3, padding="same", dilation=1, relu=True):
        """Convolution, normalization and ReLU."""
        # No bias: the normalization would subtract it.
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
        return self.layer(f"{name}_norm", norm_relu, self.normalization, axis, relu=relu)(x)

    def encoder_block(self, x, filters, name, kernel_size):
        """Two convolutions; if `residual`, the block's input is added before the last ReLU."""
        shortcut = x if self.residual else None
        x = self.conv(x, filters, f"{name}_1", kernel_size)
        x = self.conv(x, filters, f"{name}_2", kernel_size, relu=not self.residual)
        if not self.residual:
            return x
        if shortcut.shape[_axes.channel_axis(self.data_format)] != filters:
            shortcut = self.conv(shortcut, filters, f"{name}_shortcut", kernel_size=1, relu=False)
        x = self.layer(f"{name}_add", keras.layers.Add)([x, shortcut])
        return self.layer(f"{name}_relu", keras.layers.ReLU)(x)

    def encode(self, x, filters, name):
        """The encoder. Yields the features of each block before its pooling, then the bottom features."""
        levels = zip(filters, self.strides, self.kernel_sizes, strict=True)
        for level, (count, stride, kernel_size) in enumerate(levels, start=1):
            x = self.encoder_block(x, count, f"{name}_block{level}", kernel_size)
            yield x
            pool = self._kind("MaxPooling{}")
            x = self.layer(f"{name}_block{level}_pool", pool, stride, data_format=self.data_format)(x)
        yield self.conv(x, filters[-1], f"{name}_bottom", self.kernel_sizes[-1])

    def decode(self, features, filters, deep_supervision=False):
        """The decoder and the head: float32 probabilities from the features of each level, finest first.

        With deep supervision, in training, a list of the probabilities of each level but the coarsest, finest first.
        """
        *skips, x = features
        del features  # so that each tensor is released after its last use
        coarse = []
        for level in range(len(filters), 0, -1):
            count, stride, name = filters[level - 1], self.strides[level - 1], f"decoder_block{level}"
            up = self._kind("Conv{}Transpose")
            x = self.layer(f"{name}_up", up, count, stride, strides=stride, data_format=self.data_format)(x)
            x = self.conv(self.join([x, skips.pop()], f"{name}_join"), count, name, self.kernel_sizes[level - 1])
            if deep_supervision and 1 < level < len(filters):
                coarse.insert(0, x)
        probability = self.head(x)
        if not deep_supervision:
            return probability
        return self.layer("auxiliary_heads", self._auxiliary_heads, len(filters), dtype="float32")(
            [probability, *coarse]
        )

    def head(self, x):
        """The probability of each structure in each voxel, from its features."""
        return self.layer("probability", self._head_layer)(x)

    def _auxiliary_heads(self, levels, **options):
        return _AuxiliaryHeads([self._head_layer(f"probability{level}") for level in range(2, levels)], **options)

    def _head_layer(self, name, **_):
        # float32 under every policy: in float16 a sigmoid rounds probabilities near 1 to 1.
        return self._kind("Conv{}")(
            self.structures,
            1,
            padding="same",
            activation=exclusive_softmax if self.exclusive and self.structures > 1 else "sigmoid",
            data_format=self.data_format,
            dtype="float32",
            name=name,
        )

    def join(self, features, name):
        """Concatenates features along the channels; returns a single tensor unchanged."""
        if len(features) == 1:
            return features[0]
        axis = _axes.channel_axis(self.data_format)
        return self.layer(name, keras.layers.Concatenate, axis=axis)(features)
