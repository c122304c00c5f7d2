import zipfile

import keras
import numpy as np
import pytest

from keras_mmfnet.models import MMFNet, MultiEncoderUNet3D, PatchCNN, UNet3D, load_network
from keras_mmfnet.recipe import Recipe

RECIPE = Recipe().replace({"data.modalities": ("t1", "t2"), "patches.shape": (4, 8, 8), "network.filters": (2,)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of the recipe, and its file."""
    network = MMFNet(RECIPE.data.modalities, RECIPE.patches.shape, RECIPE.network.filters, reduction=2)
    path = tmp_path_factory.mktemp("saved") / "mmfnet.keras"
    network.save(path)
    return network, path


def refused(path, recipe=None):
    with pytest.raises(ValueError, match=r"must be .*Received: ") as caught:
        load_network(path, recipe)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def test_a_network_comes_back(saved):
    network, path = saved
    for found in (load_network(path), load_network(path, RECIPE)):
        assert type(found) is MMFNet
        for one, other in zip(found.get_weights(), network.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_network_for_any_size_fits_every_recipe(tmp_path):
    MultiEncoderUNet3D(RECIPE.data.modalities, (None, None, None), (2,)).save(tmp_path / "any.keras")
    assert load_network(tmp_path / "any.keras", RECIPE).patch_shape == (None, None, None)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_that_breaks_off(saved, tmp_path, share):
    content = saved[1].read_bytes()
    (tmp_path / "cut.keras").write_bytes(content[: int(share * len(content))])
    assert "must be an undamaged .keras file of a network" in refused(tmp_path / "cut.keras")


@pytest.mark.parametrize("part", ["config.json", "model.weights.h5"])
def test_a_damaged_file(saved, tmp_path, part):
    """Whole as an archive, but for one part of it."""
    path = tmp_path / "damaged.keras"
    with zipfile.ZipFile(saved[1]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[: len(content) // 2] if name == part else content)
    assert "must be an undamaged .keras file of a network" in refused(path)


def test_a_file_that_is_not_there_or_no_network(tmp_path):
    refused(tmp_path / "gone.keras")
    (tmp_path / "text.keras").write_text("not a network")
    refused(tmp_path / "text.keras")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: UNet3D("t1", (4, 8, 8), (2,)), "Received: the UNet3D of {'t1': (None, 4, 8, 8, 1)}"),
        (lambda: PatchCNN("t1", (6, 6), (2, 3)), "Received: the PatchCNN of {'t1': (None, None, None, 1)}"),
        (lambda: MMFNet(("t1", "cet1"), (4, 8, 8), (2,), reduction=2), "Received: the MMFNet of {'t1'"),
        (lambda: MMFNet(("t1", "t2"), (4, 16, 8), (2,), reduction=2), "(None, 4, 16, 8, 1)"),
        (lambda: keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]), "the Sequential of "),
    ],
)
def test_a_network_of_another_kind(network, message, tmp_path):
    path = tmp_path / "other.keras"
    network().save(path)
    load_network(path)
    text = refused(path, RECIPE)
    assert "must be a network from patches (4, 8, 8) of t1, t2 to the probabilities of tumour" in text
    assert message in text


@pytest.mark.parametrize("exclusive", [True, False])
def test_structures_exclude_each_other_in_the_network_as_in_the_recipe(exclusive, tmp_path):
    network = MMFNet(("t1", "t2"), (4, 8, 8), (2,), reduction=2, structures=("a", "b"), exclusive=exclusive)
    network.save(tmp_path / "two.keras")
    apart, overlapping = (
        RECIPE.replace({"data.structures": labels}) for labels in ({"a": 1, "b": 2}, {"a": (1, 2), "b": 2})
    )
    right, wrong = (apart, overlapping) if exclusive else (overlapping, apart)
    load_network(tmp_path / "two.keras", right)
    text = refused(tmp_path / "two.keras", wrong)
    assert f"probabilities of a, b (exclusive={not exclusive})" in text
    assert text.endswith(f"(exclusive={exclusive})")


def test_a_network_that_classifies(tmp_path):
    inputs = {name: keras.Input((*RECIPE.patches.shape, 1), name=name) for name in RECIPE.data.modalities}
    x = keras.layers.GlobalAveragePooling3D()(keras.layers.Concatenate()(list(inputs.values())))
    keras.Model(inputs, keras.layers.Dense(1)(x)).save(tmp_path / "classifier.keras")
    assert "the Functional of" in refused(tmp_path / "classifier.keras", RECIPE)


def test_code_in_a_file_is_not_run(tmp_path):
    path, trace = tmp_path / "code.keras", str(tmp_path / "trace")
    leave = eval(f"lambda x: (open({trace!r}, 'w').close(), x)[1]")  # a function by its code alone
    layer = keras.layers.Lambda(leave, output_shape=(3,))
    keras.Sequential([keras.Input((3,)), layer]).save(path)
    (tmp_path / "trace").unlink(missing_ok=True)
    refused(path)
    assert not (tmp_path / "trace").exists()
    # It would have been.
    keras.models.load_model(path, safe_mode=False)(np.zeros((1, 3)))
    assert (tmp_path / "trace").exists()


def test_self_transfer_names_a_damaged_encoder(tmp_path):
    (tmp_path / "t1.keras").write_bytes(b"")
    with pytest.raises(ValueError, match=r"t1.keras: must be an undamaged"):
        MMFNet.from_pretrained_encoders({"t1": tmp_path / "t1.keras", "t2": tmp_path / "t1.keras"})
