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
from devices_script import RECIPE, train
from typer.testing import CliRunner

from keras_mmfnet import devices
from keras_mmfnet.cli import app, memory
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
SCRIPT = Path(__file__).with_name("devices_script.py")


def read(path):
    with np.load(path) as file:
        return [file[name] for name in file.files]


def require_equal(one, two, tolerance=0.0):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_two_devices_train_as_one(tmp_path):
    """One training on two devices, one that is killed after an epoch and resumed on one device, and one on one."""
    flags = os.environ.get("XLA_FLAGS", "")
    # The two processes of PyTorch would wait for each other's threads.
    environment = {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, tmp_path]
    killed = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    for file in tmp_path.glob("process_*"):  # ends with the first one
        deadline = time.monotonic() + 60
        while Path("/proc", file.read_text()).exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert not (tmp_path / "killed" / "mmfnet.keras").exists()
    train(tmp_path / "one")
    train(tmp_path / "killed")

    require_equal(*(read(tmp_path / "two" / f"device_{n}.npz") for n in range(2)))
    expected = read_history(tmp_path / "one" / "mmfnet_history.csv")
    for name in ("two", "killed"):
        require_equal(read(tmp_path / name / "weights.npz"), read(tmp_path / "one" / "weights.npz"), 1e-4)
        history = read_history(tmp_path / name / "mmfnet_history.csv")
        assert len(history) == len(expected) == RECIPE.training.epochs
        for row, wanted in zip(history, expected, strict=True):
            # The last validation batch has 2 windows, which two devices share.
            for key in ("loss", "dice_score", "average_precision"):
                assert row[key] == pytest.approx(wanted[key], abs=1e-4), key
                assert row[f"val_{key}"] == pytest.approx(wanted[f"val_{key}"], abs=1e-4), key

    if BACKEND != "jax":  # where each layer sees the whole batch
        one, two = (read(tmp_path / "own" / f"device_{n}.npz") for n in range(2))
        require_equal(one, two)  # the moving averages are the mean over the devices
        whole = read(tmp_path / "two" / "weights.npz")
        assert max(np.abs(a - b).max() for a, b in zip(one, whole, strict=True)) > 1e-3


def start(folder, *arguments, **environment):
    command = [sys.executable, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, **options)


def end(*processes, status=0):
    """Waits for processes; returns what each printed."""
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
        assert {process.returncode for process in processes} == {status}, "\n".join(printed)
    finally:
        for process in processes:
            process.kill()
    return [" ".join(words.split()) for words in printed]


def start_two_machines(folder, script, *arguments):
    """Starts a command in two processes as of two machines, which import a script."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {
        # Of `torchrun`, and of `keras.distribution.initialize`.
        **{"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **{"KERAS_DISTRIBUTION_NUM_PROCESSES": "2", "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"127.0.0.1:{port}"},
    }
    (folder / "script.py").write_text(script)
    arguments = ("-m", "keras_mmfnet.cli", *arguments, "--small", *CHANGES, "--devices=all", "--import=script.py")
    return [
        start(folder, *arguments, **address | {"RANK": number, "KERAS_DISTRIBUTION_PROCESS_ID": number})
        for number in "01"
    ]


# The second process goes on when the first one has made the run, which on PyTorch waits for it.
LATE = """
import os, pathlib, time
late = os.environ.get("KERAS_BACKEND") == "jax" and os.environ["RANK"] == "1"
while late and not pathlib.Path("machines/recipe.json").exists():
    time.sleep(0.1)
"""


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras trains on one machine")
def test_the_command(tiny_cohort, tmp_path, monkeypatch):
    """On one device, and in two processes as of two machines, of which one starts late."""
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: False)  # it would last
    alone = CliRunner().invoke(app, ["train", str(tiny_cohort), f"--out={tmp_path / 'one'}", "--small", *CHANGES])
    assert alone.exit_code == 0, alone.output
    printed = end(*start_two_machines(tmp_path, LATE, "train", tiny_cohort, "--out=machines"))
    assert [words.count("Training on 2 devices") for words in printed] == [1, 0]
    one, two = (read_history(tmp_path / run / "fold_0" / "mmfnet_history.csv") for run in ("one", "machines"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], abs=1e-3)
    assert not list((tmp_path / "machines" / "fold_0").glob(".mmfnet"))


@pytest.mark.skipif(BACKEND != "jax", reason="torchrun ends the other processes")
def test_a_machine_that_ends(tiny_cohort, tmp_path):
    """The other one ends, too, instead of waiting for it."""
    script = "import os\nif os.environ['RANK'] == '1':\n    raise ValueError('no memory')"
    first, second = end(*start_two_machines(tmp_path, script, "train", tiny_cohort, "--out=run"), status=1)
    assert "error: no memory" in second
    assert "Connection closed by peer" in first


@pytest.mark.skipif(BACKEND != "torch", reason="the devices of a CPU are processes on PyTorch alone")
def test_a_process_that_ends(tmp_path):
    script = """
import os
from keras_mmfnet import devices
if os.environ.get("RANK") == "1":
    raise SystemExit("no memory")
devices.set_devices(2)
"""
    (tmp_path / "ends.py").write_text(script)
    [words] = end(start(tmp_path, "ends.py"), status=1)
    assert "the process of device 1 must run until the end. Received: status 1: no memory" in words
    assert "no GPU was found: 2 processes share the CPU and are slower than one" in words


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match=r"'all' or an integer of 1 or more. Received: 0"):
        devices.set_devices(0)
    if BACKEND != "torch":  # whose processes can share a CPU
        with pytest.raises(ValueError, match=r"must be at most 1 \(.*\). Received: 99"):
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
