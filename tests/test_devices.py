import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from devices_script import RECIPE

from keras_mmfnet import devices
from keras_mmfnet.data.patches import centre_patches, patch_dataset
from keras_mmfnet.recipe import PatchRecipe
from keras_mmfnet.training import read_history

BACKEND = keras.backend.backend()


RECIPE_OF_COMMAND = {
    "data.modalities": ["t1", "t2"],
    "data.spacing": 4.0,
    "patches.shape": [16, 16, 16],
    "network.filters": [2],
    "network.reduction": 2,
    "training.epochs": 1,
    "training.steps_per_epoch": 2,
    "training.self_transfer": False,
}
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
@pytest.mark.skipif(BACKEND == "tensorflow", reason="Keras trains on one machine")
def test_two_processes_as_of_two_machines(trained):
    """Of `torchrun`, or with the environment variables of `keras.distribution.initialize`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for number in "01":
        prefix = "KERAS_DISTRIBUTION_"
        environment = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            f"{prefix}PROCESS_ID": number,
            f"{prefix}NUM_PROCESSES": "2",
            f"{prefix}JOB_ADDRESSES": f"127.0.0.1:{port}",
        }
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen([*SCRIPT, trained, "machines"], env=os.environ | environment, **output))
    try:
        for process in processes:
            words, _ = process.communicate(timeout=300)
            assert process.returncode == 0, words
    finally:
        for process in processes:
            process.kill()
    one, two = (read(trained / "machines" / f"device_{n}.npz") for n in range(2))
    require_equal(one, two)
    require_equal(read(trained / "one" / "weights.npz"), read(trained / "machines" / "weights.npz"), 1e-4)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND == "jax", reason="each layer sees the whole batch")
def test_moments_of_each_devices_share(trained, tmp_path):
    alone = run_script(tmp_path, "own")
    assert alone.returncode == 0, alone.stderr
    one, two = (read(tmp_path / "own" / f"device_{n}.npz") for n in range(2))
    require_equal(one, two)  # the moving averages are the mean over the devices
    whole = read(trained / "two" / "weights.npz")
    assert max(np.abs(a - b).max() for a, b in zip(one, whole, strict=True)) > 1e-3


def run_command(tmp_path, *arguments):
    command = [sys.executable, "-m", "keras_mmfnet.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "torch", reason="the devices of a CPU are processes on PyTorch alone")
def test_the_command(tiny_cohort, tmp_path):
    changes = [f"--set={field}={json.dumps(value)}" for field, value in RECIPE_OF_COMMAND.items()]
    done = run_command(tmp_path, "train", tiny_cohort, "--out", "run", "--small", "--devices", 2, *changes)
    assert done.returncode == 0, done.stderr
    assert "Training on 2 devices" in done.stderr
    assert (tmp_path / "run" / "fold_0" / "mmfnet.keras").exists()
    assert not list((tmp_path / "run" / "fold_0").glob(".mmfnet"))
    odd = run_command(tmp_path, "train", tiny_cohort, "--out", "odd", "--small", "--devices", 3, *changes)
    assert odd.returncode == 1
    assert "must be a multiple of the 3 devices, which share each batch. Received: 4" in odd.stderr
    assert not (tmp_path / "odd" / "cache").exists()


@pytest.mark.skipif(BACKEND != "torch", reason="the devices of a CPU are processes on PyTorch alone")
def test_a_process_that_ends(tiny_cohort, tmp_path):
    (tmp_path / "ends.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    raise SystemExit('no memory')")
    options = ("--out", "run", "--small", "--devices", 2, "--import", "ends.py")
    done = run_command(tmp_path, "train", tiny_cohort, *options)
    assert done.returncode == 1
    expected = "the process of device 1 must run as long as the first. Received: its end with status 1: no memory"
    assert expected in " ".join(done.stderr.split())


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
    devices.check_batch_size(6)
    with pytest.raises(ValueError, match=r"a multiple of the 3 devices, which share each batch. Received: 4"):
        devices.check_batch_size(4)


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
    with pytest.raises(ValueError, match=r"`batch_size` must be a multiple of 2. Received: 3"):
        patch_dataset([make_case()], PatchRecipe(shape=(4, 8, 8)), batch_size=3, multiple=2)
