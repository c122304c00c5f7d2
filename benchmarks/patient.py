"""Measures the time from a patient's files to the written mask with a loaded model, and the network's part of it.

    python benchmarks/patient.py

Three images of 512x512x40 voxels, the paper's recipe: pixels of 0.5 mm, windows of 16x256x256 every four slices. The
network has random weights, which does not affect the time.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
from machine import machine, report
from preprocessing import write_patient

from keras_mmfnet.data import preprocess_case
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.inference import segment_case
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "patient.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="patients that count (5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON file for the results ({RESULTS})")
    parsed = parser.parse_args()
    recipe = Recipe()
    model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters)
    network, windows = [], []

    def predict(batch):
        start = time.perf_counter()
        probabilities = model.predict_on_batch(batch)
        network.append(time.perf_counter() - start)
        windows.append(len(probabilities))
        return probabilities

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_patient(Path(folder), slices=40)
        for _ in range(parsed.turns + 1):
            network.clear(), windows.clear()
            start = time.perf_counter()
            case = preprocess_case(files, recipe.data)
            preprocessed = time.perf_counter()
            mask = segment_case(predict, case, recipe).label_image
            write_image(mask, Path(folder) / "segmentation.nii.gz")
            end = time.perf_counter()
            rows.append(
                {
                    "all": end - start,
                    "preprocessing": preprocessed - start,
                    "network": sum(network),
                    "windows, resampling, writing": end - preprocessed - sum(network),
                }
            )
    first, *rows = rows  # the first one includes compilation
    result = {
        "machine": machine("keras", keras.backend.backend(), "SimpleITK"),
        "windows": sum(windows),
        "first_patient_seconds": round(first["all"], 2),
        "seconds": {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]},
    }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
