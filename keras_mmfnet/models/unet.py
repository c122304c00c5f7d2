from collections.abc import Sequence
from typing import Any

import keras

from keras_mmfnet.models._encoder_decoder import EncoderDecoder


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class UNet3D(EncoderDecoder):
    """3D U-net over one modality: the base encoder-decoder (section III-A).

    Args:
        modality: Name of the modality.
        patch_shape: `(depth, height, width)` in voxels, each a multiple of the product of its strides or `None`.
        filters: Filters of the encoder's blocks; the decoder mirrors them.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        **kwargs: The options that `MMFNet` lists; `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, the tensor of shape `(batch, depth, height, width, 1)`.

    Returns:
        Float32 probabilities, `(batch, depth, height, width, structures)`.

    Raises:
        ValueError: `patch_shape` or `filters` is invalid.

    Example:

    ```python
    model = UNet3D("t1", patch_shape=(16, 64, 64))
    model.compile("adam", loss=DiceLoss())
    ```
    """

    def __init__(
        self,
        modality: str = "t1",
        patch_shape: Sequence[int | None] = (16, 256, 256),
        filters: Sequence[int] = (8, 16, 32, 64),
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        super().__init__((modality,), patch_shape, filters, dtype, _encode_one, {"modality": modality}, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class UNet2D(EncoderDecoder):
    """2D U-net over slices of one modality, with the blocks of `UNet3D` (section IV-D).

    Args:
        modality: Name of the modality.
        patch_shape: `(height, width)` in pixels, each a multiple of the product of its strides or `None`.
        filters: Filters of the encoder's blocks; the decoder mirrors them.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        **kwargs: The options that `MMFNet` lists; `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, the tensor of shape `(batch, height, width, 1)`.

    Returns:
        Float32 probabilities, `(batch, height, width, structures)`.

    Raises:
        ValueError: `patch_shape` or `filters` is invalid.
    """

    def __init__(
        self,
        modality: str = "t1",
        patch_shape: Sequence[int | None] = (256, 256),
        filters: Sequence[int] = (8, 16, 32, 64),
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            (modality,), patch_shape, filters, dtype, _encode_one, {"modality": modality}, rank=2, **kwargs
        )


def _encode_one(blocks, inputs, filters):
    [(modality, x)] = inputs.items()
    return blocks.encode(x, filters, modality)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class SingleEncoderUNet3D(EncoderDecoder):
    """3D U-net over all modalities, stacked as the channels of one image (section IV-D).

    The filters of its encoder are multiplied by the number of modalities, so that it computes as many features as all
    encoders of an MMFNet.

    Args:
        modalities: Names of the modalities.
        patch_shape: `(depth, height, width)` in voxels, each a multiple of the product of its strides or `None`.
        filters: Filters of the decoder's blocks, finest level first.
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
        super().__init__(modalities, patch_shape, filters, dtype, _encode_together, settings, **kwargs)


def _encode_together(blocks, inputs, filters):
    stacked = blocks.join(list(inputs.values()), "stacked")
    return blocks.encode(stacked, [len(inputs) * count for count in filters], "stacked")
