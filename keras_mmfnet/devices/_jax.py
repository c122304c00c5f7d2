import pickle

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_mmfnet.devices import Devices, choose, connect


class _DataParallel(Devices):
    """All devices of all processes, or some of one process. Each layer sees the whole batch."""

    def __init__(self, names):
        super().__init__()
        self.number, self.process, self.processes = len(names), jax.process_index(), jax.process_count()
        self.distribution = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)

    def scope(self):
        return self.distribution.scope()

    def broadcast(self, value=None):
        if self.processes == 1:
            return value
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        # All processes must send an array of the same size.
        return pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())


def make_devices(number, sync_batch_norm):
    """Returns the devices; see `set_devices`."""
    if not sync_batch_norm:
        raise ValueError(
            "`sync_batch_norm` must be True on JAX, where each layer sees the whole batch. Received: False"
        )
    if not jax.distributed.is_initialized():
        connect()
    names = keras.distribution.list_devices()
    if jax.process_count() > 1 and number not in ("all", len(names)):
        raise ValueError(f"`number` must be 'all' or {len(names)}, the devices of all processes. Received: {number}")
    names = choose(number, names)
    return _DataParallel(names) if len(names) > 1 else Devices()
