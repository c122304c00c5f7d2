"""Trains one network, so that it can be interrupted at any moment and resumed."""

import csv
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras

from keras_mmfnet._files import write
from keras_mmfnet._log import progress
from keras_mmfnet._precision import dtype_policy
from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.patches import centre_patches, patch_dataset
from keras_mmfnet.evaluation import metrics_csv
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.methods import Method, find_method, method_of
from keras_mmfnet.metrics import AveragePrecision, DiceScore
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe

_log = logging.getLogger(__name__)


def pretrain_encoders(
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    recipe: Recipe,
    directory: str | os.PathLike,
) -> dict[str, Path]:
    """Trains one single-modality network per modality, the first half of self-transfer (section III-C).

    Args:
        training: Patients to learn from.
        validation: Patients that choose the best epoch.
        recipe: The `Recipe`.
        directory: Folder for `unet3d_<modality>.keras` and `unet3d_<modality>_history.csv`; see `train_method`.

    Returns:
        `{modality: path of its network}`.
    """
    paths = {}
    for modality in recipe.data.modalities:
        method = find_method(f"unet3d_{modality}")
        train_method(method, training, validation, recipe, directory)
        paths[modality] = Path(directory) / f"{method.name}.keras"
    return paths


def train_mmfnet(
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    recipe: Recipe,
    directory: str | os.PathLike,
    encoders: Mapping[str, keras.Model | str | os.PathLike] | None = None,
) -> keras.Model:
    """Trains MMFNet: with given encoders first while these are frozen, then the whole network.

    Args:
        training: Patients to learn from.
        validation: Patients that choose the best epoch.
        recipe: The `Recipe`.
        directory: Folder for `mmfnet.keras` and `mmfnet_history.csv`; see `train_method`.
        encoders: `{modality: network or path}`, as `pretrain_encoders` returns them, or `None` to start from random
            weights.

    Returns:
        The `MMFNet` with the weights of its best epoch.
    """
    return train_method(method_of(recipe), training, validation, recipe, directory, encoders or {})


def train_method(
    method: Method,
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    recipe: Recipe,
    directory: str | os.PathLike,
    encoders: Mapping[str, keras.Model | str | os.PathLike] | None = None,
) -> keras.Model:
    """Trains the network of a method, and before it those that lend it their encoders.

    Args:
        method: A `Method`, such as `METHODS["multi_encoder"]`.
        training: Patients to learn from.
        validation: Patients that choose the best epoch.
        recipe: The `Recipe`; the method changes what makes it this method.
        directory: Folder for `<method>.keras` and `<method>_history.csv`, shared by all methods of a fold. A network
            that is there is only loaded, and an interrupted training goes on after its last whole epoch.
        encoders: Networks that lend their encoders by modality, instead of those that the method names.

    Returns:
        The network with the weights of its best epoch.

    Raises:
        ValueError: A network in the directory is damaged or of another recipe.
        FloatingPointError: The training diverged.
        OSError: The disk is full.
    """
    recipe, path = method.adapt(recipe), Path(directory) / f"{method.name}.keras"
    if path.exists():
        return load_network(path, recipe if method.samples == "volumes" else None)
    if encoders is None:
        encoders = {
            modality: train_method(find_method(name), training, validation, recipe, directory)
            for modality, name in method.encoders.items()
        }
    _log.info("Training %s", method.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings, work = recipe.training, path.with_name(f".{path.stem}")

    def start():
        keras.utils.set_random_seed(settings.seed)
        return method.build(recipe, dtype=dtype_policy(settings.mixed_precision), encoders=encoders)

    fit = functools.partial(
        _fit, training=training, validation=validation, recipe=recipe, work=work, samples=method.samples
    )
    model, stages = start(), []
    if encoders and settings.warmup_epochs:
        for modality in encoders:
            model.encoder(modality).trainable = False
        epochs = min(settings.warmup_epochs, settings.epochs)
        stages.append(fit(model, name="encoders frozen", learning_rate=settings.warmup_learning_rate, epochs=epochs))
        # A new model, since `fit` would start at the epoch at which it resumed the last one.
        model, warm = start(), model
        model.set_weights(warm.get_weights())
    past = sum(len(stage.history) for stage in stages)
    if settings.epochs > past:
        rate = settings.learning_rate if encoders else settings.pretrain_learning_rate
        epochs, schedule = settings.epochs - past, settings.schedule
        stages.append(fit(model, name="all", learning_rate=rate, epochs=epochs, schedule=schedule, past=past))
    return _finish(model, path, stages, work, settings.steps_per_epoch)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One training with the same trainable layers and the same learning rate, or schedule of it by update."""

    name: str
    learning_rate: object
    history: list
    best_weights: Path


def _fit(model, training, validation, recipe, work, samples, name, learning_rate, epochs, schedule="constant", past=0):
    """`model.fit`, going on after the last whole epoch in `work`; the model has the last epoch's weights then.

    After each epoch everything that the next one depends on is copied into a folder of its own, which appears at once
    and whole, so that a process killed at any moment leaves one consistent state behind.
    """
    settings, network, work = recipe.training, work.with_name(work.name[1:]), work / name.replace(" ", "_")
    live, best = work / "live", work / "live" / "best.weights.h5"
    shutil.rmtree(live, ignore_errors=True)
    state = _last_state(work)
    if state:
        shutil.copytree(state, live)
    live.mkdir(parents=True, exist_ok=True)

    history = read_history(live / "history.csv")
    losses = [row["val_loss"] for row in history]
    rate, steps = learning_rate, settings.steps_per_epoch
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
    stopped = losses and len(losses) - 1 - losses.index(min(losses)) >= settings.patience
    if len(history) >= epochs or stopped:
        model.load_weights(live / "backup" / "latest.weights.h5")
        return _Stage(name, rate, history, best)
    if history:
        _log.info("%s: resumed after epoch %d of %d", network.name, past + len(history), settings.epochs)

    loss = keras.losses.BinaryCrossentropy() if samples == "centres" else DiceLoss()
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=[DiceScore(), AveragePrecision()])
    # Else `fit` makes its variables, for which TensorFlow traces the step twice.
    model.optimizer.build(model.trainable_variables)
    logger = keras.callbacks.CSVLogger(live / "history.csv", append=True)
    callbacks = [
        keras.callbacks.TerminateOnNaN(),
        _Progress(network, past, steps, settings.epochs),
        _RoomOnDisk(work),
        logger,
        keras.callbacks.ModelCheckpoint(
            str(best),
            monitor="val_loss",
            mode="min",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=min(losses, default=None),
        ),
        _EarlyStopping(history, monitor="val_loss", mode="min", patience=settings.patience),
        keras.callbacks.BackupAndRestore(str(live / "backup"), delete_checkpoint=False),
        _SaveState(live, work),
    ]
    first_batch = len(history) * steps
    patches = functools.partial(
        patch_dataset,
        recipe=recipe.patches,
        modalities=list(model.input),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    training, validation = patches(training, first_batch=first_batch), patches(validation, training=False)
    if samples == "centres":
        shape = model.patch_shape
        training = centre_patches(training, shape, seed=settings.seed, first_batch=first_batch)
        validation = centre_patches(validation, shape, seed=settings.seed)
    try:
        model.fit(
            training,
            validation_data=validation,
            steps_per_epoch=steps,
            epochs=epochs,
            shuffle=False,  # the dataset does
            callbacks=callbacks,
            verbose=0,
        )
    finally:
        # Closes its file, which it else leaves open when `fit` is interrupted.
        logger.on_train_end()
    history = read_history(live / "history.csv")
    last = history[-1]
    if not (math.isfinite(last["loss"]) and math.isfinite(last["val_loss"])):
        raise FloatingPointError(
            f"the training diverged: the loss must be finite, which a lower learning rate may help. Received: {last} "
            f"with a learning rate of {learning_rate}"
        )
    return _Stage(name, rate, history, best)


class _Progress(keras.callbacks.Callback):
    """Reports each update and logs each epoch; adds the seconds that an epoch took to its numbers."""

    def __init__(self, network, past, steps, epochs):
        super().__init__()
        self.network, self.past, self.steps, self.epochs = network, past, steps, epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch, self.start = self.past + epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        progress(self.network, self.epoch * self.steps + batch + 1, self.epochs * self.steps)

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.start
        numbers = (logs[name] for name in ("loss", "val_loss", "val_dice_score"))
        line = "Epoch %d of %d: loss %.4f, validation loss %.4f and DSC %.4f"
        _log.info(line, self.epoch + 1, self.epochs, *numbers, extra={"epoch": self.epoch + 1})


class _RoomOnDisk(keras.callbacks.Callback):
    """Ends the training before an epoch's state is written that would not fit: HDF5 may crash on a full disk."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        # The best weights, and those of the network and of Adam; the copy of all that; and the two epochs before.
        needed, free = 80 * self.model.count_params(), shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder}: {needed / 1e6:.3g} MB must be free on the disk to keep the state of the training. "
                f"Received: {free / 1e6:.3g} MB"
            )


class _EarlyStopping(keras.callbacks.EarlyStopping):
    """Early stopping that counts the epochs of an interrupted training too."""

    def __init__(self, past, **kwargs):
        super().__init__(**kwargs)
        self.past = past

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        for row in self.past:
            self.on_epoch_end(row["epoch"], row)


class _SaveState(keras.callbacks.Callback):
    """Copies the files of the callbacks before it, after each epoch, into a folder that appears at once and whole.

    The state of the epoch before stays, in case the last one is damaged.
    """

    def __init__(self, live, work):
        super().__init__()
        self.live, self.work = live, work

    def on_epoch_end(self, epoch, logs=None):
        partial = self.work / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.live, partial)
        write(partial / "checksums.json", json.dumps(_checksums(partial)))
        older = sorted(self.work.glob("epoch-*"))
        os.rename(partial, self.work / f"epoch-{epoch + 1:05d}")
        for state in older[:-1]:
            shutil.rmtree(state)


def _checksums(state):
    """A checksum of each file of a training's state."""
    files = (path for path in state.rglob("*") if path.is_file() and path.name != "checksums.json")
    return {path.relative_to(state).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _last_state(work):
    """The folder of the last undamaged state of a training; damaged ones are removed. `None` if there is none."""
    for state in sorted(work.glob("epoch-*"), reverse=True):
        try:
            if json.loads((state / "checksums.json").read_text(encoding="utf-8")) == _checksums(state):
                return state
        except (OSError, ValueError):
            pass
        _log.warning("%s: is damaged and was removed; the training goes on from the state before it", state)
        shutil.rmtree(state)
    return None


def read_history(path: str | os.PathLike) -> list[dict]:
    """The epochs of a training from its CSV file, in which numbers are numbers.

    Args:
        path: A `<network>_history.csv`; a file that is not there has no epochs.

    Returns:
        A dict for each epoch.
    """
    if not Path(path).exists():
        return []
    kinds = {"epoch": int, "stage": str}
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _finish(model, path, stages, work, steps_per_epoch):
    """Writes the model with the weights of its best epoch, and its history, to where they stay; returns that model."""
    best = min(stages, key=lambda stage: min(row["val_loss"] for row in stage.history))
    # A new model, free of the optimizer, which differs between stages, and of what was frozen.
    model = type(model).from_config(model.get_config() | {"trainable": True})
    model.load_weights(best.best_weights)
    rows = []
    for stage in stages:
        for number, row in enumerate(stage.history):
            rate = stage.learning_rate
            # That of the epoch's first update.
            rate = float(rate(number * steps_per_epoch)) if callable(rate) else rate
            rows.append({**row, "epoch": len(rows), "stage": stage.name, "learning_rate": rate})
    write(path.with_name(f"{path.stem}_history.csv"), metrics_csv(rows))
    partial = path.with_name(f".{path.name}")
    model.save(partial)
    os.replace(partial, path)
    shutil.rmtree(work)
    return model
