import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import keras
from keras import ops

from keras_mmfnet.layers import FusionBlock3D
from keras_mmfnet.models._encoder_decoder import EncoderDecoder
from keras_mmfnet.models._network import load_network


def _encode_each(blocks, inputs, filters):
    """Yields, for each level, the list of the features of all encoders."""
    encoders = [blocks.encode(x, filters, modality) for modality, x in inputs.items()]
    for level in zip(*encoders, strict=True):
        yield list(level)


def _encode_and_join(blocks, inputs, filters):
    levels = enumerate(_encode_each(blocks, inputs, filters), start=1)
    return [blocks.join(level, f"join{index}") for index, level in levels]


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class MultiEncoderUNet3D(EncoderDecoder):
    """MMFNet without fusion blocks: the features of its encoders are concatenated (section IV-D).

    Args:
        modalities: Names of the modalities.
        patch_shape: `(depth, height, width)` in voxels, each a multiple of the product of its strides or `None`.
        filters: Filters of each encoder's blocks; the decoder mirrors them.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        **kwargs: The options that `MMFNet` lists; `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, each tensor of shape `(batch, depth, height, width, 1)`.

    Returns:
        Float32 probabilities, `(batch, depth, height, width, structures)`.

    Raises:
        ValueError: `modalities`, `patch_shape` or `filters` is invalid.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("t1", "t2", "cet1"),
        patch_shape: Sequence[int | None] = (16, 256, 256),
        filters: Sequence[int] = (8, 16, 32, 64),
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        modalities = tuple(modalities)
        settings = {"modalities": modalities}
        super().__init__(modalities, patch_shape, filters, dtype, _encode_and_join, settings, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class MMFNet(EncoderDecoder):
    """Multi-modality MRI fusion network: an encoder per modality, a fusion block per level and a decoder.

    All encoder-decoder networks have these options, as keyword arguments:

    | option | default | meaning |
    |---|---|---|
    | `structures` | `("tumour",)` | names of the structures, one channel of probabilities each |
    | `exclusive` | `True` | no voxel belongs to two structures: a softmax with the background, not a sigmoid for each |
    | `strides` | `None`: 2 everywhere | by how much each level is pooled, 1 or 2 along each axis |
    | `kernel_sizes` | `None`: 3 everywhere | kernel of the convolutions of each level, 1 or 3 along each axis |
    | `normalization` | `"batch"` | or `"instance"` |
    | `residual` | `False` | the input of each encoder block is added to its output |
    | `deep_supervision` | `False` | auxiliary heads on all decoder levels but the coarsest, in training only; not \
part of the config, so a loaded network has the finest head alone |

    Args:
        modalities: Names of the modalities.
        patch_shape: `(depth, height, width)` in voxels, each a multiple of the product of its strides or `None`.
        filters: Filters of each encoder's blocks, and of the fusion blocks and the decoder.
        reduction: Ratio `r` of the channel attention's hidden layer.
        channel_statistics: Statistics of the channel attention, of `"avg"`, `"max"` and `"std"`.
        spatial_statistics: Statistics of the spatial attention.
        shared_mlp: Whether the statistics of the channel attention share one MLP, as in CBAM.
        bottleneck: How the bottom features of the encoders are joined, which the paper does not say: `"fusion"` for a
            fusion block, `"concat"` for concatenation.
        modality_dropout: Probability that a modality of a training patch is replaced by zeros, the mean of a normalised
            image; or probabilities by modality, 0 for those not named. At least one modality is kept.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        **kwargs: The options above; `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, each tensor of shape `(batch, depth, height, width, 1)`.

    Returns:
        Float32 probabilities, `(batch, depth, height, width, structures)`.

    Raises:
        ValueError: An argument is invalid.

    Example:

    ```python
    model = MMFNet(modalities=("t1", "t2", "cet1"), patch_shape=(16, 256, 256))
    model.compile(keras.optimizers.Adam(1e-4), loss=DiceLoss(), metrics=[DiceScore()])
    ```

    Reference: Chen et al., MMFNet: A Multi-modality MRI Fusion Network for Segmentation of Nasopharyngeal Carcinoma,
    section III.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("t1", "t2", "cet1"),
        patch_shape: Sequence[int | None] = (16, 256, 256),
        filters: Sequence[int] = (8, 16, 32, 64),
        reduction: int = 12,
        channel_statistics: Sequence[str] = ("avg", "max", "std"),
        spatial_statistics: Sequence[str] = ("avg", "max", "std"),
        shared_mlp: bool = False,
        bottleneck: Literal["fusion", "concat"] = "fusion",
        modality_dropout: float | Mapping[str, float] = 0.0,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        if bottleneck not in ("fusion", "concat"):
            raise ValueError(f"`bottleneck` must be 'fusion' or 'concat'. Received: {bottleneck!r}")
        modalities = tuple(modalities)
        by_name = isinstance(modality_dropout, Mapping)
        modality_dropout = dict(modality_dropout) if by_name else modality_dropout
        rates = modality_dropout if by_name else dict.fromkeys(modalities, modality_dropout)
        if not all(0 <= rate < 1 for rate in rates.values()) or not set(rates) <= set(modalities):
            raise ValueError(f"`modality_dropout` must be in [0, 1), of {modalities}. Received: {modality_dropout!r}")
        attention = {
            "reduction": reduction,
            "channel_statistics": tuple(channel_statistics),
            "spatial_statistics": tuple(spatial_statistics),
            "shared_mlp": shared_mlp,
        }

        def encode_and_fuse(blocks, inputs, filters):
            names = [*(f"fusion{index}" for index in range(1, len(filters) + 1)), "fusion_bottom"]
            fused = []
            # Fuse each level before the next one is encoded.
            for level, name, count in zip(
                _encode_each(blocks, inputs, filters), names, [*filters, filters[-1]], strict=True
            ):
                if name == "fusion_bottom" and bottleneck == "concat":
                    fused.append(blocks.join(level, "join_bottom"))
                else:
                    options = {"data_format": blocks.data_format, "normalization": blocks.normalization}
                    block = blocks.layer(name, FusionBlock3D, count, **attention, **options)
                    fused.append(block(level))
            return fused

        settings = {"modalities": modalities, **attention, "bottleneck": bottleneck}
        settings["modality_dropout"] = modality_dropout
        super().__init__(modalities, patch_shape, filters, dtype, encode_and_fuse, settings, **kwargs)
        if modality_dropout:
            self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs, training=None, mask=None):
        if training and self.modality_dropout:
            inputs = self._drop(inputs)
        return super().call(inputs, training=training, mask=mask)

    def _drop(self, inputs):
        """Replaces random modalities of each patch by zeros."""
        # One that a patient lacks is zeros already.
        there = ops.stack([ops.max(ops.abs(inputs[name]), axis=(1, 2, 3, 4)) > 0 for name in self.modalities], axis=1)
        rates = self.modality_dropout
        rates = [rates.get(name, 0.0) if isinstance(rates, dict) else rates for name in self.modalities]
        numbers = keras.random.uniform(ops.shape(there), seed=self.seed_generator) - ops.array(rates, "float32")
        numbers = ops.where(there, numbers, -2.0)
        # The modality with the largest number is always kept.
        kept = ops.logical_or(numbers >= 0, numbers == ops.max(numbers, axis=1, keepdims=True))
        return {
            name: ops.where(ops.reshape(kept[:, index], (-1, 1, 1, 1, 1)), inputs[name], 0)
            for index, name in enumerate(self.modalities)
        }

    @classmethod
    def from_pretrained_encoders(
        cls, encoders: Mapping[str, keras.Model | str | os.PathLike | None], **kwargs: Any
    ) -> Self:
        """Creates an MMFNet from the encoders of single-modality networks: self-transfer (section III-C).

        Args:
            encoders: `{modality: network or path}`. Each network has an encoder of its modality, such as a `UNet3D` or
                an `MMFNet` of any modalities; a path is that of a `.keras` file. `None`: the modality's encoder starts
                from random weights.
            **kwargs: Arguments of the constructor. The default of `modalities` is those of `encoders`; the defaults of
                `patch_shape` and of what the encoders are made of (`filters`, `strides`, `kernel_sizes`,
                `normalization`, `residual`) are those of the encoders.

        Returns:
            The network. The encoders' weights are copied; all layers are trainable.

        Raises:
            ValueError: A modality is not in `encoders` or the other way round, all of them are `None`, or they do not
                match each other or the arguments.

        Example:

        ```python
        model = MMFNet.from_pretrained_encoders({"t1": "t1.keras", "t2": "t2.keras", "cet1": "cet1.keras"})
        for modality in model.modalities:
            model.encoder(modality).trainable = False
        ```
        """
        modalities = tuple(kwargs.pop("modalities", encoders))
        if set(modalities) != set(encoders):
            raise ValueError(
                "`encoders` must have a network, or None for random weights, for each of the modalities "
                f"{modalities}. Received: {tuple(encoders)}"
            )
        donors = {name: _load_encoder(name, encoders[name]) for name in modalities if encoders[name] is not None}
        if not donors:
            raise ValueError(f"`encoders` must have at least one network. Received: {dict(encoders)}")
        first, (model, _) = next(iter(donors.items()))
        parts = ("filters", "strides", "kernel_sizes", "normalization", "residual")
        network = cls(modalities, **{name: getattr(model, name) for name in ("patch_shape", *parts)} | kwargs)
        for modality, (model, encoder) in donors.items():
            for name in parts:
                if getattr(model, name) != getattr(network, name):
                    source = f"the argument `{name}`" if name in kwargs else f"the encoder for {first!r}"
                    raise ValueError(
                        f"the encoder for {modality!r} must have the {name} {getattr(network, name)}, as {source}. "
                        f"Received: {getattr(model, name)}"
                    )
            network.encoder(modality).set_weights(encoder.get_weights())
        return network


def _load_encoder(modality, source):
    """Returns the network, which may be given as a path, and its encoder for `modality`."""
    model = load_network(source) if isinstance(source, (str, os.PathLike)) else source
    if not isinstance(model, EncoderDecoder):
        raise ValueError(f"the network for {modality!r} must be a UNet3D, or the path of one. Received: {source!r}")
    if len(model.patch_shape) != 3:
        raise ValueError(f"the network for {modality!r} must be 3D. Received: patch_shape={model.patch_shape}")
    try:
        return model, model.encoder(modality)
    except ValueError as error:
        raise ValueError(f"the network for {modality!r} has no encoder for it. Received: {source!r}") from error
