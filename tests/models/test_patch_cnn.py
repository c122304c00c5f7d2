import keras
import numpy as np
import pytest
import torch
from checks import POLICIES, TOLERANCES, count, dtype_of, fill, random_volume, to_numpy

from keras_mmfnet.models import PatchCNN, SiamesePatchCNN

SHAPE, FILTERS = (16, 20), (2, 3, 4)
# Less 4 and halved, twice.
KERNEL = (1, 2)


def conv(inputs, filters, kernel=9):
    """Trainable weights of a convolution without bias and of the normalization after it."""
    return kernel * inputs * filters + 2 * filters


BRANCH = conv(1, 2) + conv(2, 2) + conv(2, 3) + conv(3, 3)


@pytest.mark.parametrize(
    ("model_class", "modalities", "trainable", "moving"),
    [
        (PatchCNN, {"modality": "flair"}, BRANCH + conv(3, 4, kernel=2) + 5, 2 * (2 * 2 + 2 * 3 + 4)),
        (
            SiamesePatchCNN,
            {"modalities": ("flair", "dwi")},
            2 * BRANCH + conv(6, 4, kernel=2) + 5,
            2 * (2 * (2 * 2 + 2 * 3) + 4),
        ),
    ],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_model(model_class, modalities, trainable, moving, policy, tmp_path):
    arguments = {**modalities, "patch_shape": SHAPE, "filters": FILTERS}
    model = model_class(**arguments, dtype=policy)
    fill(model)
    assert (count(model.trainable_weights), count(model.non_trainable_weights)) == (trainable, moving)
    inputs = {name: random_volume(2, 18, 23, 1, seed=seed) for seed, name in enumerate(model.input)}
    outputs = model(inputs)
    assert dtype_of(outputs) == "float32"
    outputs = to_numpy(outputs)
    assert outputs.shape == (2, 3, 4, 1)
    assert 0 <= outputs.min() < outputs.max() <= 1
    single = model_class(**arguments, dtype="float32")
    single.set_weights(model.get_weights())
    assert np.abs(outputs - to_numpy(single(inputs))).max() <= TOLERANCES.get(policy, 0)

    config = model.get_config()
    assert {name: config[name] for name in arguments} == arguments
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_config() == config
    np.testing.assert_array_equal(to_numpy(again(inputs)), outputs)


def test_one_pass_gives_what_every_patch_gets_alone():
    model = SiamesePatchCNN(("t1", "t2"), SHAPE, FILTERS)
    fill(model)
    inputs = {name: random_volume(1, 21, 25, 1, seed=seed) for seed, name in enumerate(model.input)}
    whole = to_numpy(model(inputs))
    assert whole.shape == (1, 6, 6, 1)
    corners = [(row, column) for row in range(6) for column in range(6)]
    patches = {
        name: np.concatenate([x[:, row : row + 16, column : column + 20] for row, column in corners])
        for name, x in inputs.items()
    }
    np.testing.assert_allclose(to_numpy(model(patches)).reshape(6, 6), whole[0, ..., 0], rtol=1e-5)


def test_equals_a_classifier_that_pools():
    """The same weights in a plain PyTorch classifier, with max-pooling that skips and a fully connected layer."""
    model = PatchCNN("t1", SHAPE, FILTERS)
    fill(model)
    patch = random_volume(3, *SHAPE, 1)

    def weights(layer):
        return [torch.from_numpy(np.array(value)) for value in model.get_layer(layer).get_weights()]

    def block(x, name):
        (kernel,) = weights(f"{name}_conv")
        x = torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1))
        gamma, beta, mean, variance = weights(f"{name}_norm")
        return torch.relu(torch.nn.functional.batch_norm(x, mean, variance, gamma, beta, eps=1e-5))

    x = torch.from_numpy(patch).permute(0, 3, 1, 2)
    for level in (1, 2):
        for step in (1, 2):
            x = block(x, f"t1_block{level}_{step}")
        x = torch.nn.functional.max_pool2d(x, 2)
    assert x.shape == (3, 3, *KERNEL)
    x = block(x, "dense")
    kernel, bias = weights("probability")
    expected = torch.sigmoid(torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias))
    np.testing.assert_allclose(to_numpy(model({"t1": patch})).ravel(), expected.numpy().ravel(), rtol=1e-4)


@pytest.mark.parametrize("shape", [(32,), (32, 32, 32), (30, 32), (8, 8), (32, None)])
def test_patch_shape_must_fit(shape):
    with pytest.raises(ValueError, match=r"patch_shape.*Received: \(") as error:
        PatchCNN("t1", shape)
    assert str(error.value).endswith(str(shape))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"filters.*Received"):
        PatchCNN("t1", (32, 32), ())
    with pytest.raises(ValueError, match=r"modalities.*Received"):
        SiamesePatchCNN(("t1", "t1"))
