import dataclasses
import itertools
import os
import sys
import warnings

import keras
import numpy as np
import psutil
import pytest
import SimpleITK as sitk

from keras_mmfnet._machine import available_memory
from keras_mmfnet.data import augment, cache, patch_dataset, patches
from keras_mmfnet.data.patches import centre_patches
from keras_mmfnet.data.windows import window_starts
from keras_mmfnet.recipe import PatchRecipe, Recipe

RECIPE = Recipe().replace(
    {
        "data.modalities": ("t1", "t2"),
        "patches.shape": (16, 16, 16),
        "training.batch_size": 3,
        "patches.offset_fraction": (0.25, 0.125, 0.125),
    }
)


def batches(dataset, count=None):
    """Batches as NumPy arrays."""
    return [
        ({name: image.numpy() for name, image in images.items()}, mask.numpy())
        for images, mask in itertools.islice(dataset, count)
    ]


def joined(dataset, count=None):
    found = batches(dataset, count)
    images = {name: np.concatenate([images[name] for images, _ in found]) for name in found[0][0]}
    return images, np.concatenate([mask for _, mask in found])


def test_batches_have_the_documented_shapes(make_case):
    images, mask = batches(
        patch_dataset([make_case()], RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed),
        1,
    )[0]
    assert list(images) == ["t1", "t2"]
    assert {image.shape for image in images.values()} == {(3, 16, 16, 16, 1)} == {mask.shape}
    assert {image.dtype for image in images.values()} == {np.dtype("float32")}
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}


def test_without_training_each_window_comes_once_as_it_is(make_case):
    cases = [make_case("anna", (21, 24, 28), seed=1), make_case("bert", (16, 30, 20), seed=2)]
    images, mask = joined(
        patch_dataset(
            cases, RECIPE.patches, training=False, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
        )
    )
    windows = [
        (case, tuple(slice(a, a + 16) for a in start))
        for case in cases
        for start in window_starts(case.shape, (16, 16, 16), RECIPE.patches.stride, case.centre)
    ]
    assert len(mask) == len(windows) == 4
    for name in ("t1", "t2"):
        expected = np.stack([case.images[name][window] for case, window in windows])[..., None]
        np.testing.assert_allclose(images[name], expected, atol=2e-3)  # kept in float16
    np.testing.assert_array_equal(mask, np.stack([case.mask[window] for case, window in windows])[..., None])


def test_chosen_modalities_only(make_case):
    images, _ = batches(
        patch_dataset(
            [make_case()], RECIPE.patches, ["t2"], batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
        ),
        1,
    )[0]
    assert list(images) == ["t2"]


def test_a_sequence_that_a_patient_lacks_is_zeros(make_case):
    ann, bob = make_case("ann", seed=1), make_case("bob", seed=2)
    bob = dataclasses.replace(bob, images={"t2": bob.images["t2"]})
    for training in (True, False):
        images, _ = joined(patch_dataset([bob, ann], RECIPE.patches, training=training), 4 if training else None)
        assert sorted(images) == ["t1", "t2"]
        lacking = ~images["t1"].any(axis=(1, 2, 3, 4))
        assert 0 < lacking.mean() < 1
        assert images["t2"].any(axis=(1, 2, 3, 4)).all()


def test_the_same_seed_gives_the_same_batches(make_case):
    cases = [make_case(seed=seed) for seed in range(3)]
    first, again = (
        joined(
            patch_dataset(cases, RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed), 4
        )
        for _ in range(2)
    )
    other = joined(
        patch_dataset(
            cases,
            RECIPE.replace({"training.seed": 1}).patches,
            batch_size=RECIPE.replace({"training.seed": 1}).training.batch_size,
            seed=RECIPE.replace({"training.seed": 1}).training.seed,
        ),
        4,
    )
    np.testing.assert_array_equal(first[0]["t1"], again[0]["t1"])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0]["t1"], other[0]["t1"])


def test_a_resumed_training_gets_the_batches_it_missed(make_case):
    cases = [make_case(seed=seed) for seed in range(3)]
    whole = batches(
        patch_dataset(cases, RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed), 5
    )
    rest = batches(
        patch_dataset(
            cases, RECIPE.patches, first_batch=3, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
        ),
        2,
    )
    for (images, mask), (expected_images, expected_mask) in zip(rest, whole[3:], strict=True):
        np.testing.assert_array_equal(images["t2"], expected_images["t2"])
        np.testing.assert_array_equal(mask, expected_mask)


def test_every_pass_has_each_window_once_in_an_order_of_its_own(make_case):
    still = RECIPE.replace(
        {
            "training.batch_size": 1,
            "patches.offset_fraction": (0, 0, 0),
            "patches.max_rotation": 0,
            "patches.flip_axes": (),
        }
    )
    cases = [make_case(seed=seed, shape=(28, 16, 16)) for seed in range(3)]
    windows = len(
        joined(
            patch_dataset(
                cases, still.patches, training=False, batch_size=still.training.batch_size, seed=still.training.seed
            )
        )[1]
    )
    images, _ = joined(
        patch_dataset(cases, still.patches, batch_size=still.training.batch_size, seed=still.training.seed), 3 * windows
    )
    passes = [[patch.tobytes() for patch in images["t1"][i : i + windows]] for i in range(0, 3 * windows, windows)]
    assert all(len(set(one)) == windows for one in passes)
    assert all(set(one) == set(passes[0]) for one in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_rotation": 20, "max_scaling": 0.3, "flip_axes": (0, 1, 2)},
        {"max_rotation": 20, "max_scaling": 0.3, "flip_axes": (0, 1, 2), "in_plane": False},
        {"max_rotation": 20, "max_scaling": 0.3, "misalignment": (0.0, 1e-4)},
        {"max_rotation": 20, "max_scaling": 0.3, "misalignment": (0.0, 1e-4), "in_plane": False},
    ],
)
def test_modalities_and_masks_are_moved_together(make_case, changes):
    recipe = RECIPE.patches.model_copy(update=changes)
    case = make_case(shape=(24, 40, 40))
    masks = {"core": np.roll(case.mask, 3, axis=2), "edema": np.roll(case.mask, (-2, 2), axis=(0, 1))}
    case = dataclasses.replace(case, masks=masks)
    case.images.update(t1=masks["core"].astype(np.float32), t2=masks["edema"].astype(np.float32))
    images, found = joined(patch_dataset([case], recipe, batch_size=3), 10)
    assert found.shape == (30, 16, 16, 16, 2)
    for channel, name in enumerate(("t1", "t2")):
        # But for voxels within a rounding error of one half.
        clear = np.abs(images[name][..., 0] - 0.5) > 1e-3
        np.testing.assert_array_equal((images[name][..., 0] > 0.5)[clear], (found[..., channel] == 1)[clear])
        assert clear.mean() > 0.95
        assert len({m.tobytes() for m in found[..., channel]}) > 10  # they do move


@pytest.mark.parametrize("in_plane", [True, False])
def test_a_misalignment_moves_each_sequence_but_the_reference(make_case, in_plane):
    recipe = RECIPE.patches.model_copy(update={"misalignment": (3.0, 0.0), "in_plane": in_plane})
    case = make_case(shape=(24, 40, 40))
    ramp = np.indices(case.shape).astype(np.float32)
    case.images.update(t1=ramp[2], t2=ramp[2], cet1=ramp[2])
    images, mask = joined(patch_dataset([case], recipe, batch_size=3), 15)
    still = recipe.model_copy(update={"misalignment": (0.0, 0.0)})
    expected, expected_mask = joined(patch_dataset([case], still, batch_size=3), 15)
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_allclose(images["t1"], expected["t1"], atol=1e-4)
    # Of a ramp of one a voxel of 1 mm, the difference is the shift, once for the whole patch.
    shifts = {name: (images[name] - expected[name])[:, 4:12, 4:12, 4:12, 0].reshape(45, -1) for name in ("t2", "cet1")}
    for shift in shifts.values():
        # A rotated and flipped shift in plane, which the rotation by a few degrees changes little.
        np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=2e-2)
        assert 2.5 < np.abs(shift).max() < 3.3
    assert abs(np.corrcoef(shifts["t2"][:, 0], shifts["cet1"][:, 0])[0, 1]) < 0.5


def test_intensities_change_by_sequence_and_neither_masks_nor_missing_ones(make_case):
    changes = {name: getattr(PatchRecipe.strong(), name) for name in augment.INTENSITIES}
    strong = RECIPE.patches.model_copy(update=changes | {"intensity_probability": 0.5})
    ann, bob = make_case("ann", seed=1), make_case("bob", seed=2)
    bob = dataclasses.replace(bob, images={"t2": bob.images["t2"]})
    images, mask = joined(patch_dataset([ann, bob], strong, batch_size=3), 8)
    plain, plain_mask = joined(patch_dataset([ann, bob], RECIPE.patches, batch_size=3), 8)
    np.testing.assert_array_equal(mask, plain_mask)
    lacking = ~plain["t1"].any(axis=(1, 2, 3, 4))
    assert 0 < lacking.mean() < 1
    assert not images["t1"][lacking].any()
    changed = {name: (images[name] != plain[name]).any(axis=(1, 2, 3, 4)) for name in images}
    assert changed["t2"].mean() > 0.9  # one of seven kinds at least
    assert all(np.isfinite(image).all() for image in images.values())


@pytest.mark.parametrize("in_plane", [True, False])
def test_a_share_of_the_patches_is_at_structures(make_case, in_plane):
    """Even at those that all windows miss."""
    changes = {"foreground": 1 / 3, "max_scaling": 0.1, "in_plane": in_plane}
    placed = RECIPE.patches.model_copy(update=changes)
    cases = [make_case("ann", (20, 60, 60), seed=1), make_case("bob", (20, 60, 60), seed=2), make_case("cid", seed=3)]
    for corner, case in enumerate(cases):
        masks = {"core": np.zeros_like(case.mask), "edema": np.zeros_like(case.mask)}
        if corner < 2:  # in a corner of the first two; the third has no structure
            masks["core"][2:5, 50 * corner :][:, 4:7, -7:-4] = 1
            masks["edema"][15:18, 50 * corner :][:, 4:7, -7:-4] = 1
        cases[corner] = dataclasses.replace(case, masks=masks)
    with pytest.warns(UserWarning, match=r"ann \(100%\), bob \(100%\)"):
        datasets = [patch_dataset(cases, placed, batch_size=4, first_batch=first) for first in (0, 13)]
    images, masks = joined(datasets[0], 30)
    rest, rest_masks = joined(datasets[1], 5)
    at = np.arange(120) % 3 == 2
    there = masks.any(axis=(1, 2, 3))
    assert not there[~at].any()
    assert there[at].any(axis=1).mean() > 0.9
    assert there[at].mean(axis=0).min() > 0.25
    np.testing.assert_array_equal(images["t1"][52:72], rest["t1"])
    np.testing.assert_array_equal(masks[52:72], rest_masks)


def test_a_patch_at_a_structure_stays_where_windows_are(make_case):
    still = {"offset_fraction": (0, 0, 0), "max_rotation": 0, "flip_axes": (), "foreground": 1.0}
    recipe = RECIPE.patches.model_copy(update=still | {"stride": (4, None, 12)})
    case = make_case(shape=(40, 30, 60))
    z, y, x = np.indices(case.shape).astype(np.float32)
    mask = np.zeros(case.shape, np.uint8)
    mask[10, 14, [3, 30]] = mask[39, 14, 59] = 1
    case = dataclasses.replace(case, images={"t1": z, "t2": y, "cet1": x}, masks={"tumour": mask})
    images, _ = joined(patch_dataset([case], recipe, batch_size=4), 20)
    firsts = {tuple(int(images[name][n, 0, 0, 0, 0]) for name in ("t1", "t2", "cet1")) for n in range(80)}
    # Centred on the voxel between the first and the last window.
    assert firsts == {(2, 7, 0), (2, 7, 22), (24, 7, 44)}


@pytest.mark.parametrize("in_plane", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_voxels_read_from_files_give_the_same_patches(make_case, tmp_path, in_plane, training):
    cases = [
        make_case("anna", (21, 24, 28), seed=1),
        make_case("bert", (9, 15, 40), seed=2),
        make_case("cleo", (16, 60, 20), (8, 20, 10), seed=3),
    ]
    cases[1].images.pop("t2")
    recipe = PatchRecipe.strong(
        shape=(16, 16, 16), stride=(8, None, 8), in_plane=in_plane, flip_axes=(0, 2), misalignment=(1.5, 3.0)
    )
    entries = [tmp_path / case.name for case in cases]
    for case, entry in zip(cases, entries, strict=True):
        cache.store(case, entry)
    cases = [cache.load(entry, entry.name) for entry in entries]
    options = {"modalities": ("t1", "t2"), "training": training, "seed": 3}
    with warnings.catch_warnings(action="ignore"):  # one is smaller than the patch
        in_memory = joined(patch_dataset(cases, recipe, **options), 6)
        read = joined(patch_dataset(cases, recipe.model_copy(update={"memory": 0.0}), **options), 6)
    for name in ("t1", "t2"):
        assert np.ptp(read[0][name]) > 1
        np.testing.assert_array_equal(read[0][name], in_memory[0][name])
    np.testing.assert_array_equal(read[1], in_memory[1])
    assert read[1].any()


def test_voxels_are_in_memory_if_they_take_less_than_half_of_what_is_given(make_case, monkeypatch):
    def in_memory(memory):
        recipe = RECIPE.patches.model_copy(update={"memory": memory})
        return patches._load([make_case()], recipe, ("t1", "t2"), training=False, parts=1)[0].volume is not None

    size = 20 * 16 * 16 * 3 * 2  # slices, rows and columns of the windows, channels, bytes
    assert [in_memory(2.1 * size / 1e9), in_memory(1.9 * size / 1e9)] == [True, False]
    # Without a number, a quarter of the machine's memory.
    assert 1e8 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(patches, "available_memory", lambda: 7.9 * size)
    assert not in_memory(None)
    monkeypatch.setattr(patches, "available_memory", lambda: 8.1 * size)
    assert in_memory(None)


@pytest.mark.skipif(sys.platform != "linux", reason="memory without mapped files is known on Linux only")
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the same on every backend")
def test_memory_does_not_grow_with_the_number_of_patients(make_case, tmp_path):
    cache.store(make_case("anna", (32, 64, 64)), tmp_path / "entry")
    recipe = PatchRecipe(shape=(16, 32, 32), stride=(8, 16, 16), memory=0.05)

    def memory():
        now = psutil.Process().memory_info()
        return (now.rss - now.shared) / 1e6  # without mapped files

    def read(count):
        # Their voxels take 0.65 MB each in memory, 3.3 GB in all.
        cases = [cache.load(tmp_path / "entry", f"patient {number}") for number in range(count)]
        patches = iter(patch_dataset(cases, recipe, batch_size=4, seed=0))
        for _ in range(200):
            next(patches)
        return memory()

    few = read(50)
    assert read(5000) < few + 300


def test_offsets_reach_their_limits_and_no_further(make_case):
    recipe = RECIPE.replace({"patches.max_rotation": 0, "patches.flip_axes": ()})
    case = make_case(shape=(60, 40, 40), centre=(30, 20, 20))
    z, y, x = np.indices(case.shape).astype(np.float32)
    case.images.update(t1=y, t2=x)
    images, _ = joined(
        patch_dataset([case], recipe.patches, batch_size=recipe.training.batch_size, seed=recipe.training.seed), 100
    )
    for name in ("t1", "t2"):
        corners = images[name][:, 0, 0, 0, 0] - 12
        assert set(corners) == set(range(-2, 3))
    case.images.update(t1=z)
    first = joined(
        patch_dataset([case], recipe.patches, ["t1"], batch_size=recipe.training.batch_size, seed=recipe.training.seed),
        100,
    )[0]["t1"][:, 0, 0, 0, 0]
    assert set(first) <= set(range(45))
    assert len({value % 4 for value in first}) == 4


def test_patches_stay_within_the_patients_slices(make_case):
    cases = [make_case(seed=seed, shape=(18, 20, 20)) for seed in (1, 2)]
    for value, case in enumerate(cases):
        case.images["t1"] = np.full(case.shape, value, np.float32)
    images, _ = joined(
        patch_dataset(cases, RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed), 30
    )
    assert all(np.ptp(patch) < 1e-6 for patch in images["t1"])
    assert set(np.round(images["t1"][:, 0, 0, 0, 0])) == {0, 1}


@pytest.mark.parametrize("axis", [1, 2])
def test_mirroring_is_along_the_axis_of_the_recipe(make_case, axis):
    recipe = RECIPE.replace(
        {"patches.offset_fraction": (0, 0, 0), "patches.max_rotation": 0, "patches.flip_axes": axis}
    )
    case = make_case(shape=(16, 16, 16))
    images, mask = joined(
        patch_dataset([case], recipe.patches, batch_size=recipe.training.batch_size, seed=recipe.training.seed), 20
    )
    plain = case.images["t1"].astype(np.float16).astype(np.float32)
    mirrored = np.flip(plain, axis)
    found = [np.array_equal(p[..., 0], plain) + 2 * np.array_equal(p[..., 0], mirrored) for p in images["t1"]]
    assert set(found) == {1, 2}
    assert 0.25 < np.mean(np.array(found) == 2) < 0.75
    for kind, m in zip(found, mask, strict=True):
        np.testing.assert_array_equal(m[..., 0], case.mask if kind == 1 else np.flip(case.mask, axis))


def test_rotation_is_simpleitks(make_case):
    recipe = RECIPE.replace({"patches.offset_fraction": (0, 0, 0), "patches.max_rotation": 20, "patches.flip_axes": ()})
    case = make_case(shape=(16, 48, 48))
    y, x = np.indices((48, 48)) / 6
    case.images.update(t1=np.broadcast_to(np.sin(x) + np.cos(1.3 * y), case.shape).astype(np.float32))
    images, _ = joined(
        patch_dataset([case], recipe.patches, ["t1"], batch_size=recipe.training.batch_size, seed=recipe.training.seed),
        4,
    )
    image = sitk.GetImageFromArray(case.images["t1"][0])
    angles = []
    for patch in images["t1"]:
        # The angle that fits best must fit to the rounding of float16.
        errors = []
        for degrees in np.arange(-20, 20.01, 0.1):
            turn = sitk.Euler2DTransform((23.5, 23.5), np.radians(degrees))
            turned = sitk.GetArrayFromImage(sitk.Resample(image, turn, sitk.sitkLinear))
            errors.append(np.abs(turned[16:32, 16:32] - patch[0, ..., 0]).max())
        assert min(errors) < 0.01
        angles.append(np.argmin(errors) / 10 - 20)
    assert np.ptp(angles) > 5


def test_a_small_volume_is_padded_with_its_background_and_named(make_case):
    case = make_case("carla", shape=(10, 12, 20))
    with pytest.warns(UserWarning, match=r"smaller than the patch \(16, 16, 16\).*carla"):
        images, mask = joined(
            patch_dataset(
                [case], RECIPE.patches, training=False, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
            )
        )
    patch = images["t1"][0, ..., 0]
    np.testing.assert_allclose(patch[3:13, 2:14], case.images["t1"][:, :, 2:18], atol=2e-3)
    outside = np.ones(patch.shape, bool)
    outside[3:13, 2:14] = False
    np.testing.assert_allclose(patch[outside], case.images["t1"].min(), atol=2e-3)
    assert not mask[0, ..., 0][outside].any()


def test_a_tumour_outside_the_windows_is_named(make_case):
    case = make_case("doris", shape=(16, 60, 60), centre=(8, 52, 52))
    with pytest.warns(UserWarning, match=r"outside all windows: doris \(100%\)"):
        patch_dataset([case], RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed)


def test_patients_without_a_mask_are_refused(make_case):
    case = dataclasses.replace(make_case("emil"), masks=None)
    with pytest.raises(ValueError, match=r"mask.*Received: .*emil"):
        patch_dataset([case], RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed)
    with pytest.raises(ValueError, match="at least one patient"):
        patch_dataset([], RECIPE.patches, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed)


def test_the_gpu_is_left_to_the_other_backends():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow is the backend")
    import tensorflow as tf

    assert tf.config.get_visible_devices("GPU") == []


def test_centre_patches_are_cut_about_their_centres(make_case):
    volumes = patch_dataset(
        [make_case(seed=seed) for seed in range(3)],
        RECIPE.patches,
        batch_size=RECIPE.training.batch_size,
        seed=RECIPE.training.seed,
    )
    shape, count = (7, 4), 6
    (images, mask), (patches, labels) = (
        batches(dataset, 1)[0] for dataset in (volumes, centre_patches(volumes, shape, count))
    )
    assert {patch.shape for patch in patches.values()} == {(3 * count, 7, 4, 1)}
    assert labels.shape == (3 * count, 1, 1, 1)
    assert labels.dtype == np.uint8
    for sample in range(3):
        # Every patch is found in its volume, padded with 0, at a voxel of its class, in both modalities.
        padded = {name: np.pad(image[sample, ..., 0], ((0, 0), (3, 3), (2, 1))) for name, image in images.items()}
        for patch in range(sample * count, (sample + 1) * count):
            there = [
                (z, y, x)
                for z, y, x in np.ndindex(16, 16, 16)
                if padded["t1"][z, y + 3, x + 2] == patches["t1"][patch, 3, 2, 0]
                and np.array_equal(padded["t1"][z, y : y + 7, x : x + 4], patches["t1"][patch, ..., 0])
            ]
            assert len(there) == 1
            z, y, x = there[0]
            np.testing.assert_array_equal(padded["t2"][z, y : y + 7, x : x + 4], patches["t2"][patch, ..., 0])
            assert labels[patch].item() == mask[sample, z, y, x, 0]
        assert mask[sample].sum() >= 3
        assert labels[sample * count : (sample + 1) * count].sum() == 3


def test_centre_patches_are_a_function_of_seed_and_number(make_case):
    cases = [make_case(seed=seed) for seed in range(3)]

    def labels(first=0, seed=0):
        volumes = patch_dataset(
            cases, RECIPE.patches, first_batch=first, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
        )
        return [images["t1"] for images, _ in batches(centre_patches(volumes, (5, 5), 4, seed, first), 3)]

    np.testing.assert_array_equal(labels(), labels())
    np.testing.assert_array_equal(labels()[1:], labels(first=1)[:2])
    assert not np.array_equal(labels(), labels(seed=1))


def test_centre_patches_without_a_tumour(make_case):
    case = make_case()
    empty = dataclasses.replace(case, masks={"tumour": np.zeros_like(case.mask)})
    volumes = patch_dataset(
        [empty], RECIPE.patches, training=False, batch_size=RECIPE.training.batch_size, seed=RECIPE.training.seed
    )
    (_, labels) = batches(centre_patches(volumes, (5, 5), 4), 1)[0]
    assert len(labels) >= 4
    assert not labels.any()


def test_centres_of_any_structure_are_labelled_by_all(make_case):
    case = make_case(seed=2)
    wide = np.maximum(case.mask, np.roll(case.mask, 2, axis=2))
    case = dataclasses.replace(case, masks={"core": case.mask, "whole": wide})
    case.images.update(t1=case.masks["core"].astype(np.float32), t2=wide.astype(np.float32))
    volumes = patch_dataset([case], RECIPE.patches, training=False, batch_size=2)
    images, labels = batches(centre_patches(volumes, (5, 4), 20), 1)[0]
    assert labels.shape == (40, 1, 1, 2)
    assert labels[..., 1].sum() == 20  # half of them in a structure
    assert 0 < labels[..., 0].sum() < 20
    for channel, name in enumerate(("t1", "t2")):
        np.testing.assert_array_equal(images[name][:, 2, 2, 0], labels[:, 0, 0, channel])
