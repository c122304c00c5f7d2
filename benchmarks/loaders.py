"""Compares the patches per second of the tf.data pipeline with those of Grain, without TensorFlow.

    pip install grain
    python benchmarks/loaders.py

Grain runs the paper's augmentation (offset, rotation in plane, flip) by NumPy, or by PyTorch's `grid_sample`, in as
many threads as there are cores. That all rotate and flip a box alike is checked first. The loaders take turns.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from machine import machine, report
from pipeline import make_cases, ours, parser_of, rates, relative

from keras_mmfnet._machine import available_cores
from keras_mmfnet.data import augment
from keras_mmfnet.data.windows import window_starts
from keras_mmfnet.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "loaders.json"


def draw(number, cases, recipe, seed):
    """The patient, the first voxel of the box and the transform of a training patch."""
    rng = np.random.default_rng([seed, number])
    case = cases[rng.integers(len(cases))]
    starts = window_starts(case.shape, recipe.shape, recipe.stride, case.centre)
    offset = rng.integers(-np.array(recipe.max_offset), np.array(recipe.max_offset) + 1)
    start = np.array(starts[rng.integers(len(starts))]) + offset
    flips = {axis: -1.0 if rng.random() < 0.5 else 1.0 for axis in recipe.flip_axes}
    signs = [flips.get(axis, 1.0) for axis in range(3)]
    return case, start, {"angle": np.radians(recipe.max_rotation) * rng.uniform(-1, 1), "signs": signs}


def crop(case, start, shape):
    """A box `(channels, depth, height, width)`."""
    start = np.clip(start, 0, np.subtract(case.shape, shape))
    box = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
    return np.stack([array[box] for array in (*case.images.values(), *case.masks.values())])


def positions(transform, recipe, size):
    """The rows and the columns of a box from which the pixels of the patch are taken."""
    (height, width), (_, flip_y, flip_x), angle = recipe.shape[1:], transform["signs"], transform["angle"]
    y = ((np.arange(height, dtype=np.float32) - (height - 1) / 2) * flip_y)[:, None]
    x = ((np.arange(width, dtype=np.float32) - (width - 1) / 2) * flip_x)[None]
    rows, columns = np.cos(angle) * y + np.sin(angle) * x, np.cos(angle) * x - np.sin(angle) * y
    return [(part + (n - 1) / 2).astype(np.float32) for part, n in zip((rows, columns), size, strict=True)]


def by_numpy(box, transform, recipe):
    """Rotates and flips with linear interpolation by NumPy."""
    box = np.ascontiguousarray(box.transpose(2, 3, 1, 0))  # all slices and channels of a pixel are contiguous
    rows, columns = positions(transform, recipe, box.shape[:2])
    top, left = np.floor(rows).astype(np.int32), np.floor(columns).astype(np.int32)
    low, right = (rows - top)[..., None, None], (columns - left)[..., None, None]
    patch = box[top, left] * ((1 - low) * (1 - right))
    patch += box[top, left + 1] * ((1 - low) * right)
    patch += box[top + 1, left] * (low * (1 - right))
    patch += box[top + 1, left + 1] * (low * right)
    return patch.transpose(3, 2, 0, 1)


def by_torch(box, transform, recipe):
    """The same by PyTorch's `grid_sample`, for which slices are channels."""
    size = box.shape[2:]
    rows, columns = (2 * p / (n - 1) - 1 for p, n in zip(positions(transform, recipe, size), size, strict=True))
    grid = torch.from_numpy(np.stack([columns, rows], -1))[None]
    flat = torch.from_numpy(box).reshape(1, -1, *size)
    patch = torch.nn.functional.grid_sample(flat, grid, "bilinear", "border", align_corners=True)
    return patch.reshape(*box.shape[:2], *recipe.shape[1:]).numpy()


def make_patch(number, cases, recipe, seed, move):
    """A training patch like those of `patch_dataset`, but moved inside at the edges of the volume."""
    case, start, transform = draw(int(number), cases, recipe, seed)
    margin = augment.margin(recipe)
    box = crop(case, start - [0, *margin], np.add(recipe.shape, [0, *2 * margin]))
    moved = move(box, transform, recipe)
    masks = (moved[len(case.images) :] >= 0.5).astype(np.uint8)
    return {name: moved[n][..., None] for n, name in enumerate(case.images)}, np.moveaxis(masks, 0, -1)


def with_grain(cases, recipe, move):
    """Endless batches by Grain."""
    import grain

    patches, settings = recipe.patches, recipe.training
    numbers = grain.MapDataset.range(10**9)
    made = numbers.map(lambda number: make_patch(number, cases, patches, settings.seed, move))
    options = grain.ReadOptions(num_threads=available_cores(), prefetch_buffer_size=16)
    return iter(made.batch(settings.batch_size).to_iter_dataset(options))


def check(cases, recipe):
    """Raises an `AssertionError` if the augmentations differ for the same transform."""
    import tensorflow as tf

    for number in range(4):
        case, start, transform = draw(number, cases, recipe, 0)
        margin = augment.margin(recipe)
        box = crop(case, start - [0, *margin], np.add(recipe.shape, [0, *2 * margin]))
        theirs = {
            "signs": tf.constant(transform["signs"], tf.float32),
            "angles": tf.constant([transform["angle"], 0, 0], tf.float32),
            "scale": tf.constant(1.0),
        }
        expected = augment.move_in_plane(tf.constant(box.transpose(2, 3, 1, 0)), theirs, tf.ones(2), margin, recipe)
        for move in (by_numpy, by_torch):
            np.testing.assert_allclose(move(box, transform, recipe), expected, atol=1e-3)


def main():
    parsed = parser_of(__doc__, RESULTS, turns=8, seconds=3).parse_args()
    torch.set_num_threads(1)  # each patch has its own thread
    cases, result = make_cases(4), {"machine": machine("tensorflow", "torch", "grain")}
    for shape in (Recipe().patches.shape, Recipe.small().patches.shape):
        recipe = Recipe().replace({"patches.shape": shape, "training.batch_size": 4})
        check(cases, recipe.patches)
        loaders = {
            "tf.data": ours(cases, recipe),
            "grain, NumPy": with_grain(cases, recipe, by_numpy),
            "grain, PyTorch": with_grain(cases, recipe, by_torch),
        }
        # By the time of the cores, since all loaders go on prefetching.
        found = rates(loaders, parsed.turns, parsed.seconds, recipe.training.batch_size, time.process_time)
        result["x".join(map(str, shape))] = {
            name: {
                "patches_per_second_of_a_core": round(statistics.median(values), 1),
                "relative": relative(found, name, "tf.data"),
            }
            for name, values in found.items()
        }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
