import importlib
import inspect
import subprocess
import sys

import keras
import numpy as np
import pytest
import torch

from keras_mmfnet import kernels
from keras_mmfnet.kernels import reference
from keras_mmfnet.models import mmfnet

SHAPE = (2, 16, 16, 16)


@pytest.fixture
def step(benchmarks):
    import step

    return step


def test_the_contenders(step):
    names = [contender.name for contender in step.choose_contenders(["torch"], "mixed_float16", gpu=True)]
    assert names == [
        "plain",
        "plain, channels last",
        "plain, compiled",
        "torch",
        "torch without attention",
        "torch, plain kernels",
        "torch in float32",
    ]
    names = [contender.name for contender in step.choose_contenders(["torch"], "float32", False, "before")]
    assert names[-1] == "torch, baseline"
    chosen = step.choose_contenders(["torch"], "float32", False, each_kernel=True)
    assert [contender.plain_kernel for contender in chosen if contender.plain_kernel] == list(step.FAST["torch"])
    assert all(contender.policy == "float32" for contender in step.choose_contenders(["jax"], "float32", gpu=False))


def test_the_ratios_are_medians_over_the_turns(step):
    seconds = {
        ("plain", "train"): [2.0, 4.0, 2.0],
        ("plain, channels last", "train"): [4.0, 4.0, 4.0],
        (step.KEPT, "train"): [1.0, 1.0, 1.0],
        ("jax", "train"): [1.0, 2.0, 3.0],
        ("jax without attention", "train"): [0.8, 1.6, 2.4],
    }
    seconds |= {(name, "predict"): [1.0, 1.0, 1.0] for name, _ in list(seconds)}
    results = {
        name: {"train_seconds": np.median(values), "predict_seconds": 1.0, "peak_mib": 100 if "plain" in name else 70}
        for (name, what), values in seconds.items()
        if what == "train"
    }
    for name, tensors in (("plain", 55), ("plain, channels last", 50), ("jax", 40)):
        results[name]["peak_tensors_mib"] = tensors
    assert step.compare(results, seconds, ["jax"]) == {
        "jax, train / plain": 0.5,
        f"jax, train / {step.KEPT}": 2.0,
        "jax, predict / plain": 1.0,
        f"jax, predict / {step.KEPT}": 1.0,
        "jax, memory / plain": 0.7,
        "jax, tensors / plain": 0.8,
        "jax, train with / without attention": 1.25,
    }


@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_every_fast_kernel_is_measured(step, backend):
    fast = importlib.import_module(f"keras_mmfnet.kernels.{backend}")
    operations = [
        name for name, value in vars(reference).items() if inspect.isfunction(value) and name in vars(kernels)
    ]
    assert set(step.FAST[backend]) == {name for name in operations if name in vars(fast)}


@pytest.mark.parametrize("variant", ["plain kernels", "plain conv", "baseline"])
def test_the_ratios_beside_a_variant(step, variant):
    names = {"plain": 4.0, step.KEPT: 3.0, "torch": 1.0, "torch without attention": 0.8, f"torch, {variant}": 2.0}
    results = {
        name: {"train_seconds": x, "predict_seconds": x, "peak_mib": 100 * x, "peak_tensors_mib": 10 * x}
        for name, x in names.items()
    }
    seconds = {(name, what): [x, x] for name, x in names.items() for what in ("train", "predict")}
    ratios = step.compare(results, seconds, ["torch"])
    found = {name.split(" / ")[0]: ratio for name, ratio in ratios.items() if name.endswith(f" / {variant}")}
    assert found == {"torch, train": 0.5, "torch, predict": 0.5, "torch, memory": 0.5, "torch, tensors": 0.5}


def test_the_compiled_variant_has_a_ratio_of_its_own(step):
    names = {
        "plain": 3.0,
        "plain, channels last": 2.0,
        step.COMPILED: 1.0,
        "torch": 1.0,
        "torch without attention": 0.8,
    }
    results = {name: {"train_seconds": x, "predict_seconds": x, "peak_mib": 100} for name, x in names.items()}
    seconds = {(name, what): [x, x] for name, x in names.items() for what in ("train", "predict")}
    ratios = step.compare(results, seconds, ["torch"])
    assert ratios["torch, train / plain"] == ratios["torch, predict / plain"] == 0.5
    assert ratios["torch, train / plain, compiled"] == ratios["torch, predict / plain, compiled"] == 1.0


def test_the_memory_of_tensors(step):
    before = torch.ones(2**20)

    def run():
        after = before + 1  # 4 MiB
        after * after  # 4 more, and not kept
        return (after * 2).sum().item()

    assert step.memory_of_tensors(run) == 8


def test_a_contender_that_dies_ends_the_run(step, tmp_path):
    # One voxel is left at the bottom, which PyTorch's batch normalization refuses.
    command = [sys.executable, step.__file__, "--shape", "1", "16", "16", "16", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "plain: its process ended" in done.stderr
    assert "Expected more than 1 value per channel" in done.stderr
    assert not (tmp_path / "result.json").exists()


def test_a_training_step_takes_less_memory_than_plain_pytorch(step):
    shape = (2, 16, 64, 64)
    peaks = []
    for make, backend in ((step.make_keras, "torch"), (step.make_plain, None)):
        train, _, _ = make(step.Contender("one", backend), shape)
        train()
        peaks.append(step.memory_of_tensors(train))
    assert peaks[0] < 0.7 * peaks[1]


def test_a_ratio_that_is_worse_is_named(step):
    before = {"a": 0.5, "b": 1.0}
    assert step.worse({"a": 0.59, "b": 1.1, "new": 9.0}, before) == []
    assert step.worse({"a": 0.61, "b": 1.1}, before) == ["worse: a is 0.61, and was 0.50"]


@pytest.mark.parametrize("name", ["plain", "keras", "keras without attention"])
def test_a_contender_trains_and_predicts(step, name, monkeypatch):
    monkeypatch.setattr(mmfnet, "FusionBlock3D", mmfnet.FusionBlock3D)  # given back afterwards
    if name == "plain":
        made = step.make_plain(step.Contender(name, channels_last=True), SHAPE)
    else:
        attention = name == "keras"
        made = step.make_keras(step.Contender(name, keras.backend.backend(), attention), SHAPE)
    train, predict, _ = made
    losses = [train() for _ in range(3)]
    assert losses[2] < losses[0] <= 1
    assert predict().size == np.prod(SHAPE)


def test_the_memory_of_the_process(step):
    memory = step.memory_since_now("torch")
    block = np.ones(2**29, np.uint8)
    assert memory() >= 200  # The kernel counts late, and some of the memory may have been freed before.
    assert block.all()


def test_the_least_traffic(step):
    one = step.least_traffic((2, 16, 16, 16))
    assert step.least_traffic((4, 16, 16, 32)) == pytest.approx(4 * one, rel=0.01)  # but for the MLPs
    # The first level alone: three encoders with two blocks of convolution, normalization and ReLU inside, 8 channels.
    assert one > 3 * 2 * 2 * 8 * 2 * 16**3 * 4 * 4


def test_the_bandwidth(step):
    assert step.memory_bandwidth(gpu=False) > 1e8
