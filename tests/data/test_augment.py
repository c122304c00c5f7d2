import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from keras_mmfnet.data import augment
from keras_mmfnet.recipe import PatchRecipe

RECIPE = PatchRecipe(shape=(4, 16, 24), max_rotation=30.0)


@pytest.mark.parametrize("flip_axis", [None, 1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_rotated_and_flipped_as_scipy_does(flip_axis, flip):
    recipe = RECIPE.model_copy(update={"flip_axis": flip_axis})
    margin, angle = augment.margin(recipe), 0.4
    box = np.random.default_rng(0).normal(size=(16 + 2 * margin[0], 24 + 2 * margin[1], 4, 2)).astype("float32")
    found = augment.rotate_and_flip(tf.constant(box), tf.constant(angle), tf.constant(flip), margin, recipe).numpy()
    # A flipped image turns the other way.
    source, turn = (np.flip(box, flip_axis - 1), -angle) if flip and flip_axis else (box, angle)
    expected = ndimage.rotate(source, np.degrees(turn), axes=(1, 0), reshape=False, order=1)
    expected = expected[margin[0] : -margin[0], margin[1] : -margin[1]]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_parameters_depend_on_the_seed_and_the_number_alone():
    draws = [augment.draw(tf.constant(7, tf.int64), 5, RECIPE, seed) for seed in (1, 1, 2)]
    same, again, other = ([np.asarray(value).tolist() for value in draw] for draw in draws)
    assert same == again != other
    window, offset, angle, _ = same
    assert 0 <= window < 5
    assert all(abs(step) <= most for step, most in zip(offset, RECIPE.max_offset, strict=True))
    assert abs(angle) <= np.radians(RECIPE.max_rotation)


def test_every_window_comes_once_in_a_pass():
    windows = [int(augment.draw(tf.constant(n, tf.int64), 6, RECIPE, 0)[0]) for n in range(12)]
    assert sorted(windows[:6]) == sorted(windows[6:]) == list(range(6))
    assert windows[:6] != windows[6:]
