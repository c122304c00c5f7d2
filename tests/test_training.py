import csv
import dataclasses
import re
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet import training
from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.inference import segment_case
from keras_mmfnet.losses import LOSSES, CrossEntropy, DiceLoss
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.models import MMFNet, PatchCNN, UNet3D, load_network
from keras_mmfnet.recipe import Recipe, TrainingRecipe
from keras_mmfnet.training import train_method

TINY = Recipe().replace(
    {
        "data.modalities": ("t1", "t2"),
        "patches.shape": (8, 8, 8),
        "network.filters": (2,),
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 4,
        "training.warmup_epochs": 2,
        "training.learning_rate": 1e-3,
    }
)
# One small network.
ONE = TINY.replace({"data.modalities": ("t1",)})
# Methods whose networks are of the same kind as others'.
ONCE = ("siamese_patch_cnn", "unet2d_cet1", "single_encoder")
# For the patients in files, in voxels of 4 mm.
COARSE = TINY.replace(
    {
        "data.modalities": ("t1", "t2", "cet1"),
        "patches.shape": (16, 16, 16),
        "data.spacing": 4.0,
        "training.epochs": 2,
        "training.warmup_epochs": 1,
        "training.folds": 3,
    }
)


@pytest.fixture
def patients(make_case):
    """Patients to learn from and to validate on."""
    return some_patients(make_case)


def some_patients(make_case):
    cases = [make_case(f"patient {seed}", seed=seed, shape=(10, 12, 12)) for seed in range(4)]
    return cases[:3], cases[3:]


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def weights(model):
    return [np.asarray(w) for w in model.get_weights()]


def pretrain_encoders(training, validation, recipe, folder):
    """Trains a network for each modality; their paths."""
    for modality in recipe.data.modalities:
        train_method(METHODS[f"unet3d_{modality}"], training, validation, recipe, folder)
    return {modality: folder / f"unet3d_{modality}.keras" for modality in recipe.data.modalities}


def train_mmfnet(training, validation, recipe, folder, encoders=None):
    """Trains MMFNet, by default without self-transfer."""
    return train_method(method_of(recipe), training, validation, recipe, folder, encoders or {})


def donors():
    """Networks to lend their encoders."""
    keras.utils.set_random_seed(1)
    return {name: UNet3D(name, TINY.patches.shape, TINY.network.filters) for name in TINY.data.modalities}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_case):
    """The folder of an undisturbed training with self-transfer, its patients and its network."""
    # A path may have what Keras would format.
    folder, parts = tmp_path_factory.mktemp("trained") / "{fold}", some_patients(make_case)
    pretrain_encoders(*parts, ONE, folder)
    return folder, parts, train_mmfnet(*parts, TINY, folder, donors())


def test_one_network_per_modality(trained):
    folder, _, _ = trained
    model = keras.models.load_model(folder / "unet3d_t1.keras")
    assert isinstance(model, UNet3D)
    assert (model.modality, model.patch_shape, model.filters) == ("t1", ONE.patches.shape, ONE.network.filters)
    history = rows(folder / "unet3d_t1_history.csv")
    assert [row["epoch"] for row in history] == ["0", "1", "2", "3"]
    assert {float(row["learning_rate"]) for row in history} == {ONE.training.pretrain_learning_rate}
    assert {"loss", "val_loss", "dice_score", "val_average_precision"} <= set(history[0])


def test_only_results_stay(trained):
    folder, _, _ = trained
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["mmfnet.keras", "mmfnet_history.csv", "unet3d_t1.keras", "unet3d_t1_history.csv"]


def test_encoders_learn_after_the_decoder_and_at_a_rate_of_their_own(trained):
    folder, _, _ = trained
    history = rows(folder / "mmfnet_history.csv")
    assert [row["stage"] for row in history] == ["encoders frozen"] * 2 + ["all"] * 2
    assert [float(row["learning_rate"]) for row in history] == [TINY.training.warmup_learning_rate] * 2 + [
        TINY.training.learning_rate
    ] * 2
    assert [row["epoch"] for row in history] == ["0", "1", "2", "3"]


def test_the_best_epoch_is_kept(trained):
    folder, (_, validation), model = trained
    model.compile(loss=DiceLoss())
    loss = model.evaluate(
        training.patch_dataset(
            validation, TINY.patches, training=False, batch_size=TINY.training.batch_size, seed=TINY.training.seed
        ),
        verbose=0,
    )
    assert loss == pytest.approx(min(float(row["val_loss"]) for row in rows(folder / "mmfnet_history.csv")), abs=1e-5)


def test_a_trained_network_is_not_trained_again(trained, no_training):
    folder, parts, model = trained
    assert pretrain_encoders(*parts, ONE, folder) == {"t1": folder / "unet3d_t1.keras"}
    again = train_mmfnet(*parts, TINY, folder, donors())
    for one, other in zip(weights(model), weights(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_network_is_named(patients, tmp_path, no_training):
    (tmp_path / "mmfnet.keras").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"mmfnet.keras: must be an undamaged .keras file of a network. Received: "):
        train_mmfnet(*patients, TINY, tmp_path)
    donors()["t1"].save(tmp_path / "mmfnet.keras")
    with pytest.raises(ValueError, match=r"mmfnet.keras: must be a network from patches .* Received: the UNet3D of"):
        train_mmfnet(*patients, TINY, tmp_path)


TWICE = """
import pathlib, sys
import keras, numpy

if keras.backend.backend() == "tensorflow":
    import tensorflow
    tensorflow.config.experimental.enable_op_determinism()
elif keras.backend.backend() == "torch":
    import torch
    torch.use_deterministic_algorithms(True)

from keras_mmfnet.data import find_cases, preprocess_case
from keras_mmfnet.methods import method_of
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.training import train_method

recipe = Recipe.load(sys.argv[2])
cases = [preprocess_case(case, recipe.data) for case in find_cases(sys.argv[1], recipe.data)]
one, other = (
    train_method(method_of(recipe), cases[:3], cases[3:4], recipe, folder, encoders={}).get_weights()
    for folder in (pathlib.Path(sys.argv[2]).parent / name for name in ("one", "other"))
)
assert any(weights.any() for weights in one)
print([bool(numpy.array_equal(a, b)) for a, b in zip(one, other, strict=True)])
"""


def test_the_same_seed_gives_the_same_weights(tiny_cohort, tmp_path):
    """To the last bit, with the backend in its deterministic mode, which needs a process of its own."""
    (tmp_path / "recipe.json").write_text(
        COARSE.replace({"data.modalities": ("t1", "t2"), "training.epochs": 1}).to_json()
    )
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(tiny_cohort), str(tmp_path / "recipe.json")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(re.findall("True|False", done.stdout)) == {"True"}


def test_the_encoders_are_frozen_first(patients, tmp_path):
    lent = donors()
    model = train_mmfnet(*patients, TINY.replace({"training.epochs": 2}), tmp_path, lent)
    for name, donor in lent.items():
        for one, other in zip(weights(model.encoder(name)), weights(donor.encoder(name)), strict=True):
            np.testing.assert_array_equal(one, other)
    assert all(layer.trainable for layer in model.layers)


def test_training_learns(patients, tmp_path):
    recipe = ONE.replace(
        {
            "network.filters": (4,),
            "training.epochs": 3,
            "training.steps_per_epoch": 40,
            "training.batch_size": 4,
            "training.pretrain_learning_rate": 0.03,
        }
    )
    paths = pretrain_encoders(*patients, recipe, tmp_path)
    case = patients[1][0]
    probability = segment_case(keras.models.load_model(paths["t1"]), case, recipe).probabilities["tumour"]
    assert evaluate_case(sitk.GetArrayFromImage(probability), case.mask, case.spacing)["dsc"] > 0.8


@pytest.mark.once
def test_the_cosine_schedule_ends_at_0(patients, tmp_path, monkeypatch):
    rates = []

    def watch(self, epoch, logs=None):
        rates.append(float(self.model.optimizer.learning_rate))

    monkeypatch.setattr(training._RoomOnDisk, "on_epoch_begin", watch, raising=False)
    train_mmfnet(*patients, TINY.replace({"training.schedule": "cosine"}), tmp_path, donors())
    # Two epochs frozen at a constant rate; then two epochs, of which the second starts half way down.
    expected = [TINY.training.warmup_learning_rate] * 2 + [TINY.training.learning_rate, TINY.training.learning_rate / 2]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    written = [float(row["learning_rate"]) for row in rows(tmp_path / "mmfnet_history.csv")]
    np.testing.assert_allclose(written, expected, rtol=1e-5)


@pytest.fixture
def epochs(monkeypatch):
    """The weights at the end of each epoch; gives epochs the validation numbers in `epochs.numbers`."""
    found = types.SimpleNamespace(weights=[], numbers={}, stop=None)
    progress, save = training._Progress.on_epoch_end, training._SaveState.on_epoch_end

    def pretend(self, epoch, logs=None):
        progress(self, epoch, logs)
        logs.update({name: values[epoch] for name, values in found.numbers.items()})

    def keep(self, epoch, logs=None):
        save(self, epoch, logs)
        found.weights.append(weights(self.model))
        if len(found.weights) == found.stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Progress, "on_epoch_end", pretend)
    monkeypatch.setattr(training._SaveState, "on_epoch_end", keep)
    return found


@pytest.mark.once
def test_the_epoch_of_the_best_dsc(patients, tmp_path, epochs):
    # The second epoch is the best, though the loss falls to the end.
    epochs.numbers = {"val_dice_score": [0.1, 0.9, 0.5, 0.6, 0.7, 0.8], "val_loss": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]}
    recipe = ONE.replace({"training.choose_by": "dsc", "training.patience": 2, "training.epochs": 6})
    [path] = pretrain_encoders(*patients, recipe, tmp_path).values()
    assert len(rows(tmp_path / "unet3d_t1_history.csv")) == len(epochs.weights) == 4
    for one, other in zip(weights(keras.models.load_model(path)), epochs.weights[1], strict=True):
        np.testing.assert_array_equal(one, other)


# A loss that rises from the first epoch on ends no training.
LAST = ONE.replace(
    {
        "training.patience": None,
        "training.weight_average": 2,
        "training.schedule": "polynomial",
        "training.optimizer": "sgd",
        "training.clip_norm": 1.0,
        "training.loss": "dice_ce",
    }
)


@pytest.mark.once
def test_the_mean_of_the_last_epochs_after_an_interruption(patients, tmp_path, epochs, monkeypatch):
    # As if the mean were better than every epoch.
    monkeypatch.setattr(training._Trainer, "_cost", lambda self, row: row.get("epoch", -1))
    epochs.stop = 3
    with pytest.raises(KeyboardInterrupt):
        pretrain_encoders(*patients, LAST, tmp_path)
    [path] = pretrain_encoders(*patients, LAST, tmp_path).values()
    *_, third, fourth = epochs.weights
    for one, a, b in zip(weights(keras.models.load_model(path)), third, fourth, strict=True):
        np.testing.assert_array_equal(one, np.mean([a, b], axis=0))
    history = training.read_history(tmp_path / "unet3d_t1_history.csv")
    rate = ONE.training.pretrain_learning_rate
    expected = [rate * (1 - epoch / 4) ** 0.9 for epoch in range(4)]
    assert [row["learning_rate"] for row in history] == pytest.approx(expected, rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["unet3d_t1.keras", "unet3d_t1_history.csv"]


@pytest.mark.parametrize(("best", "kept"), [(-1, False), (99, True)])
def test_the_mean_is_kept_if_it_is_better(patients, tmp_path, best, kept):
    model = donors()["t1"]
    before = weights(model)
    for number in (1, 3):
        np.savez(tmp_path / f"{number}.npz", *[number * one for one in before])
    trainer = training._Trainer(tmp_path / "unet3d_t1.keras", ONE, "volumes", *patients)
    trainer._average(model, [np.load(path) for path in tmp_path.glob("*.npz")], {"val_loss": best})
    for one, other in zip(weights(model), before, strict=True):
        np.testing.assert_allclose(one, 2 * other if kept else other, rtol=1e-6)


def test_the_optimizer():
    def made(**changes):
        return training._optimizer(TrainingRecipe(**changes), 0.1)

    assert made().get_config() | {"name": "adam"} == keras.optimizers.Adam(0.1).get_config() | {"name": "adam"}
    assert type(made(optimizer="adamw")) is type(keras.optimizers.AdamW())
    momentum = made(optimizer="sgd", clip_norm=3)
    assert type(momentum) is type(keras.optimizers.SGD())
    assert (momentum.momentum, momentum.nesterov, momentum.global_clipnorm) == (0.99, True, 3)


@pytest.mark.parametrize("exclusive", [True, False])
def test_the_objective(exclusive):
    structures = {"gtv": (1,), "node": (2,), "ring": (3 if exclusive else 2,)}
    recipe = Recipe().replace({"training.loss": "dice_per_patch", "data.structures": structures})
    loss, metrics = training._objective(recipe, "volumes")
    assert (type(loss), loss.per_patch) == (DiceLoss, True)
    assert [metric.structures for metric in metrics] == [3, 3]
    assert metrics[0].exclusive == exclusive
    loss, _ = training._objective(recipe, "centres")
    assert (type(loss), loss.exclusive) == (CrossEntropy, exclusive)


def test_a_loss_that_nobody_registered(three, tmp_path, no_training):
    recipe = THREE.replace({"training.loss": "hinge"})
    with pytest.raises(ValueError, match=r"`training.loss`, must be one of dice, .*Received: 'hinge'$"):
        training.train_method(METHODS["mmfnet_mlp_std_transfer"], *three, recipe, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "hinge" not in LOSSES


THREE = TINY.replace({"data.modalities": ("t1", "t2", "cet1")})


@pytest.fixture
def three(make_case):
    """Patients with three modalities."""
    cases = some_patients(make_case)
    return [
        [dataclasses.replace(case, images={**case.images, "cet1": case.images["t1"]}) for case in part]
        for part in cases
    ]


@pytest.mark.once
def test_a_method_lends_its_encoder_to_another(three, tmp_path, monkeypatch):
    donor = training.train_method(METHODS["unet3d_t1"], *three, THREE, tmp_path)
    fitted = []
    fit = training._Trainer.fit

    def watch(self, model, **kwargs):
        fitted.append((type(model).__name__, *model.input))
        if isinstance(model, MMFNet) and kwargs["name"] == "encoders frozen":
            for one, other in zip(weights(model.encoder("t1")), weights(donor.encoder("t1")), strict=True):
                np.testing.assert_array_equal(one, other)
        return fit(self, model, **kwargs)

    monkeypatch.setattr(training._Trainer, "fit", watch)
    network = training.train_method(METHODS["mmfnet_t1_t2"], *three, THREE, tmp_path)
    assert fitted == [("UNet3D", "t2"), ("MMFNet", "t1", "t2"), ("MMFNet", "t1", "t2")]
    assert network.modalities == ("t1", "t2")
    names = {
        f"{name}{end}" for name in ("unet3d_t1", "unet3d_t2", "mmfnet_t1_t2") for end in (".keras", "_history.csv")
    }
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    "name",
    ["patch_cnn_t2", "multi_encoder", *(pytest.param(n, marks=pytest.mark.once) for n in ONCE)],
)
def test_the_other_methods_train(name, three, tmp_path, no_second_training):
    method = METHODS[name]
    network = training.train_method(method, *three, THREE, tmp_path)
    history = rows(tmp_path / f"{name}_history.csv")
    assert len(history) == THREE.training.epochs
    assert all(np.isfinite(float(row["val_loss"])) for row in history)
    again = training.train_method(method, *three, THREE, tmp_path)
    for one, other in zip(weights(network), weights(again), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def no_second_training(monkeypatch):
    fit, calls = training._Trainer.fit, []

    def once(*args, **kwargs):
        calls.append(1)
        assert len(calls) == 1
        return fit(*args, **kwargs)

    monkeypatch.setattr(training._Trainer, "fit", once)


def test_a_patch_classifier_learns(patients, tmp_path):
    """On patients whose tumour is bright."""
    recipe = TINY.replace(
        {
            "data.modalities": ("t1",),
            "training.epochs": 3,
            "training.steps_per_epoch": 30,
            "training.batch_size": 4,
            "training.pretrain_learning_rate": 0.01,
        }
    )
    method = dataclasses.replace(
        METHODS["patch_cnn_t1"], build=lambda recipe, dtype, encoders=None: PatchCNN("t1", (6, 6), (8, 16), dtype)
    )
    network = training.train_method(method, *patients, recipe, tmp_path)
    case = patients[1][0]
    probability = segment_case(method.over_volumes(network, recipe), case, recipe).probabilities["tumour"]
    assert evaluate_case(sitk.GetArrayFromImage(probability), case.mask, case.spacing)["ap"] > 0.8


def test_deep_supervision_is_resumed_and_leaves_no_trace(three, tmp_path, monkeypatch):
    changes = {"network.filters": (2, 2, 2), "network.deep_supervision": True, "training.epochs": 2}
    changes["training.weight_average"] = 2
    keep, heads = training._SaveState.on_epoch_end, []

    def interrupted(self, epoch, logs=None):
        keep(self, epoch, logs)
        heads.append(np.array(self.model.get_layer("auxiliary_heads").get_weights()[0]))
        if epoch == 0:
            raise KeyboardInterrupt

    def watch(self, epoch, logs=None):
        heads.append(np.array(self.model.get_layer("auxiliary_heads").get_weights()[0]))

    monkeypatch.setattr(training._SaveState, "on_epoch_end", interrupted)
    monkeypatch.setattr(training._SaveState, "on_epoch_begin", watch, raising=False)
    with pytest.raises(KeyboardInterrupt):
        training.train_method(METHODS["multi_encoder"], *three, THREE.replace(changes), tmp_path)
    network = training.train_method(METHODS["multi_encoder"], *three, THREE.replace(changes), tmp_path)
    start, stopped, resumed, end = heads
    np.testing.assert_array_equal(resumed, stopped)
    assert (start != stopped).all()
    assert (stopped != end).all()
    assert not network.deep_supervision
    assert len(network.weights) == len(load_network(tmp_path / "multi_encoder.keras", THREE.replace(changes)).weights)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "kept"), [(1, False), (3, True)])
def test_an_interrupted_training_ends_as_an_undisturbed_one(trained, tmp_path, monkeypatch, stop, kept):
    folder, parts, undisturbed = trained
    keep, ends = training._SaveState.on_epoch_end, []

    def interrupted(self, epoch, logs=None):
        ends.append(epoch)
        if len(ends) != stop or kept:
            keep(self, epoch, logs)
        if len(ends) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._SaveState, "on_epoch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_mmfnet(*parts, TINY, tmp_path, donors())
    assert not (tmp_path / "mmfnet.keras").exists()
    resumed = train_mmfnet(*parts, TINY, tmp_path, donors())

    # No epoch but one that was not kept is done again.
    assert len(ends) == TINY.training.epochs + (not kept)
    history, expected = (rows(path / "mmfnet_history.csv") for path in (tmp_path, folder))
    for row, other in zip(history, expected, strict=True):
        assert row.pop("stage") == other.pop("stage")
        assert float(row.pop("seconds")) > 0 < float(other.pop("seconds"))
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, rel=1e-4)
    for one, other in zip(weights(resumed), weights(undisturbed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.once
def test_a_training_on_a_full_disk(patients, tmp_path, monkeypatch):
    usage = training.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(training.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"0.* MB must be free on the disk .*Received: 0.0001 MB"):
        pretrain_encoders(*patients, ONE, tmp_path)
    assert not (tmp_path / "unet3d_t1.keras").exists()
    monkeypatch.undo()
    pretrain_encoders(*patients, ONE, tmp_path)
    assert len(rows(tmp_path / "unet3d_t1_history.csv")) == ONE.training.epochs


# Without a learning rate worth the name only the batch normalization's statistics move, and soon no more.
STILL = ONE.replace({"training.pretrain_learning_rate": 1e-12, "training.patience": 2, "training.epochs": 50})


@pytest.mark.once
def test_early_stopping_counts_the_epochs_before_an_interruption(patients, tmp_path, monkeypatch):
    pretrain_encoders(*patients, STILL, tmp_path / "undisturbed")
    losses = [float(row["val_loss"]) for row in rows(tmp_path / "undisturbed" / "unet3d_t1_history.csv")]
    assert len(losses) < 50
    assert losses.index(min(losses)) == len(losses) - 1 - STILL.training.patience

    keep = training._SaveState.on_epoch_end

    def interrupted(self, epoch, logs=None):
        keep(self, epoch, logs)
        if epoch in (0, len(losses) - 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(training._SaveState, "on_epoch_end", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain_encoders(*patients, STILL, tmp_path / "resumed")
    pretrain_encoders(*patients, STILL, tmp_path / "resumed")
    assert len(rows(tmp_path / "resumed" / "unet3d_t1_history.csv")) == len(losses)


def test_a_training_that_diverges_says_so(patients, tmp_path):
    for case in patients[0]:
        case.images["t1"][:] = np.nan
    with pytest.raises(FloatingPointError, match=r"diverged.*Received: .*nan"):
        pretrain_encoders(*patients, ONE, tmp_path)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(training._Trainer, "fit", lambda *_, **__: pytest.fail("the training started"))


@pytest.mark.once
@pytest.mark.parametrize("damage", ["backup/latest.weights.h5", "history.csv", "checksums.json"])
def test_a_damaged_state_falls_back_to_the_one_before(patients, tmp_path, monkeypatch, caplog, damage):
    save, ends = training._SaveState.on_epoch_end, []

    def interrupted(self, epoch, logs=None):
        ends.append(epoch)
        save(self, epoch, logs)
        if len(ends) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._SaveState, "on_epoch_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain_encoders(*patients, ONE, tmp_path)
    work = tmp_path / ".unet3d_t1" / "all"
    assert [state.name for state in sorted(work.glob("epoch-*"))] == ["epoch-00002", "epoch-00003"]
    (work / "epoch-00003" / damage).write_bytes(b"epoch")
    pretrain_encoders(*patients, ONE, tmp_path)
    assert ends == [0, 1, 2, 2, 3]
    assert "epoch-00003: is damaged" in caplog.text
    assert [row["epoch"] for row in rows(tmp_path / "unet3d_t1_history.csv")] == ["0", "1", "2", "3"]


def test_the_history_is_read_as_numbers(trained, tmp_path):
    folder, _, _ = trained
    history = training.read_history(folder / "mmfnet_history.csv")
    assert [(row["epoch"], row["stage"]) for row in history] == [
        (0, "encoders frozen"),
        (1, "encoders frozen"),
        (2, "all"),
        (3, "all"),
    ]
    assert all(isinstance(row["val_loss"], float) for row in history)
    assert training.read_history(tmp_path / "nothing.csv") == []
