"""Trains on two devices of a CPU for `test_devices.py`: `devices_script.py FOLDER`."""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np

from keras_mmfnet import devices, training
from keras_mmfnet.data import Grid, PreprocessedCase
from keras_mmfnet.methods import method_of
from keras_mmfnet.recipe import Recipe

RECIPE = Recipe.small().replace(
    {
        "data.modalities": ("t1", "t2"),
        "data.spacing": None,
        "patches.shape": (4, 8, 8),
        "patches.stride": (4, 3, None),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.batch_size": 4,
        "training.epochs": 2,
        "training.steps_per_epoch": 5,
        "training.self_transfer": False,
        "training.loss": "dice_ce",
        # Adam divides by the gradient, so that rounding errors of one near 0 would show.
        "training.optimizer": "sgd",
    }
)


def make_case(name, seed):
    """A patient of 6x18x8 voxels, which have 10 windows: 2 more than whole batches."""
    rng, shape = np.random.default_rng(seed), (6, 18, 8)
    mask = np.zeros(shape, np.uint8)
    mask[1:4, 4 + seed : 9 + seed, 2:6] = 1
    images = {
        name: (sign * mask.astype(float) + rng.normal(0, 0.3, shape)).astype(np.float32)
        for name, sign in (("t1", 1), ("t2", -1))
    }
    grid = Grid(shape[::-1], (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    return PreprocessedCase(name, images, {"tumour": mask}, grid, grid, tuple(n // 2 for n in shape))


def replicas(weight):
    """The values that the devices of this process have of a weight."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return [value.numpy() for value in tf.distribute.get_strategy().experimental_local_results(weight.value)]
    if keras.backend.backend() == "jax":
        return [np.asarray(shard.data) for shard in weight.value.addressable_shards]
    return [keras.ops.convert_to_numpy(weight.value)]


def train(folder, die=False):
    """Trains a network; saves its weights, and those that each device has at the end."""
    fit, save = training._Trainer.fit_epochs, training._SaveState.on_epoch_end

    def fit_epochs(self, model, *args, **kwargs):
        fit(self, model, *args, **kwargs)
        chosen = devices.in_use()
        if chosen.number == 1:
            return
        # A process of the second choice of devices begins with the first one.
        place = folder.with_name("two" if chosen.sync_batch_norm else "own")
        place.mkdir(exist_ok=True)
        values = zip(*map(replicas, model.weights), strict=True)
        for number, weights in enumerate(values, start=chosen.process):
            np.savez(place / f"device_{number}.npz", *weights)

    def on_epoch_end(self, epoch, logs=None):
        save(self, epoch, logs)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)

    training._Trainer.fit_epochs, training._SaveState.on_epoch_end = fit_epochs, on_epoch_end
    if number := devices.get_devices().process:
        (folder.parent / f"process_{number}").write_text(str(os.getpid()))
        return training.follow()
    cases = [make_case(f"patient_{n}", n) for n in range(4)]
    model = training.train_method(method_of(RECIPE), cases[:3], cases[3:], RECIPE, folder)
    np.savez(folder / "weights.npz", *model.get_weights())
    training._Trainer.fit_epochs, training._SaveState.on_epoch_end = fit, save


def main(folder):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpus = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    if keras.backend.backend() != "jax":  # where each layer sees the whole batch
        devices.set_devices(2, sync_batch_norm=False)
        train(folder / "own")
        if devices.get_devices().process:
            return
    devices.set_devices(2)
    train(folder / "two")
    train(folder / "killed", die=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
