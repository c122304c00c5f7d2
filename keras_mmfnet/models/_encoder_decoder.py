import json
import os
from pathlib import Path
from typing import Any, Self

import keras
from keras import ops

from keras_mmfnet._files import new_folder, read_json
from keras_mmfnet.models._blocks import block_output
from keras_mmfnet.models._network import Network, check_levels, check_names, load_network, make_blocks, make_inputs
from keras_mmfnet.version import __version__

# The files of a preset that are read, named as in keras-hub.
_CONFIG, _WEIGHTS = "config.json", "model.weights.h5"
# The arguments on which the weights and their meaning do not depend.
_FREE = {"patch_shape", "modality_dropout", "dtype", "name", "trainable"}


class EncoderDecoder(Network):
    """A network with one or more encoders and one decoder, over volumes or slices.

    The graph is flat: the encoders are not nested models, so freezing, copying weights and Grad-CAM work on their
    layers. The names of an encoder's layers start with its modality.

    Args:
        modalities: Names of the inputs.
        patch_shape: Size of a patch along each axis.
        filters: Filters of the decoder, from the finest level.
        dtype: Dtype policy of the layers, or `None` for Keras' global policy.
        compute_features: Function `compute_features(blocks, inputs, filters)` that returns the decoder's inputs: the
            features of each level, from the finest to the bottom. `blocks` are the network's `Blocks`, `inputs` is
            `{modality: tensor}`.
        settings: The other arguments of the subclass, which become attributes and part of the config.
        rank: 3 for volumes, 2 for slices.
        structures, exclusive, strides, kernel_sizes, normalization, residual, deep_supervision: See `MMFNet`.
        **kwargs: `name` and `trainable`, as in `keras.Model`.
    """

    def __init__(
        self,
        modalities,
        patch_shape,
        filters,
        dtype,
        compute_features,
        settings,
        rank=3,
        structures=("tumour",),
        exclusive=True,
        strides=None,
        kernel_sizes=None,
        normalization="batch",
        residual=False,
        deep_supervision=False,
        **kwargs,
    ):
        patch_shape, filters, structures = tuple(patch_shape), tuple(filters), tuple(structures)
        check_names(modalities, filters)
        if deep_supervision and len(filters) < 3:
            raise ValueError(f"`deep_supervision` must go with three or more levels. Received: filters={filters}")
        options = {
            "strides": check_levels("strides", strides, filters, rank, 2),
            "kernel_sizes": check_levels("kernel_sizes", kernel_sizes, filters, rank, 3),
            "normalization": normalization,
            "residual": residual,
        }
        blocks = make_blocks(dtype, structures, exclusive, rank, **options)
        inputs = make_inputs(modalities, patch_shape, options["strides"])

        def compute(inputs):
            return blocks.decode(compute_features(blocks, inputs, filters), filters, deep_supervision)

        settings = {**settings, "patch_shape": patch_shape, "filters": filters, **options}
        settings |= {"structures": structures, "exclusive": exclusive}
        super().__init__(inputs, compute(inputs), blocks.dtype, settings, **kwargs)
        self._compute = compute
        self.deep_supervision = deep_supervision

    def call(self, inputs, training=None, mask=None):
        """In training with deep supervision, returns a list of the probabilities of each level, finest first.

        On PyTorch, calls the layers in the order of the code instead of Keras' order by depth, which saves memory:
        Features are released after their last use, and a level is fused before the next one is encoded. The backward
        pass has the opposite order: it reaches the largest features after it has released those of the other levels.
        """
        several = training and self.deep_supervision  # Keras' own order returns one output
        if keras.backend.backend() != "torch" and not several:  # compilers choose their own order
            return super().call(inputs, training=training, mask=mask)
        inputs = {name: ops.convert_to_tensor(inputs[name], x.dtype) for name, x in self.input.items()}
        if several:  # Keras' trainer on JAX calls only this method, so that the layers do not know that they train
            return keras.layers.Lambda(self._compute, dtype="float32")(inputs, training=training)
        return self._compute(inputs)

    def encoder(self, modality: str) -> keras.Model:
        """Returns one modality's encoder as a model that shares the layers of this network.

        Both models share the weights and the `trainable` attribute of these layers. A frozen batch normalization also
        stops updating its moving averages.

        Args:
            modality: Name of the modality.

        Returns:
            A `keras.Model` from the modality's patch to a list of features: the output of each block before its
            pooling, then the bottom features.

        Raises:
            ValueError: The network has no encoder for this modality alone.
        """
        names = [block_output(modality, level, self.residual) for level in range(1, len(self.filters) + 1)]
        outputs = {layer.name: layer.output for layer in self.layers}
        if modality not in self.input or not set(names) <= set(outputs):
            raise ValueError(f"{self.name} has no encoder for this modality alone. Received: {modality!r}")
        features = [outputs[name] for name in (*names, f"{modality}_bottom_norm")]
        return keras.Model(self.input[modality], features, name=f"{modality}_encoder")

    def save_to_preset(self, preset_dir: str | os.PathLike) -> None:
        """Saves the network as a preset, with the files of keras-hub: a folder to share or to upload.

        Args:
            preset_dir: A new folder for `config.json`, `model.weights.h5` and `metadata.json`.

        Raises:
            FileExistsError: There is something at the path.
        """
        name = keras.saving.get_registered_name(type(self))
        config = {"module": type(self).__module__, "class_name": type(self).__name__, "registered_name": name}
        config["config"] = self.get_config()
        metadata = {"keras_version": keras.version(), "keras_mmfnet_version": __version__}
        with new_folder(Path(preset_dir)) as folder:
            for file, values in (("config", config), ("metadata", metadata | {"parameter_count": self.count_params()})):
                (folder / f"{file}.json").write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
            self.save_weights(folder / _WEIGHTS)

    @classmethod
    def from_preset(cls, preset: str | os.PathLike, fold: int | None = None, **kwargs: Any) -> Self:
        """Loads a network from a preset or a bundle. No code in it is executed.

        Args:
            preset: A folder of `save_to_preset`, a folder or zip archive of `Run.save_bundle`, or `hf://user/name` for
                either on the Hugging Face Hub (extra `hub`).
            fold: The fold whose network of a bundle it is; `None` for the first.
            **kwargs: Arguments of the constructor that differ: `patch_shape`, `modality_dropout`, `dtype`, `name` and
                `trainable`.

        Returns:
            The network, not compiled.

        Raises:
            ValueError: There is no such preset, bundle or fold; it is damaged; it is of another class; or its weights
                are of other arguments.
            ImportError: `hf://` is given without the extra `hub`.

        Example:

        ```python
        model.save_to_preset("preset")
        larger = MMFNet.from_preset("preset", patch_shape=(16, 128, 128))
        ```
        """
        from keras_mmfnet.bundle import Bundle, is_bundle, local_folder

        path = local_folder(preset)
        if not is_bundle(path):
            return _load_preset(cls, path, kwargs)
        bundle = Bundle(path)
        folds = bundle.trained_folds()
        if fold not in (None, *folds):
            listed = ", ".join(map(str, folds))
            raise ValueError(f"{preset}: `fold` must be one of the bundle's, {listed}. Received: {fold}")
        network = load_network(bundle.network(folds[0] if fold is None else fold), bundle.recipe)
        _check_class(cls, type(network), preset)
        if kwargs:
            _check_arguments(network.get_config(), kwargs, preset)
            network, before = type(network)(**network.get_config() | kwargs), network
            network.set_weights(before.get_weights())
        return network


def _load_preset(cls, path, changes):
    """The network in a folder of `save_to_preset`, of a class or one derived from it."""
    file, weights = path / _CONFIG, path / _WEIGHTS
    for part in (file, weights):
        if not part.is_file():
            raise ValueError(f"{part}: a preset with such a file, or a bundle, is expected. Received: a folder without")
    values = read_json(file)
    name = values.get("registered_name")
    found = keras.saving.get_registered_object(name) if isinstance(name, str) else None
    _check_class(cls, found, file)
    _check_arguments(values.get("config"), changes, path)
    try:
        network = found(**values["config"] | changes)  # and not `from_config`, which would make any layers
        network.load_weights(weights)
    except Exception as error:  # from HDF5, or the constructor of a layer
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: must be an undamaged preset that fits {changes}. Received: {reason[0]}") from error
    return network


def _check_arguments(config, changes, preset):
    """Refuses changes of a preset's config that its weights do not fit."""
    if not isinstance(config, dict):
        return  # Building the network will tell.
    for name in sorted(changes.keys() - _FREE):
        if name not in config:
            raise ValueError(f"{preset}: an argument of {', '.join(sorted(_FREE))} is expected. Received: {name}")
        own, other = (json.dumps(some[name], default=str) for some in (config, changes))  # A file has lists for tuples.
        if own != other:
            raise ValueError(f"{preset}: `{name}` must be the preset's, {own}. Received: {other}")


def _check_class(cls, found, path):
    if not (isinstance(found, type) and issubclass(found, cls)):
        raise ValueError(f"{path}: must be of the class {cls.__name__}. Received: {getattr(found, '__name__', found)}")
