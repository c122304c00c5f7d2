import weakref

import keras
import numpy as np
import pytest
from checks import BACKEND, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers._gradients import Remade, not_kept, with_gradient
from keras_mmfnet.models import MMFNet

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
def test_what_a_gradient_needs_is_let_go_once_it_is_known():
    import torch

    references = []

    def compute(x):
        squared = x * x
        references.append(weakref.ref(squared))
        return squared * x, {"squared": squared}

    def differentiate(tensors, kept, upstream):
        return (3 * upstream * kept["squared"],)

    volume = torch.arange(3.0, requires_grad=True)
    output = with_gradient(compute, differentiate)(volume)
    assert references[0]() is not None
    output.sum().backward()
    np.testing.assert_array_equal(to_numpy(volume.grad), [0.0, 3.0, 12.0])
    assert references[0]() is None
    assert output.grad_fn is not None  # it is not for want of this that they are gone


def doubled(volume):
    """Twice a volume on PyTorch, and a list that grows by one each time it is made again, as three times the volume."""
    made = []

    def make(tensors, kept):
        made.append(1)
        return 3 * tensors[0].contiguous()

    output = with_gradient(lambda x: (2 * x, {}), lambda tensors, kept, upstream: (2 * upstream,))(volume)
    return output, Remade(output, make), made


@torch_only
def test_what_is_made_again_lies_as_it_lay():
    import torch

    volume = torch.arange(6.0, requires_grad=True).reshape(2, 3).T
    output, remade, made = doubled(volume)
    values = remade.values()
    assert values.stride() == output.stride() == (1, 3)
    np.testing.assert_array_equal(to_numpy(values), 3 * to_numpy(volume))
    assert remade.values() is remade.take() is values
    assert len(made) == 1
    assert remade.take() is not values


@torch_only
def test_only_what_can_be_made_again_is_not_kept():
    import torch

    weights, other = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    output, _, made = doubled(torch.arange(3.0, requires_grad=True))
    with not_kept(output, other):
        result = (weights * output * other).sum()
    result.backward()
    # Of what was made again, though another value, so that it shows; and of the other as it was.
    np.testing.assert_array_equal(to_numpy(weights.grad), [0.0, 6.0, 12.0])
    assert len(made) == 1


@torch_only
def test_a_network_whose_user_recomputes_or_offloads():
    """The gradients are the same where PyTorch's own ways to save memory are used around the layers."""
    import torch
    from torch.utils.checkpoint import checkpoint

    encoder = MMFNet(("t1", "t2"), (4, 8, 8), (2, 3), reduction=2).encoder("t1")
    volume = keras.ops.convert_to_tensor(random_volume(2, 4, 8, 8, 1))
    weights = [weight.value for weight in encoder.trainable_weights]

    def gradients(features):
        return [to_numpy(x) for x in torch.autograd.grad(sum(torch.tanh(x).sum() for x in features), weights)]

    expected = gradients(encoder(volume, training=True))
    recomputed = gradients(checkpoint(lambda x: encoder(x, training=True), volume, use_reentrant=False))
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(encoder(volume, training=True))
    for one, *others in zip(expected, recomputed, offloaded, strict=True):
        assert np.abs(one).max() > 1e-6
        for other in others:
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
