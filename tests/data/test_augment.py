import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage
from scipy.spatial.transform import Rotation

from keras_mmfnet.data import augment
from keras_mmfnet.recipe import PatchRecipe

RECIPE = PatchRecipe(shape=(4, 16, 24), max_rotation=30.0)
STRONG = PatchRecipe.strong(shape=(4, 16, 24), misalignment=(2.0, 5.0))
IMAGE = np.random.default_rng(1).normal(size=(5, 12, 16)).astype("float32")


def transform_of(angles, flips=(), scale=1.0, shifts=None, own_angles=None):
    """A transform as `draw_transform` returns it, of these numbers."""
    own = {} if own_angles is None else {"misalignment_shifts": shifts, "misalignment_angles": own_angles}
    signs = [-1.0 if axis in flips else 1.0 for axis in range(3)]
    values = {"angles": angles, "signs": signs, "scale": scale, **own}
    return {name: tf.constant(value, tf.float32) for name, value in values.items()}


def drawn(numbers, recipe=STRONG, seed=0):
    """The parameters of patches of two sequences and a structure."""

    def draw(sample):
        transform = augment.draw_transform(sample, tf.constant([0.0, 1.0, 0.0]), recipe, seed)
        return transform | {"amounts": augment.draw_intensities(sample, 2, recipe, seed)}

    patches = tf.data.Dataset.from_tensor_slices(np.array(numbers, np.int64)).map(draw)
    return {name: value.numpy() for name, value in next(iter(patches.batch(len(numbers)))).items()}


@pytest.mark.parametrize("flip_axis", [None, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_rotated_and_flipped_as_scipy_does(flip_axis, flip):
    margin, angle = augment.margin(RECIPE), 0.4
    box = np.random.default_rng(0).normal(size=(16 + 2 * margin[0], 24 + 2 * margin[1], 4, 2)).astype("float32")
    transform = transform_of([angle, 0, 0], [flip_axis] if flip else [])
    found = augment.move_in_plane(tf.constant(box), transform, tf.ones(2), margin, RECIPE).numpy()
    # A flipped image is rotated the other way.
    source, rotation = (np.flip(box, flip_axis - 1), -angle) if flip and flip_axis else (box, angle)
    expected = ndimage.rotate(source, np.degrees(rotation), axes=(1, 0), reshape=False, order=1)
    expected = expected[margin[0] : -margin[0], margin[1] : -margin[1]]
    np.testing.assert_allclose(found, expected.transpose(3, 2, 0, 1), atol=1e-4)


def positions(transform, channel, spacing, recipe):
    """The positions from which a channel of a patch is taken, relative to its centre, in voxels `(3, voxels)`."""
    shape = np.array(recipe.shape)
    steps = np.indices(shape).reshape(3, -1).T - (shape - 1) / 2
    own = [0, 0, 0] if "misalignment_angles" not in transform else transform["misalignment_angles"].numpy()[channel]
    shift = [0, 0, 0] if "misalignment_angles" not in transform else transform["misalignment_shifts"].numpy()[channel]
    about_z, about_y, about_x = transform["angles"].numpy() + own
    rotation = Rotation.from_euler("zyx", [about_z, -about_y, about_x])
    steps = steps * transform["signs"].numpy() * transform["scale"].numpy() * spacing
    return ((rotation.apply(steps[:, ::-1])[:, ::-1] + shift) / spacing).T


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize(
    ("in_plane", "spacing"), [(False, (2.0, 1.5, 1.25)), (True, (3.0, 1.5, 1.5)), (True, (3.0, 1.6, 1.0))]
)
def test_all_transforms_are_one_linear_interpolation(in_plane, spacing, misaligned):
    recipe, spacing = STRONG.model_copy(update={"in_plane": in_plane, "flip_axes": (0, 2)}), np.array(spacing)
    shifts = np.array([[0, 0, 0], [0.0 if in_plane else 1.0, -1.5, 2.0]])
    own_angles = np.array([[0, 0, 0], [0.08, *([0, 0] if in_plane else [-0.05, 0.03])]])
    angles = [0.25, *([0, 0] if in_plane else [-0.2, 0.1])]
    transform = transform_of(angles, (0, 2), 1.2, *([shifts, own_angles] if misaligned else []))
    volume = np.random.default_rng(0).normal(size=(12, 44, 52, 2)).astype("float32")
    start, middle = np.array([4, 14, 14]), (np.array(recipe.shape) - 1) / 2
    if in_plane:
        margin = augment.margin(recipe, [spacing[1:]])
        box = volume[4:8, 14 - margin[0] : 30 + margin[0], 14 - margin[1] : 38 + margin[1]].transpose(1, 2, 0, 3)
        found = augment.move_in_plane(tf.constant(box), transform, tf.constant(spacing[1:], tf.float32), margin, recipe)
        transform["scale"] = tf.constant([1, 1.2, 1.2])  # not along the slices
    else:
        limits = tf.constant([[3, 0, 0], [9, 43, 51]])
        found = augment.move_in_space(
            tf.constant(volume),
            tf.constant(start, tf.int32),
            limits,
            transform,
            tf.constant(spacing, tf.float32),
            recipe,
        )
        volume, start = volume[3:10], start - [3, 0, 0]  # beyond the patient's slices, the nearest one
    for channel in range(2):
        index = positions(transform, channel, spacing, recipe) + (start + middle)[:, None]
        expected = ndimage.map_coordinates(volume[..., channel], index, order=1, mode="nearest")
        np.testing.assert_allclose(found[channel], expected.reshape(recipe.shape), atol=2e-4)


def test_a_blur_is_scipys():
    for axes in ((1, 2), (0, 1, 2)):
        found = augment.blur(tf.constant(IMAGE), tf.constant(0.8), 3, axes)
        expected = ndimage.gaussian_filter(IMAGE, 0.8, mode="reflect", radius=3, axes=axes)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_array_equal(augment.blur(tf.constant(IMAGE), tf.constant(0.0), 3, axes), IMAGE)


def test_a_low_resolution_is_numpys_interpolation():
    found = augment.low_resolution(tf.constant(IMAGE), tf.constant(1.7), (0, 1, 2))
    expected = IMAGE
    for axis, size in enumerate(IMAGE.shape):
        points = size // 2 + np.arange(-20, 21) * 1.7
        near = np.clip(np.round(points - size // 2).astype(int) + size // 2, 0, size - 1)
        expected = np.apply_along_axis(
            lambda line, points=points, near=near: np.interp(range(len(line)), points, line[near]), axis, expected
        )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(augment.low_resolution(tf.constant(IMAGE), tf.constant(1.0), (1, 2)), IMAGE)


def test_the_changes_of_each_value_are_numpys():
    image, low, high = tf.constant(IMAGE), IMAGE.min(), IMAGE.max()
    expected = low + (high - low) * ((IMAGE - low) / (high - low)) ** 1.3
    np.testing.assert_allclose(augment.gamma(image, tf.constant(1.3)), expected, atol=1e-5)
    expected = IMAGE.mean() + 0.8 * (IMAGE - IMAGE.mean())
    np.testing.assert_allclose(augment.contrast(image, tf.constant(0.8)), expected, atol=1e-6)
    line, parabola = np.array([0.3, -0.2, 0.1]), np.array([-0.1, 0.4, 0.2])
    steps = np.meshgrid(*(np.linspace(-1, 1, size) for size in IMAGE.shape), indexing="ij")
    log = sum(a * t + b * (3 * t**2 - 1) / 2 for a, b, t in zip(line, parabola, steps, strict=True)) / 6
    expected = low + (IMAGE - low) * np.exp(log)
    found = augment.bias_field(image, tf.constant([*line, *parabola], tf.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)

    number = tf.constant(3, tf.int64)
    noisy = [augment.noise(image, tf.constant(0.5), number, sequence, 0).numpy() - IMAGE for sequence in (0, 1, 1)]
    assert abs(noisy[0].mean()) < 0.1
    assert noisy[0].std() == pytest.approx(0.5, abs=0.05)
    assert abs(np.corrcoef(noisy[0].ravel(), noisy[1].ravel())[0, 1]) < 0.1
    np.testing.assert_array_equal(noisy[1], noisy[2])


@pytest.mark.parametrize("name", augment.INTENSITIES[:-1])
def test_only_what_is_chosen_is_changed(name):
    amounts = np.zeros((len(augment.INTENSITIES), 6), "float32")
    recipe = STRONG.model_copy(update={"shape": IMAGE.shape})
    np.testing.assert_array_equal(augment.change_intensities(tf.constant(IMAGE), tf.constant(amounts), recipe), IMAGE)
    amounts[augment.INTENSITIES.index(name)] = -0.5
    value, axes = getattr(recipe, name), (1, 2)
    expected = {
        "blur": lambda x: augment.blur(x, 0.5 * value, 3, axes),
        "low_resolution": lambda x: augment.low_resolution(x, 1 + 0.5 * value, axes),
        "bias_field": lambda x: augment.bias_field(x, tf.constant([-0.5 * value] * 6)),
        "gamma": lambda x: augment.gamma(x, (1 + value) ** -0.5),
        "contrast": lambda x: augment.contrast(x, (1 + value) ** -0.5),
        "brightness": lambda x: x - 0.5 * value,
    }[name](tf.constant(IMAGE))
    found = augment.change_intensities(tf.constant(IMAGE), tf.constant(amounts), recipe)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - IMAGE).max() > 0.01


def test_the_parameters_depend_on_the_seed_and_the_number_alone():
    same, again, other, later = drawn([7], seed=1), drawn([8, 7], seed=1), drawn([7], seed=2), drawn([8], seed=1)
    for name, value in same.items():
        np.testing.assert_array_equal(value, again[name][1:])
    for different in (other, later):
        assert all((same[name] != value).any() for name, value in different.items() if name not in ("signs", "offset"))


def test_the_parameters_stay_within_the_recipe():
    recipe = STRONG.model_copy(update={"flip_axes": (0, 2), "in_plane": False})
    joined = drawn(range(200), recipe)
    for name, most in {
        "offset": np.array(recipe.max_offset),
        "angles": np.radians(15),
        "misalignment_shifts": 2.0,
        "misalignment_angles": np.radians(5),
        "amounts": 1.0,
    }.items():
        assert 0.95 < np.max(np.abs(joined[name]) / most) <= 1 + 1e-6
    assert 1 / 1.25 - 1e-6 <= joined["scale"].min() < 0.82
    assert 1.22 < joined["scale"].max() <= 1.25 + 1e-6
    # Each chosen axis is flipped by itself.
    assert (joined["signs"][:, 1] == 1).all()
    assert {tuple(signs) for signs in joined["signs"]} == {(a, 1, b) for a in (-1, 1) for b in (-1, 1)}
    # The reference modality and the mask are not misaligned.
    for name in ("misalignment_shifts", "misalignment_angles"):
        assert not joined[name][:, [0, 2]].any()
    # Each kind is chosen for each sequence by itself.
    chosen = joined["amounts"].any(axis=-1).reshape(200, -1)
    np.testing.assert_allclose(chosen.mean(axis=0), recipe.intensity_probability, atol=0.1)
    together = np.corrcoef(chosen.T)
    assert np.abs(together - np.eye(len(together))).max() < 0.3


def test_every_window_comes_once_in_a_pass():
    windows = [int(augment.draw_window(tf.constant(n, tf.int64), 6, 0)) for n in range(12)]
    assert sorted(windows[:6]) == sorted(windows[6:]) == list(range(6))
    assert windows[:6] != windows[6:]


def test_patients_and_structures_are_equally_likely():
    # One patient with a structure of one voxel and one of 98, the other with a single voxel.
    patients, structures = tf.constant([[0, 2], [2, 1]]), tf.constant([[0, 1], [1, 98], [99, 1]])
    samples = tf.data.Dataset.range(400).map(lambda number: augment.draw_voxel(number, patients, structures, 0))
    voxels = list(samples.as_numpy_iterator())
    shares = [np.mean([low <= voxel <= high for voxel in voxels]) for low, high in ((0, 0), (1, 98), (99, 99))]
    np.testing.assert_allclose(shares, (0.25, 0.25, 0.5), atol=0.07)
    assert len(set(voxels)) > 60
