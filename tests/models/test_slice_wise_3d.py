import keras
import numpy as np
import pytest
from checks import fill, random_volume, to_numpy

from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.models import PatchCNN, SiamesePatchCNN, SliceWise3D, UNet2D


def test_each_slice_is_predicted_as_by_itself():
    network = UNet2D("t1", (8, 12), (2, 3))
    fill(network)
    volume = random_volume(2, 3, 8, 12, 1)
    found = to_numpy(SliceWise3D(network, (3, 8, 12))({"t1": volume}))
    assert found.shape == (2, 3, 8, 12, 1)
    for sample in range(2):
        np.testing.assert_allclose(found[sample], to_numpy(network({"t1": volume[sample]})), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (16, 6)])
def test_each_voxel_is_the_centre_of_its_patch(shape):
    network = PatchCNN("t1", shape, (2, 3))
    fill(network)
    volume = random_volume(1, 2, 9, 10, 1)
    found = to_numpy(SliceWise3D(network, (2, 9, 10))({"t1": volume}))
    assert found.shape == (1, 2, 9, 10, 1)
    for z, y, x in [(0, 0, 0), (1, 8, 9), (0, 4, 5)]:
        patch = np.zeros((1, *shape, 1), np.float32)
        for row in range(shape[0]):
            for column in range(shape[1]):
                there = (y + row - shape[0] // 2, x + column - shape[1] // 2)
                if 0 <= there[0] < 9 and 0 <= there[1] < 10:
                    patch[0, row, column] = volume[0, z, there[0], there[1]]
        np.testing.assert_allclose(found[0, z, y, x, 0], to_numpy(network({"t1": patch})).item(), rtol=1e-4)


def test_config_files_and_training(tmp_path):
    network = SiamesePatchCNN(("t1", "t2"), (6, 6), (2, 3))
    fill(network)
    model = SliceWise3D(network, (2, 8, 8), name="rows")
    inputs = {name: random_volume(2, 2, 8, 8, 1, seed=seed) for seed, name in enumerate(model.input)}
    outputs = to_numpy(model(inputs))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again) is SliceWise3D
    assert (again.name, again.patch_shape, type(again.network)) == ("rows", (2, 8, 8), SiamesePatchCNN)
    np.testing.assert_array_equal(to_numpy(again(inputs)), outputs)

    before = network.get_weights()
    model.compile(keras.optimizers.Adam(1e-2), loss=DiceLoss())
    model.fit(inputs, (inputs["t1"] > 0).astype("uint8"), verbose=0)
    assert all((old != new).any() for old, new in zip(before, network.get_weights(), strict=True))


def test_patch_shape_must_be_known():
    with pytest.raises(ValueError, match=r"patch_shape.*Received: \(None, 8, 8\)"):
        SliceWise3D(UNet2D("t1", (8, 8), (2, 3)), (None, 8, 8))
