import dataclasses
import shutil

import keras
import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.data import CaseError, Grid, preprocess_case, read_case_folder
from keras_mmfnet.data.windows import gaussian_weights
from keras_mmfnet.inference import masks_of, predict_volume, read_segmentation, segment_case, segment_ensemble
from keras_mmfnet.models import MMFNet
from keras_mmfnet.postprocess import MaskRule, PostProcessing
from keras_mmfnet.recipe import DataRecipe, Recipe


def mean_of_modalities(batch):
    """A stand-in for a network: any callable will do."""
    return np.mean(list(batch.values()), axis=0)


def volumes(shape, count=2):
    rng = np.random.default_rng(0)
    return {f"m{i}": rng.uniform(size=shape).astype(np.float32) for i in range(count)}


@pytest.mark.parametrize("shape", [(16, 20, 24), (21, 20, 24), (37, 20, 24)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_overlapping_windows_give_back_what_a_pointwise_network_sees(shape, batch_size):
    images = volumes(shape)
    result = predict_volume(mean_of_modalities, images, (16, 16, 16), (4, 8, 8), batch_size=batch_size)[..., 0]
    np.testing.assert_allclose(result, np.mean(list(images.values()), axis=0), atol=1e-6)
    assert result.dtype == np.float32


def test_overlapping_windows_are_averaged():
    seen = []

    def number(batch):
        seen.extend(range(len(seen), len(seen) + len(batch["a"])))
        return np.stack([np.full((4, 4, 4, 1), i, np.float32) for i in seen[-len(batch["a"]) :]])

    result = predict_volume(number, {"a": np.zeros((6, 4, 4), np.float32)}, (4, 4, 4), (2, None, None), batch_size=1)
    np.testing.assert_array_equal(result[:, 0, 0, 0], [0, 0, 0.5, 0.5, 1, 1])


def test_every_batch_has_the_same_size():
    sizes = set()

    def call(batch):
        sizes.add(batch["m0"].shape)
        return batch["m0"]

    predict_volume(call, volumes((33, 16, 16)), (16, 16, 16), batch_size=4)
    assert sizes == {(4, 16, 16, 16, 1)}


def test_where_no_window_reaches_the_probability_is_0():
    image = np.zeros((4, 9, 9), np.float32)
    ones = predict_volume(lambda batch: np.ones_like(batch["a"]), {"a": image}, (4, 4, 4), centre=(2, 5, 4))
    assert ones[:, 3:7, 2:6].min() == 1
    assert ones.sum() == 4**3


def test_a_small_volume_is_padded_with_its_background():
    seen = []

    def call(batch):
        seen.append(batch["a"])
        return batch["a"]

    image = np.random.default_rng(0).normal(size=(10, 12, 20)).astype(np.float32)
    result = predict_volume(call, {"a": image}, (16, 16, 16), centre=(5, 6, 10), batch_size=1)
    np.testing.assert_array_equal(result[:, :, 2:18, 0], image[:, :, 2:18])
    assert seen[0][0, 0, 0, 0, 0] == image.min()


def test_windows_are_weighted():
    weights = np.linspace(1, 4, 4, dtype=np.float32)[:, None, None] * np.ones((4, 4, 4), np.float32)
    numbers = iter([0, 1])

    def number(batch):
        return np.full((1, 4, 4, 4, 1), next(numbers), np.float32)

    result = predict_volume(
        number, {"a": np.zeros((6, 4, 4), np.float32)}, (4, 4, 4), (2, None, None), batch_size=1, weights=weights
    )
    # Where the two overlap, the first counts 3 and 4, the second 1 and 2.
    np.testing.assert_allclose(result[:, 0, 0, 0], [0, 0, 1 / 4, 2 / 6, 1, 1])


def test_gaussian_weights():
    weights = gaussian_weights((16, 8, 8))
    assert weights.shape == (16, 8, 8)
    assert weights.dtype == np.float32
    assert weights.max() == 1
    assert weights.min() >= 1e-3
    np.testing.assert_array_equal(weights, weights[::-1, ::-1, ::-1])
    line = weights[:, 4, 4] / weights[8, 4, 4]
    np.testing.assert_allclose(line[9] / line[8], np.exp((0.5**2 - 1.5**2) / 2 / 2**2), rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mirrored_prediction(axis):
    """A network that sees one side only says the same of both sides, when its mirror image is averaged in."""
    half = np.zeros((8, 8, 8), np.float32)
    half[tuple(slice(0, 4) if i == axis else slice(None) for i in range(3))] = 1

    def one_sided(batch):
        return batch["a"] * half[None, ..., None]

    image = {"a": np.random.default_rng(0).uniform(size=(8, 8, 8)).astype(np.float32)}
    result = predict_volume(one_sided, image, (8, 8, 8), flip_axes=(axis,), batch_size=1)
    np.testing.assert_allclose(result[..., 0], image["a"] / 2, rtol=1e-6)


def test_networks_are_averaged_and_their_disagreement_is_told(make_case):
    case, recipe = (
        make_case(),
        Recipe().replace({"data.modalities": ("t1", "t2"), "patches.shape": (16, 16, 16), "patches.flip_axes": ()}),
    )

    def constant(value):
        return lambda batch: np.full_like(batch["t1"], value)

    found = segment_ensemble([constant(0.2), constant(0.9)], case, recipe, gaussian=True)
    images = (found.masks, found.probabilities, found.disagreements)
    arrays = [sitk.GetArrayFromImage(one["tumour"]) for one in images]
    there = arrays[1] > 0
    assert there.any()
    np.testing.assert_allclose(arrays[1][there], 0.55, rtol=1e-5)
    np.testing.assert_allclose(arrays[2][there], 0.35, rtol=1e-4)
    np.testing.assert_array_equal(arrays[0], there)
    mask, probability, disagreement = segment_ensemble([constant(0.9)], case, recipe)
    assert sitk.GetArrayFromImage(mask).any()
    assert sitk.GetArrayFromImage(probability).max() == np.float32(0.9)
    assert not sitk.GetArrayFromImage(disagreement).any()
    with pytest.raises(ValueError, match=r"trained on flipped patches. Received: flip_axes=\(\)"):
        segment_case(constant(0.2), case, recipe, mirror=True)
    with pytest.raises(ValueError, match=r"at least one network. Received: \[\]"):
        segment_ensemble([], case, recipe)


def test_a_tumour_that_may_lie_outside_the_windows_is_noted(make_case):
    case = make_case(shape=(16, 64, 16))
    body = np.zeros(case.shape, np.float32)
    body[:, 8:56] = 1
    case = dataclasses.replace(case, images={"t1": body})

    def notes(height, predict):
        changes = {"data.modalities": ("t1",), "patches.shape": (16, height, 16)}
        return segment_case(predict, case, Recipe().replace(changes)).notes

    def nothing(batch):
        return np.zeros_like(batch["t1"])

    def upper_rows(batch):
        return (np.arange(batch["t1"].shape[2])[:, None, None] < 2) * batch["t1"]

    (note,) = notes(32, nothing)
    assert "the windows cover 67% of the body" in note
    (note,) = notes(32, upper_rows)
    assert "reaches the edge of the windows and may go on beyond" in note
    # The windows hold the body, or the volume.
    assert notes(48, nothing) == notes(48, upper_rows) == notes(64, upper_rows) == ()


def test_images_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"the same shape\. Received: .*\(4, 4, 5\)"):
        predict_volume(mean_of_modalities, {"a": np.zeros((4, 4, 4)), "b": np.zeros((4, 4, 5))}, (4, 4, 4))


def test_a_model_and_its_call_agree():
    keras.utils.set_random_seed(0)
    model = MMFNet(("m0", "m1"), (8, 8, 8), filters=(2, 3))
    images = volumes((8, 8, 8))
    batch = {name: image[None, ..., None] for name, image in images.items()}
    expected = keras.ops.convert_to_numpy(model(batch))[0]
    np.testing.assert_allclose(predict_volume(model, images, (8, 8, 8)), expected, atol=1e-5)


def test_the_mask_lands_on_the_patients_own_grid(cohort):
    # The network is one that finds what is bright in cet1; each odd patient has a grid of its own per modality.
    recipe = Recipe.small()
    case = preprocess_case(read_case_folder(cohort / "patient_01", recipe.data), recipe.data)
    low, high = recipe.data.clip["cet1"]

    def bright(batch):
        return np.clip((batch["cet1"] - low) / (high - low), 0, 1)

    found = segment_case(bright, case, recipe)
    mask, probability = found.label_image, found.probabilities["tumour"]
    own = sitk.ReadImage(str(cohort / "patient_01" / "t1.nii.gz"))
    for image in (mask, probability):
        assert image.GetSize() == own.GetSize()
        for header in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(image, header)(), getattr(own, header)())
    assert (mask.GetPixelID(), probability.GetPixelID()) == (sitk.sitkUInt8, sitk.sitkFloat32)
    mask, probability = (sitk.GetArrayFromImage(image) for image in (mask, probability))
    np.testing.assert_array_equal(mask, probability >= 0.5)
    assert mask.any()


def test_a_patient_without_some_modalities(tiny_cohort, tmp_path):
    """Read, preprocessed and segmented where the network was trained for it, refused with the reason where not."""
    folder = tmp_path / "ann"
    shutil.copytree(tiny_cohort / "patient_00", folder)
    (folder / "t1.nii.gz").unlink()
    (folder / "mask.nii.gz").unlink()
    recipe = Recipe.small().replace({"data.spacing": None, "patches.shape": (16, 16, 16)})
    with pytest.raises(CaseError, match=r"t1: is missing"):
        read_case_folder(folder, recipe.data, require_mask=False)
    able = recipe.replace({"network.modality_dropout": 0.3, "data.allow_missing": True})
    files = read_case_folder(folder, able.data, require_mask=False)
    assert list(files.images) == ["t2", "cet1"]
    with pytest.raises(CaseError, match=r"an image of t1 is expected, or `data.allow_missing`.*Received: t2, cet1"):
        preprocess_case(files, recipe.data)

    case = preprocess_case(files, able.data, cache=tmp_path / "cache")
    assert case.source.matches(Grid.from_image(sitk.ReadImage(str(folder / "t2.nii.gz"))))
    seen = []

    def network(batch):
        seen.append({name: np.abs(image).max() for name, image in batch.items()})
        return np.full_like(batch["t2"], 0.7)

    mask = segment_case(network, case, able).label_image
    assert sitk.GetArrayFromImage(mask).any()
    assert all(batch["t1"] == 0 < min(batch["t2"], batch["cet1"]) for batch in seen)
    for name in ("t2", "cet1"):
        (folder / f"{name}.nii.gz").unlink()
    with pytest.raises(CaseError, match="t1: is missing"):
        read_case_folder(folder, able.data, require_mask=False)


def test_masks_of_exclusive_structures_are_where_they_are_most_probable():
    rng = np.random.default_rng(0)
    drawn = rng.dirichlet((1, 1, 1), 1000)  # background, gtv, node
    recipe = DataRecipe(structures={"gtv": 2, "node": 5})
    masks, labels = masks_of({"gtv": drawn[:, 1], "node": drawn[:, 2]}, recipe)
    np.testing.assert_array_equal(labels, np.array([0, 2, 5])[drawn.argmax(axis=1)])
    np.testing.assert_array_equal(masks["gtv"], labels == 2)
    # Of one structure with the same threshold it is the probability that reaches it.
    low = PostProcessing(structures={"gtv": MaskRule(threshold=0.3)})
    alone, _ = masks_of({"gtv": drawn[:, 1]}, DataRecipe(structures={"gtv": 2}), low)
    np.testing.assert_array_equal(alone["gtv"], drawn[:, 1] >= 0.3)
    high = PostProcessing(structures=dict.fromkeys(recipe.structures, MaskRule(threshold=0.9)))
    strict, _ = masks_of({"gtv": drawn[:, 1], "node": drawn[:, 2]}, recipe, high)
    assert 0 < strict["gtv"].sum() < masks["gtv"].sum()


def test_regions_fit_together_as_their_labels_do():
    recipe = DataRecipe(structures={"whole": (1, 2, 4), "core": (1, 4), "enhancing": 4})
    probabilities = {"whole": [0.9, 0.9, 0.9, 0.1], "core": [0.2, 0.6, 0.7, 0.2], "enhancing": [0.1, 0.2, 0.8, 0.9]}
    masks, labels = masks_of({name: np.array(values) for name, values in probabilities.items()}, recipe)
    np.testing.assert_array_equal(labels, [2, 1, 4, 0])
    for name, expected in {"whole": [1, 1, 1, 0], "core": [0, 1, 1, 0], "enhancing": [0, 0, 1, 0]}.items():
        np.testing.assert_array_equal(masks[name], expected)


def test_several_structures_of_a_patient(make_case):
    case = make_case()
    recipe = Recipe().replace({"data.modalities": ("t1", "t2"), "patches.shape": (16, 16, 16)})
    apart = recipe.replace({"data.structures": {"low": "low", "high": "high"}})
    found = segment_case(lambda batch: np.full((len(batch["t1"]), 16, 16, 16, 2), (0.4, 0.8)), case, apart)
    arrays = {name: sitk.GetArrayFromImage(image) for name, image in found.probabilities.items()}
    np.testing.assert_allclose(arrays["low"], arrays["high"] / 2, rtol=1e-6)
    assert found.label_image is None
    with pytest.raises(ValueError, match=r"one structure can be unpacked\. Received: low, high"):
        list(found)
    assert sitk.GetArrayFromImage(found.masks["high"]).any()
    assert not sitk.GetArrayFromImage(found.masks["low"]).any()
    labelled = recipe.replace({"data.structures": {"low": 3, "high": 7}})
    found = segment_case(lambda batch: np.full((len(batch["t1"]), 16, 16, 16, 2), (0.2, 0.7)), case, labelled)
    assert np.unique(sitk.GetArrayFromImage(found.label_image)).tolist() == [0, 7]


def test_a_truncated_mask_is_refused(tmp_path):
    path = tmp_path / "anna.nii.gz"
    mask = np.random.default_rng(0).integers(0, 2, (20, 30, 40), np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(path))
    [found] = read_segmentation({None: path}, {"tumour": None}).values()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(found), mask)
    path.write_bytes(path.read_bytes()[:2000])
    for structure in (None, "tumour"):
        with pytest.raises(CaseError, match=r"anna.nii.gz: .* Received: a file that breaks off or is damaged"):
            read_segmentation({structure: path}, {"tumour": None})


def test_what_no_network_may_give_is_refused():
    images = {"t1": np.zeros((4, 8, 8), np.float32)}

    def predict(batch):
        found = np.full((*batch["t1"].shape[:4], 1), 0.5, np.float32)
        found[0, 0, 0, 0] = np.nan
        return found

    with pytest.raises(ValueError, match=r"finite probabilities\. Received: NaN or infinity"):
        predict_volume(predict, images, (4, 8, 8), (None, None, None), (2, 4, 4))


def test_rules_of_other_structures_are_refused():
    recipe = DataRecipe(structures={"whole": (1, 2), "core": (1,)})
    probabilities = {name: np.full((2, 3, 4), 0.8) for name in recipe.structures}
    rule = MaskRule()
    for rules in (
        PostProcessing(structures={"core": rule, "whole": rule}, exclusive=False),
        PostProcessing(structures={"whole": rule, "core": rule}),
        PostProcessing(structures={"liver": rule, "spleen": rule}, exclusive=False),
    ):
        with pytest.raises(ValueError, match=r"must have rules of whole, core, exclusive=False. Received: "):
            masks_of(probabilities, recipe, rules)
