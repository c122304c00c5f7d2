import keras_mmfnet._backend  # noqa: F401  # isort: skip
import math
import warnings

import keras
import numpy as np

from keras_mmfnet.data.windows import cut, window_starts

try:
    import tensorflow as tf
except ImportError as error:
    backend = keras.backend.backend()
    raise ImportError(
        f"patches are made by tf.data, so training needs TensorFlow beside {backend}: "
        f"pip install keras-mmfnet[{backend}]"
    ) from error


def hide_gpus() -> None:
    """Keeps TensorFlow off the GPUs, for the rest of the process.

    The patches are made on the CPU. On another backend TensorFlow would take the GPU's memory from it as soon as the
    first patch is made. The command `mmfnet` calls this by itself; a training loop of one's own calls it before
    `patch_dataset`.

    Raises:
        RuntimeError: TensorFlow uses the GPUs already.
    """
    tf.config.set_visible_devices([], "GPU")


def patch_dataset(cases, recipe, modalities=None, batch_size=8, training=True, seed=0, first_batch=0):
    """Batches of 3D patches of preprocessed patients, as a `tf.data.Dataset` on every backend (section IV-A).

    For training, every pass over the windows of all patients goes through them in a random order; each window is
    moved by a random offset, rotated in plane and mirrored, the same for all modalities and the mask, and the batches
    never end. Every batch is a function of `seed` and its number alone. Otherwise each window comes once, as it
    is. The patients' voxels that any window can reach are held once, in float16.

    Args:
        cases: `PreprocessedCase`s with a mask.
        recipe: The `PatchRecipe`: shape, windows and augmentation.
        modalities: Names of the modalities in the batches; `None` for all of the first patient's.
        batch_size: Patches per batch.
        training: Random and endless, or each window once.
        seed: Seed of the order of the windows and of the augmentation.
        first_batch: Number of the batch to start from, to resume a training.

    Returns:
        A dataset of `({modality: float32 (batch, depth, height, width, 1)}, uint8 mask of the same shape)`.

    Raises:
        ValueError: There is no patient, or one has no mask.

    Warns:
        UserWarning: A volume is smaller than the patch and is padded with its background, or a tumour lies outside
            all windows in part.
    """
    cases = list(cases)
    if not cases:
        raise ValueError("`cases` must hold at least one patient. Received: []")
    modalities = tuple(modalities or cases[0].images)
    without = [case.name for case in cases if case.mask is None]
    if without:
        raise ValueError(f"every patient must have a mask. Received: patients without one {without}")

    volume, windows = _pack(cases, recipe, modalities, training)
    # Tensors of their own, so that the pipeline refers to them and does not copy them into its graph.
    volume, windows = tf.constant(volume), tf.constant(windows, tf.int32)
    margin = _margin(recipe)

    # Compiled, it goes through the patch once and not a dozen times.
    @tf.function(jit_compile=True)
    def turn(box, angle, mirrored):
        return _turn(box, angle, mirrored, margin, recipe)

    def random_patch(sample):
        window, offset, angle, mirrored = _draw(sample, len(windows), recipe, seed)
        return _split(turn(_cut(volume, windows[window], offset, margin, recipe), angle, mirrored), modalities)

    def patch(sample):
        return _split(_cut(volume, windows[sample], np.zeros(3, int), np.zeros(2, int), recipe), modalities)

    if training:
        samples = tf.data.Dataset.range(first_batch * batch_size, np.iinfo(np.int64).max)
    else:
        samples = tf.data.Dataset.range(first_batch * batch_size, len(windows))
    patches = samples.map(random_patch if training else patch, num_parallel_calls=tf.data.AUTOTUNE)
    return patches.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def centre_patches(dataset, patch_shape, count=16, seed=0, first_batch=0):
    """2D patches and the class of their centres, from batches of 3D patches (section IV-D).

    Of each 3D patch, half of the centres are random voxels of the tumour and half of the rest; where one of the two has
    too few, the other fills up. Patches that stick out are padded with 0, the mean of a normalised image.

    Args:
        dataset: Batches from `patch_dataset`.
        patch_shape: `(height, width)` of a 2D patch, about its pixel `(height // 2, width // 2)`.
        count: 2D patches from each 3D patch.
        seed: Seed of the choice, which is a function of it and the number of the batch alone.
        first_batch: Number of the dataset's first batch.

    Returns:
        A dataset of `({modality: float32 (batch * count, height, width, 1)}, uint8 (batch * count, 1, 1, 1))`.
    """
    height, width = patch_shape
    # The pixel of the padded slice at which a centre's patch begins is the centre itself.
    pads = [(0, 0), (0, 0), (height // 2, height - 1 - height // 2), (width // 2, width - 1 - width // 2)]

    def choose(number, batch):
        images, mask = batch
        mask = mask[..., 0]
        shape = tf.shape(mask)
        tumour = tf.reshape(mask > 0, (shape[0], -1))
        # The largest random numbers, of the tumour and of the rest.
        noise = tf.random.stateless_uniform(tf.shape(tumour), tf.stack([seed, number]))
        inside = tf.math.top_k(tf.where(tumour, noise, noise - 1), count // 2).indices
        outside = tf.math.top_k(tf.where(tumour, noise - 1, noise), count - count // 2).indices
        chosen = tf.reshape(tf.concat([inside, outside], axis=1), [-1])
        z, y, x = tf.unstack(tf.unravel_index(chosen, shape[1:]))
        centres = tf.stack([tf.repeat(tf.range(shape[0]), count), z, y, x], axis=-1)
        # The centres' neighbours, (patches, height, width, 4).
        steps = tf.stack(tf.meshgrid(0, 0, tf.range(height), tf.range(width), indexing="ij"), axis=-1)[0, 0]
        index = centres[:, None, None] + steps
        patches = {
            name: tf.ensure_shape(tf.gather_nd(tf.pad(image[..., 0], pads), index), (None, height, width))[..., None]
            for name, image in images.items()
        }
        return patches, tf.gather_nd(mask, centres)[:, None, None, None]

    return dataset.enumerate(first_batch).map(choose, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _margin(recipe):
    """By how many pixels `(y, x)` a patch that is rotated about its centre can stick out on each side.

    Half of what its bounding box has more than the patch, and one pixel to interpolate with.
    """
    sine = math.sin(math.radians(min(recipe.max_rotation, 90)))
    return np.ceil(sine / 2 * np.array(recipe.shape[:0:-1])).astype(int) + 1


def _pack(cases, recipe, modalities, training):
    """What the windows can reach of every patient, one after the other.

    Returns:
        The voxels, float16 `(height, width, slices, modalities + 1)` with the mask last, and the windows, int32
        `(windows, 5)`: first slice, row and column of each, and the first and last slice at which it may begin.
    """
    starts = [np.array(window_starts(case.shape, recipe.shape, recipe.stride, case.centre)) for case in cases]
    _warn(cases, starts, recipe.shape)

    depth, *plane = recipe.shape
    margin = _margin(recipe) + recipe.max_offset[1:] if training else np.zeros(2, int)
    reach = np.max([np.ptp(s[:, 1:], axis=0) for s in starts], axis=0) + plane + 2 * margin
    slices = [max(case.shape[0], depth) for case in cases]

    volume = np.empty((*reach, sum(slices), len(modalities) + 1), np.float16)
    windows = []
    for case, first, count, top in zip(cases, starts, slices, np.cumsum([0, *slices]), strict=False):
        corner = np.array([min(first[:, 0].min(), 0), *(first[:, 1:].min(axis=0) - margin)])
        block = np.moveaxis(volume[:, :, top : top + count], 2, 0)
        for channel, name in enumerate(modalities):
            image = case.images[name]
            block[..., channel] = cut(image, corner, block.shape[:3], image.min())
        block[..., -1] = cut(case.mask, corner, block.shape[:3], 0)
        begins = np.array([[top, top + count - depth]] * len(first))
        windows.append(np.concatenate([first - corner + (top, 0, 0), begins], axis=1))
    return volume, np.concatenate(windows).astype(np.int32)


def _warn(cases, starts, patch_shape):
    small = [case.name for case in cases if any(n < p for n, p in zip(case.shape, patch_shape, strict=True))]
    if small:
        warnings.warn(
            f"volumes smaller than the patch {patch_shape} are padded with their background: {', '.join(small)}",
            stacklevel=3,
        )
    outside = []
    for case, first in zip(cases, starts, strict=True):
        low, high = np.maximum(first.min(axis=0), 0), first.max(axis=0) + patch_shape
        seen = case.mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].sum(dtype=int)
        whole = case.mask.sum(dtype=int)
        if seen < whole:
            outside.append(f"{case.name} ({1 - seen / whole:.0%})")
    if outside:
        warnings.warn(f"part of the tumour lies outside all windows: {', '.join(outside)}", stacklevel=3)


def _draw(sample, windows, recipe, seed):
    """The random window, offset, angle and mirroring of one training patch: a function of its number."""
    # Every pass over the windows has an order of its own.
    order = tf.stack([seed, sample // windows])
    window = tf.random.experimental.index_shuffle(sample % windows, order, windows - 1)
    numbers = tf.random.stateless_uniform([5], tf.stack([seed, sample]), -1.0, 1.0)
    offset = tf.cast(tf.round(numbers[:3] * tf.constant(recipe.max_offset, tf.float32)), tf.int32)
    return window, offset, numbers[3] * math.radians(recipe.max_rotation), numbers[4] > 0


def _cut(volume, window, offset, margin, recipe):
    """A window of the packed patients, moved, with a margin: float32 `(height, width, depth, modalities + 1)`."""
    depth, height, width = recipe.shape
    top = tf.clip_by_value(window[0] + offset[0], window[3], window[4])
    row, column = tf.unstack(window[1:3] + offset[1:] - margin)
    height, width = height + 2 * margin[0], width + 2 * margin[1]
    box = volume[row : row + height, column : column + width, top : top + depth]
    return tf.ensure_shape(tf.cast(box, tf.float32), (height, width, depth, volume.shape[-1]))


def _turn(box, angle, mirrored, margin, recipe):
    """Rotates a window about its centre and mirrors it in one bilinear interpolation, and takes its margin off.

    All slices and modalities of a pixel move together and lie together, so each of its four neighbours is one row.
    """
    _, height, width = recipe.shape
    middle = np.array([(height - 1) / 2, (width - 1) / 2], np.float32)
    y = np.arange(height, dtype=np.float32)[:, None] - middle[0]
    x = np.arange(width, dtype=np.float32) - middle[1]
    flip = tf.where(mirrored, -1.0, 1.0)
    y, x = (axis * flip if recipe.flip_axis == number else axis for number, axis in ((1, y), (2, x)))
    rows = tf.sin(angle) * x + tf.cos(angle) * y + (middle[0] + margin[0])
    columns = tf.cos(angle) * x - tf.sin(angle) * y + (middle[1] + margin[1])
    top, left = tf.floor(rows), tf.floor(columns)
    down, right = (tf.reshape(part, (-1, 1, 1)) for part in (rows - top, columns - left))
    first = tf.reshape(tf.cast(top, tf.int32) * box.shape[1] + tf.cast(left, tf.int32), [-1])
    pixels = tf.reshape(box, (-1, *box.shape[2:]))
    turned = tf.add_n(
        [
            (1 - down) * (1 - right) * tf.gather(pixels, first),
            (1 - down) * right * tf.gather(pixels, first + 1),
            down * (1 - right) * tf.gather(pixels, first + box.shape[1]),
            down * right * tf.gather(pixels, first + box.shape[1] + 1),
        ]
    )
    return tf.reshape(turned, (height, width, *box.shape[2:]))


def _split(patch, modalities):
    """The images and the mask of a patch."""
    patch = tf.transpose(patch, (3, 2, 0, 1))[..., None]
    return {name: patch[channel] for channel, name in enumerate(modalities)}, tf.cast(patch[-1] >= 0.5, tf.uint8)
