import keras
import numpy as np
import pytest
from checks import BACKEND, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers._gradients import Remade, not_kept, with_gradient

torch_only = pytest.mark.skipif(BACKEND != "torch", reason="the one backend on which it is used")


def test_a_gradient_by_hand():
    """The gradients are those written down, whatever they are, and what is kept for them comes by its name."""

    def compute(x, y):
        return x * y, {"twice": 2 * x, "thrice": 3 * y}

    def differentiate(tensors, kept, upstream):
        x, y = tensors
        return upstream * (kept["thrice"] + x), upstream * (kept["twice"] + y)

    class Product(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=shape, initializer="random_normal")

        def call(self, x):
            return with_gradient(compute, differentiate)(x, self.weight + 0.0)

    x, layer = random_volume(2, 3), Product()
    layer.build((2, 3))
    y = to_numpy(layer.weight)
    np.testing.assert_allclose(to_numpy(layer(x)), x * y, rtol=1e-6)
    by_x, by_y = gradient_function(layer)(keras.ops.convert_to_tensor(x))
    # By each the gradient of the mean over six values.
    np.testing.assert_allclose(to_numpy(by_x), (3 * y + x) / 6, rtol=1e-5)
    np.testing.assert_allclose(to_numpy(by_y), (2 * x + y) / 6, rtol=1e-5)


@torch_only
def test_what_is_made_again_lies_as_it_lay():
    import torch

    output = torch.arange(6.0).reshape(2, 3).T.clone(memory_format=torch.preserve_format)
    made = []

    def make():
        made.append(1)
        return torch.arange(6.0).reshape(2, 3).T.contiguous()

    remade = Remade(output, make)
    values = remade.values()
    assert values.stride() == output.stride() != make().stride()
    np.testing.assert_array_equal(to_numpy(values), to_numpy(output))
    assert remade.values() is remade.take() is values
    assert len(made) == 2  # with the one above
    assert remade.take() is not values


@torch_only
def test_only_what_can_be_made_again_is_not_kept():
    import torch

    weights, other = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    volume = torch.arange(3.0)
    Remade(volume, lambda: torch.tensor([10.0, 11.0, 12.0]))
    with not_kept(volume, other):
        result = (weights * volume * other).sum()
    result.backward()
    # Of what was made again, though another value, so that it shows; and of the other as it was.
    np.testing.assert_array_equal(to_numpy(weights.grad), [20.0, 22.0, 24.0])
