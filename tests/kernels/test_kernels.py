"""Every fast operation and its gradients against the reference, and the switch between them."""

import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from checks import BACKEND, POLICIES, dtype_of, gradient_function, random_volume, to_numpy
from keras import ops

import keras_mmfnet
from keras_mmfnet import kernels

# Largest error as a share of the largest value. Over a single channel a deviation is its epsilon, and its gradient's
# factor of 1000 multiplies the rounding.
TOLERANCES = {"float32": 1e-3, "mixed_float16": 0.01, "mixed_bfloat16": 0.06}
# Shape, channels of each tensor of features, and axis of the channels.
CASES = {
    "one channel": ((2, 3, 5, 7), (1,), -1),
    "channels first": ((2, 3, 5, 7), (1, 3, 2), 1),
    "one patch": ((1, 2, 4, 4), (2, 2, 2), -1),
    "one slice": ((3, 1, 4, 5), (9, 20), -1),
}


def shaped(shape, channels, axis):
    return (*shape, channels) if axis == -1 else (shape[0], channels, *shape[1:])


def volumes(shape, channels, axis):
    return [random_volume(*shaped(shape, count, axis), seed=seed) for seed, count in enumerate(channels)]


def factors(shape, channels, axis, seed=7):
    """Weights in (0, 1) of each channel of each patch, or of each voxel for one channel."""
    return 1 / (1 + np.exp(-random_volume(*shaped(shape, channels, axis), seed=seed)))


def over_space(shape, channels, axis):
    return volumes(shape, channels, axis), lambda x: kernels.statistics_over_space(x, kernels.STATISTICS, axis, True)


def over_channels(shape, channels, axis):
    def run(tensors):
        *features, weights = tensors
        return kernels.statistics_over_channels(features, kernels.STATISTICS, axis, weights, True)

    weights = factors((shape[0], 1, 1, 1), sum(channels), axis)
    return [*volumes(shape, channels, axis), weights], run


def over_channels_unweighted(shape, channels, axis):
    def run(features):
        return kernels.statistics_over_channels(features, ("std", "max"), axis)

    return volumes(shape, channels, axis), run


def weighted_reduction(shape, channels, axis):
    def run(tensors):
        by_channel, by_voxel, kernel, *features = tensors
        return kernels.weighted_reduction(features, by_channel, by_voxel, kernel, axis)

    count = sum(channels)
    weights = [factors((shape[0], 1, 1, 1), count, axis), factors(shape, 1, axis), random_volume(count, 3)]
    return [*weights, *volumes(shape, channels, axis)], run


def batch_norm_relu(shape, channels, axis, moments=None):
    count = sum(channels)
    gamma, beta = 1 + random_volume(count, seed=8) / 4, random_volume(count, seed=9)

    def run(tensors):
        x, *affine = tensors
        affine = [ops.cast(tensor, "float32") for tensor in affine]
        given = tuple(ops.convert_to_tensor(each) for each in moments(count)) if moments else None
        return kernels.batch_norm_relu(x, *affine, 1e-5, axis, given)[0]

    return [2 * random_volume(*shaped(shape, count, axis)) + 1, gamma, beta], run


def batch_norm_relu_of_moments(shape, channels, axis):
    def moments(count):
        return np.full(count, 0.5, "float32"), np.full(count, 2.0, "float32")

    return batch_norm_relu(shape, channels, axis, moments)


def conv(size, dilation=1):
    def make(shape, channels, axis):
        def run(tensors):
            return kernels.conv(*tensors, [1, 1, 1], "same", data_format(axis), (dilation,) * 3)

        count = sum(channels)
        return [random_volume(*shaped(shape, count, axis)), random_volume(*size, count, 2)], run

    return make


def max_pool(shape, channels, axis):
    def run(tensors):
        return kernels.max_pool(tensors[0], (1, 2, 2), (1, 2, 2), "valid", data_format(axis))

    return [random_volume(*shaped(shape, sum(channels), axis))], run


def data_format(axis):
    return "channels_last" if axis == -1 else "channels_first"


OPERATIONS = {
    "statistics over space": over_space,
    "statistics over channels": over_channels,
    "statistics over channels without weights": over_channels_unweighted,
    "weighted reduction": weighted_reduction,
    "batch normalization": batch_norm_relu,
    "batch normalization by given moments": batch_norm_relu_of_moments,
    "convolution": conv((3, 3, 3)),
    "dilated convolution": conv((1, 3, 3), dilation=2),
    "convolution of one voxel": conv((1, 1, 1)),
    "max-pooling": max_pool,
}
# Where TensorFlow has no kernel on a CPU, or a wrong gradient unless XLA compiles it; both are plain operations.
PLAIN_ON_TENSORFLOW = {name for name in OPERATIONS if "convolution" in name or "pooling" in name}


class Operation(keras.layers.Layer):
    """An operation on tensors in the layer's dtype, and the sum of its output times random factors."""

    def __init__(self, run, **kwargs):
        super().__init__(**kwargs)
        self.run = run

    def outputs(self, inputs):
        return self.run([ops.cast(x, self.compute_dtype) for x in inputs])

    def call(self, inputs, training=None):
        outputs = ops.cast(self.outputs(inputs), "float32")
        return ops.sum(outputs * ops.convert_to_tensor(random_volume(*outputs.shape, seed=11)))


@pytest.mark.skipif(BACKEND == "jax", reason="no faster kernels than the plain ones")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_same_as_the_reference(name, policy, case, monkeypatch):
    if BACKEND == "tensorflow" and name in PLAIN_ON_TENSORFLOW:
        pytest.skip("the plain operation")
    inputs, run = OPERATIONS[name](*CASES[case])
    layer, tensors, found = Operation(run, dtype=policy), [ops.convert_to_tensor(x) for x in inputs], {}
    for kind in kernels.KERNELS:
        monkeypatch.setattr(kernels, "_chosen", kind)
        outputs = layer.outputs(tensors)
        found[kind] = [to_numpy(outputs), *gradient_function(layer)(inputs), dtype_of(outputs)]
    assert found["fast"].pop() == found["plain"].pop()
    for fast, plain in zip(found["fast"], found["plain"], strict=True):
        assert fast.shape == plain.shape
        np.testing.assert_allclose(fast, plain, rtol=0, atol=TOLERANCES[policy] * max(1e-2, np.abs(plain).max()))


@pytest.mark.parametrize("value", [0.0, 300.0])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in PLAIN_ON_TENSORFLOW])
def test_finite_gradients_on_constant_inputs(name, policy, value, each_kind):
    inputs, run = OPERATIONS[name]((2, 3, 4, 5), (1, 3), -1)
    inputs = [np.full_like(x, value) if x.shape[:4] == (2, 3, 4, 5) and x.shape[4] > 1 else x for x in inputs]
    for gradient in gradient_function(Operation(run, dtype=policy))(inputs):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("chosen", kernels.KERNELS)
def test_the_switch(chosen, monkeypatch):
    monkeypatch.delenv("MMFNET_KERNELS", raising=False)
    default = kernels.get_kernels()
    assert default in kernels.KERNELS
    kernels.set_kernels(chosen)
    assert kernels.get_kernels() == chosen
    kernels.set_kernels(None)
    assert kernels.get_kernels() == default
    monkeypatch.setenv("MMFNET_KERNELS", chosen)
    assert kernels.get_kernels() == chosen


def test_plain_by_default_on_a_gpu(monkeypatch):
    monkeypatch.delenv("MMFNET_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "_on_gpu", lambda: True)
    assert kernels.get_kernels() == "plain"


def test_an_unknown_switch(monkeypatch):
    with pytest.raises(ValueError, match=r"^`kernels` must be 'plain' or 'fast'. Received: 'quick'$"):
        kernels.set_kernels("quick")
    monkeypatch.setenv("MMFNET_KERNELS", "quick")
    with pytest.raises(ValueError, match=r"MMFNET_KERNELS must be 'plain' or 'fast'. Received: 'quick'$"):
        kernels.get_kernels()


@pytest.mark.skipif(BACKEND == "jax", reason="no faster kernels than the plain ones")
@pytest.mark.parametrize("chosen", kernels.KERNELS)
def test_the_switch_decides_what_is_loaded(chosen):
    """Importing the layers loads no fast kernels; calling one does, unless the plain ones are chosen."""
    script = f"""
import sys, numpy
from keras_mmfnet import kernels
from keras_mmfnet.layers import SpatialStdAttention3D
layer = SpatialStdAttention3D()
loaded = lambda: "keras_mmfnet.kernels.{BACKEND}" in sys.modules
before = loaded()
kernels.set_kernels("{chosen}")
layer(numpy.zeros((1, 2, 2, 2, 3), "float32"))
print(before, loaded())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", str(chosen == "fast")]


# Names with one leading underscore, on anything but this package's own `self` and modules.
PRIVATE = re.compile(r"(?<!self)(?<!keras_mmfnet)\._[a-z]|keras\.src|gc\.collect|import gc")


def test_no_private_name_of_another_library():
    folder = Path(keras_mmfnet.__file__).parent
    sources = list(folder.rglob("*.py"))
    assert len(sources) > 15
    found = {}
    for path in sources:
        # Public in spite of their names: of named tuples, and of the module `os`.
        text = re.sub(r"from keras_mmfnet\S* |\._replace\(|\bos\._exit\(", "", path.read_text(encoding="utf-8"))
        found[str(path.relative_to(folder))] = PRIVATE.findall(text)
    assert {name: names for name, names in found.items() if names} == {}
    for private in ("tensor._base", "node.arguments._x", "keras.src.ops", "self.layers[0]._y", "gc.collect()"):
        assert PRIVATE.search(f"x = {private}"), private
