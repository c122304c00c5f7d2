"""Measures the seconds and the memory of segmenting patients by command: `mmfnet segment` and nnU-Net's own.

    python benchmarks/prediction.py --run OUT/planned_40/seed_0 --fold 0 --methods mmfnet,nnunet_scaled --name lgg

OUT is the folder of `whole_patients.py`, whose networks of the fold are used. Each command segments one test patient,
and then several, so that the start can be told from each further patient. The memory is that of the largest process.
"""

import argparse
import functools
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Off by default on some processors; a prediction is faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
from machine import machine, report

from keras_mmfnet.run import Run

RESULTS = Path(__file__).parent / "results" / "prediction"
sys.path.append(str(Path(__file__).parent / "peers"))


def prepare(run, fold, method, names, folder):
    """Writes the patients as a method reads them; returns a function that segments them by its command."""
    images, out = folder / "images", folder / "out"
    images.mkdir()
    if method == "mmfnet":
        # Without the expert's mask, with which it would be compared.
        for name in names:
            (images / name).mkdir()
            for image in run.cases[name].images.values():
                (images / name / image.name).symlink_to(image)
        program = Path(sys.executable).with_name("mmfnet")
        options = ("segment", run.folder, images, "--fold", fold, "--out", out, "--quiet")
        return functools.partial(subprocess.run, [program, *map(str, options)], check=True)
    import handover
    import nnunet

    for patient in run.patients(names):
        handover.write_images(run.cases[patient.name], run.recipe.data.modalities, patient.source, images)
    space = nnunet.Workspace((run.folder / "nnunet").absolute(), fold)
    return functools.partial(nnunet.segment, space, method.removeprefix("nnunet_"), images, out)


def measure(path, fold, method, count):
    """The seconds of some test patients, and the memory in MB of the largest process of the command."""
    run = Run(path)
    with tempfile.TemporaryDirectory() as folder:
        segment = prepare(run, fold, method, run.folds[fold].test[:count], Path(folder))
        begun = time.perf_counter()
        segment()
        seconds = time.perf_counter() - begun
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def in_a_process(*arguments):
    """What `measure` returns, in a process that has no other children."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="folder of a run, <recipe>/seed_<number>")
    add("--fold", type=int, default=0, help="(%(default)s)")
    add("--methods", default="mmfnet", metavar="NAMES", help="mmfnet, nnunet_planned, nnunet_scaled (%(default)s)")
    add("--patients", type=int, default=6, help="(%(default)s)")
    add("--name", required=True, help="name of the file of results")
    parsed = parser.parse_args()
    if parsed.patients < 2:
        parser.error(f"--patients: at least 2 are expected. Received: {parsed.patients}")
    result = {"machine": machine("keras", keras.backend.backend()), "patients": parsed.patients, "methods": {}}
    for method in parsed.methods.split(","):
        one, _ = in_a_process(parsed.run, parsed.fold, method, 1)
        several, memory = in_a_process(parsed.run, parsed.fold, method, parsed.patients)
        result["methods"][method] = {
            "seconds of one": round(one, 1),
            "seconds of each further": round((several - one) / (parsed.patients - 1), 1),
            "memory, MB": round(memory),
        }
    report(result, RESULTS / f"{parsed.name}.json")


if __name__ == "__main__":
    main()
