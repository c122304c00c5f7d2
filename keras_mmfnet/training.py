"""Trains one network with `model.fit`. A training can be interrupted at any moment and resumed."""

import contextlib
import csv
import dataclasses
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from keras_mmfnet import devices
from keras_mmfnet._files import csv_text, write
from keras_mmfnet._log import progress
from keras_mmfnet._precision import dtype_policy
from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.patches import centre_patches, patch_dataset
from keras_mmfnet.losses import CrossEntropy, make_loss
from keras_mmfnet.methods import Method, find_method
from keras_mmfnet.metrics import AveragePrecision, DiceScore
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.tracking import trackers

_log = logging.getLogger(__name__)
# The stages of a training, in this order: the first one if it starts from other networks' encoders.
_STAGES = ("encoders frozen", "all")


def train_method(
    method: Method,
    training: Sequence[PreprocessedCase],
    validation: Sequence[PreprocessedCase],
    recipe: Recipe,
    directory: str | os.PathLike,
    encoders: Mapping[str, keras.Model | str | os.PathLike | None] | None = None,
) -> keras.Model:
    """Trains the network of a method, after the networks whose encoders it copies.

    Args:
        method: A `Method`, such as `method_of(recipe)`, MMFNet with the self-transfer of section III-C.
        training: Training patients.
        validation: Validation patients, for early stopping and the choice of the best epoch.
        recipe: The `Recipe`, to which the method's changes are applied.
        directory: Folder for `<method>.keras` and `<method>_history.csv`, shared by all methods of a fold. A network
            that exists is only loaded. An interrupted training resumes after its last complete epoch.
        encoders: `{modality: network or path}` of pretrained encoders, as for `MMFNet.from_pretrained_encoders`. `None`
            trains those that the method names.

    Returns:
        The network with the weights of its best epoch.

    Raises:
        ValueError: A network in the directory is damaged or does not match the recipe, no patient to train or to
            validate on has the method's modalities, no loss has the recipe's name, or the devices cannot train this
            recipe.
        FloatingPointError: The training diverged.
        OSError: The disk is full.
    """
    recipe, path = method.adapt(recipe), Path(directory) / f"{method.name}.keras"
    if path.exists():
        return load_network(path, recipe if method.samples == "volumes" else None)
    # Refused before the encoders are trained.
    make_loss(recipe.training.loss)
    devices.check_recipe(recipe)
    if encoders is None:
        encoders = {
            modality: train_method(find_method(name), training, validation, recipe, directory)
            for modality, name in method.encoders.items()
        }
    parts = training, validation
    training, validation = ([case for case in part if method.serves(case.images, recipe)] for part in parts)
    if not (training and validation):
        wanted = " or ".join(recipe.data.modalities)
        raise ValueError(
            f"{method.title}: must have patients with {wanted} to train and to validate on. "
            f"Received: {len(training)} and {len(validation)} of {' and '.join(str(len(part)) for part in parts)}"
        )
    _log.info("Training %s on %d patients, validating on %d", method.title, len(training), len(validation))
    path.parent.mkdir(parents=True, exist_ok=True)
    settings, trainer = recipe.training, _Trainer(path, recipe, method.samples, training, validation)

    def build():
        keras.utils.set_random_seed(settings.seed)
        return method.build(recipe, dtype=dtype_policy(settings.mixed_precision), encoders=encoders)

    model = build()
    if encoders and settings.warmup_epochs:
        frozen = [modality for modality, donor in encoders.items() if donor is not None]
        epochs, rate = min(settings.warmup_epochs, settings.epochs), settings.warmup_learning_rate
        trainer.fit(model, name=_STAGES[0], learning_rate=rate, epochs=epochs, frozen=frozen)
        # A new model: `fit` starts at the epoch at which it last resumed the same model.
        model, warm = build(), model
        model.set_weights(warm.get_weights())
    epochs = settings.epochs - len(trainer.history)
    if epochs > 0:
        rate = settings.learning_rate if encoders else settings.pretrain_learning_rate
        updates, schedules = epochs * settings.steps_per_epoch, keras.optimizers.schedules
        if settings.schedule == "cosine":
            rate = schedules.CosineDecay(rate, updates)
        elif settings.schedule == "polynomial":
            rate = schedules.PolynomialDecay(rate, updates, end_learning_rate=0.0, power=0.9)
        trainer.fit(model, name=_STAGES[1], learning_rate=rate, epochs=epochs)
    return trainer.finish(model)


def follow() -> None:
    """Takes part in the trainings of the first process, until that one closes its devices; see `devices`."""
    while (job := devices.get_devices().broadcast()) is not None:
        trainer, live, *arguments = job
        with tempfile.TemporaryDirectory() as own:
            shutil.copytree(live, own, dirs_exist_ok=True)
            _fit_on_devices(trainer, Path(own), *arguments)


def _fit_on_devices(trainer, live, kind, config, weights, arguments):
    """Trains a network in each process of the devices; returns its weights, which are the same in all of them."""
    group, seed = devices.get_devices(), trainer.recipe.training.seed
    # Layers draw for their share of a batch, not the same for all shares.
    keras.utils.set_random_seed(seed + group.process if group.shares else seed)
    with devices.scope():
        model = kind.from_config(config)
        model.set_weights(weights)
        trainer.fit_epochs(model, live, **arguments)
        return model.get_weights()


def _objective(recipe, samples):
    """The loss and the metrics of a network."""
    exclusive, structures = recipe.data.exclusive, len(recipe.data.structures)
    loss = CrossEntropy(exclusive) if samples == "centres" else make_loss(recipe.training.loss, exclusive)
    dice = DiceScore(structures=structures, exclusive=exclusive, per_patch=recipe.training.choose_by == "dsc")
    return loss, [dice, AveragePrecision(structures=structures)]


def _optimizer(settings, rate):
    options = {"learning_rate": rate, "global_clipnorm": settings.clip_norm}
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(momentum=0.99, nesterov=True, **options)
    return {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW}[settings.optimizer](**options)


@dataclasses.dataclass
class _Trainer:
    """Trains one network in stages and keeps the state of the training in a hidden folder beside `path`.

    A stage is the epochs with the same trainable layers and the same learning rate or schedule. After each epoch its
    state is copied to a new folder, which appears only when it is complete: a process that is killed at any moment
    leaves a consistent state.
    """

    path: Path
    recipe: Recipe
    samples: str
    training: Sequence[PreprocessedCase]
    validation: Sequence[PreprocessedCase]
    history: list[dict] = dataclasses.field(default_factory=list)

    def _cost(self, row):
        """The quantity that the best epoch minimises."""
        return row["val_loss"] if self.recipe.training.choose_by == "loss" else -row["val_dice_score"]

    def _patches(self, model, training, first_batch=0):
        """The batches to train or to validate a model on."""
        settings, group = self.recipe.training, devices.in_use()
        part = (group.process, group.processes)
        dataset = patch_dataset(
            self.training if training else self.validation,
            self.recipe.patches,
            modalities=list(model.input),
            batch_size=settings.batch_size,
            training=training,
            seed=settings.seed,
            first_batch=first_batch,
            part=part,
            multiple=devices.get_devices().number,
        )
        if self.samples == "centres":
            return centre_patches(dataset, model.patch_shape, seed=settings.seed, first_batch=first_batch, part=part)
        return dataset

    def fit(self, model, name, learning_rate, epochs, frozen=()):
        """Trains one stage, or what remains of it, and adds its epochs to `history`.

        The encoders of the `frozen` modalities keep their weights. The model ends with the weights of the stage's last
        epoch; those of its best epoch are saved.
        """
        settings, folder = self.recipe.training, _folder_of(self.path, name)
        live = folder / "live"
        shutil.rmtree(live, ignore_errors=True)
        if state := _last_state(folder):
            shutil.copytree(state, live)
        live.mkdir(parents=True, exist_ok=True)

        rows = read_history(live / "history.csv")
        costs = [self._cost(row) for row in rows]
        stopped = costs and settings.patience and len(costs) - 1 - costs.index(min(costs)) >= settings.patience
        if len(rows) >= epochs or stopped:
            model.load_weights(live / "backup" / "latest.weights.h5")
        else:
            arguments = {"rows": rows, "learning_rate": learning_rate, "epochs": epochs, "frozen": frozen}
            if devices.get_devices().number == 1:
                self.fit_epochs(model, live, **arguments)
            else:
                job = self, live, type(model), model.get_config(), model.get_weights(), arguments
                model.set_weights(_fit_on_devices(*devices.get_devices().broadcast(job)))
            rows = read_history(live / "history.csv")
        for number, row in enumerate(rows):
            rate = learning_rate
            if callable(rate):  # the rate of the epoch's first update
                rate = float(rate(number * settings.steps_per_epoch))
            self.history.append({**row, "epoch": len(self.history), "stage": name, "learning_rate": rate})
        last = self.history[-1]
        if not (math.isfinite(last["loss"]) and math.isfinite(last["val_loss"])):
            raise FloatingPointError(
                f"the training diverged: the loss must be finite; try a lower learning rate. Received: {last}"
            )

    def fit_epochs(self, model, live, rows, learning_rate, epochs, frozen):
        """Calls `model.fit` for the epochs after those in `rows`; the callbacks write their files to `live`."""
        group = devices.in_use()
        for modality in frozen:
            model.encoder(modality).trainable = False
        settings, past, network = self.recipe.training, len(self.history), self.path.with_suffix("")
        steps = settings.steps_per_epoch
        if rows:
            _log.info("%s: resumed after epoch %d of %d", network, past + len(rows), settings.epochs)
        loss, metrics = _objective(self.recipe, self.samples)
        model.compile(_optimizer(settings, learning_rate), loss=loss, metrics=metrics)
        # If `fit` creates the optimizer's variables, TensorFlow traces the training step twice.
        model.optimizer.build(model.trainable_variables)
        group.average_gradients(model)
        logger = keras.callbacks.CSVLogger(live / "history.csv", append=True)
        by_loss = settings.choose_by == "loss"
        chosen = {"monitor": "val_loss" if by_loss else "val_dice_score", "mode": "min" if by_loss else "max"}
        # Every process writes files, as reading the weights takes all of them on JAX; those of the first one are kept.
        callbacks = [
            _SameLosses(group),
            keras.callbacks.TerminateOnNaN(),
            _Progress(network, past, steps, settings.epochs),
            *([] if group.process else [_RoomOnDisk(live.parent, settings.weight_average)]),
            logger,
            keras.callbacks.ModelCheckpoint(
                # Keras formats this text.
                str(live / "best.weights.h5").replace("{", "{{").replace("}", "}}"),
                **chosen,
                save_best_only=True,
                save_weights_only=True,
                initial_value_threshold=min(rows, key=self._cost)[chosen["monitor"]] if rows else None,
            ),
            keras.callbacks.BackupAndRestore(str(live / "backup"), delete_checkpoint=False),
            _LastWeights(live, settings.weight_average),
            *([] if group.process else [_SaveState(live)]),
        ]
        if settings.patience:
            callbacks.append(_EarlyStopping(rows, **chosen, patience=settings.patience))
        training = self._patches(model, training=True, first_batch=len(rows) * steps)
        validation = self._patches(model, training=False)
        tracked = contextlib.nullcontext([]) if group.process else trackers(self.path, live.parent, self.recipe)
        try:
            with tracked as more:
                model.fit(
                    training,
                    validation_data=validation,
                    steps_per_epoch=steps,
                    epochs=epochs,
                    shuffle=False,  # the dataset is shuffled
                    callbacks=[*callbacks, *more],
                    verbose=0,
                )
        finally:
            # Closes the CSV file, which would stay open if `fit` is interrupted.
            logger.on_train_end()

    def finish(self, model):
        """Saves the network with the weights of its best epoch, or their mean; returns it. Saves its history."""
        best = min(self.history, key=self._cost)
        # A new model, without the optimizer and without frozen layers.
        model = type(model).from_config(model.get_config() | {"trainable": True})
        model.load_weights(_folder_of(self.path, best["stage"]) / "live" / "best.weights.h5")
        last = _folder_of(self.path, self.history[-1]["stage"]) / "live"
        if paths := sorted(last.glob("weights-*.npz")):
            self._average(model, [np.load(path) for path in paths], best)
        write(self.path.with_name(f"{self.path.stem}_history.csv"), csv_text(self.history))
        partial = self.path.with_name(f".{self.path.name}")
        model.save(partial)
        os.replace(partial, self.path)
        shutil.rmtree(last.parent.parent)
        return model

    def _average(self, model, epochs, best):
        """Gives the model the mean weights of some epochs if it is better on the validation patients than the best one.

        The statistics of the batch normalization are averaged, too: in the last epochs the weights hardly move.
        """
        average = type(model).from_config(model.get_config())
        average.set_weights([np.mean([weights[name] for weights in epochs], axis=0) for name in epochs[0].files])
        loss, metrics = _objective(self.recipe, self.samples)
        average.compile(loss=loss, metrics=metrics)
        found = average.evaluate(self._patches(average, training=False), return_dict=True, verbose=0)
        better = self._cost({f"val_{name}": value for name, value in found.items()}) < self._cost(best)
        if better:
            model.set_weights(average.get_weights())
        line = "The mean of the last %d epochs is %s than the best one: validation loss %.4f and DSC %.4f"
        _log.info(line, len(epochs), "better" if better else "not better", found["loss"], found["dice_score"])


class _SameLosses(keras.callbacks.Callback):
    """Replaces the losses by their mean over the processes, so that all decide the same; their metrics are equal."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def on_train_batch_end(self, batch, logs=None):
        for name in ("loss", "val_loss"):  # in the same order in all of them
            if name in logs and self.group.processes > 1:
                logs[name] = self.group.mean(logs[name])

    def on_epoch_end(self, epoch, logs=None):
        self.on_train_batch_end(epoch, logs)


class _Progress(keras.callbacks.Callback):
    """Reports each update, logs each epoch and adds the duration of an epoch to its logs."""

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
    """Stops the training if the next state would not fit on the disk: HDF5 may crash on a full disk."""

    def __init__(self, folder, averaged):
        super().__init__()
        self.folder, self.averaged = folder, averaged

    def on_epoch_end(self, epoch, logs=None):
        # The best weights, the weights and Adam's moments, and the weights that are averaged; their copy; and the
        # states of the two previous epochs.
        needed = (80 + 16 * self.averaged) * self.model.count_params()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder}: {needed / 1e6:.3g} MB must be free on the disk for the state of the training. "
                f"Received: {free / 1e6:.3g} MB"
            )


class _EarlyStopping(keras.callbacks.EarlyStopping):
    """Early stopping that also counts the epochs before an interruption."""

    def __init__(self, past, **kwargs):
        super().__init__(**kwargs)
        self.past = past

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        for row in self.past:
            self.on_epoch_end(row["epoch"], row)


class _LastWeights(keras.callbacks.Callback):
    """Keeps the weights of the last `count` epochs, without the heads of deep supervision, which are not saved."""

    def __init__(self, live, count):
        super().__init__()
        self.live, self.count = live, count

    def on_epoch_end(self, epoch, logs=None):
        if self.count:
            pairs = zip(self.model.weights, self.model.get_weights(), strict=True)
            weights = [value for weight, value in pairs if "auxiliary_heads/" not in weight.path]
            np.savez(self.live / f"weights-{epoch:05d}.npz", *weights)
            for path in sorted(self.live.glob("weights-*.npz"))[: -self.count]:
                path.unlink()


class _SaveState(keras.callbacks.Callback):
    """Copies the files of the previous callbacks after each epoch to a folder that appears only when it is complete.

    The state of the previous epoch is kept, in case the last one is damaged.
    """

    def __init__(self, live):
        super().__init__()
        self.live, self.work = live, live.parent

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
    """Checksums of the files of a state, by relative path."""
    files = (path for path in state.rglob("*") if path.is_file() and path.name != "checksums.json")
    return {path.relative_to(state).as_posix(): zlib.crc32(path.read_bytes()) for path in files}


def _folder_of(path, stage):
    """The hidden folder with the states of a stage of a network's training."""
    return path.with_name(f".{path.stem}") / stage.replace(" ", "_")


def _last_state(work):
    """The folder of the last undamaged state, or `None`. Damaged states are removed."""
    for state in sorted(work.glob("epoch-*"), reverse=True):
        try:
            if json.loads((state / "checksums.json").read_text(encoding="utf-8")) == _checksums(state):
                return state
        except (OSError, ValueError):
            pass
        _log.warning("%s: is damaged and was removed; the training resumes from the previous state", state)
        shutil.rmtree(state)
    return None


def read_history(path: str | os.PathLike) -> list[dict]:
    """Reads the epochs of a training.

    Args:
        path: A `<network>_history.csv`. A missing file is an empty history.

    Returns:
        A list with a dict per epoch. `epoch` is an int, `stage` a string, and every other value a float.

    Raises:
        ValueError: The file is damaged.
    """
    kinds = {"epoch": int, "stage": str}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: must be an undamaged table of epochs. Received: {error}") from error


def read_epochs(path: str | os.PathLike) -> list[dict]:
    """Reads the epochs of a training that may not be finished.

    Args:
        path: The `<network>.keras` that is or will be written.

    Returns:
        The complete epochs, as from `read_history`. Until the training is finished, `epoch` starts at 0 in each stage,
        and there is no `stage`.
    """
    path = Path(path)
    if rows := read_history(path.with_name(f"{path.stem}_history.csv")):
        return rows
    for stage in _STAGES:
        if states := sorted(_folder_of(path, stage).glob("epoch-*")):
            rows += read_history(states[-1] / "history.csv")
    return rows


def last_epoch_end(path: str | os.PathLike) -> float | None:
    """When the last complete epoch of a training that is not finished ended.

    Args:
        path: The `<network>.keras` that will be written.

    Returns:
        Seconds since 1970 by the clock of the disk, or `None`.
    """
    for stage in reversed(_STAGES):
        for state in sorted(_folder_of(Path(path), stage).glob("epoch-*"), reverse=True):
            with contextlib.suppress(FileNotFoundError):  # it was replaced by a later one at this moment
                return state.stat().st_mtime
    return None
