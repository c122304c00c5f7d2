import keras_mmfnet._backend  # noqa: F401  # isort: skip
import warnings
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from keras_mmfnet._machine import available_memory
from keras_mmfnet.data import augment
from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.windows import window_box, window_starts
from keras_mmfnet.recipe import PatchRecipe

try:
    import tensorflow as tf

    from keras_mmfnet.data.voxels import Voxels
except ImportError as error:
    backend = keras.backend.backend()
    raise ImportError(
        f"patches are made by tf.data, so training on {backend} also needs TensorFlow: "
        f"pip install 'keras-mmfnet[{backend}]'. Received: {error}"
    ) from error


# Of all structures of all patients together, as many voxels at most are known as places for patches.
_VOXELS = 4_000_000


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
    part: tuple[int, int] = (0, 1),
    multiple: int = 1,
) -> tf.data.Dataset:
    """Creates a `tf.data.Dataset` of batches of 3D patches of preprocessed patients, on every backend (section IV-A).

    For training, the dataset is endless. Each pass takes the windows of all patients in a new random order, and a share
    of `recipe.foreground` of the patches lies at structures instead. Each patch has a random offset, rotation, scaling
    and flip, in plane or in space, the same for all modalities and masks but for a misalignment, and each modality has
    random changes of its intensities. A batch depends only on `seed` and its number. For validation, the dataset has
    each window once, without augmentation. All voxels that a patch can reach are kept in memory in float16; where that
    would take more than half of `recipe.memory`, they are read from the patients' arrays for each patch.

    Args:
        cases: `PreprocessedCase`s with a mask.
        recipe: The `PatchRecipe`: shape, windows and augmentation.
        modalities: Names of the modalities in the batches; `None` for all that the patients have, in the order in
            which they first occur.
        batch_size: Patches per batch.
        training: Whether the dataset is random and endless.
        seed: Seed of the order of the windows and of the augmentation.
        first_batch: Number of the first batch, for resuming a training.
        part: `(index, count)`: only part `index` of each batch, which is split into `count` equal parts for as many
            processes.
        multiple: The last batch for validation is padded with the first windows to a multiple of this number, that of
            the devices.

    Returns:
        A dataset of `({modality: float32 (batch, depth, height, width, 1)}, masks)`, the masks uint8
        `(batch, depth, height, width, structures)`.

    Raises:
        ValueError: There is no patient, a patient has no mask, or the batches cannot be split equally.

    Warns:
        UserWarning: A volume is smaller than the patch and is padded with its lowest value, or part of a tumour lies
            outside all windows.
    """
    cases = list(cases)
    number, parts = part
    if batch_size % multiple or multiple % parts:
        raise ValueError(
            "`batch_size` must be a multiple of `multiple`, and that of the number of parts. "
            f"Received: {batch_size}, {multiple} and {parts}"
        )
    if not cases:
        raise ValueError("`cases` must hold at least one patient. Received: []")
    modalities = tuple(modalities or dict.fromkeys(name for case in cases for name in case.images))
    without = [case.name for case in cases if case.masks is None]
    if without:
        raise ValueError(f"every patient must have a mask. Received: patients without one {without}")

    # The pipeline captures tensors by reference and does not copy them into its graph.
    voxels, tables = _load(cases, recipe, modalities, training, parts)
    spacing = tables["spacing"].numpy()
    margin = augment.margin(recipe, spacing[:, 1:])
    plane = np.add(recipe.shape, [0, *2 * margin])
    space = augment.extent_in_space(recipe, spacing)

    # Compiled once for all sequences.
    @tf.function(jit_compile=True)
    def change(image, amounts):
        return augment.change_intensities(image, amounts, recipe)

    def random_patch(sample):
        patient, start, lowest, highest = _place(sample, tables, recipe, seed)
        transform = augment.draw_transform(sample, tables["movable"][patient], recipe, seed)
        start = tf.clip_by_value(start + transform.pop("offset"), lowest, highest)
        spacing = tables["spacing"][patient]
        if recipe.in_plane:
            box = tf.cast(voxels.crop(patient, start - [0, *margin], plane), tf.float32)
            moved = augment.move_in_plane(box, transform, spacing[1:], margin, recipe)
        else:
            slices = tables["bounds"][patient, :, 0] + [0, recipe.shape[0] - 1]
            limits = tf.transpose([slices, [0, voxels.shape[1] - 1], [0, voxels.shape[2] - 1]])
            box, corner = voxels.around(patient, start + np.array(recipe.shape, np.int32) // 2, space)
            moved = augment.move_in_space(box, start - corner, limits - corner, transform, spacing, recipe)
        images, masks = _split(moved, modalities)
        if any(getattr(recipe, name) for name in augment.INTENSITIES):
            amounts = augment.draw_intensities(sample, len(modalities), recipe, seed)
            for number, (name, image) in enumerate(images.items()):
                # The image of a sequence that the patient lacks stays zero.
                amount = tf.where(tf.reduce_any(image != 0), amounts[number], 0.0)
                changed = change(image[..., 0], amount)
                deviation = recipe.noise * tf.abs(amount[-1, 0])
                images[name] = augment.noise(changed, deviation, sample, number, seed)[..., None]
        return images, masks

    def patch(sample):
        window = tables["windows"][sample]
        box = tf.cast(voxels.crop(window[3], window[:3], recipe.shape), tf.float32)
        return _split(tf.transpose(box, (3, 2, 0, 1)), modalities)

    own = batch_size // parts
    if training:
        # The samples of the batches before, and of the other parts of this one, are passed over.
        count = tf.data.Dataset.range(first_batch * own, np.iinfo(np.int64).max)
        samples = count.map(lambda n: n // own * batch_size + number * own + n % own)
    else:
        samples = tf.data.Dataset.from_tensor_slices(
            _validation_samples(len(tables["windows"]), batch_size, part, multiple)
        )
    patches = samples.map(random_patch if training else patch, num_parallel_calls=tf.data.AUTOTUNE)
    return patches.batch(own).prefetch(tf.data.AUTOTUNE)


def centre_patches(
    dataset: tf.data.Dataset,
    patch_shape: Sequence[int],
    count: int = 16,
    seed: int = 0,
    first_batch: int = 0,
    part: tuple[int, int] = (0, 1),
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
        part: The `part` of the batches that the dataset has.

    Returns:
        A dataset of `({modality: float32 (batch * count, height, width, 1)}, uint8 (batch * count, 1, 1, structures))`.
    """
    height, width = patch_shape
    # With this padding, the first pixel of a patch has the index of its centre in the unpadded slice.
    pads = [(0, 0), (0, 0), (height // 2, height - 1 - height // 2), (width // 2, width - 1 - width // 2)]

    def choose(number, batch):
        images, mask = batch
        shape = tf.shape(mask)[:4]
        tumour = tf.reshape(tf.reduce_any(mask > 0, axis=-1), (shape[0], -1))
        # The voxels with the largest random numbers, of the tumour and of the background.
        size = [shape[0] * part[1], tf.shape(tumour)[1]]
        noise = tf.random.stateless_uniform(size, tf.stack([seed, number]))[shape[0] * part[0] :][: shape[0]]
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
        return patches, tf.gather_nd(mask, centres)[:, None, None]

    return dataset.enumerate(first_batch).map(choose, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _validation_samples(windows, batch_size, part, multiple):
    """The numbers of the windows in a part of each batch; the last batch is padded to a multiple."""
    number, parts = part
    batches = [np.arange(first, min(first + batch_size, windows)) for first in range(0, windows, batch_size)]
    batches[-1] = np.append(batches[-1], np.arange(-len(batches[-1]) % multiple) % windows)
    return np.concatenate([np.split(batch, parts)[number] for batch in batches])


def _load(cases, recipe, modalities, training, parts):
    """Finds the voxels that a patch can reach, and lists where in them a patch can be.

    Returns:
        The `Voxels`, and tensors by name. `windows` and, if patches are placed at structures, `voxels`: int32 `(n, 4)`,
        the index of the first voxel or of the voxel in their array, and the number of the patient. `patients` and
        `structures`: see `augment.draw_voxel`. By patient: `reach` and `bounds`, int32 `(2, 3)`, the lowest and the
        highest first voxel of a patch before and after it is shifted; `spacing` in mm `(z, y, x)`, float32; and
        `movable`, see `augment.draw_transform`.
    """
    starts = [np.array(window_starts(case.shape, recipe.shape, recipe.stride, case.centre)) for case in cases]
    _warn(cases, recipe)
    depth, *plane = recipe.shape
    spacing = np.array([case.spacing for case in cases], np.float32)
    in_space, placed = training and not recipe.in_plane, training and recipe.foreground
    margin = augment.margin(recipe, spacing[:, 1:]) + recipe.max_offset[1:] if training else np.zeros(2, int)
    most = min(10_000, _VOXELS // (len(cases) * len(cases[0].masks)))
    voxels = [
        [_some_voxels(mask, most) for mask in case.masks.values() if mask.any()] if placed else [] for case in cases
    ]
    reach = [
        _reach(case.shape, first, own, recipe.shape) for case, first, own in zip(cases, starts, voxels, strict=True)
    ]

    # In space, the nearest voxel is taken outside of the slices: one pixel about them is enough.
    planes = [
        ([-1, -1], np.add(case.shape[1:], 1)) if in_space else (low[1:] - margin, high[1:] + plane + margin)
        for case, (low, high) in zip(cases, reach, strict=True)
    ]
    corners = [(min(low[0], 0), *corner) for (low, _), (corner, _) in zip(reach, planes, strict=True)]
    size = np.max([np.subtract(end, corner) for corner, end in planes], axis=0)
    slices = np.array([max(case.shape[0], depth) for case in cases])
    # Half of the memory is for the patients to train on, half for those to validate on, of each process.
    limit = (available_memory() / 4 if recipe.memory is None else 1e9 * recipe.memory) / 2 / parts
    kept = Voxels(cases, modalities, corners, slices, size, in_space, limit)
    tops = kept.tops

    # From the index in a patient to that in the array, and behind it the number of the patient.
    shifts = np.insert(-np.array(corners), 3, range(len(cases)), axis=1)
    shifts[:, 0] += tops
    shifts = shifts.astype(np.int32)
    windows, found = (
        [np.insert(index, 3, 0, axis=1) + shift for own, shift in zip(several, shifts, strict=True) for index in own]
        for several in ([[first] for first in starts], voxels)
    )
    far = np.full(len(cases), 2**30)
    bounds = [[tops, -far, -far], [tops + slices - depth, far, far]]
    fixed = [False] * len(cases[0].masks)
    movable = [[name != next(iter(case.images)) for name in modalities] + fixed for case in cases]
    tables = {
        "windows": np.concatenate(windows),
        "voxels": np.concatenate([np.zeros((0, 4), np.int32), *found]),
        "structures": _spans([len(index) for index in found]),
        "patients": _spans([len(own) for own in voxels if own]),
        "reach": np.array(reach) + shifts[:, None, :3],
        "bounds": np.transpose(bounds, (2, 0, 1)),
    }
    tables = {name: tf.constant(table, tf.int32) for name, table in tables.items()}
    others = {"spacing": tf.constant(spacing), "movable": tf.constant(movable, tf.float32)}
    return kept, tables | others


def _reach(size, starts, voxels, shape):
    """The lowest and the highest first voxel of the windows, further out where a structure lies outside all of them."""
    low, high, shape = starts.min(axis=0), starts.max(axis=0), np.array(shape)
    for index in voxels:
        first, last = index.min(axis=0), index.max(axis=0)
        low = np.where(first < low, np.maximum(first - shape // 2, 0), low)
        high = np.where(last >= high + shape, np.minimum(last - shape // 2, size - shape), high)
    return low, high


def _spans(counts):
    """The first number and the count of each of several runs of consecutive numbers."""
    counts = np.array(counts, int)
    return np.stack([np.cumsum(counts) - counts, counts], axis=1)


def _some_voxels(mask, most):
    """Indices of up to `most` voxels of a mask, `(voxels, 3)`."""
    index = np.flatnonzero(mask)
    return np.stack(np.unravel_index(index[:: 1 + len(index) // most], mask.shape), axis=1).astype(np.int32)


def _place(sample, tables, recipe, seed):
    """Where a training patch is.

    Returns:
        The number of the patient, the first voxel of the patch, and the lowest and the highest that an offset leads to.
    """
    voxels, windows, shape = tables["voxels"], tables["windows"], np.array(recipe.shape, np.int32)
    share = recipe.foreground if len(voxels) else 0.0
    # The patches at structures are spread evenly over all patches; the others are numbered without them.
    before, after = (tf.cast(tf.floor(tf.cast(sample + n, tf.float64) * share), tf.int64) for n in (0, 1))
    window = windows[augment.draw_window(sample - before, len(windows), seed)]
    if not share:
        return window[3], window[:3], *tf.unstack(tables["bounds"][window[3]])
    placed = after > before
    voxel = voxels[augment.draw_voxel(sample, tables["patients"], tables["structures"], seed)]
    patient = tf.where(placed, voxel[3], window[3])
    reach, bounds = tables["reach"][patient], tables["bounds"][patient]
    start = tf.where(placed, tf.clip_by_value(voxel[:3] - shape // 2, reach[0], reach[1]), window[:3])
    # The shift brings the voxel no nearer to an edge than an eighth of the patch.
    around = tf.stack([tf.minimum(start, voxel[:3] - shape * 7 // 8), tf.maximum(start, voxel[:3] - shape // 8)])
    around = tf.clip_by_value(around, bounds[0], bounds[1])
    return patient, start, *tf.unstack(tf.where(placed, around, bounds))


def _warn(cases, recipe):
    small = [case.name for case in cases if any(n < p for n, p in zip(case.shape, recipe.shape, strict=True))]
    if small:
        warnings.warn(
            f"volumes smaller than the patch {recipe.shape} are padded with their background: {_listed(small)}",
            stacklevel=3,
        )
    outside = []
    for case in cases:
        mask = case.mask
        seen = mask[window_box(case.shape, recipe.shape, recipe.stride, case.centre)].sum(dtype=int)
        whole = mask.sum(dtype=int)
        if seen < whole:
            outside.append(f"{case.name} ({1 - seen / whole:.0%})")
    if outside:
        warnings.warn(
            f"part of the tumour lies outside all windows: {_listed(outside)}; a larger `patches.shape` or a "
            f"`patches.stride` in plane covers more",
            stacklevel=3,
        )


def _listed(names):
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _split(patch, modalities):
    """Splits a patch `(channels, depth, height, width)` into the images and the masks."""
    masks = tf.transpose(patch[len(modalities) :], (1, 2, 3, 0))
    return {name: patch[n][..., None] for n, name in enumerate(modalities)}, tf.cast(masks >= 0.5, tf.uint8)
