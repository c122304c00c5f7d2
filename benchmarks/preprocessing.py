"""Compares the time to preprocess a patient in this package and in MONAI.

    python benchmarks/preprocessing.py

Three image files of 512x512x30 voxels on different grids are resampled to the first one's grid with pixels of 0.5 mm,
z-scored inside the body and clipped. MONAI has no body mask: it uses the nonzero voxels, which is less work. The two
take turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from machine import machine, report

from keras_mmfnet.data import Case, Grid, preprocess_case
from keras_mmfnet.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "preprocessing.json"


def write_patient(folder, slices=30):
    """Writes three images of a body, 230 mm wide; t2 and cet1 are shifted and cover a slightly larger field of view."""
    images = {}
    for number, name in enumerate(("t1", "t2", "cet1")):
        spacing = (0.45 + 0.01 * number, 0.45 + 0.01 * number, 4.0 + 0.1 * number)
        grid = Grid((512, 512, slices), spacing, (-115.0 - number, -115.0, -60.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
        y, x = (np.linspace(-1.2, 1.2, 512) ** 2)[:, None], np.linspace(-1.3, 1.3, 512) ** 2
        rng = np.random.default_rng(number)
        body = (x + y < 1) * (600 + 200 * np.sin(40 * x) * np.cos(30 * y))
        volume = np.clip(rng.normal(body, 30, (slices, 512, 512)), 0, None).astype(np.int16)
        images[name] = folder / f"{name}.nii.gz"
        sitk.WriteImage(grid.image(volume), str(images[name]), useCompression=True)
    return Case("patient", images)


def monai_transform(recipe):
    """A function of a case that does the same steps in MONAI."""
    from monai.transforms import Compose, LoadImaged, NormalizeIntensityd, ResampleToMatchd, Spacingd

    names = list(recipe.data.modalities)
    transform = Compose(
        [
            LoadImaged(names, ensure_channel_first=True),
            # The spacing of the slices is kept, as in the paper.
            Spacingd(names[0], pixdim=(recipe.data.spacing, recipe.data.spacing, 0)),
            ResampleToMatchd(names[1:], key_dst=names[0]),
            NormalizeIntensityd(names, nonzero=True),
        ]
    )

    def preprocess(case):
        images = transform({name: str(path) for name, path in case.images.items()})
        return {name: images[name].clip(*recipe.data.clip[name]) for name in names}

    return preprocess


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="turns that are measured, after one to warm up (7)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON file for the results ({RESULTS})")
    parsed = parser.parse_args()
    recipe = Recipe()
    contenders = {"keras-mmfnet": lambda case: preprocess_case(case, recipe.data), "monai": monai_transform(recipe)}
    seconds = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        case = write_patient(Path(folder))
        for _ in range(parsed.turns + 1):
            for name, preprocess in contenders.items():
                start = time.perf_counter()
                preprocess(case)
                seconds[name].append(time.perf_counter() - start)
    seconds = {name: values[1:] for name, values in seconds.items()}  # the first turn warms up
    ratio = statistics.median(a / b for a, b in zip(seconds["keras-mmfnet"], seconds["monai"], strict=True))
    result = {
        "machine": machine("SimpleITK", "monai", "torch"),
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratios": {"keras-mmfnet / monai": round(ratio, 3)},
    }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
