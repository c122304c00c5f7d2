from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mmfnet.models._network import Network, check_names, make_blocks


class _PatchClassifier(Network):
    """A `PatchCNN` of one or more branches; `settings` are the arguments of the subclass about them."""

    def __init__(self, modalities, patch_shape, filters, dtype, structures, exclusive, settings, **kwargs):
        patch_shape, filters, structures = tuple(patch_shape), tuple(filters), tuple(structures)
        blocks = make_blocks(dtype, structures, exclusive, rank=2)
        settings = {**settings, "patch_shape": patch_shape, "filters": filters}
        settings |= {"structures": structures, "exclusive": exclusive}
        super().__init__(*_classifier(modalities, patch_shape, filters, blocks), settings, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class PatchCNN(_PatchClassifier):
    """Classifies the centre pixel of 2D patches, for all patches of a slice in one pass (section IV-D).

    Each block has two 3x3 convolutions without padding and a 2x2 max-pooling. A fully connected layer over the
    remaining pixels and the output follow. The network is fully convolutional: the poolings have stride 1 and the
    kernels after them are dilated, so every patch of a slice gets the same probability as if it were classified alone.

    Args:
        modality: Name of the modality.
        patch_shape: `(height, width)` of a patch in pixels; its centre is the pixel `(height // 2, width // 2)`. Each
            block subtracts 4 pixels and halves the rest, which must give whole numbers.
        filters: Filters of each block, then units of the fully connected layer.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        structures: Names of the structures.
        exclusive: Whether no voxel can belong to two structures.
        **kwargs: `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, the tensor of shape `(batch, height, width, 1)`, not smaller than `patch_shape`.

    Returns:
        Float32 probabilities, one per structure and patch of the input:
        `(batch, height - patch height + 1, width - patch width + 1, structures)`.

    Raises:
        ValueError: `patch_shape` or `filters` is invalid.
    """

    def __init__(
        self,
        modality: str = "t1",
        patch_shape: Sequence[int] = (32, 32),
        filters: Sequence[int] = (16, 32, 64),
        dtype: str | keras.DTypePolicy | None = None,
        structures: Sequence[str] = ("tumour",),
        exclusive: bool = True,
        **kwargs: Any,
    ):
        settings = {"modality": modality}
        super().__init__((modality,), patch_shape, filters, dtype, structures, exclusive, settings, **kwargs)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class SiamesePatchCNN(_PatchClassifier):
    """A `PatchCNN` with a branch per modality; the fully connected layer joins the branches (section IV-D).

    The branches do not share weights, because the modalities show the same tissue in different intensities.

    Args:
        modalities: Names of the modalities.
        patch_shape: As for `PatchCNN`.
        filters: As for `PatchCNN`, for each branch.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        structures: Names of the structures.
        exclusive: Whether no voxel can belong to two structures.
        **kwargs: `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, each tensor of shape `(batch, height, width, 1)`, not smaller than `patch_shape`.

    Returns:
        Float32 probabilities, as from `PatchCNN`.

    Raises:
        ValueError: `modalities`, `patch_shape` or `filters` is invalid.
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("t1", "t2", "cet1"),
        patch_shape: Sequence[int] = (32, 32),
        filters: Sequence[int] = (16, 32, 64),
        dtype: str | keras.DTypePolicy | None = None,
        structures: Sequence[str] = ("tumour",),
        exclusive: bool = True,
        **kwargs: Any,
    ):
        settings = {"modalities": (modalities := tuple(modalities))}
        super().__init__(modalities, patch_shape, filters, dtype, structures, exclusive, settings, **kwargs)


def _classifier(modalities, patch_shape, filters, blocks):
    """The inputs, the probabilities and the dtype policy of a patch classifier."""
    check_names(modalities, filters)
    remaining = patch_shape if all(isinstance(size, int) for size in patch_shape) else ()
    for _ in filters[:-1]:
        remaining = tuple((size - 4) / 2 for size in remaining)
    if len(remaining) != 2 or any(size < 1 or size != int(size) for size in remaining):
        raise ValueError(
            f"`patch_shape` must have two sizes that give whole numbers when each of the {len(filters) - 1} blocks "
            f"subtracts 4 and halves them, such as 32 with two blocks. Received: {patch_shape!r}"
        )
    inputs = {name: keras.Input((None, None, 1), name=name) for name in modalities}
    dilation = 2 ** (len(filters) - 1)
    branches = []
    for name, x in inputs.items():
        for level, count in enumerate(filters[:-1]):
            for step in (1, 2):
                x = blocks.conv(x, count, f"{name}_block{level + 1}_{step}", padding="valid", dilation=2**level)
            x = _max_of_neighbours(x, 2**level)
        branches.append(x)
    x = blocks.join(branches, "joined")
    kernel = tuple(int(size) for size in remaining)
    x = blocks.conv(x, filters[-1], "dense", kernel_size=kernel, padding="valid", dilation=dilation)
    return inputs, blocks.head(x), blocks.dtype


def _max_of_neighbours(x, distance):
    """2x2 max-pooling with stride 1 over pixels that are `distance` apart."""
    x = ops.maximum(x[:, :-distance], x[:, distance:])
    return ops.maximum(x[:, :, :-distance], x[:, :, distance:])
