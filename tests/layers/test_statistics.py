import keras
import numpy as np
import pytest
import torch
from checks import dtype_of, gradient_function, random_volume, to_numpy
from keras import ops

from keras_mmfnet.layers._statistics import EPSILON, STATISTICS, check_statistics, statistics_over


def statistics_apart(x, statistics, axis):
    """The statistics as a list; with the channels second where they are not among the axes at the end."""
    channel_axis = 1 if axis in (1, (2, 3, 4)) else -1
    return ops.split(statistics_over(x, statistics, axis, channel_axis), len(statistics), axis=channel_axis)


@pytest.mark.parametrize("axis", [-1, 1, (1, 2, 3), (2, 3, 4)])
def test_values(axis):
    x = random_volume(2, 3, 4, 5, 6)
    average, largest, deviation = statistics_apart(ops.convert_to_tensor(x), STATISTICS, axis)
    np.testing.assert_allclose(to_numpy(average), x.mean(axis, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(largest), x.max(axis, keepdims=True))
    np.testing.assert_allclose(to_numpy(deviation), np.sqrt(x.var(axis, keepdims=True) + EPSILON), rtol=1e-5)


def test_order_follows_the_names():
    x = ops.convert_to_tensor(np.array([[1.0, 5.0]], "float32"))
    for names, expected in [(("std", "avg"), [2, 3]), (("max", "std"), [5, 2]), (("max", "avg"), [5, 3])]:
        values = [to_numpy(value).item() for value in statistics_apart(x, names, 1)]
        assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_raised(dtype):
    # Squares of these overflow in float16, and their mean lies between two numbers of either dtype.
    x = np.array([[320.0, -384.0, 324.0]], "float32")
    values = statistics_apart(ops.cast(ops.convert_to_tensor(x), dtype), STATISTICS, 1)
    assert [dtype_of(value) for value in values] == ["float32"] * 3
    found = [to_numpy(value).item() for value in values]
    assert found == pytest.approx([x.mean(), 324, x.std()], rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0, -300.0])
def test_constant(value):
    x = ops.convert_to_tensor(np.full((1, 2, 2, 2, 3), value, "float32"))
    found = [to_numpy(statistic) for statistic in statistics_apart(x, STATISTICS, (1, 2, 3))]
    for statistic, expected in zip(found, (value, value, EPSILON**0.5), strict=True):
        np.testing.assert_allclose(statistic, np.full((1, 1, 1, 1, 3), expected), rtol=1e-5)


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


def gradient_of(x, statistics, axis):
    """Gradient by `x` of a weighted sum of the statistics: by the layer's formula, and by PyTorch's own."""
    shape = x.mean(axis, keepdims=True).shape
    weights = [random_volume(*shape, seed=seed) for seed in range(len(statistics))]

    class Weighted(keras.layers.Layer):
        def call(self, x):
            values = statistics_apart(x, statistics, axis)
            return sum(
                ops.sum(value * ops.convert_to_tensor(weight)) for value, weight in zip(values, weights, strict=True)
            )

    [found] = gradient_function(Weighted())(x)
    tensor = torch.tensor(x, requires_grad=True)
    by_name = {
        "avg": lambda: tensor.mean(axis, keepdim=True),
        "max": lambda: tensor.amax(axis, keepdim=True),
        "std": lambda: (tensor.var(axis, correction=0, keepdim=True) + EPSILON).sqrt(),
    }
    total = sum((by_name[name]() * torch.tensor(w)).sum() for name, w in zip(statistics, weights, strict=True))
    return found, torch.autograd.grad(total, tensor)[0].numpy()


@pytest.mark.parametrize("axis", [-1, 1, (1, 2, 3), (2, 3, 4)])
@pytest.mark.parametrize("statistics", [STATISTICS, ("max", "avg"), ("std",), ("avg",), ("max",)])
def test_gradient(statistics, axis):
    found, expected = gradient_of(random_volume(2, 3, 4, 5, 6), statistics, axis)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_gradient_where_values_are_equal():
    # Rectified features: many are 0, and of some voxels all.
    x = np.maximum(random_volume(2, 3, 4, 5, 6), 0)
    x[:, 0] = 0
    found, expected = gradient_of(x, STATISTICS, -1)
    assert (x.max(-1) == 0).any()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
