"""Measures how the training of one network scales with the number of devices, and models it for more of them.

    KERAS_BACKEND=torch OMP_NUM_THREADS=1 python benchmarks/scaling.py --devices 1,2

MMFNet on patches of random voxels: with the same batch for all (strong scaling) and with the same batch for each device
(weak scaling). Where there is no GPU, a device is a process of PyTorch with one thread. The settings take turns. The
model needs what one device of yours takes for a patch, and the network between them:

    python benchmarks/scaling.py --model-only --seconds-per-patch 0.05 --bandwidth 12.5 --latency 20
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import machine, report

from keras_mmfnet import devices
from keras_mmfnet.data import Grid, PreprocessedCase
from keras_mmfnet.methods import build_mmfnet, method_of
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.training import follow, read_history, train_method

RESULTS = Path(__file__).parent / "results" / "scaling.json"
MODELLED = (1, 2, 4, 8, 16, 32, 64)


def make_case(shape, number):
    """A patient of noise with a tumour; each has one window."""
    rng = np.random.default_rng(number)
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(n // 4, n // 2) for n in shape)] = 1
    images = {name: rng.normal(mask, 0.3).astype(np.float32) for name in ("t1", "t2", "cet1")}
    grid = Grid(tuple(shape[::-1]), (1.0, 1.0, 4.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    return PreprocessedCase(f"patient {number}", images, {"tumour": mask}, grid, grid, tuple(n // 2 for n in shape))


def recipe_of(shape, batch_size, updates):
    """Epochs of some updates; the first one includes compilation."""
    return Recipe.small().replace(
        {
            "patches.shape": shape,
            "training.batch_size": batch_size,
            "training.steps_per_epoch": updates,
            "training.epochs": 3,
            "training.self_transfer": False,
            "training.patience": None,
        }
    )


def measure(number, shape, batch_size, updates):
    """Trains on a number of devices; returns the patches per second of the epochs after the first one."""
    if devices.set_devices(number).process:
        return follow()
    cases, recipe = [make_case(shape, n) for n in range(number + 1)], recipe_of(shape, batch_size, updates)
    with tempfile.TemporaryDirectory() as folder:
        # Each device validates one window.
        train_method(method_of(recipe), cases[:1], cases[1:], recipe, folder)
        seconds = [row["seconds"] for row in read_history(Path(folder) / "mmfnet_history.csv")]
    devices.set_devices(1)
    return batch_size * updates / statistics.median(seconds[1:])


def exchanged(shape):
    """The bytes that a device contributes to the sums of one update, and how many sums there are.

    Gradients and the moments of batch normalization, forward and backward, in float32.
    """
    model = build_mmfnet(recipe_of(shape, 1, 1), "float32")
    gradients = [int(np.prod(weight.shape)) for weight in model.trainable_weights]
    means = [weight.shape[0] for weight in model.non_trainable_weights if weight.path.endswith("moving_mean")]
    return 4 * (sum(gradients) + 4 * sum(means)), len(gradients) + 4 * len(means)


def modelled(number, batch_size, seconds_per_patch, data, sums, bandwidth, latency, patches_per_second):
    """Patches per second of a number of devices.

    An update takes the time of a device for its share of the batch, or that of the input pipeline if it is longer, and
    that of the sums: a ring sends `2 (n - 1) / n` of the data, and each sum waits for the latency.
    """
    share = batch_size / number
    exchange = (number > 1) * (2 * (number - 1) / number * data / bandwidth + sums * latency)
    return batch_size / (max(share * seconds_per_patch, share / patches_per_second) + exchange)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2", metavar="N,..", help="numbers of devices (%(default)s)")
    parser.add_argument("--shape", type=int, nargs=3, default=(16, 64, 64), help="of a patch (16 64 64)")
    parser.add_argument("--batch-size", type=int, default=4, help="of all devices, or of each (%(default)s)")
    parser.add_argument("--updates", type=int, default=6, help="updates per epoch (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="trainings of each setting (%(default)s)")
    parser.add_argument("--model-only", action="store_true", help="measure nothing")
    parser.add_argument("--seconds-per-patch", type=float, help="of one device, for the model (what was measured)")
    parser.add_argument("--bandwidth", type=float, default=12.5, help="for the model, in GB/s (%(default)s)")
    parser.add_argument("--latency", type=float, default=20, help="latency of one sum, in microseconds (%(default)s)")
    parser.add_argument(
        "--patches-per-second", type=float, default=50, help="of the input pipeline for one device (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"JSON file for the results ({RESULTS})")
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.measure:
        speed = measure(parsed.measure[0], tuple(parsed.shape), parsed.measure[1], parsed.updates)
        print(json.dumps(speed))
        return
    if parsed.model_only and not parsed.seconds_per_patch:
        parser.error("--seconds-per-patch: expected with --model-only. Received: none")
    numbers, speeds = sorted({1, *map(int, parsed.devices.split(","))}), {}
    # Of one device, both are the same.
    settings = [("strong", n, parsed.batch_size) for n in numbers]
    settings += [("weak", n, parsed.batch_size * n) for n in numbers if n > 1]
    for _ in range(0 if parsed.model_only else parsed.turns):
        for kind, number, batch_size in settings:
            shape = ["--shape", *map(str, parsed.shape), "--updates", str(parsed.updates)]
            command = [sys.executable, __file__, "--measure", str(number), str(batch_size), *shape]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            speeds.setdefault(f"{kind}, {number}", []).append(json.loads(done.stdout.splitlines()[-1]))
    if speeds:
        speeds["weak, 1"] = speeds["strong, 1"]
    data, sums = exchanged(tuple(parsed.shape))
    measured = {
        name: {
            "patches_per_second": round(statistics.median(found), 3),
            "efficiency": round(
                statistics.median(found) / int(name.split()[1]) / statistics.median(speeds["strong, 1"]), 3
            ),
        }
        for name, found in speeds.items()
    }
    seconds = parsed.seconds_per_patch or 1 / measured["strong, 1"]["patches_per_second"]
    assumed = {
        "seconds_per_patch": seconds,
        "bandwidth": 1e9 * parsed.bandwidth,
        "latency": 1e-6 * parsed.latency,
        "patches_per_second": parsed.patches_per_second,
    }
    model = {}
    for kind in ("strong", "weak"):
        for number in MODELLED:
            batch_size = max(MODELLED) if kind == "strong" else parsed.batch_size * number
            speed = modelled(number, batch_size, data=data, sums=sums, **assumed)
            model[f"{kind}, {number}"] = {
                "patches_per_second": round(speed, 3),
                "efficiency": round(speed * seconds / number, 3),
            }
    result = {
        "machine": machine("keras", "torch", "keras-mmfnet"),
        "patch": list(parsed.shape),
        "batch_size": parsed.batch_size,
        "bytes_per_update": data,
        "sums_per_update": sums,
        "measured": measured,
        "assumed": assumed,
        "modelled": model,
    }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
