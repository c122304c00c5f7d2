import atexit
import os
import pickle
import sys

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils

from keras_mmfnet.devices import Devices, choose, started_with_others

# Whether the other processes wait for this one: until `broadcast(None)` ends the training.
_awaited = False


def connect():
    """Connects to the processes of other machines, as `keras.distribution.initialize` is told by the environment."""
    global _awaited
    keras.distribution.initialize()
    _awaited = jax.process_index() > 0  # the first process may fail before its first broadcast
    atexit.register(_leave)


def _leave():
    """Ends a process that failed. JAX would first wait for the others to end, which then wait for this one."""
    if _awaited:
        sys.stdout.flush()
        os._exit(1)


class _DataParallel(Devices):
    """All devices of all processes, or some of one process. Each layer sees the whole batch."""

    def __init__(self, names):
        super().__init__()
        self.number, self.process, self.processes = len(names), jax.process_index(), jax.process_count()
        self.distribution = keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)

    def scope(self):
        return self.distribution.scope()

    def broadcast(self, value=None):
        global _awaited
        if self.processes == 1:
            return value
        _awaited = True
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        # All processes must send an array of the same size.
        value = pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())
        _awaited = value is not None
        return value


def make_devices(number, sync_batch_norm):
    """Returns the devices; see `set_devices`."""
    if not sync_batch_norm:
        raise ValueError(
            "`sync_batch_norm` must be True on JAX, where each layer sees the whole batch. Received: False"
        )
    if started_with_others() and not jax.distributed.is_initialized():
        connect()
    names = keras.distribution.list_devices()
    if jax.process_count() > 1 and number not in ("all", len(names)):
        raise ValueError(f"`number` must be 'all' or {len(names)}, the devices of all processes. Received: {number}")
    names = choose(number, names)
    return _DataParallel(names) if len(names) > 1 else Devices()
