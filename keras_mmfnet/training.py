import csv
import dataclasses
import functools
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path

import keras
import SimpleITK as sitk

from keras_mmfnet._files import write, write_once
from keras_mmfnet._log import time_left
from keras_mmfnet._memory import keep_freed_memory
from keras_mmfnet._precision import dtype_policy
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.folds import five_folds
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.data.patches import centre_patches, patch_dataset
from keras_mmfnet.data.preprocess import preprocess_case, read_tumour
from keras_mmfnet.evaluation import evaluate_case, metrics_csv, metrics_json
from keras_mmfnet.inference import segment_case
from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.methods import METHODS, build_mmfnet
from keras_mmfnet.metrics import AveragePrecision, DiceScore
from keras_mmfnet.models import UNet3D, load_network

_log = logging.getLogger(__name__)


def pretrain_encoders(training, validation, recipe, directory):
    """Trains one single-modality network per modality, the first half of self-transfer (section III-C).

    Args:
        training: `PreprocessedCase`s to learn from.
        validation: `PreprocessedCase`s that choose the best epoch.
        recipe: The `Recipe`.
        directory: Folder for `<modality>.keras` and `<modality>_history.csv`. A network that is there already is not
            trained again, and one that was interrupted goes on after its last whole epoch.

    Returns:
        `{modality: path of its network}`.
    """
    directory = Path(directory)
    paths = {modality: directory / f"{modality}.keras" for modality in recipe.data.modalities}
    for modality, path in paths.items():
        if not path.exists():
            _log.info("Training the network for %s alone", modality)
            build = functools.partial(UNet3D, modality, recipe.patches.shape, recipe.network.filters)
            _train(build, training, validation, recipe, path)
    return paths


def train_mmfnet(training, validation, recipe, directory, encoders=None):
    """Trains MMFNet: with encoders from `pretrain_encoders` first while these are frozen, then the whole of it.

    Args:
        training: `PreprocessedCase`s to learn from.
        validation: `PreprocessedCase`s that choose the best epoch.
        recipe: The `Recipe`.
        directory: Folder for `mmfnet.keras` and `mmfnet_history.csv`. If the network is there already it is only
            loaded, and a training that was interrupted goes on after its last whole epoch.
        encoders: `{modality: network or path}`, or `None` to start from random weights.

    Returns:
        The `MMFNet` with the weights of its best epoch.
    """
    path = Path(directory) / "mmfnet.keras"
    if path.exists():
        return load_network(path, recipe)
    _log.info("Training MMFNet")
    build = functools.partial(build_mmfnet, recipe, encoders=encoders)
    return _train(build, training, validation, recipe, path, frozen=recipe.data.modalities if encoders else ())


def train_method(method, training, validation, recipe, directory):
    """Trains the network of one of the tables' methods, and before it those that lend it their encoders.

    Args:
        method: A `Method`, such as `METHODS["multi_encoder"]`.
        training: `PreprocessedCase`s to learn from.
        validation: `PreprocessedCase`s that choose the best epoch.
        recipe: The `Recipe`, of which the method changes what makes it this method.
        directory: Folder for `<method>.keras` and `<method>_history.csv`, shared by all methods of a fold. A network
            that is there already is only loaded, and a training that was interrupted goes on after its last whole
            epoch.

    Returns:
        The network with the weights of its best epoch.
    """
    recipe, path = method.adapt(recipe), Path(directory) / f"{method.name}.keras"
    if path.exists():
        return load_network(path, recipe if method.samples == "volumes" else None)
    encoders = {
        modality: train_method(METHODS[name], training, validation, recipe, directory)
        for modality, name in method.encoders.items()
    }
    _log.info("Training %s", method.title)
    build = functools.partial(method.build, recipe, encoders=encoders)
    return _train(build, training, validation, recipe, path, tuple(encoders), method.samples)


def cross_validate(cases, recipe, directory, folds=None, resume=False, on_error=None):
    """Trains MMFNet on the patients of each fold and evaluates it on those held back (section IV-C).

    The directory gets `recipe.json`, `cohort.json` (patients, notes on them, folds), `metrics.json`, `metrics.csv`, and
    for each fold a folder with the networks, their histories and the test patients' masks, each on the grid of the
    patient's own first modality. Preprocessed patients are kept in `cache`.

    Args:
        cases: `Case`s with a mask.
        recipe: The `Recipe`.
        directory: Folder for the results.
        folds: Numbers of the folds to run, from 0; `None` for all.
        resume: Go on with what is in the directory, which a run of the same recipe and patients has left.
        on_error: Called with the `CaseError` of each patient that cannot be used; that patient is then left out.
            `None`: the first such error is raised.

    Returns:
        A list with a dict for each test patient of all folds run so far: `patient`, `fold`, the numbers of
        `evaluate_case` (`None` where not defined) and `seconds`, the time from the preprocessed images to the written
        mask.

    Raises:
        CaseError: A patient cannot be used.
        ValueError: The directory holds a run already, or the run to be resumed is of another recipe or of other
            patients; or there are too few patients for the folds.
    """
    directory = Path(directory)
    _claim(directory, recipe, resume)
    _log.info("Computing in %s", dtype_policy(recipe.training.mixed_precision))
    patients, skipped = preprocess_cases(cases, recipe.data, directory / "cache", on_error)
    splits = five_folds(
        list(patients), recipe.training.folds, recipe.training.validation_fraction, recipe.training.seed
    )
    cohort = {
        "patients": {name: list(patient.notes) for name, patient in patients.items()},
        "skipped": skipped,
        "folds": [dataclasses.asdict(split) for split in splits],
    }
    write_once(directory / "cohort.json", json.dumps(cohort, indent=2) + "\n", "other patients")
    folds = range(len(splits)) if folds is None else folds
    unknown = [fold for fold in folds if fold not in range(len(splits))]
    if unknown:
        raise ValueError(f"`folds` must be numbers from 0 to {len(splits) - 1}. Received: {unknown}")

    files = {case.name: case for case in cases}
    for fold in folds:
        folder = directory / f"fold_{fold}"
        if (folder / "metrics.json").exists():
            continue
        folder.mkdir(exist_ok=True)
        training, validation, test = parts = [
            [patients[n] for n in names] for names in dataclasses.astuple(splits[fold])
        ]
        _log.info("Fold %d: %d patients to learn from, %d to choose the best epoch, %d to test", fold, *map(len, parts))
        encoders = pretrain_encoders(training, validation, recipe, folder) if recipe.training.self_transfer else None
        model = train_mmfnet(training, validation, recipe, folder, encoders)
        rows, start = [], time.monotonic()
        for patient in test:
            rows.append(_test(model, patient, files[patient.name], recipe, folder, fold))
            left = time_left(time.monotonic() - start, len(rows), len(test))
            _log.info("Segmented patient %d of %d: DSC %.4f%s", len(rows), len(test), rows[-1]["dsc"], left)
        write(folder / "metrics.json", metrics_json(rows))

    done = sorted(directory.glob("fold_*/metrics.json"), key=lambda path: int(path.parent.name.removeprefix("fold_")))
    rows = [row for path in done for row in json.loads(path.read_text(encoding="utf-8"))["patients"]]
    write(directory / "metrics.json", metrics_json(rows))
    write(directory / "metrics.csv", metrics_csv(rows))
    return rows


def preprocess_cases(cases, recipe, cache, on_error=None):
    """Preprocesses all patients of a run.

    Args:
        cases: `Case`s.
        recipe: The `Recipe`.
        cache: Folder that keeps them for the next time.
        on_error: As for `cross_validate`.

    Returns:
        `({name: PreprocessedCase}, {name: why it was left out})`.

    Raises:
        CaseError: A patient cannot be used, and there is no `on_error`.
    """
    patients, skipped, start = {}, {}, time.monotonic()
    for number, case in enumerate(cases, start=1):
        try:
            patient = preprocess_case(case, recipe.data, cache)
        except CaseError as error:
            if on_error is None:
                raise
            on_error(error)
            skipped[case.name] = str(error)
            continue
        left, about = time_left(time.monotonic() - start, number, len(cases)), "; ".join([case.name, *patient.notes])
        _log.info("Preprocessed patient %d of %d%s: %s", number, len(cases), left, about)
        patients[case.name] = patient
    return patients, skipped


def _test(model, patient, case, recipe, folder, fold):
    """Segments one patient, writes the mask and compares it with the expert's."""
    start = time.perf_counter()
    mask, probability = segment_case(model, patient, recipe)
    path = folder / "masks" / f"{patient.name}.nii.gz"
    path.parent.mkdir(exist_ok=True)
    write_image(mask, path)
    seconds = time.perf_counter() - start
    truth = read_tumour(case, recipe.data, patient)
    numbers = evaluate_case(sitk.GetArrayViewFromImage(probability), truth, patient.source.spacing[::-1])
    return {"patient": patient.name, "fold": fold, **numbers, "seconds": seconds}


def _claim(directory, recipe, resume):
    """Makes the directory this run's, or refuses it."""
    ours = ("recipe.json", "cohort.json", "metrics.json", "metrics.csv", "cache", "fold_*")
    found = sorted(path.name for pattern in ours for path in directory.glob(pattern))
    if found and not resume:
        raise ValueError(
            f"the output folder must hold no run, unless that run is to be resumed. Received: {directory}, with "
            f"{', '.join(found)}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_once(directory / "recipe.json", recipe.to_json(), "another recipe")


def _train(build, training, validation, recipe, path, frozen=(), samples="volumes"):
    """Trains a network and writes it and its history: first, if any are `frozen`, with these encoders as they are."""
    keep_freed_memory()
    work = path.with_name(f".{path.stem}")

    def start():
        keras.utils.set_random_seed(recipe.training.seed)
        return build(dtype=dtype_policy(recipe.training.mixed_precision))

    fit = functools.partial(_fit, training=training, validation=validation, recipe=recipe, work=work, samples=samples)
    model, stages = start(), []
    if frozen and recipe.training.warmup_epochs:
        for modality in frozen:
            model.encoder(modality).trainable = False
        epochs = min(recipe.training.warmup_epochs, recipe.training.epochs)
        stages.append(
            fit(model, name="encoders frozen", learning_rate=recipe.training.warmup_learning_rate, epochs=epochs)
        )
        # A new model, since `fit` would start at the epoch at which it resumed the last one.
        model, warm = start(), model
        model.set_weights(warm.get_weights())
    epochs = recipe.training.epochs - sum(len(stage.history) for stage in stages)
    if epochs > 0:
        rate = recipe.training.learning_rate if frozen else recipe.training.pretrain_learning_rate
        stages.append(fit(model, name="all", learning_rate=rate, epochs=epochs, schedule=recipe.training.schedule))
    return _finish(model, path, stages, work, recipe.training.steps_per_epoch)


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One training with the same trainable layers and the same learning rate, or schedule of it by update."""

    name: str
    learning_rate: object
    history: list
    best_weights: Path


def _fit(model, training, validation, recipe, work, samples, name, learning_rate, epochs, schedule="constant"):
    """`model.fit`, going on after the last whole epoch in `work`; the model has the last epoch's weights then.

    After each epoch everything that the next one depends on is copied into a folder of its own, which appears at once
    and whole, so that a process killed at any moment leaves one consistent state behind.
    """
    work = work / name.replace(" ", "_")
    live, best = work / "live", work / "live" / "best.weights.h5"
    shutil.rmtree(live, ignore_errors=True)
    states = sorted(work.glob("epoch-*"))
    if states:
        shutil.copytree(states[-1], live)
    live.mkdir(parents=True, exist_ok=True)

    past = _read_history(live / "history.csv")
    losses = [row["val_loss"] for row in past]
    rate = learning_rate
    if schedule == "cosine":
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * recipe.training.steps_per_epoch)
    stopped = losses and len(losses) - 1 - losses.index(min(losses)) >= recipe.training.patience
    if len(past) >= epochs or stopped:
        model.load_weights(live / "backup" / "latest.weights.h5")
        return _Stage(name, rate, past, best)

    loss = keras.losses.BinaryCrossentropy() if samples == "centres" else DiceLoss()
    model.compile(keras.optimizers.Adam(rate), loss=loss, metrics=[DiceScore(), AveragePrecision()])
    # Else `fit` makes its variables, for which TensorFlow traces the step twice.
    model.optimizer.build(model.trainable_variables)
    logger = keras.callbacks.CSVLogger(live / "history.csv", append=True)
    callbacks = [
        keras.callbacks.TerminateOnNaN(),
        _Seconds(),
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
        _EarlyStopping(past, monitor="val_loss", mode="min", patience=recipe.training.patience),
        keras.callbacks.BackupAndRestore(str(live / "backup"), delete_checkpoint=False),
        _KeepState(live, work),
    ]
    modalities, first_batch = list(model.input), len(past) * recipe.training.steps_per_epoch
    training = patch_dataset(
        training,
        recipe.patches,
        modalities,
        first_batch=first_batch,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
    )
    validation = patch_dataset(
        validation,
        recipe.patches,
        modalities,
        training=False,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
    )
    if samples == "centres":
        shape = model.patch_shape
        training = centre_patches(training, shape, seed=recipe.training.seed, first_batch=first_batch)
        validation = centre_patches(validation, shape, seed=recipe.training.seed)
    try:
        model.fit(
            training,
            validation_data=validation,
            steps_per_epoch=recipe.training.steps_per_epoch,
            epochs=epochs,
            shuffle=False,  # the dataset does
            callbacks=callbacks,
            # A bar with the time left of the epoch for a person; each epoch is logged besides.
            verbose=1 if sys.stdout.isatty() else 0,
        )
    finally:
        # Closes its file, which it else leaves open when `fit` is interrupted.
        logger.on_train_end()
    history = _read_history(live / "history.csv")
    last = history[-1]
    if not (math.isfinite(last["loss"]) and math.isfinite(last["val_loss"])):
        raise FloatingPointError(
            f"the training diverged: the loss must be finite, which a lower learning rate may help. Received: {last} "
            f"with a learning rate of {learning_rate}"
        )
    return _Stage(name, rate, history, best)


class _Seconds(keras.callbacks.Callback):
    """Adds to an epoch's numbers how many seconds it took, and logs them with the time left."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.perf_counter() - self.start
        total = self.params["epochs"]
        # Of this epoch's length, which a compilation does not add to but in the first one.
        left = time_left(logs["seconds"], 1, total - epoch)
        numbers = (logs[name] for name in ("loss", "val_loss", "val_dice_score"))
        _log.info("Epoch %d of %d: loss %.4f, validation loss %.4f and DSC %.4f%s", epoch + 1, total, *numbers, left)


class _RoomOnDisk(keras.callbacks.Callback):
    """Ends the training before an epoch's state is written that would not fit: HDF5 may crash on a full disk."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_epoch_end(self, epoch, logs=None):
        # The best weights, and those of the network and of Adam; the copy of all that; and the epoch before.
        needed, free = 64 * self.model.count_params(), shutil.disk_usage(self.folder).free
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


class _KeepState(keras.callbacks.Callback):
    """Copies the files of the callbacks before it, after each epoch, into a folder that appears at once and whole."""

    def __init__(self, live, work):
        super().__init__()
        self.live, self.work = live, work

    def on_epoch_end(self, epoch, logs=None):
        partial = self.work / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(self.live, partial)
        older = list(self.work.glob("epoch-*"))
        os.rename(partial, self.work / f"epoch-{epoch + 1:05d}")
        for state in older:
            shutil.rmtree(state)


def _read_history(path):
    """The rows that CSVLogger wrote, as numbers."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {key: int(value) if key == "epoch" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def _finish(model, path, stages, work, steps_per_epoch):
    """Writes the model with the weights of its best epoch, and its history, to where they stay; returns that model."""
    best = min(stages, key=lambda stage: min(row["val_loss"] for row in stage.history))
    # A new model, free of the optimizer, which differs between stages, and of what was frozen.
    model = type(model).from_config(model.get_config() | {"trainable": True})
    model.load_weights(best.best_weights)
    rows, epoch = [], 0
    for stage in stages:
        for number, row in enumerate(stage.history):
            rate = stage.learning_rate
            # That of the epoch's first update.
            rate = float(rate(number * steps_per_epoch)) if callable(rate) else rate
            extra = {"epoch": epoch, "stage": stage.name, "learning_rate": rate}
            rows.append({**row, **extra})
            epoch += 1
    write(path.with_name(f"{path.stem}_history.csv"), metrics_csv(rows))
    partial = path.with_name(f".{path.name}")
    model.save(partial)
    os.replace(partial, path)
    shutil.rmtree(work)
    return model
