import keras
from keras import ops

from keras_mmfnet.models._network import Network, make_blocks, make_inputs


class EncoderDecoder(Network):
    """A network of one or more encoders and one decoder, over volumes or slices.

    The graph is flat: no encoder is a model inside the model, so that freezing, copying and Grad-CAM see its layers.
    The layers of an encoder are named after it.

    Args:
        modalities: Names of the inputs.
        patch_shape: Sizes of a patch.
        filters: Filters of the decoder, from the finest level.
        dtype: Dtype policy of the layers, or `None` for Keras' own.
        compute_features: A function `compute_features(blocks, inputs, filters)` from the network's `Blocks` and inputs
            by modality to the features of each level for the decoder, from the finest to the bottom.
        settings: The other arguments of the subclass, kept as attributes and in the config as these are.
        rank: 3 for volumes, 2 for slices.
        **kwargs: `name` and `trainable`, as for every model.
    """

    def __init__(self, modalities, patch_shape, filters, dtype, compute_features, settings, rank=3, **kwargs):
        patch_shape, filters, blocks = tuple(patch_shape), tuple(filters), make_blocks(dtype, rank)
        inputs = make_inputs(modalities, patch_shape, filters, rank)

        def compute(inputs):
            return blocks.decode(compute_features(blocks, inputs, filters), filters)

        settings = {**settings, "patch_shape": patch_shape, "filters": filters}
        super().__init__(inputs, compute(inputs), blocks.dtype, settings, **kwargs)
        self._compute = compute

    def call(self, inputs, training=None, mask=None):
        """On PyTorch calls the layers in the order in which the network is written, not in Keras' order by depth.

        Features are released after their last use, and a level is fused before the next one is encoded. A backward pass
        goes the opposite way: it reaches the largest features when it has released those of the other levels.
        """
        if keras.backend.backend() != "torch":  # Compilers choose an order of their own.
            return super().call(inputs, training=training, mask=mask)
        return self._compute({name: ops.convert_to_tensor(inputs[name], x.dtype) for name, x in self.input.items()})

    def encoder(self, modality: str) -> keras.Model:
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
        names = [f"{modality}_block{level}_2_norm" for level in range(1, len(self.filters) + 1)]
        outputs = {layer.name: layer.output for layer in self.layers}
        if modality not in self.input or not set(names) <= set(outputs):
            raise ValueError(f"{self.name} has no encoder for this modality alone. Received: {modality!r}")
        features = [outputs[name] for name in (*names, f"{modality}_bottom_norm")]
        return keras.Model(self.input[modality], features, name=f"{modality}_encoder")
