import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from devices_script import RECIPE

from keras_mmfnet import devices
from keras_mmfnet.cli._options import use_devices
from keras_mmfnet.data.patches import centre_patches, patch_dataset
from keras_mmfnet.recipe import PatchRecipe
from keras_mmfnet.training import read_history

BACKEND = keras.backend.backend()


CHANGES = [
    "--set=data.modalities=t1,t2",
    "--set=data.spacing=4",
    "--set=patches.shape=16,16,16",
    "--set=network.filters=[2]",
    "--set=network.reduction=2",
    "--set=training.epochs=1",
    "--set=training.steps_per_epoch=2",
    "--set=training.self_transfer=false",
]
SCRIPT = [sys.executable, Path(__file__).with_name("devices_script.py")]


def run_script(folder, what):
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"}
    return subprocess.run([*SCRIPT, folder, what], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of trainings on two devices, one of them killed after an epoch and resumed on one device."""
    folder = tmp_path_factory.mktemp("devices")
    killed = run_script(folder, "two")
    assert killed.returncode == -9, killed.stderr
    for file in folder.glob("process_*"):  # ends with the first one
        deadline = time.monotonic() + 60
        while Path("/proc", file.read_text()).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not (folder / "killed" / "mmfnet.keras").exists()
    alone = run_script(folder, "one")
    assert alone.returncode == 0, alone.stderr
    return folder


def read(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def require_equal(one, two, tolerance=0.0):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_devices_have_the_same_weights(trained):
    one, two = (read(trained / "two" / f"device_{n}.npz") for n in range(2))
    require_equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "killed"])
def test_two_devices_give_the_weights_of_one(trained, name):
    require_equal(read(trained / "one" / "weights.npz"), read(trained / name / "weights.npz"), 1e-4)
    one, two = (read_history(trained / folder / "mmfnet_history.csv") for folder in ("one", name))
    assert len(one) == len(two) == RECIPE.training.epochs
    for a, b in zip(one, two, strict=True):
        # The last validation batch has 2 windows, which two devices share.
        for key in ("loss", "val_loss", "dice_score", "val_dice_score", "average_precision", "val_average_precision"):
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "jax", reason="each layer sees the whole batch")
def test_moments_of_each_devices_share(trained, tmp_path):
    alone = run_script(tmp_path, "own")
    assert alone.returncode == 0, alone.stderr
    one, two = (read(tmp_path / "own" / f"device_{n}.npz") for n in range(2))
    require_equal(one, two)  # the moving averages are the mean over the devices
    whole = read(trained / "two" / "weights.npz")
    assert max(np.abs(a - b).max() for a, b in zip(one, whole, strict=True)) > 1e-3


def start_command(folder, *arguments, **environment):
    command = [sys.executable, "-m", "keras_mmfnet.cli", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **options)


def end(process, status=0):
    """Waits for a process; returns what it printed."""
    try:
        words, _ = process.communicate(timeout=300)
        assert process.returncode == status, words
    finally:
        process.kill()
    return " ".join(words.split())


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras trains on one machine")
def test_the_command(tiny_cohort, tmp_path):
    """On one device, on two of PyTorch, and in two processes as of two machines."""

    def train(out, *options, **environment):
        return start_command(tmp_path, "train", tiny_cohort, "--out", out, "--small", *CHANGES, *options, **environment)

    end(train("one"))
    runs = ["machines"]
    if BACKEND == "torch":
        runs.append("two")
        words = end(train("two", "--devices", 2))
        assert "Training on 2 devices" in words
        words = end(train("odd", "--devices", 3), status=1)
        assert "must be a multiple of the 3 devices, which share each batch. Received: 4" in words
        assert not (tmp_path / "odd" / "cache").exists()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {
        # Of `torchrun`, and of `keras.distribution.initialize`.
        **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **{"KERAS_DISTRIBUTION_NUM_PROCESSES": "2", "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}"},
    }
    processes = [
        train("machines", "--devices", "all", **address, **dict.fromkeys(("RANK", "KERAS_DISTRIBUTION_PROCESS_ID"), n))
        for n in "01"
    ]
    for process in processes:
        end(process)
    one, *others = (read_history(tmp_path / run / "fold_0" / "mmfnet_history.csv") for run in ("one", *runs))
    for other in others:
        assert [row["val_loss"] for row in other] == pytest.approx([row["val_loss"] for row in one], abs=1e-4)
    for run in runs:
        assert not list((tmp_path / run / "fold_0").glob(".mmfnet"))


@pytest.mark.skipif(BACKEND != "torch", reason="the devices of a CPU are processes on PyTorch alone")
def test_a_process_that_ends(tiny_cohort, tmp_path):
    (tmp_path / "ends.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    raise SystemExit('no memory')")
    options = ("--out", "run", "--small", "--devices", 2, "--import", "ends.py")
    words = end(start_command(tmp_path, "train", tiny_cohort, *options), status=1)
    assert "the process of device 1 must run until the end. Received: status 1: no memory" in words


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match=r"'all' or an integer of 1 or more. Received: 0"):
        devices.set_devices(0)
    if BACKEND != "torch":  # whose processes can share a CPU
        with pytest.raises(ValueError, match=r"must be at most the number of devices.*Received: 99"):
            devices.set_devices(99)
    assert devices.set_devices("all").number == devices.get_devices().number == 1


def test_several_machines_with_tensorflow(monkeypatch):
    if BACKEND != "tensorflow":
        pytest.skip("TensorFlow only")
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(ValueError, match=r"use JAX or PyTorch for several. Received: TF_CONFIG"):
        devices.set_devices(2)


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(devices.Devices, "number", 3)
    devices.check_recipe(RECIPE.replace({"training.batch_size": 6}))
    with pytest.raises(ValueError, match=r"a multiple of the 3 devices, which share each batch. Received: 4"):
        devices.check_recipe(RECIPE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("centres", [True, False])
def test_parts_of_batches_make_whole_ones(make_case, training, centres):
    """Those of a training that is resumed; for validation, of 9 windows, the last batch is filled up."""
    cases = [make_case(f"case_{n}", shape=(10, 8, 8), seed=n) for n in range(3)]
    recipe = PatchRecipe(shape=(4, 8, 8), stride=(4, None, None), foreground=0.5)

    def batches(part=(0, 1), multiple=2):
        first = 5 if training else 0
        found = patch_dataset(cases, recipe, None, 4, training, first_batch=first, part=part, multiple=multiple)
        if centres:
            found = centre_patches(found, (4, 4), count=6, first_batch=first, part=part)
        return [np.concatenate([np.ravel(images["t1"]), np.ravel(mask)]) for images, mask in found.take(3)]

    def sorted_values(arrays):
        return [np.sort(array) for array in arrays]

    parts = [batches((number, 2)) for number in range(2)]
    require_equal(sorted_values(batches()), sorted_values(map(np.concatenate, zip(*parts, strict=True))))
    if not (training or centres):
        assert [len(batch) for batch in batches(multiple=1)] == [4 * 512, 4 * 512, 512]
        (windows, _), *_ = patch_dataset(cases, recipe, None, 1, training=False)
        *_, (last, _) = patch_dataset(cases, recipe, None, 4, training=False, multiple=2)
        np.testing.assert_array_equal(last["t1"][1:], windows["t1"])


def test_a_batch_size_that_does_not_fit(make_case):
    for size, part in ((3, (0, 1)), (4, (0, 4))):
        with pytest.raises(ValueError, match=rf"`batch_size` must be.*Received: {size}, 2 and {part[1]}"):
            patch_dataset([make_case()], PatchRecipe(shape=(4, 8, 8)), batch_size=size, multiple=2, part=part)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow only")
def test_settings_that_tensorflow_cannot_train_with_on_several_devices(monkeypatch):
    monkeypatch.setattr(
        devices.Devices, "check", importlib.import_module("keras_mmfnet.devices._tensorflow")._Mirrored.check
    )
    devices.check_recipe(RECIPE)
    with pytest.raises(ValueError, match=r"`training.clip_norm` must be null.*Received: 1.0"):
        devices.check_recipe(RECIPE.replace({"training.clip_norm": 1.0}))


def test_one_of_several_processes_needs_the_option(monkeypatch):
    name = {"torch": "WORLD_SIZE", "jax": "KERAS_DISTRIBUTION_NUM_PROCESSES"}.get(BACKEND, "nothing")
    monkeypatch.setenv(name, "2")
    assert devices.started_with_others() == (BACKEND != "tensorflow")
    if BACKEND != "tensorflow":
        with pytest.raises(ValueError, match=r"--devices: all is expected.*Received: nothing"), use_devices(None, True):
            pass
