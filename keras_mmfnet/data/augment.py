"""Augmentation of training patches: draws random parameters, then applies them (section IV-A).

All random parameters depend on the seed and the patch's number alone.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_mmfnet.recipe import PatchRecipe

# The changes of the intensities in the order in which they are applied, each the name of its field.
INTENSITIES = ("blur", "low_resolution", "bias_field", "gamma", "contrast", "brightness", "noise")


def margin(recipe: PatchRecipe, pixels: np.ndarray | Sequence[Sequence[float]] = ((1.0, 1.0),)) -> np.ndarray:
    """The margin in pixels `(y, x)` on each side that moving a patch in plane needs.

    It is half the difference between the moved patch's bounding box and the patch, plus one pixel for interpolation.

    Args:
        recipe: The `PatchRecipe`.
        pixels: Pixel sizes in mm `(patients, 2)`, along y and x.

    Returns:
        Two integers.
    """
    shift, angle = recipe.misalignment
    sine = math.sin(math.radians(min(recipe.max_rotation + angle, 90)))
    half, scale, pixels = np.array(recipe.shape[1:]) / 2, 1 + recipe.max_scaling, np.asarray(pixels)
    turned = sine * (half[::-1] * pixels[:, ::-1] / pixels).max(axis=0)
    return np.ceil(scale * turned + (scale - 1) * half + shift / pixels.min(axis=0)).astype(int) + 1


def extent_in_space(recipe: PatchRecipe, spacing: np.ndarray) -> np.ndarray:
    """Voxels `(z, y, x)` of a box about the window's centre that holds all that `move_in_space` reads.

    Args:
        recipe: The `PatchRecipe`.
        spacing: Voxel sizes in mm `(patients, 3)`.

    Returns:
        Three integers.
    """
    shift, angle = recipe.misalignment
    sine = math.sin(math.radians(min(recipe.max_rotation + angle, 90)))
    # What the rotations about x, y and z have at most in magnitude.
    about_x, about_y, about_z = np.eye(3), np.eye(3), np.eye(3)
    about_x[0, 1] = about_x[1, 0] = about_y[0, 2] = about_y[2, 0] = about_z[1, 2] = about_z[2, 1] = sine
    half = (1 + recipe.max_scaling) * np.array(recipe.shape) / 2 * spacing
    reach = (half @ (about_x @ about_y @ about_z).T + shift) / spacing
    return 2 * np.ceil(reach.max(axis=0)).astype(int) + 4


def draw_window(number: tf.Tensor, windows: int, seed: int) -> tf.Tensor:
    """Draws the window of a training patch. Each pass over the windows has its own order.

    Args:
        number: Number of the patch among those that come from the windows, int64.
        windows: Number of windows of all patients.
        seed: The seed.

    Returns:
        The number of the window.
    """
    return tf.random.experimental.index_shuffle(number % windows, tf.stack([seed, number // windows]), windows - 1)


def draw_voxel(sample: tf.Tensor, patients: tf.Tensor, structures: tf.Tensor, seed: int) -> tf.Tensor:
    """Draws a patient, one of the patient's structures and one of its voxels.

    Args:
        sample: Number of the patch, int64.
        patients: Int32 `(patients, 2)`, the first structure of each patient and their number.
        structures: Int32 `(structures, 2)`, the first voxel of each structure and their number.
        seed: The seed.

    Returns:
        The number of the voxel, int32.
    """
    patient, structure, voxel = tf.unstack(
        tf.random.stateless_uniform([3], _stream(sample, seed, 1), 0, 2**31 - 1, tf.int32)
    )
    own = patients[patient % len(patients)]
    own = structures[own[0] + structure % own[1]]
    return own[0] + voxel % own[1]


def draw_transform(sample: tf.Tensor, movable: tf.Tensor, recipe: PatchRecipe, seed: int) -> dict[str, tf.Tensor]:
    """Draws the spatial transform of a training patch.

    Args:
        sample: Number of the patch, int64.
        movable: Float32 `(channels,)`, 1 for the sequences that a misalignment moves; 0 for the reference modality and
            the structures.
        recipe: The `PatchRecipe`.
        seed: The seed.

    Returns:
        `offset`, the shift of the window in voxels `(z, y, x)`, int32; `signs`, float32 `(z, y, x)`, -1 for a flipped
        axis; `scale`, the factor of the sampled lengths; `angles`, float32 `(z, y, x)`, the rotations about these axes
        in radians. With a misalignment also `misalignment_shifts` in mm and `misalignment_angles`
        in radians, float32 `(channels, 3)`.
    """
    numbers = tf.random.stateless_uniform([5], _stream(sample, seed, 0), -1.0, 1.0)
    others = tf.random.stateless_uniform([5], _stream(sample, seed, 2), -1.0, 1.0)
    flips = dict(zip(recipe.flip_axes, tf.unstack(tf.concat([numbers[4:], others[:2]], 0)), strict=False))
    transform = {
        "offset": tf.cast(tf.round(numbers[:3] * tf.constant(recipe.max_offset, tf.float32)), tf.int32),
        "signs": tf.stack([tf.where(flips[axis] > 0, -1.0, 1.0) if axis in flips else 1.0 for axis in range(3)]),
        "scale": (1 + recipe.max_scaling) ** others[4],
        "angles": tf.concat([numbers[3:4], others[2:4]], 0) * math.radians(recipe.max_rotation),
    }
    if any(recipe.misalignment):
        shift, angle = recipe.misalignment
        own = tf.random.stateless_uniform([2, len(movable), 3], _stream(sample, seed, 3), -1.0, 1.0)
        own *= movable[:, None]
        transform |= {"misalignment_shifts": own[0] * shift, "misalignment_angles": own[1] * math.radians(angle)}
    return transform


def draw_intensities(sample: tf.Tensor, sequences: int, recipe: PatchRecipe, seed: int) -> tf.Tensor:
    """Draws how the intensities of each sequence of a training patch are changed.

    Args:
        sample: Number of the patch, int64.
        sequences: Number of sequences.
        recipe: The `PatchRecipe`.
        seed: The seed.

    Returns:
        Float32 `(sequences, kinds, 6)` in [-1, 1], by the kinds of `INTENSITIES`: the strengths as multiples of the
        recipe's largest one, or 0 for a kind that is not chosen. The bias field has six; the others use the first.
    """
    shape = [sequences, len(INTENSITIES), 7]
    numbers = tf.random.stateless_uniform(shape, _stream(sample, seed, 4), -1.0, 1.0)
    return tf.where(numbers[..., :1] < 2 * recipe.intensity_probability - 1, numbers[..., 1:], 0.0)


def move_in_plane(
    box: tf.Tensor, transform: dict[str, tf.Tensor], pixel: tf.Tensor, margin: np.ndarray, recipe: PatchRecipe
) -> tf.Tensor:
    """Rotates, scales, flips and misaligns a window within its slices and crops the margin, with one interpolation.

    Args:
        box: Float32 `(height, width, depth, channels)`, the patch with the margin.
        transform: From `draw_transform`.
        pixel: Pixel size in mm `(y, x)`.
        margin: Pixels `(y, x)` of the margin on each side.
        recipe: The `PatchRecipe`.

    Returns:
        Float32 `(channels, depth, height, width)` without the margin.
    """
    middle = [np.float32((n - 1) / 2 + m) for n, m in zip(recipe.shape[1:], margin, strict=True)]

    # Compiled, it reads the patch once instead of a dozen times.
    @tf.function(jit_compile=True)
    def moved(box, transform, pixel):
        if 0 in recipe.flip_axes:
            box = tf.where(transform["signs"][0] < 0, box[:, :, ::-1], box)
        _, y, x = _steps(transform, recipe)
        tall = pixel[0] / pixel[1]
        if "misalignment_angles" not in transform:
            rows, columns = _rotate(y, x, transform["angles"][0], tall)
            # All slices and channels of a pixel are contiguous: each neighbour is one row of memory.
            return _interpolate(box, [rows + middle[0], columns + middle[1]])
        angles = transform["angles"][0] + transform["misalignment_angles"][:, 0, None, None]
        rows, columns = _rotate(y, x, angles, tall)
        shifts = (transform["misalignment_shifts"][:, 1:] / pixel)[..., None, None]
        coordinates = [rows + middle[0] + shifts[:, 0], columns + middle[1] + shifts[:, 1]]
        return _interpolate(tf.transpose(box, (0, 1, 3, 2)), coordinates, each_channel=True)

    order = (0, 3, 1, 2) if "misalignment_angles" in transform else (3, 2, 0, 1)
    return tf.transpose(moved(box, transform, pixel), order)


def move_in_space(
    volume: tf.Tensor,
    start: tf.Tensor,
    limits: tf.Tensor,
    transform: dict[str, tf.Tensor],
    spacing: tf.Tensor,
    recipe: PatchRecipe,
) -> tf.Tensor:
    """Rotates, scales, flips and misaligns a window in three dimensions, with one interpolation.

    Args:
        volume: `(slices, height, width, channels)`.
        start: First voxel of the window `(z, y, x)`, int32.
        limits: The first and the last voxel `(z, y, x)` of the patient, int32 `(2, 3)`. Outside of them, the value of
            the nearest voxel is taken.
        transform: From `draw_transform`.
        spacing: Voxel size in mm `(z, y, x)`.
        recipe: The `PatchRecipe`.

    Returns:
        Float32 `(channels, depth, height, width)`.
    """
    each_channel = "misalignment_angles" in transform

    @tf.function(jit_compile=True)
    def moved(start, limits, transform, spacing):
        z, y, x = (step * size for step, size in zip(_steps(transform, recipe), tf.unstack(spacing), strict=True))
        angles, shifts = transform["angles"][None], tf.zeros((1, 3))
        if each_channel:
            angles, shifts = angles + transform["misalignment_angles"], transform["misalignment_shifts"]
        about_z, about_y, about_x = tf.unstack(angles[..., None, None, None], axis=1)
        y, x = _rotate(y, x, about_z)
        z, x = _rotate(z, x, about_y)
        z, y = _rotate(z, y, about_x)
        middle = (np.array(recipe.shape, np.float32) - 1) / 2
        # Relative to the start: the index of a slice may be too large for the precision of float32.
        first, last = tf.unstack(tf.cast(limits - start, tf.float32))
        coordinates = [
            tf.clip_by_value(
                (step + shifts[:, axis, None, None, None]) / spacing[axis] + middle[axis], first[axis], last[axis]
            )
            for axis, step in enumerate((z, y, x))
        ]
        coordinates = coordinates if each_channel else [c[0] for c in coordinates]
        return _interpolate(volume, coordinates, each_channel, tf.unstack(start), tf.unstack(limits[1]))

    moved = moved(start, limits, transform, spacing)
    return moved if each_channel else tf.transpose(moved, (3, 0, 1, 2))


def change_intensities(image: tf.Tensor, amounts: tf.Tensor, recipe: PatchRecipe) -> tf.Tensor:
    """Changes the intensities of one sequence of a patch, except for the noise.

    Args:
        image: Float32 `(depth, height, width)`.
        amounts: Float32 `(kinds, 6)`, the image's of `draw_intensities`.
        recipe: The `PatchRecipe`.

    Returns:
        The changed image.
    """
    axes = (1, 2) if recipe.in_plane else (0, 1, 2)
    changes = {
        "blur": lambda x, a: blur(x, recipe.blur * tf.abs(a[0]), math.ceil(3 * recipe.blur), axes),
        "low_resolution": lambda x, a: low_resolution(x, 1 + recipe.low_resolution * tf.abs(a[0]), axes),
        "bias_field": lambda x, a: bias_field(x, recipe.bias_field * a),
        "gamma": lambda x, a: gamma(x, (1 + recipe.gamma) ** a[0]),
        "contrast": lambda x, a: contrast(x, (1 + recipe.contrast) ** a[0]),
        "brightness": lambda x, a: x + recipe.brightness * a[0],
    }
    for name, change in changes.items():
        if getattr(recipe, name):
            amount = amounts[INTENSITIES.index(name)]
            change = functools.partial(change, image, amount)
            image = tf.cond(tf.reduce_any(amount != 0), change, functools.partial(tf.identity, image))
    return image


def noise(image: tf.Tensor, deviation: tf.Tensor, sample: tf.Tensor, sequence: int, seed: int) -> tf.Tensor:
    """Adds Gaussian noise of a standard deviation, drawn from the seed and the numbers of patch and sequence."""
    stream = _stream(sample, seed, 5 + sequence)
    # Slow if compiled.
    return tf.cond(
        deviation > 0, lambda: image + deviation * tf.random.stateless_normal(image.shape, stream), lambda: image
    )


def blur(image: tf.Tensor, deviation: tf.Tensor, radius: int, axes: Sequence[int]) -> tf.Tensor:
    """Convolves with a Gaussian of a standard deviation in voxels along some axes; mirrored at the edges."""
    deviation = tf.maximum(deviation, 1e-3)  # of 0, the weights would not be numbers
    weights = tf.exp(-(np.arange(-radius, radius + 1, dtype=np.float32) ** 2) / (2 * deviation**2))
    weights = tf.unstack(weights / tf.reduce_sum(weights))
    for axis in axes:
        size = image.shape[axis]
        padded = tf.gather(image, np.pad(np.arange(size), radius, "symmetric"), axis=axis)
        shifted = (padded[(slice(None),) * axis + (slice(k, k + size),)] for k in range(len(weights)))
        image = tf.add_n([weight * part for weight, part in zip(weights, shifted, strict=True)])
    return image


def low_resolution(image: tf.Tensor, factor: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Keeps the voxels nearest to a grid that is coarser by a factor, and interpolates linearly between them."""
    sides = []  # of each axis: the index and the weight of the voxel on either side
    for axis in axes:
        size = image.shape[axis]
        position = (np.arange(size, dtype=np.float32) - size // 2) / factor
        lower = tf.floor(position)
        upper = tf.reshape(position - lower, [-1 if other == axis else 1 for other in range(3)])
        near, far = (
            tf.clip_by_value(tf.cast(tf.round(step * factor), tf.int32) + size // 2, 0, size - 1)
            for step in (lower, lower + 1)
        )
        sides.append([(axis, near, 1 - upper), (axis, far, upper)])
    total = []
    for corner in itertools.product(*sides):
        part = image
        for axis, index, _ in corner:
            part = tf.gather(part, index, axis=axis)
        total.append(math.prod(weight for _, _, weight in corner) * part)
    return tf.add_n(total)


def bias_field(image: tf.Tensor, coefficients: tf.Tensor) -> tf.Tensor:
    """Multiplies what is above the lowest value by a smooth field, as the coils of a scanner do.

    The field's logarithm is the mean, over the axes, of a line and a parabola over [-1, 1], which have one coefficient
    each.
    """
    field = 1.0
    for axis, size in enumerate(image.shape):
        t = np.linspace(-1, 1, size, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        field *= tf.exp((coefficients[axis] * t + coefficients[3 + axis] * (1.5 * t**2 - 0.5)) / 6)
    lowest = tf.reduce_min(image)
    return lowest + (image - lowest) * field


def gamma(image: tf.Tensor, exponent: tf.Tensor) -> tf.Tensor:
    """Raises the values, as fractions of their range, to a power."""
    lowest = tf.reduce_min(image)
    span = tf.reduce_max(image) - lowest
    fraction = (image - lowest) / tf.maximum(span, 1e-6)
    # Faster than `tf.pow`.
    return lowest + span * tf.exp(exponent * tf.math.log(tf.maximum(fraction, 1e-12)))


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Multiplies the distances from the mean value by a factor."""
    mean = tf.reduce_mean(image)
    return mean + factor * (image - mean)


def _stream(sample, seed, number):
    """A seed for the random numbers of one purpose. The project's seeds are below 2**32."""
    return tf.stack([seed + number * 2**32, sample])


def _steps(transform, recipe):
    """The positions along each axis about the patch's centre, flipped and scaled, in voxels."""
    scales = [1.0 if recipe.in_plane else transform["scale"], transform["scale"], transform["scale"]]
    for axis, (size, scale) in enumerate(zip(recipe.shape, scales, strict=True)):
        step = (np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)).reshape((-1, *[1] * (2 - axis)))
        yield step * (transform["signs"][axis] * scale)


def _rotate(u, v, angle, tall=1.0):
    """Rotates a position; its first coordinate counts steps that are `tall` times as long as the second's."""
    return tf.sin(angle) / tall * v + tf.cos(angle) * u, tf.cos(angle) * v - tf.sin(angle) * tall * u


def _interpolate(values, coordinates, each_channel=False, start=None, last=None):
    """Interpolates linearly along the first axes of an array.

    Args:
        values: Array, its channels behind these axes.
        coordinates: Float32 indices along each of these axes.
        each_channel: Whether the first axis of the coordinates is that of the channels, which then comes first.
        start: The index that the coordinates are relative to, `None` for 0.
        last: The largest index; `None` if all neighbours lie inside.

    Returns:
        Float32 array.
    """
    lower = [tf.floor(coordinate) for coordinate in coordinates]
    trailing = (1,) * (len(values.shape) - len(coordinates) - each_channel)
    parts = [
        tf.reshape(coordinate - low, (*coordinate.shape, *trailing))
        for coordinate, low in zip(coordinates, lower, strict=True)
    ]
    near = [tf.cast(low, tf.int32) + (start[axis] if start else 0) for axis, low in enumerate(lower)]
    far = [index + 1 for index in near]
    if last is not None:
        far = [tf.minimum(index, most) for index, most in zip(far, last, strict=True)]
    channel = []
    if each_channel:
        count = coordinates[0].shape[0]
        channel = [
            tf.broadcast_to(tf.reshape(tf.range(count), (count, *[1] * (len(lower[0].shape) - 1))), lower[0].shape)
        ]
    total = []
    for corner in itertools.product((False, True), repeat=len(coordinates)):
        index = [b if up else a for a, b, up in zip(near, far, corner, strict=True)]
        weight = math.prod(part if up else 1 - part for part, up in zip(parts, corner, strict=True))
        total.append(weight * tf.cast(tf.gather_nd(values, tf.stack(index + channel, axis=-1)), tf.float32))
    return tf.add_n(total)
