import dataclasses

import numpy as np
import pytest
from checks import random_volume, to_numpy

from keras_mmfnet.methods import METHODS, Method, find_method, method_of, register_method
from keras_mmfnet.models import MMFNet, UNet3D
from keras_mmfnet.recipe import Recipe

RECIPE = Recipe().replace({"patches.shape": (4, 8, 8), "network.filters": (2, 3)})
# Tables I and II of the paper: DSC, AP, Dice loss. Two rows are in both.
PAPER = """
patch_cnn_t1 0.5195 0.5320 0.4818
patch_cnn_t2 0.4939 0.4984 0.5074
patch_cnn_cet1 0.5693 0.5828 0.4314
siamese_patch_cnn 0.6083 0.6307 0.3930
unet2d_t1 0.5895 0.6169 0.4119
unet2d_t2 0.5589 0.5777 0.4422
unet2d_cet1 0.6012 0.6142 0.3995
unet3d_t1 0.6817 0.7202 0.3361
unet3d_t2 0.6589 0.6920 0.3610
unet3d_cet1 0.6222 0.6456 0.3921
single_encoder 0.6552 0.6954 0.3556
multi_encoder 0.7005 0.7439 0.3141
mmfnet_base 0.7007 0.7494 0.3129
mmfnet_mlp 0.7083 0.7508 0.3046
mmfnet_mlp_std_channel 0.7095 0.7602 0.3015
mmfnet_mlp_std_spatial 0.7010 0.7482 0.3123
mmfnet_mlp_std 0.7189 0.7648 0.2938
mmfnet_base_transfer 0.7095 0.7589 0.3018
mmfnet_mlp_transfer 0.7128 0.7659 0.2971
mmfnet_mlp_std_transfer 0.7191 0.7721 0.2907
mmfnet_t1_t2 0.7098 0.7598 0.3026
mmfnet_t1_cet1 0.7034 0.7542 0.3079
mmfnet_t2_cet1 0.6943 0.7372 0.3189
"""


def test_every_row_of_the_tables_with_its_numbers():
    expected = {name: [float(n) for n in numbers] for name, *numbers in map(str.split, PAPER.strip().splitlines())}
    assert list(METHODS) == list(expected)
    assert len(METHODS) == 23
    for name, method in METHODS.items():
        assert (method.name, list(method.paper)) == (name, ["dsc", "ap", "dice_loss"])
        assert list(method.paper.values()) == expected[name]
    assert len({method.title for method in METHODS.values()}) == 23


@pytest.mark.parametrize("labels", [{"gtv": 1, "node": 2}, {"whole": (1, 2), "core": 1}], ids=["exclusive", "regions"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_predicts_volumes(name, labels):
    method = METHODS[name]
    recipe = method.adapt(RECIPE.replace({"data.structures": labels}))
    network = method.over_volumes(method.build(recipe, "float32", encoders=None), recipe)
    assert tuple(network.input) == recipe.data.modalities
    volumes = {modality: random_volume(1, 4, 8, 8, 1) for modality in recipe.data.modalities}
    probability = to_numpy(network(volumes))
    assert probability.shape == (1, 4, 8, 8, 2)
    most = probability.sum(axis=-1) if recipe.data.exclusive else probability
    assert 0 <= probability.min() <= most.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["unet2d_t1", "unet3d_t1", "single_encoder", "multi_encoder", "mmfnet_base"])
def test_every_encoder_decoder_takes_the_options_of_the_recipe(name):
    options = {
        "strides": ((1, 2, 2), (2, 2, 2), (1, 2, 2)),
        "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "normalization": "instance",
        "residual": True,
        "deep_supervision": True,
    }
    recipe = RECIPE.replace(
        {"network.filters": (2, 2, 2), **{f"network.{field}": value for field, value in options.items()}}
    )
    network = METHODS[name].build(METHODS[name].adapt(recipe), "float32")
    if name == "unet2d_t1":
        network = network.network
        options |= {field: tuple(level[1:] for level in options[field]) for field in ("strides", "kernel_sizes")}
    assert {field: getattr(network, field) for field in options} == options


def test_modalities():
    single = [name for name in METHODS if name.startswith(("patch_cnn", "unet"))]
    for name in single:
        assert METHODS[name].adapt(RECIPE).data.modalities == (name.rsplit("_", 1)[1],)
    drawn_on_t2 = RECIPE.replace({"data.mask_from": "t2"})
    assert METHODS["unet3d_t1"].adapt(drawn_on_t2).data.mask_from is None
    assert METHODS["unet3d_t2"].adapt(drawn_on_t2).data.mask_from == "t2"
    assert METHODS["mmfnet_t1_t2"].adapt(RECIPE).data.modalities == ("t1", "t2")
    assert METHODS["mmfnet_t1_cet1"].adapt(RECIPE).data.modalities == ("t1", "cet1")
    assert METHODS["mmfnet_t2_cet1"].adapt(RECIPE).data.modalities == ("t2", "cet1")
    assert METHODS["siamese_patch_cnn"].adapt(RECIPE).data.modalities == ("t1", "t2", "cet1")


@pytest.mark.parametrize(
    ("name", "shared", "channel", "spatial", "transfer"),
    [
        ("mmfnet_base", True, ("avg", "max"), ("avg", "max"), False),
        ("mmfnet_mlp", False, ("avg", "max"), ("avg", "max"), False),
        ("mmfnet_mlp_std_channel", False, ("avg", "max", "std"), ("avg", "max"), False),
        ("mmfnet_mlp_std_spatial", False, ("avg", "max"), ("avg", "max", "std"), False),
        ("mmfnet_mlp_std", False, ("avg", "max", "std"), ("avg", "max", "std"), False),
        ("mmfnet_base_transfer", True, ("avg", "max"), ("avg", "max"), True),
        ("mmfnet_mlp_transfer", False, ("avg", "max"), ("avg", "max"), True),
        ("mmfnet_mlp_std_transfer", False, ("avg", "max", "std"), ("avg", "max", "std"), True),
        ("mmfnet_t1_cet1", False, ("avg", "max", "std"), ("avg", "max", "std"), True),
    ],
)
def test_ablations(name, shared, channel, spatial, transfer):
    method = METHODS[name]
    network = method.build(method.adapt(RECIPE), "float32")
    assert isinstance(network, MMFNet)
    block = network.get_layer("fusion1")
    assert (block.shared_mlp, block.channel_statistics, block.spatial_statistics) == (shared, channel, spatial)
    modalities = network.modalities if transfer else ()
    assert dict(method.encoders) == {modality: f"unet3d_{modality}" for modality in modalities}


def test_self_transfer_copies_the_encoders():
    method = METHODS["mmfnet_t1_t2"]
    donors = {name: UNet3D(name, RECIPE.patches.shape, RECIPE.network.filters) for name in ("t1", "t2")}
    network = method.build(method.adapt(RECIPE), "float32", donors)
    for name, donor in donors.items():
        for ours, theirs in zip(network.encoder(name).weights, donor.encoder(name).weights, strict=True):
            np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr("keras_mmfnet.methods.METHODS", dict(METHODS))
    mine = Method(
        "mine", "My network", METHODS["unet3d_t1"].build, {"data.modalities": ("t1",), "network.filters": (4, 5)}
    )
    assert register_method(mine) is mine
    assert mine.adapt(RECIPE) == RECIPE.replace({"data.modalities": ("t1",), "network.filters": (4, 5)})
    with pytest.raises(ValueError, match=r"new\. Received: 'mine'"):
        register_method(mine)
    with pytest.raises(ValueError, match=r"encoders.*Received: \['nobody'\]"):
        register_method(dataclasses.replace(mine, name="other", encoders={"t1": "nobody"}))
    with pytest.raises(ValueError, match=r"samples.*Received: 'points'"):
        dataclasses.replace(mine, samples="points")
    with pytest.raises(ValueError, match=r"`build` or `train`.*Received: 'none' with neither"):
        Method("none", "No network")


def test_the_method_of_a_recipe():
    recipe = RECIPE.replace({"data.modalities": ("t1", "flair"), "network.shared_mlp": True})
    method = method_of(recipe)
    assert method.encoders == {"t1": "unet3d_t1", "flair": "unet3d_flair"}
    network = method.build(method.adapt(recipe), "float32")
    assert (network.modalities, network.shared_mlp) == (("t1", "flair"), True)
    assert not method_of(recipe.replace({"training.self_transfer": False})).encoders


def test_a_single_modality_network_of_any_modality():
    assert find_method("unet3d_t1") is METHODS["unet3d_t1"]
    method = find_method("unet3d_flair")
    assert method.build(method.adapt(RECIPE), "float32").modality == "flair"
    with pytest.raises(ValueError, match=r"one of patch_cnn_t1.*Received: 'unet4d'"):
        find_method("unet4d")
