from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mmfnet.models._network import Network


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class SliceWise3D(Network):
    """Applies a 2D network to each slice of a volume.

    Args:
        network: A 2D network over a dict of slices by modality, such as `UNet2D` or `PatchCNN`. If its output is
            smaller than its input, the slices are padded with 0, the mean of a normalised image.
        patch_shape: `(depth, height, width)` of the volumes in voxels.
        **kwargs: `name` and `trainable`, as in `keras.Model`.

    Call arguments:
        inputs: `{modality: tensor}`, each tensor of shape `(batch, depth, height, width, 1)`.

    Returns:
        Float32 probabilities, `(batch, depth, height, width, structures)`.

    Raises:
        ValueError: `patch_shape` does not have three known sizes.

    Example:

    ```python
    model = SliceWise3D(UNet2D("t1", (64, 64)), patch_shape=(16, 64, 64))
    ```
    """

    def __init__(
        self,
        network: keras.Model,
        patch_shape: Sequence[int],
        **kwargs: Any,
    ):
        patch_shape = tuple(patch_shape)
        if len(patch_shape) != 3 or None in patch_shape:
            raise ValueError(f"`patch_shape` must have three known sizes. Received: {patch_shape!r}")
        _, height, width = patch_shape
        taken = network.patch_shape
        given = network.compute_output_shape({name: (None, *taken, 1) for name in network.input})[1:3]
        # The centre of a patch is its pixel `size // 2`.
        pads = [((n - m + 1) // 2, (n - m) // 2) for n, m in zip(taken, given, strict=True)]
        inputs = {name: keras.Input((*patch_shape, 1), name=name) for name in network.input}

        def compute(inputs, training=None):
            slices = {}
            for name, x in inputs.items():
                x = ops.reshape(x, (-1, height, width, 1))
                slices[name] = ops.pad(x, ((0, 0), *pads, (0, 0))) if tuple(given) != tuple(taken) else x
            outputs = network(slices, training=training)
            volumes = [ops.reshape(y, (-1, patch_shape[0], *y.shape[1:])) for y in keras.tree.flatten(outputs)]
            return volumes if isinstance(outputs, list) else volumes[0]

        settings = {"network": network, "patch_shape": patch_shape}
        super().__init__(inputs, compute(inputs), network.dtype_policy, settings, **kwargs)
        self._compute = compute
        self.structures, self.exclusive = network.structures, network.exclusive
        self.strides = [(1, *stride) for stride in getattr(network, "strides", ())]

    def call(self, inputs, training=None, mask=None):
        if training and getattr(self.network, "deep_supervision", False):
            return self._compute(inputs, training)
        return super().call(inputs, training=training, mask=mask)

    def get_config(self):
        config = {**super().get_config(), "network": keras.saving.serialize_keras_object(self.network)}
        del config["dtype"]  # that of the network
        return config

    @classmethod
    def from_config(cls, config, custom_objects=None):
        network = keras.saving.deserialize_keras_object(config["network"], custom_objects)
        return cls(**{**config, "network": network})
