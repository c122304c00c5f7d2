"""Augmentation of training patches: draws random parameters, then applies them (section IV-A)."""

import math

import numpy as np
import tensorflow as tf

from keras_mmfnet.recipe import PatchRecipe


def margin(recipe: PatchRecipe) -> np.ndarray:
    """The margin in pixels `(y, x)` on each side that rotating a patch needs.

    It is half the difference between the rotated patch's bounding box and the patch, plus one pixel for interpolation.

    Args:
        recipe: The `PatchRecipe`.

    Returns:
        Two integers.
    """
    sine = math.sin(math.radians(min(recipe.max_rotation, 90)))
    return np.ceil(sine / 2 * np.array(recipe.shape[:0:-1])).astype(int) + 1


def draw(sample: tf.Tensor, windows: int, recipe: PatchRecipe, seed: int) -> tuple[tf.Tensor, ...]:
    """Draws the random parameters of a training patch. They depend only on the seed and the patch's number.

    Args:
        sample: Number of the patch, int64.
        windows: Number of windows of all patients.
        recipe: The `PatchRecipe`.
        seed: The seed.

    Returns:
        `(window, offset, angle, flip)`: the number of the window; the offset `(z, y, x)` in voxels, int32; the in-plane
        angle in radians, float32; and whether the patch is flipped.
    """
    # Each pass over the windows has its own order.
    order = tf.stack([seed, sample // windows])
    window = tf.random.experimental.index_shuffle(sample % windows, order, windows - 1)
    numbers = tf.random.stateless_uniform([5], tf.stack([seed, sample]), -1.0, 1.0)
    offset = tf.cast(tf.round(numbers[:3] * tf.constant(recipe.max_offset, tf.float32)), tf.int32)
    return window, offset, numbers[3] * math.radians(recipe.max_rotation), numbers[4] > 0


def rotate_and_flip(
    box: tf.Tensor, angle: tf.Tensor, flip: tf.Tensor, margin: np.ndarray, recipe: PatchRecipe
) -> tf.Tensor:
    """Rotates a window about its centre, flips it and crops the margin, with one bilinear interpolation.

    All slices and modalities of a pixel are contiguous, so the interpolation gathers one row per neighbour.

    Args:
        box: Float32 `(height, width, depth, channels)`, the patch with the margin.
        angle: In-plane angle in radians.
        flip: Whether to flip along `recipe.flip_axis`.
        margin: Pixels `(y, x)` of the margin on each side.
        recipe: The `PatchRecipe`.

    Returns:
        Float32 `(height, width, depth, channels)` without the margin.
    """
    _, height, width = recipe.shape
    middle = np.array([(height - 1) / 2, (width - 1) / 2], np.float32)
    y = np.arange(height, dtype=np.float32)[:, None] - middle[0]
    x = np.arange(width, dtype=np.float32) - middle[1]
    sign = tf.where(flip, -1.0, 1.0)
    y, x = (axis * sign if recipe.flip_axis == number else axis for number, axis in ((1, y), (2, x)))
    rows = tf.sin(angle) * x + tf.cos(angle) * y + (middle[0] + margin[0])
    columns = tf.cos(angle) * x - tf.sin(angle) * y + (middle[1] + margin[1])
    top, left = tf.floor(rows), tf.floor(columns)
    down, right = (tf.reshape(part, (-1, 1, 1)) for part in (rows - top, columns - left))
    first = tf.reshape(tf.cast(top, tf.int32) * box.shape[1] + tf.cast(left, tf.int32), [-1])
    pixels = tf.reshape(box, (-1, *box.shape[2:]))
    rotated = tf.add_n(
        [
            (1 - down) * (1 - right) * tf.gather(pixels, first),
            (1 - down) * right * tf.gather(pixels, first + 1),
            down * (1 - right) * tf.gather(pixels, first + box.shape[1]),
            down * right * tf.gather(pixels, first + box.shape[1] + 1),
        ]
    )
    return tf.reshape(rotated, (height, width, *box.shape[2:]))
