import dataclasses

import keras
import numpy as np
import pytest
from checks import BACKEND, fill, random_volume

from keras_mmfnet.explain import (
    cohort_shares,
    explain_patient,
    fusion_attention,
    gradient_maps,
    spatial_attention,
    tumour_window,
)
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.models import MMFNet, UNet3D
from keras_mmfnet.plots import plot_attention, plot_heat
from keras_mmfnet.recipe import Recipe

scipy_name = pytest.mark.filterwarnings("ignore:Please import `zoom` from the `scipy.ndimage`:DeprecationWarning")


def network(deaf_to=(), **options):
    model = MMFNet(("t1", "t2"), (4, 16, 16), (2, 3), reduction=2, **options)
    fill(model)
    for layer in model.layers:
        if layer.name.startswith(tuple(f"{name}_" for name in deaf_to)) and layer.name.endswith("_norm"):
            layer.gamma.assign(np.zeros(layer.gamma.shape))
            layer.beta.assign(np.zeros(layer.beta.shape))
    return model


def batch():
    return {name: random_volume(2, 4, 16, 16, 1, seed=seed) for seed, name in enumerate(("t1", "t2"))}


def test_a_network_that_looks_at_one_modality_listens_to_it_alone():
    channel, spatial, share = fusion_attention(network(deaf_to=["t2"]), batch())
    assert list(channel) == list(spatial) == list(share) == ["fusion1", "fusion2", "fusion_bottom"]
    assert channel["fusion2"]["t1"].shape == (2, 3)
    assert spatial["fusion2"].shape == (2, 2, 8, 8)
    for block in share.values():
        np.testing.assert_allclose(block["t1"], 1)
        np.testing.assert_array_equal(block["t2"], 0)
    both = fusion_attention(network(), batch())[2]
    assert all((block["t2"] > 0.02).all() for block in both.values())


def test_shares_of_a_cohort_are_those_about_the_tumours(make_case):
    recipe = Recipe().replace({"data.modalities": ("t1", "t2"), "patches.shape": (16, 16, 16)})
    model = MMFNet(recipe.data.modalities, recipe.patches.shape, (2, 3), reduction=2)
    fill(model)
    cases = [make_case(seed=seed, shape=(24, 24, 24)) for seed in (1, 2)]
    for case in cases:
        case.mask[:] = 0
        case.mask[11, 14, 13] = 1
    del cases[1].images["t2"]
    shares = cohort_shares(model, cases)
    window = tuple(slice(a, a + 16) for a in (3, 6, 5))
    for index, case in enumerate(cases):
        images = {name: case.images[name] if name in case.images else np.zeros(case.shape) for name in ("t1", "t2")}
        inside = {name: image[window][None, ..., None].astype(np.float32) for name, image in images.items()}
        for block, share in fusion_attention(model, inside)[2].items():
            assert shares[block]["t1"][index] == pytest.approx(share["t1"][0], rel=1e-5)
    assert shares["fusion1"]["t1"].shape == (2,)
    _, start = tumour_window(cases[0].images, np.zeros((24, 24, 24)), recipe.patches.shape, (10, 12, 12))
    assert tuple(start) == (2, 4, 4)


def test_spatial_weights_are_averaged_over_windows():
    images = {name: random_volume(6, 16, 16, seed=seed) for seed, name in enumerate(("t1", "t2"))}
    model, options = network(), (images, (4, 16, 16), (2, None, None))
    heat = predict_volume(spatial_attention(model, ["fusion2", "fusion1"]), *options)
    assert heat.shape == (6, 16, 16, 2)
    assert 0 < heat.min() < heat.max() < 1
    for number, block in enumerate(("fusion2", "fusion1")):
        np.testing.assert_array_equal(
            heat[..., number], predict_volume(spatial_attention(model, [block]), *options)[..., 0]
        )


def test_a_network_without_fusion_blocks_is_refused():
    with pytest.raises(ValueError, match=r"must have fusion blocks. Received"):
        fusion_attention(UNet3D("t1", (4, 16, 16), (2, 3)), {})


def test_pictures():
    share = fusion_attention(network(), batch())[2]
    bars = plot_attention(share).axes[0].patches
    np.testing.assert_allclose(sum(bar.get_height() for bar in bars), len(share), rtol=1e-5)
    images = {name: image[0, ..., 0] for name, image in batch().items()}
    heat = np.zeros((4, 16, 16))
    heat[2, 3, 4] = 1
    figure = plot_heat(images, dict.fromkeys(images, heat), spacing_zyx=(4.0, 1.0, 2.0))
    assert figure.get_suptitle() == "slice 3 of 4"
    left, right, bottom, top = figure.axes[0].images[1].get_extent()
    assert (right - left, bottom - top) == (32, 16)
    assert len(figure.axes[0].collections) == 0
    figure = plot_heat(images, dict.fromkeys(images, heat), depth=2, title="A map", truth=heat > 0)
    assert figure.get_suptitle() == "A map\nslice 3 of 4"
    assert [len(axes.collections) for axes in figure.axes[:2]] == [1, 1]
    with pytest.raises(ValueError, match=r"the same shape\. Received: .*map of t2"):
        plot_heat(images, {"t1": heat, "t2": heat[1:]})


def test_maps_are_cropped_to_the_body():
    images = {name: np.full((4, 30, 40), -2.0, np.float32) for name in ("t1", "t2", "missing")}
    images["t1"][:, 10:20, 12:25] = 1
    images["t2"][:, 8:18, 12:30] = 1
    figure = plot_heat(images, dict.fromkeys(images, np.zeros((4, 30, 40))), spacing_zyx=(4.0, 1.0, 2.0))
    for axes in figure.axes[:3]:
        np.testing.assert_allclose(axes.get_xlim(), (2 * 11.5, 2 * 29.5))
        np.testing.assert_allclose(axes.get_ylim(), (19.5, 7.5))


@scipy_name
@pytest.mark.parametrize("mask", [True, False])
def test_all_pictures_of_a_patient(make_case, mask, caplog):
    recipe = Recipe().replace(
        {"data.modalities": ("t1", "t2"), "patches.shape": (4, 16, 16), "network.filters": (2, 3)}
    )
    case = make_case(shape=(12, 24, 24))
    if not mask:
        case = dataclasses.replace(case, masks=None)
    figures = explain_patient(network(), case, recipe, methods=("gradcam", "gradcam++"))
    maps = ["spatial_fusion1", "spatial_fusion2", "spatial_fusion_bottom"]
    gradients = ["gradcam", "gradcampp"] if BACKEND == "tensorflow" else []
    assert list(figures) == ["attention", *maps, *gradients]
    assert BACKEND == "tensorflow" or "KERAS_BACKEND=tensorflow" in caplog.text
    assert all(figure.get_suptitle().startswith("anna: ") for figure in figures.values())
    for name in [*maps, *gradients]:
        (legend,) = figures[name].legends
        assert [text.get_text() for text in legend.get_texts()] == [*(["expert"] if mask else []), "prediction"]
    with pytest.raises(ValueError, match=r"must be of gradcam, gradcam\+\+, saliency\. Received: \['lime'\]"):
        explain_patient(network(), case, recipe, methods=("lime",))


@scipy_name
@pytest.mark.parametrize("labels", [{"edema": 2, "core": 1}, {"whole": (1, 2), "core": 1}])
def test_pictures_of_one_of_several_structures(make_case, labels):
    changes = {"data.modalities": ("t1", "t2"), "data.structures": labels, "patches.shape": (4, 16, 16)}
    recipe = Recipe().replace({**changes, "network.filters": (2, 3)})
    case = make_case(shape=(12, 24, 24))
    case = dataclasses.replace(case, masks=dict.fromkeys(labels, case.mask))
    model = network(structures=recipe.data.structure_names, exclusive=recipe.data.exclusive)
    for methods in ((), ("gradcam", "saliency")) if BACKEND == "tensorflow" else ((),):
        figures = explain_patient(model, case, recipe, methods, structure="core")
        assert list(figures) == ["attention", "spatial_fusion1", "spatial_fusion2", "spatial_fusion_bottom", *methods]
    with pytest.raises(ValueError, match=r"`structure` must be one of .*, core. Received: 'nodes'"):
        explain_patient(model, case, recipe, (), structure="nodes")


@pytest.mark.skipif(BACKEND == "tensorflow", reason="works there")
def test_other_backends_say_how_to_get_gradient_maps():
    with pytest.raises(ValueError, match=r"KERAS_BACKEND=tensorflow and load .* Received: the backend"):
        gradient_maps(network(), batch())


@scipy_name
@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf-keras-vis works on TensorFlow only")
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "saliency"])
def test_gradient_maps_are_hot_in_the_modality_and_the_region_that_decide(method):
    # A network whose output is t1's own features: the bright block decides, t2 counts for nothing.
    inputs = {name: keras.Input((4, 16, 16, 1), name=name) for name in ("t1", "t2")}
    features = {name: keras.layers.Conv3D(1, 1, name=f"{name}_block1_2_norm")(x) for name, x in inputs.items()}
    gain = keras.layers.Conv3D(1, 1, activation="relu", name="gain")
    silent = keras.layers.Rescaling(0.0)(features["t2"])
    model = keras.Model(inputs, gain(keras.layers.Add()([features["t1"], silent])))
    model.filters = (1,)
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([np.ones((1, 1, 1, 1, 1)), np.full(1, -0.5 if layer.name == "gain" else 0.0)])
    images = {name: np.zeros((1, 4, 16, 16, 1), np.float32) for name in inputs}
    images["t1"][:, 1:3, 4:8, 4:8] = 2
    maps = gradient_maps(model, images, method)
    assert maps["t1"][0, 1:3, 4:8, 4:8].min() > 0.9
    assert maps["t1"].sum() == pytest.approx(maps["t1"][0, 1:3, 4:8, 4:8].sum(), abs=1e-4)
    np.testing.assert_array_equal(maps["t2"], 0)
    with pytest.raises(ValueError, match=r"must be one of .* Received: 'lime'"):
        gradient_maps(model, images, "lime")
