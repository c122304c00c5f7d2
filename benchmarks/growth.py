"""Measures the seconds and the memory of each stage against the number of patients, and of their voxels.

    python benchmarks/growth.py --patients 10,30,100,300,1000 --voxels 0.25,0.5,1,2,4,8

The patients are made for it: two sequences and a mask with 0.2 million voxels each, of noise and a tumour; with
--voxels, 16 patients of so many million. No network is trained: a threshold takes its place, so that the time is that
of the package. Each stage is a process of its own. The memory is the largest sum over it and its workers, without
mapped files. The limit of the training patches, `patches.memory`, is 0.1 GB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import psutil
import SimpleITK as sitk
from machine import machine, report
from matplotlib.figure import Figure
from scipy import special

from keras_mmfnet._machine import available_cores

RESULTS = Path(__file__).parent / "results" / "growth.json"
# These run in processes of their own; they are measured on one core, too.
PARALLEL, ONE_CORE = ("check", "preprocess", "evaluate", "report"), " on one core"
STAGES = [
    name
    for stage in ("check", "preprocess", "resume", "patches", "segment", "evaluate", "report")
    for name in ((stage + ONE_CORE, stage) if stage in PARALLEL else (stage,))
]
# The shape of each of many patients; how many patients of many voxels; and how many batches are timed.
SHAPE, WITH_VOXELS, BATCHES = (24, 96, 96), 16, 100


def make_patients(folder, count, shape):
    """Files of patients whose tumour is bright."""
    for number in range(count):
        rng = np.random.default_rng(number)
        mask = np.zeros(shape, np.uint8)
        low = [int(rng.integers(n // 4, n // 2)) for n in shape]
        mask[tuple(slice(a, a + n // 4) for a, n in zip(low, shape, strict=True))] = 1
        patient = folder / f"patient_{number:05d}"
        patient.mkdir(parents=True)
        for name in ("t1", "t2", "mask"):
            array = mask if name == "mask" else (100 + 200.0 * mask + rng.normal(0, 20, shape)).astype(np.int16)
            image = sitk.GetImageFromArray(array)
            image.SetSpacing((1.0, 1.0, 4.0))
            sitk.WriteImage(image, str(patient / f"{name}.nii.gz"))


def recipe_of():
    """The recipe of all stages."""
    from keras_mmfnet.recipe import Recipe

    return Recipe.small().replace(
        {"data.modalities": ("t1", "t2"), "data.spacing": None, "patches.memory": 0.1, "patches.shape": (16, 64, 64)}
    )


def threshold(method, training, validation, recipe, folder):
    """Takes the place of a training: the brighter a voxel in both sequences, the higher its probability."""

    def predict(images):
        darker = np.minimum(images["t1"], images["t2"])
        return special.expit(40 * (darker - 0.95))

    return predict, 0, []


def run_stage(stage, folder):
    """Runs a stage on the patients of a folder; returns numbers besides its seconds and memory."""
    from keras_mmfnet.data import find_cases
    from keras_mmfnet.data.patches import patch_dataset
    from keras_mmfnet.data.survey import survey
    from keras_mmfnet.mask_folders import compare_folders
    from keras_mmfnet.methods import Method
    from keras_mmfnet.report import write_report
    from keras_mmfnet.run import Run, cross_validate

    recipe, patients, run = recipe_of(), folder / "patients", Run(folder / "run")
    one_core, stage = stage.endswith(ONE_CORE), stage.removesuffix(ONE_CORE)
    begin = time.perf_counter()
    if stage == "check":
        survey(find_cases(patients, recipe.data), recipe.data)
    elif stage == "preprocess":
        Run.start(folder / "run on one core" if one_core else run.folder, patients, recipe)
    elif stage == "resume":
        Run.start(run.folder, patients, recipe, resume=True)
    elif stage == "patches":
        batches = iter(patch_dataset(run.patients(run.folds[0].train), recipe.patches, batch_size=4, seed=0))
        next(batches)
        first = time.perf_counter()
        for _ in range(BATCHES):
            next(batches)
        return {"seconds": first - begin, "patches_per_second": 4 * BATCHES / (time.perf_counter() - first)}
    elif stage == "segment":
        cross_validate(run, Method("mmfnet", "MMFNet", train=threshold))
    elif stage == "evaluate":
        compare_folders(patients, patients, recipe.data)
    else:
        write_report(run)
        return {"seconds": time.perf_counter() - begin, "page_mb": run.report_file.stat().st_size / 1e6}
    return {"seconds": time.perf_counter() - begin}


def watch(found):
    """Keeps the largest memory of this process and those it started in `found`."""
    me = psutil.Process()
    while not found.get("done"):
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                memory = process.memory_info()
            except psutil.NoSuchProcess:
                continue
            total += memory.rss - memory.shared
        found["mb"] = max(found.get("mb", 0), total / 1e6)
        time.sleep(0.05)


def measure(stage, folder):
    """Runs a stage in this process; the cores are one or all."""
    one = stage.endswith(ONE_CORE)
    if one:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # on Linux
    found = {}
    watcher = threading.Thread(target=watch, args=(found,))
    watcher.start()
    try:
        with joblib.parallel_config("loky", n_jobs=1 if one else available_cores()):
            numbers = run_stage(stage, folder)
    finally:
        found["done"] = True
        watcher.join()
    return {name: round(value, 3) for name, value in {**numbers, "mb": found["mb"]}.items()}


def stages_of(count, shape):
    """The numbers of all stages with some patients."""
    with tempfile.TemporaryDirectory() as folder:
        make_patients(Path(folder) / "patients", count, shape)
        found = {}
        for stage in STAGES:
            command = [sys.executable, __file__, "--stage", stage, "--folder", folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[stage] = json.loads(done.stdout.splitlines()[-1])
            print(count, shape, stage, found[stage], flush=True)
        return found


def draw(result, path):
    """Draws the seconds and the memory of each stage against the patients and their voxels."""
    axes = {
        "patients": f"patients of {np.prod(SHAPE) / 1e6:.2g} million voxels",
        "voxels": f"million voxels, {WITH_VOXELS} patients",
    }
    axes = {key: label for key, label in axes.items() if result[key]}
    colors = [stage for stage in STAGES if not stage.endswith(ONE_CORE)]
    figure = Figure(figsize=(5.5 * len(axes), 7.5), layout="constrained")
    panels = figure.subplots(2, len(axes), sharex="col", squeeze=False)
    for column, (key, label) in zip(panels.T, axes.items(), strict=True):
        for panel, quantity in zip(column, ("seconds", "mb"), strict=True):
            for stage in STAGES:
                x = [float(one) for one in result[key]]
                y = [stages[stage][quantity] for stages in result[key].values()]
                style = "--" if stage.endswith(ONE_CORE) else "-"
                color = f"C{colors.index(stage.removesuffix(ONE_CORE))}"
                panel.plot(x, y, style, marker="o", markersize=3, color=color, label=stage)
            panel.set_xscale("log")
            panel.set_xticks(x, labels=map(str, result[key]))
            panel.set_xticks([], minor=True)
            panel.set_yscale("log" if quantity == "seconds" else "linear")
            panel.grid(alpha=0.3)
        column[0].set_ylabel("seconds")
        column[1].set_ylabel("memory, MB")
        column[1].set_ylim(bottom=0)
        column[1].set_xlabel(label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", default="10,30,100,300,1000", metavar="N,..", help="(%(default)s)")
    parser.add_argument("--voxels", default="0.25,0.5,1,2,4,8", metavar="N,..", help="millions (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.stage:
        print(json.dumps(measure(parsed.stage, parsed.folder)))
        return
    backends = {"tensorflow", os.environ.get("KERAS_BACKEND", "tensorflow")}
    result = {"machine": machine("keras-mmfnet", "numpy", "SimpleITK", *backends), "patients": {}, "voxels": {}}
    for count in map(int, filter(None, parsed.patients.split(","))):
        result["patients"][count] = stages_of(count, SHAPE)
    for millions in map(float, filter(None, parsed.voxels.split(","))):
        width = round((millions * 1e6 / 32) ** 0.5)
        result["voxels"][f"{millions:g}"] = stages_of(WITH_VOXELS, (32, width, width))
    report(result, parsed.out)
    draw(result, parsed.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
