import keras

from keras_mmfnet.models._blocks import Blocks


class EncoderDecoder(keras.Model):
    """A network of one or more encoders and one decoder, over volumes or slices.

    The graph is flat: no encoder is a model inside the model, so that freezing, copying and Grad-CAM see its layers.
    The layers of an encoder are named after it.

    Args:
        inputs: Symbolic inputs by modality, from `make_inputs`.
        features: Symbolic features of each level, from the finest to the bottom, for the decoder.
        blocks: The `Blocks` that made the features.
        filters: Filters of the decoder, from the finest level.
        settings: The arguments of the subclass, kept as attributes and in the config.
        **kwargs: `name` and `trainable`, as for every model.
    """

    def __init__(self, inputs, features, blocks, filters, settings, **kwargs):
        super().__init__(inputs=inputs, outputs=blocks.decode(features, filters), **kwargs)
        self.dtype_policy = blocks.dtype
        self._setting_names = tuple(settings)
        for name, value in settings.items():
            setattr(self, name, value)

    def encoder(self, modality):
        """One modality's encoder, as a model over the same layers.

        Setting `trainable` on it freezes or frees these layers here too, and `set_weights` fills them. A frozen batch
        normalization also stops updating its statistics.

        Args:
            modality: Name of the modality.

        Returns:
            A `keras.Model` from the modality's patch to a list of features: those of each block before its pooling,
            then those after the last one.

        Raises:
            ValueError: The network has no such encoder.
        """
        names = [f"{modality}_block{level}_2_relu" for level in range(1, len(self.filters) + 1)]
        outputs = {layer.name: layer.output for layer in self.layers}
        if modality not in self.input or not set(names) <= set(outputs):
            raise ValueError(f"{self.name} has no encoder for this modality alone. Received: {modality!r}")
        features = [outputs[name] for name in (*names, f"{modality}_bottom_relu")]
        return keras.Model(self.input[modality], features, name=f"{modality}_encoder")

    def get_config(self):
        settings = {name: getattr(self, name) for name in self._setting_names}
        return {"name": self.name, "trainable": self.trainable, "dtype": self.dtype_policy.name, **settings}


def make_inputs(modalities, patch_shape, filters, rank=3):
    """Symbolic inputs by modality, each one patch of one channel; checks the arguments every network has.

    Raises:
        ValueError: Names repeat, or the sizes do not fit a network with these filters.
    """
    if not modalities or len(set(modalities)) != len(modalities):
        raise ValueError(f"`modalities` must be distinct names, at least one. Received: {modalities!r}")
    if not filters or any(not isinstance(count, int) or count < 1 for count in filters):
        raise ValueError(f"`filters` must be one or more positive integers. Received: {filters!r}")
    factor = 2 ** len(filters)
    if len(patch_shape) != rank or any(size is not None and (size < 1 or size % factor) for size in patch_shape):
        raise ValueError(
            f"`patch_shape` must have {rank} sizes, each None or a positive multiple of {factor}, since the network "
            f"halves them {len(filters)} times. Received: {patch_shape!r}"
        )
    return {name: keras.Input((*patch_shape, 1), name=name) for name in modalities}


def make_blocks(dtype, rank=3):
    """The blocks for a dtype policy, `None` for Keras' own."""
    policy = keras.dtype_policies.get(dtype if dtype is not None else keras.config.dtype_policy())
    return Blocks(rank=rank, dtype=policy)
