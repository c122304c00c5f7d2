"""Compares the patches per second of this package's tf.data pipeline and of MONAI's transforms, and of augmentations.

    python benchmarks/pipeline.py

Patches of 16x256x256 of three modalities and a mask, with random offset, flip and rotation, from patients in memory.
MONAI's transforms run in a PyTorch DataLoader with two workers. The two take turns. Then each augmentation beyond the
paper's takes turns with the paper's alone, at the strengths of `PatchRecipe.strong`, by patches per second of one core;
and so do patches that are read from the files of the patients, `memory=0`.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine, report

from keras_mmfnet.data import Grid, PreprocessedCase
from keras_mmfnet.data.cache import load, store
from keras_mmfnet.recipe import PatchRecipe, Recipe

RESULTS = Path(__file__).parent / "results" / "pipeline.json"
SHAPE = (40, 400, 400)


def make_cases(count):
    """Patients with a body, a tumour and noise."""
    cases = []
    for number in range(count):
        rng = np.random.default_rng(number)
        mask = np.zeros(SHAPE, np.uint8)
        mask[15:25, 180:220, 170:230] = 1
        images = {name: rng.normal(mask, 0.3).astype(np.float32) for name in ("t1", "t2", "cet1")}
        grid = Grid(SHAPE[::-1], (0.5, 0.5, 4.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
        cases.append(
            PreprocessedCase(f"patient {number}", images, {"tumour": mask}, grid, grid, tuple(n // 2 for n in SHAPE))
        )
    return cases


def from_files(cases, folder):
    """The patients, whose arrays are in files of a folder."""
    for case in cases:
        store(case, folder / case.name)
    return [load(folder / case.name, case.name) for case in cases]


def ours(cases, recipe):
    """Endless batches of this package."""
    from keras_mmfnet.data import patch_dataset

    return iter(patch_dataset(cases, recipe.patches, batch_size=recipe.training.batch_size, seed=recipe.training.seed))


def monai(cases, recipe, affine):
    """Endless batches of MONAI: cropped first, which is faster, then flipped and rotated."""
    from monai.data import DataLoader, Dataset
    from monai.transforms import Compose, RandAffined, RandFlipd, RandRotated, RandSpatialCropd

    names = [*recipe.data.modalities, "mask"]
    modes = ["bilinear"] * len(recipe.data.modalities) + ["nearest"]
    angle = np.radians(recipe.patches.max_rotation)
    if affine:
        rotate = RandAffined(names, prob=1, rotate_range=(angle, 0, 0), mode=modes, padding_mode="border")
    else:
        rotate = RandRotated(names, prob=1, range_x=angle, mode=modes, padding_mode="border")
    transform = Compose(
        [
            RandSpatialCropd(names, recipe.patches.shape, random_size=False),
            RandFlipd(names, prob=0.5, spatial_axis=1),
            rotate,
        ]
    )
    patients = [
        {**{name: image[None] for name, image in case.images.items()}, "mask": case.mask[None]} for case in cases
    ]
    # Long enough that the workers are not restarted.
    loader = DataLoader(
        Dataset(patients * 1000, transform),
        batch_size=recipe.training.batch_size,
        shuffle=True,
        num_workers=2,
        multiprocessing_context="fork",
    )
    return iter(loader)


def augmentations():
    """The fields that each adds to the paper's augmentation."""
    strong = PatchRecipe.strong(shape=(16, 256, 256), flip_axes=(0, 1, 2), misalignment=(2.0, 2.0))
    fields = {name: value for name, value in strong if value != getattr(PatchRecipe(), name)}
    kinds = {name: {name: value} for name, value in fields.items()} | {"in_plane=False": {"in_plane": False}}
    together = {"all": fields, "all, in_plane=False": fields | {"in_plane": False}}
    files = {"memory=0": {"memory": 0.0}, "memory=0, in_plane=False": {"memory": 0.0, "in_plane": False}}
    return {**kinds, "PatchRecipe.strong": dict(PatchRecipe.strong()), **together, **files}


def rates(contenders, turns, seconds, batch_size, clock=time.perf_counter):
    """The patches per second of endless batches in each turn, without a first turn to warm up."""
    rates = {name: [] for name in contenders}
    for _ in range(turns + 1):
        for name, batches in contenders.items():
            for _ in range(6):  # discard prefetched batches
                next(batches)
            start, patches = clock(), 0
            while clock() - start < seconds:
                next(batches)
                patches += batch_size
            rates[name].append(patches / (clock() - start))
    return {name: values[1:] for name, values in rates.items()}


def relative(rates, name, other):
    """The median ratio of two contenders' rates within a turn."""
    return round(statistics.median(a / b for a, b in zip(rates[name], rates[other], strict=True)), 2)


def parser_of(description, results, turns, seconds):
    """The parser of a script whose contenders take turns."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=turns, help="measured, after one to warm up (%(default)s)")
    parser.add_argument("--seconds", type=float, default=seconds, help="length of a turn (%(default)s)")
    parser.add_argument("--out", type=Path, default=results, help="JSON file for the results (%(default)s)")
    return parser


def main():
    parsed = parser_of(__doc__, RESULTS, turns=8, seconds=4).parse_args()
    cases, recipe = make_cases(4), Recipe().replace({"training.batch_size": 2})
    # MONAI first: its processes are forked, which must happen before TensorFlow starts threads.
    contenders = {f"monai, {'RandAffined' if affine else 'RandRotated'}": affine for affine in (False, True)}
    contenders = {name: monai(cases, recipe, affine) for name, affine in contenders.items()}
    for batches in contenders.values():
        next(batches)
    contenders["keras-mmfnet"] = ours(cases, recipe)
    next(contenders["keras-mmfnet"])
    load = os.getloadavg()[0]
    measured = rates(contenders, parsed.turns, parsed.seconds, recipe.training.batch_size)
    medians = {name: round(statistics.median(values), 2) for name, values in measured.items()}
    best = max((name for name in medians if name.startswith("monai")), key=medians.get)
    del contenders

    augmented, folder = {}, tempfile.TemporaryDirectory()
    cases = from_files(cases[:2], Path(folder.name))
    for shape in (recipe.patches.shape, Recipe.small().patches.shape):
        speeds, ratios = [], {}
        paper = recipe.replace({"patches.shape": shape})
        for name, fields in augmentations().items():
            patches = paper.patches.model_copy(update=fields | {"shape": shape})
            pair = {
                "paper": ours(cases, paper),
                name: ours(cases, paper.model_copy(update={"patches": patches})),
            }
            pair_rates = rates(
                pair, parsed.turns // 2, parsed.seconds / 4, recipe.training.batch_size, time.process_time
            )
            speeds += pair_rates["paper"]
            ratios[name] = relative(pair_rates, name, "paper")
        augmented["x".join(map(str, shape))] = {
            "patches_per_second_of_a_core": round(statistics.median(speeds), 1),
            "relative": ratios,
        }
    folder.cleanup()
    result = {
        "machine": machine("tensorflow", "torch", "monai"),
        "load_before": round(load, 1),
        "patches_per_second": medians,
        "ratios": {f"keras-mmfnet / {best}": relative(measured, "keras-mmfnet", best)},
        "augmentations": augmented,
    }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
