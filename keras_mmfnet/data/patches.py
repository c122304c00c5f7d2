import keras_mmfnet._backend  # noqa: F401  # isort: skip
import warnings
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from keras_mmfnet.data import augment
from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.windows import crop, window_starts
from keras_mmfnet.recipe import PatchRecipe

try:
    import tensorflow as tf
except ImportError as error:
    backend = keras.backend.backend()
    raise ImportError(
        f"patches are made by tf.data, so training on {backend} also needs TensorFlow: "
        f"pip install keras-mmfnet[{backend}]"
    ) from error


def hide_gpus() -> None:
    """Hides all GPUs from TensorFlow, for the rest of the process.

    Patches are cropped on the CPU. On PyTorch or JAX, TensorFlow would otherwise reserve most of the GPU's memory at
    the first patch. The command `mmfnet` calls this function. Call it before `patch_dataset` in your own training loop.

    Raises:
        RuntimeError: TensorFlow has already initialised the GPUs.
    """
    tf.config.set_visible_devices([], "GPU")


def patch_dataset(
    cases: Iterable[PreprocessedCase],
    recipe: PatchRecipe,
    modalities: Sequence[str] | None = None,
    batch_size: int = 8,
    training: bool = True,
    seed: int = 0,
    first_batch: int = 0,
) -> tf.data.Dataset:
    """Creates a `tf.data.Dataset` of batches of 3D patches of preprocessed patients, on every backend (section IV-A).

    For training, the dataset is endless. Each pass takes the windows of all patients in a new random order. Each
    window has a random offset, in-plane rotation and flip, the same for all modalities and the mask. A batch depends
    only on `seed` and its number. For validation, the dataset has each window once, without augmentation. All voxels
    that a window can reach are kept in memory in float16.

    Args:
        cases: `PreprocessedCase`s with a mask.
        recipe: The `PatchRecipe`: shape, windows and augmentation.
        modalities: Names of the modalities in the batches; `None` for all modalities of the first patient.
        batch_size: Patches per batch.
        training: Whether the dataset is random and endless.
        seed: Seed of the order of the windows and of the augmentation.
        first_batch: Number of the first batch, for resuming a training.

    Returns:
        A dataset of `({modality: float32 (batch, depth, height, width, 1)}, uint8 mask of the same shape)`.

    Raises:
        ValueError: There is no patient, or a patient has no mask.

    Warns:
        UserWarning: A volume is smaller than the patch and is padded with its lowest value, or part of a tumour lies
            outside all windows.
    """
    cases = list(cases)
    if not cases:
        raise ValueError("`cases` must hold at least one patient. Received: []")
    modalities = tuple(modalities or dict.fromkeys(name for case in cases for name in case.images))
    without = [case.name for case in cases if case.mask is None]
    if without:
        raise ValueError(f"every patient must have a mask. Received: patients without one {without}")

    volume, windows = _pack(cases, recipe, modalities, training)
    # As tensors: the pipeline captures them by reference and does not copy them into its graph.
    volume, windows = tf.constant(volume), tf.constant(windows, tf.int32)
    margin = augment.margin(recipe)

    # Compiled, it reads the patch once instead of a dozen times.
    @tf.function(jit_compile=True)
    def transform(box, angle, flip):
        return augment.rotate_and_flip(box, angle, flip, margin, recipe)

    def random_patch(sample):
        window, offset, angle, flip = augment.draw(sample, len(windows), recipe, seed)
        return _split(transform(_crop(volume, windows[window], offset, margin, recipe), angle, flip), modalities)

    def patch(sample):
        return _split(_crop(volume, windows[sample], np.zeros(3, int), np.zeros(2, int), recipe), modalities)

    last = np.iinfo(np.int64).max if training else len(windows)
    samples = tf.data.Dataset.range(first_batch * batch_size, last)
    patches = samples.map(random_patch if training else patch, num_parallel_calls=tf.data.AUTOTUNE)
    return patches.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def centre_patches(
    dataset: tf.data.Dataset,
    patch_shape: Sequence[int],
    count: int = 16,
    seed: int = 0,
    first_batch: int = 0,
) -> tf.data.Dataset:
    """Crops 2D patches from batches of 3D patches, labelled by the class of their centre pixel (section IV-D).

    In each 3D patch, half of the centres are random tumour voxels and half are random background voxels. If there are
    too few of one class, more of the other are taken. Patches are padded with 0, the mean of a normalised image.

    Args:
        dataset: Batches from `patch_dataset`.
        patch_shape: `(height, width)` of a 2D patch; its centre is the pixel `(height // 2, width // 2)`.
        count: 2D patches per 3D patch.
        seed: Seed of the random centres. They depend only on it and on the number of the batch.
        first_batch: Number of the dataset's first batch.

    Returns:
        A dataset of `({modality: float32 (batch * count, height, width, 1)}, uint8 (batch * count, 1, 1, 1))`.
    """
    height, width = patch_shape
    # With this padding, the first pixel of a patch has the index of its centre in the unpadded slice.
    pads = [(0, 0), (0, 0), (height // 2, height - 1 - height // 2), (width // 2, width - 1 - width // 2)]

    def choose(number, batch):
        images, mask = batch
        mask = mask[..., 0]
        shape = tf.shape(mask)
        tumour = tf.reshape(mask > 0, (shape[0], -1))
        # The voxels with the largest random numbers, of the tumour and of the background.
        noise = tf.random.stateless_uniform(tf.shape(tumour), tf.stack([seed, number]))
        inside = tf.math.top_k(tf.where(tumour, noise, noise - 1), count // 2).indices
        outside = tf.math.top_k(tf.where(tumour, noise - 1, noise), count - count // 2).indices
        chosen = tf.reshape(tf.concat([inside, outside], axis=1), [-1])
        z, y, x = tf.unstack(tf.unravel_index(chosen, shape[1:]))
        centres = tf.stack([tf.repeat(tf.range(shape[0]), count), z, y, x], axis=-1)
        # Indices of the pixels around each centre, (patches, height, width, 4).
        steps = tf.stack(tf.meshgrid(0, 0, tf.range(height), tf.range(width), indexing="ij"), axis=-1)[0, 0]
        index = centres[:, None, None] + steps
        patches = {
            name: tf.ensure_shape(tf.gather_nd(tf.pad(image[..., 0], pads), index), (None, height, width))[..., None]
            for name, image in images.items()
        }
        return patches, tf.gather_nd(mask, centres)[:, None, None, None]

    return dataset.enumerate(first_batch).map(choose, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _pack(cases, recipe, modalities, training):
    """Concatenates the voxels of all patients that a window can reach along the slices.

    Returns:
        The voxels, float16 `(height, width, slices, modalities + 1)` with the mask as the last channel; and the
        windows, int32 `(windows, 5)`: first slice, row and column, and the lowest and highest first slice for which
        the window lies inside the patient.
    """
    starts = [np.array(window_starts(case.shape, recipe.shape, recipe.stride, case.centre)) for case in cases]
    _warn(cases, starts, recipe.shape)

    depth, *plane = recipe.shape
    margin = augment.margin(recipe) + recipe.max_offset[1:] if training else np.zeros(2, int)
    reach = np.max([np.ptp(s[:, 1:], axis=0) for s in starts], axis=0) + plane + 2 * margin
    slices = [max(case.shape[0], depth) for case in cases]

    volume = np.empty((*reach, sum(slices), len(modalities) + 1), np.float16)
    windows = []
    for case, first, count, top in zip(cases, starts, slices, np.cumsum([0, *slices]), strict=False):
        corner = np.array([min(first[:, 0].min(), 0), *(first[:, 1:].min(axis=0) - margin)])
        block = np.moveaxis(volume[:, :, top : top + count], 2, 0)
        images = case.images_of(modalities)
        for channel, name in enumerate(modalities):
            image = images[name]
            block[..., channel] = crop(image, corner, block.shape[:3], image.min())
        block[..., -1] = crop(case.mask, corner, block.shape[:3], 0)
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
        warnings.warn(
            f"part of the tumour lies outside all windows: {', '.join(outside)}; a larger `patches.shape` or a "
            f"`patches.stride` in plane covers more",
            stacklevel=3,
        )


def _crop(volume, window, offset, margin, recipe):
    """Crops a shifted window with a margin: float32 `(height, width, depth, modalities + 1)`."""
    depth, height, width = recipe.shape
    top = tf.clip_by_value(window[0] + offset[0], window[3], window[4])
    row, column = tf.unstack(window[1:3] + offset[1:] - margin)
    height, width = height + 2 * margin[0], width + 2 * margin[1]
    box = volume[row : row + height, column : column + width, top : top + depth]
    return tf.ensure_shape(tf.cast(box, tf.float32), (height, width, depth, volume.shape[-1]))


def _split(patch, modalities):
    """Splits the channels of a patch into the images and the mask."""
    patch = tf.transpose(patch, (3, 2, 0, 1))[..., None]
    return {name: patch[channel] for channel, name in enumerate(modalities)}, tf.cast(patch[-1] >= 0.5, tf.uint8)
