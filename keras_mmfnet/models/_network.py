import math
import os
from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from keras_mmfnet import kernels
from keras_mmfnet.models._blocks import Blocks

if TYPE_CHECKING:
    from keras_mmfnet.recipe import Recipe


class Network(keras.Model):
    """A network over a dict of inputs by modality. Its arguments become attributes and part of its config.

    Args:
        inputs: Symbolic inputs by modality; see `make_inputs`.
        outputs: Symbolic probabilities.
        dtype: Dtype policy of the layers.
        settings: The arguments of the subclass.
        **kwargs: `name` and `trainable`, as in `keras.Model`.
    """

    def __init__(self, inputs, outputs, dtype, settings, **kwargs):
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)
        self.dtype_policy = dtype
        self._setting_names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    # Only deep supervision gives several outputs, in training: the probabilities of each level, finest first.

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if not isinstance(y_pred, list):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        total, weights, mask = 0.0, [0.5**level for level in range(len(y_pred))], ops.cast(y, "float32")
        for level, probability in enumerate(y_pred):
            if level:
                # The maximum, for the nearest voxel would lose structures that are smaller than a coarse voxel.
                stride = self.strides[level - 1]
                mask = kernels.max_pool(mask, stride, stride, "valid", "channels_last")
            # Structures that exclude each other share the coarse voxels in which they meet.
            shared = mask / ops.maximum(ops.sum(mask, axis=-1, keepdims=True), 1.0) if self.exclusive else mask
            loss = super().compute_loss(x, shared, probability, sample_weight, training)
            total += weights[level] / sum(weights) * loss
        return total

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        y_pred = y_pred[0] if isinstance(y_pred, list) else y_pred
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def export(self, filepath: str | os.PathLike, **kwargs: Any) -> None:
        """Exports the network for inference without Keras, as `keras.Model.export`.

        Args:
            filepath: Path of the file or folder.
            **kwargs: As for `keras.Model.export`, such as `format="onnx"`, `"openvino"` or `"tf_saved_model"`.
        """
        self(self.input)  # Keras cannot export a loaded model before its first call
        super().export(str(filepath), **kwargs)

    def get_config(self):
        settings = {name: getattr(self, name) for name in self._setting_names}
        return {"name": self.name, "trainable": self.trainable, "dtype": self.dtype_policy.name, **settings}


def load_network(path: str | os.PathLike, recipe: "Recipe | None" = None) -> keras.Model:
    """Loads a network from a `.keras` file. Code in the file is never executed.

    Args:
        path: Path of the file.
        recipe: The `Recipe` whose modalities and patch shape the network must match, or `None` for no check.

    Returns:
        A `keras.Model` that is not compiled.

    Raises:
        ValueError: The file is missing or damaged, it needs custom code or a class that is not imported, or the network
            does not match the recipe.
    """
    try:
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # from zipfile, HDF5, or the constructor of a layer
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: must be an undamaged .keras file of a network. Received: {reason[0]}") from error
    if recipe is not None and not _matches(recipe, model):
        shapes = keras.tree.map_structure(lambda tensor: getattr(tensor, "shape", None), getattr(model, "input", None))
        wanted, received = f"the probabilities of {', '.join(recipe.data.structures)}", f"of {shapes}"
        if len(recipe.data.structures) > 1:
            wanted += f" (exclusive={recipe.data.exclusive})"
            received += f" (exclusive={getattr(model, 'exclusive', None)})"
        raise ValueError(
            f"{path}: must be a network from patches {recipe.patches.shape} of {', '.join(recipe.data.modalities)} to "
            f"{wanted}, as the recipe says. Received: the {type(model).__name__} {received}"
        )
    return model


def _matches(recipe, model):
    """Whether a network maps the recipe's patches, or patches of any size, to a number per structure and voxel."""
    if not isinstance(inputs := getattr(model, "input", None), dict) or set(inputs) != set(recipe.data.modalities):
        return False
    outputs, structures = keras.tree.flatten(model.output), recipe.data.structure_names
    wanted = [*((tensor, 1) for tensor in inputs.values()), *((tensor, len(structures)) for tensor in outputs)]
    # A network of one structure may have learned it under another name.
    named = len(structures) == 1 or (
        getattr(model, "structures", structures) == structures
        and getattr(model, "exclusive", recipe.data.exclusive) == recipe.data.exclusive
    )
    return (
        named
        and len(outputs) == 1
        and all(
            len(tensor.shape) == 5
            and all(
                size in (None, want)
                for size, want in zip(tensor.shape, (None, *recipe.patches.shape, channels), strict=True)
            )
            for tensor, channels in wanted
        )
    )


def make_inputs(modalities, patch_shape, strides):
    """Creates a symbolic input of one channel per modality; checks that the strides of all levels divide its sizes.

    Raises:
        ValueError: `patch_shape` is invalid.
    """
    factors = [math.prod(sizes) for sizes in zip(*strides, strict=True)]
    axes = ("depth", "height", "width")[-len(factors) :]
    sizes = patch_shape if len(patch_shape) == len(factors) else [0] * len(factors)
    for axis, size, factor in zip(axes, sizes, factors, strict=True):
        if size is not None and (size < 1 or size % factor):
            raise ValueError(
                f"`patch_shape` must have {len(factors)} sizes, each None or positive, the {axis} a multiple of "
                f"{factor}, since the network halves it {factor.bit_length() - 1} times. Received: {patch_shape!r}"
            )
    return {name: keras.Input((*patch_shape, 1), name=name) for name in modalities}


def check_levels(name, values, filters, rank, largest):
    """`rank` numbers for each level, as tuples. `None` stands for `largest` everywhere.

    Raises:
        ValueError: A number is neither 1 nor `largest`, or there are too few or too many.
    """
    values = [[largest] * rank] * len(filters) if values is None else values
    several = (list, tuple)
    if len(values) != len(filters) or not all(
        isinstance(level, several) and len(level) == rank and set(level) <= {1, largest} for level in values
    ):
        raise ValueError(
            f"`{name}` must have {rank} numbers, each 1 or {largest}, for each of the {len(filters)} levels. "
            f"Received: {values!r}"
        )
    return tuple(map(tuple, values))


def check_names(modalities, filters):
    """Raises `ValueError` unless the modalities are distinct names and the filters are positive integers."""
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(f"`modalities` must be distinct names, at least one. Received: {modalities!r}")
    if not filters or any(not isinstance(count, int) or count < 1 for count in filters):
        raise ValueError(f"`filters` must be one or more positive integers. Received: {filters!r}")


def make_blocks(dtype, structures, exclusive, rank=3, **options):
    """`Blocks` of a dtype policy; `None` is Keras' global policy.

    Raises:
        ValueError: `structures` are no distinct names.
    """
    if not structures or isinstance(structures, str) or len(set(structures)) != len(structures):
        raise ValueError(f"`structures` must be distinct names, at least one. Received: {structures!r}")
    policy = keras.dtype_policies.get(dtype if dtype is not None else keras.config.dtype_policy())
    return Blocks(policy, rank, len(structures), exclusive, **options)
