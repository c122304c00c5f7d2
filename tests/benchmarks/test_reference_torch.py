import keras
import numpy as np
import pytest
import torch
from checks import fill, named_weights, random_volume, to_numpy

from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.models import MMFNet

FILTERS = (2, 3, 4, 5)
RATE = 1e3  # so that the changes are large beside the weights and lose no digits


@pytest.fixture
def reference_torch(benchmarks):
    import reference_torch

    return reference_torch


@pytest.fixture
def networks(reference_torch):
    """MMFNet and the plain one with the same weights."""
    model = MMFNet(patch_shape=(16, 16, 32), filters=FILTERS, reduction=3)
    fill(model)
    plain = reference_torch.MMFNet(filters=FILTERS, reduction=3)
    reference_torch.load_keras_weights(plain, named_weights(model))
    return model, plain


def test_same_output(networks):
    model, plain = networks
    inputs = {name: random_volume(2, 16, 16, 32, 1, seed=seed) for seed, name in enumerate(model.modalities)}
    with torch.inference_mode():
        expected = plain.eval()([torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in inputs.values()]).numpy()
    assert np.ptp(expected) > 0.05
    np.testing.assert_allclose(np.moveaxis(to_numpy(model(inputs)), -1, 1), expected, rtol=1e-4, atol=1e-6)


def test_same_step(reference_torch, networks):
    """One step of gradient descent on the Dice loss changes all weights and moving averages alike."""
    model, plain = networks
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    inputs = {name: random_volume(2, 16, 16, 32, 1, seed=seed) for seed, name in enumerate(model.modalities)}
    truth = (inputs["t1"] > 0).astype("uint8")
    model.compile(keras.optimizers.SGD(RATE), DiceLoss())
    loss = model.train_on_batch(inputs, truth)

    volumes, truth = ([torch.tensor(np.moveaxis(x, -1, 1).copy()) for x in each] for each in (inputs.values(), [truth]))
    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    expected = reference_torch.dice_loss(truth[0].float(), plain.train()(volumes))
    expected.backward()
    optimizer.step()

    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    trained = reference_torch.MMFNet(filters=FILTERS, reduction=3)
    reference_torch.load_keras_weights(trained, named_weights(model))
    after, changed = plain.state_dict(), []
    # PyTorch averages the sample's variance, Keras the population's.
    for name, value in trained.state_dict().items():
        if (
            "num_batches" in name or "running_var" in name
        ):  # PyTorch's is the sample's variance, Keras' the population's
            continue
        change = (after[name] - before[name]).numpy()
        changed.append(np.abs(change).max() > 0)
        np.testing.assert_allclose((value - before[name]).numpy(), change, rtol=1e-2, atol=1e-3 * np.abs(change).max())
    assert np.mean(changed) > 0.9  # the rest hang on hidden units that are 0 here


def test_weights_of_another_network_are_refused(reference_torch, networks):
    model, _ = networks
    with pytest.raises(ValueError, match=r"Received: also \['fusion1/channel_attention/avg_hidden/bias'"):
        reference_torch.load_keras_weights(
            reference_torch.MMFNet(filters=FILTERS, attention=False), named_weights(model)
        )
