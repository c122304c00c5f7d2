import keras
import numpy as np
import pytest
import torch
from checks import BACKEND, dtype_of, gradient_function, random_volume, to_numpy
from keras import ops

from keras_mmfnet.kernels import STATISTICS, check_statistics, statistics_over_channels, statistics_over_space
from keras_mmfnet.kernels.reference import EPSILON

pytestmark = pytest.mark.usefixtures("each_kind")

# Channels of the features.
SIZES = (1, 3, 2)


def cut(x, axis, sizes=SIZES):
    """An array of 6 channels in parts of some each."""
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def over_space(features, statistics, axes, training=False):
    """The statistics by name, with sizes of 1 for depth, height and width."""
    axis = 1 if axes == (2, 3, 4) else -1
    values = statistics_over_space(features, statistics, axis, training)
    shape = [-1, 1, 1, 1, 1]
    shape[axis] = values.shape[-1]
    return {name: ops.reshape(values[:, index], shape) for index, name in enumerate(statistics)}


def over_channels(features, statistics, axis, weights=None, training=False):
    """The statistics by name."""
    values = statistics_over_channels(features, statistics, axis, weights, training)
    return dict(zip(statistics, ops.split(values, len(statistics), axis=axis), strict=True))


def check_values(found, x, axis):
    np.testing.assert_allclose(to_numpy(found["avg"]), x.mean(axis, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(found["max"]), x.max(axis, keepdims=True))
    deviation = np.sqrt(x.var(axis, keepdims=True) + EPSILON)
    np.testing.assert_allclose(to_numpy(found["std"]), deviation, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axes", [(1, 2, 3), (2, 3, 4)])
def test_values_over_space(axes, training):
    x = random_volume(2, 6, 4, 5, 6)
    check_values(over_space([ops.convert_to_tensor(x)], STATISTICS, axes, training), x, axes)
    parts = [ops.convert_to_tensor(part) for part in cut(x, 1 if axes == (2, 3, 4) else -1)]
    check_values(over_space(parts, STATISTICS, axes, training), x, axes)


@pytest.mark.parametrize("training", [False, True])
def test_values_over_many_voxels(training):
    # Rectified features: added up one by one, half of the squares would be rounded the same way each time.
    x = np.maximum(random_volume(1, 16, 128, 128, 8), 0)
    found = over_space([ops.convert_to_tensor(x)], ("std",), (1, 2, 3), training)["std"]
    deviation = np.sqrt(x.var((1, 2, 3), dtype="float64", keepdims=True) + EPSILON)
    np.testing.assert_allclose(to_numpy(found), deviation, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("sizes", [SIZES, (2, 2, 2)])
def test_values_over_channels(sizes, axis, training):
    x = random_volume(2, 6, 4, 5, 6)
    shape = [2, 1, 1, 1, 1]
    shape[axis] = 6
    weights = np.abs(random_volume(*shape, seed=1))
    parts = [ops.convert_to_tensor(part) for part in cut(x, axis, sizes)]
    found = over_channels(parts, STATISTICS, axis, ops.convert_to_tensor(weights), training)
    check_values(found, x * weights, axis)
    check_values(over_channels(parts, STATISTICS, axis, training=training), x, axis)
    check_values(over_channels([ops.convert_to_tensor(x)], STATISTICS, axis), x, axis)


def test_order_follows_the_names():
    x = ops.convert_to_tensor(np.array([1.0, 5.0], "float32").reshape(1, 1, 1, 1, 2))
    for names, expected in [(("std", "avg"), [2, 3]), (("max", "std"), [5, 2]), (("max", "avg"), [5, 3])]:
        assert to_numpy(statistics_over_channels([x], names, -1)).ravel() == pytest.approx(expected, rel=1e-5)
        by_space = statistics_over_space([ops.reshape(x, (1, 2, 1, 1, 1))], names, -1)
        assert tuple(by_space.shape) == (1, 2, 1)
        assert to_numpy(by_space).ravel() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_raised(dtype, training):
    # Squares of these overflow in float16, and their mean lies between two numbers of either dtype.
    x = np.array([320.0, -384.0, 324.0], "float32")
    tensor = ops.cast(ops.convert_to_tensor(x.reshape(1, 1, 1, 1, 3)), dtype)
    weights = ops.cast(ops.convert_to_tensor(np.full((1, 1, 1, 1, 3), 1.25, "float32")), dtype)
    for values, factor in [
        (over_channels([tensor], STATISTICS, -1, None, training), 1),
        (over_channels([tensor], STATISTICS, -1, weights, training), 1.25),
        (over_space([ops.reshape(tensor, (1, 3, 1, 1, 1))], STATISTICS, (1, 2, 3), training), 1),
    ]:
        assert [dtype_of(value) for value in values.values()] == ["float32"] * 3
        found = [to_numpy(value).item() for value in values.values()]
        assert found == pytest.approx([x.mean() * factor, 324 * factor, x.std() * factor], rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0, -300.0])
def test_constant(value):
    x = ops.convert_to_tensor(np.full((1, 2, 2, 2, 3), value, "float32"))
    for found in (over_space([x], STATISTICS, (1, 2, 3)), over_channels([x], STATISTICS, -1)):
        for statistic, expected in zip(found.values(), (value, value, EPSILON**0.5), strict=True):
            np.testing.assert_allclose(to_numpy(statistic), np.full(statistic.shape, expected), rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "names"), [("std", ("std",)), (["max", "avg"], ("max", "avg")), (STATISTICS, ("avg", "max", "std"))]
)
def test_names(given, names):
    assert check_statistics(given) == names


@pytest.mark.parametrize("given", [(), "", "mean", ("avg", "avg"), ["avg", "mean"]])
def test_wrong_names(given):
    with pytest.raises(ValueError, match="`statistics` must be one or more of") as error:
        check_statistics(given)
    assert str(error.value).endswith(f"Received: {given!r}")


def by_torch(x, axis):
    """PyTorch's own statistics by name."""
    deviation = (x.var(axis, correction=0, keepdim=True) + EPSILON).sqrt()
    return {"avg": x.mean(axis, keepdim=True), "max": x.amax(axis, keepdim=True), "std": deviation}


def weighted_sum(values, factors):
    """Of the statistics as tensors of the backend."""
    return sum(ops.sum(values[name] * ops.convert_to_tensor(factor)) for name, factor in factors.items())


def torch_weighted_sum(values, factors):
    return sum((values[name] * torch.tensor(factor)).sum() for name, factor in factors.items())


def factors_for(shape, statistics):
    """Random factors by name, with which the statistics are added up to one number."""
    return {name: random_volume(*shape, seed=seed) for seed, name in enumerate(statistics)}


SUBSETS = [STATISTICS, ("max", "avg"), ("std",), ("avg",), ("max",)]


def check_gradient_over_space(x, statistics, axes):
    """Compares the gradients by parts of `x`, and by it whole, with PyTorch's own."""
    channel_axis = 1 if axes == (2, 3, 4) else -1
    factors = factors_for(x.mean(axes, keepdims=True).shape, statistics)

    class Weighted(keras.layers.Layer):
        def call(self, parts, training=None):
            return weighted_sum(over_space(parts, statistics, axes, training), factors)

    found = gradient_function(Weighted())(cut(x, channel_axis))
    tensor = torch.tensor(x, requires_grad=True)
    [expected] = torch.autograd.grad(torch_weighted_sum(by_torch(tensor, axes), factors), tensor)
    np.testing.assert_allclose(np.concatenate(found, channel_axis), expected, rtol=1e-4, atol=1e-6)
    [found] = gradient_function(Weighted())([x])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axes", [(1, 2, 3), (2, 3, 4)])
@pytest.mark.parametrize("statistics", SUBSETS)
def test_gradient_over_space(statistics, axes):
    check_gradient_over_space(random_volume(2, 6, 4, 5, 6), statistics, axes)


def check_gradient_over_channels(x, weights, statistics, axis, sizes=SIZES):
    """Compares the gradients by parts of `x` and by the weights, which may be `None`, with PyTorch's own."""
    factors = factors_for(x.mean(axis, keepdims=True).shape, statistics)
    parts, weights = cut(x, axis, sizes), [] if weights is None else [weights]

    class Weighted(keras.layers.Layer):
        def call(self, inputs, training=None):
            weights, parts = inputs[: -len(SIZES)], inputs[-len(SIZES) :]
            values = over_channels(parts, statistics, axis, *weights, training=training)
            return weighted_sum(values, factors)

    found = gradient_function(Weighted())([*weights, *parts])
    tensors = [torch.tensor(value, requires_grad=True) for value in (*weights, *parts)]
    product = torch.cat(tensors[-len(SIZES) :], axis)
    product = product * tensors[0] if weights else product
    total = torch_weighted_sum(by_torch(product, axis), factors)
    for one, other in zip(found, torch.autograd.grad(total, tensors), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("statistics", SUBSETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_over_channels(weighted, statistics, axis):
    x = random_volume(2, 6, 4, 5, 6)
    shape = [2, 1, 1, 1, 1]
    shape[axis] = 6
    check_gradient_over_channels(x, random_volume(*shape, seed=1) if weighted else None, statistics, axis)


@pytest.mark.parametrize("axis", [-1, 1])
def test_gradient_over_channels_of_parts_alike(axis):
    x = random_volume(2, 6, 7, 5, 6)
    shape = [2, 1, 1, 1, 1]
    shape[axis] = 6
    check_gradient_over_channels(x, random_volume(*shape, seed=1), STATISTICS, axis, (2, 2, 2))


@pytest.mark.parametrize("sizes", [(9, 9, 9), (2, 9, 16)])
def test_over_many_channels(sizes):
    # A compiler is given a few channels one by one, but not these.
    x, weights = random_volume(2, 3, 4, 5, 27), random_volume(2, 1, 1, 1, 27, seed=1)
    parts = [ops.convert_to_tensor(part) for part in cut(x, -1, sizes)]
    check_values(over_channels(parts, STATISTICS, -1, ops.convert_to_tensor(weights), True), x * weights, -1)
    check_gradient_over_channels(x, weights, STATISTICS, -1, sizes)


def test_gradient_where_values_are_equal():
    # Rectified features: many are 0, and of some voxels all.
    x = np.maximum(random_volume(2, 3, 4, 5, 6), 0)
    x[:, 0] = 0
    assert (x.max(-1) == 0).any()
    check_gradient_over_channels(x, np.abs(random_volume(2, 1, 1, 1, 6, seed=1)), STATISTICS, -1)
    # And of each channel many are the largest.
    check_gradient_over_space(np.minimum(random_volume(2, 3, 4, 5, 6), 0), STATISTICS, (1, 2, 3))


@pytest.mark.skipif(BACKEND != "torch", reason="the one backend whose tensors can be overwritten")
@pytest.mark.parametrize("statistics", SUBSETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_features_are_not_overwritten(weighted, statistics):
    x = random_volume(2, 3, 4, 5, 6)
    parts = [torch.tensor(part, requires_grad=True) for part in cut(x, -1, (2, 2, 2))]
    weights = torch.tensor(random_volume(2, 1, 1, 1, 6, seed=1), requires_grad=True) if weighted else None
    before = [tensor.detach().clone() for tensor in (*parts, *([weights] if weighted else []))]
    for values in (over_space(parts, statistics, (1, 2, 3)), over_channels(parts, statistics, -1, weights, True)):
        sum(value.square().sum() for value in values.values()).backward()
    for tensor, old in zip((*parts, *([weights] if weighted else [])), before, strict=True):
        torch.testing.assert_close(tensor.detach(), old, rtol=0, atol=0)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the one backend whose compiler rounds as it likes")
def test_gradient_where_the_largest_was_rounded_otherwise():
    # As when a compiler computes a feature once for the maximum and once more for its gradient.
    from keras_mmfnet.kernels import tensorflow as fast

    x = ops.convert_to_tensor(random_volume(2, 3, 4, 5, 6))
    for axes, gradient_over in [
        ((1, 2, 3), lambda *numbers: fast._grad_over_space((x,), *numbers, (1, 2, 3), -1)),
        (-1, lambda *numbers: fast._grad_over_channels((), (x,), *numbers, -1)),
    ]:
        above = ops.max(x, axis=axes, keepdims=True) + 1e-6
        [found] = gradient_over({"max": above}, ops.ones_like(above), ["max"])
        np.testing.assert_array_equal(to_numpy(found), 0)
