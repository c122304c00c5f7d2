import functools
import os

import tensorflow as tf

from keras_mmfnet._precision import dtype_policy
from keras_mmfnet.devices import Devices, choose


class _Mirrored(Devices):
    """Several devices of this machine, in one process."""

    shares = True

    def __init__(self, names, sync_batch_norm):
        super().__init__(sync_batch_norm)
        self.number, self.strategy = len(names), _strategy(tuple(names))

    def scope(self):
        return self.strategy.scope()

    def check(self, settings):
        # Keras clips the gradient of each device, and looks for overflow on the first one, before it sums them.
        if settings.clip_norm is not None:
            raise ValueError(
                "`training.clip_norm` must be null for several devices on TensorFlow; PyTorch and JAX clip the sum. "
                f"Received: {settings.clip_norm}"
            )
        if dtype_policy(settings.mixed_precision) == "mixed_float16":
            raise ValueError(
                "`training.mixed_precision` must be bfloat16 or off for several devices on TensorFlow. "
                f"Received: {settings.mixed_precision}"
            )

    def sum(self, x):
        context = tf.distribute.get_replica_context()
        # There is none while the model is built.
        return x if context is None else context.all_reduce(tf.distribute.ReduceOp.SUM, x)


@functools.cache
def _strategy(names):
    """The strategy of some devices. TensorFlow would confuse the reductions of a second one with those of the first."""
    return tf.distribute.MirroredStrategy(names)


def make_devices(number, sync_batch_norm):
    """Returns the devices; see `set_devices`."""
    if "TF_CONFIG" in os.environ:
        raise ValueError(
            "Keras trains on one machine with TensorFlow; use JAX or PyTorch for several. Received: TF_CONFIG="
            f"{os.environ['TF_CONFIG']}"
        )
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    names = choose(number, [device.name for device in devices])
    return _Mirrored(names, sync_batch_norm) if len(names) > 1 else Devices()
