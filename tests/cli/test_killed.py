"""Runs killed at random moments end, when they are started again, as an undisturbed one.

The processes are forks of one that has imported everything, so that ten of them take little time:

    python tests/cli/test_killed.py PATIENTS FOLDER
"""

import csv
import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet.cli import app
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe

RECIPE = Recipe().replace(
    {
        "data.spacing": 4.0,
        "patches.shape": (16, 16, 16),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 3,
        "training.warmup_epochs": 1,
        "training.folds": 3,
    }
)
# What is there when the killing may begin, and within how many seconds it happens.
MOMENTS = (
    *(("run.log", 0.3), ("cache/*", 0.3), ("fold_0/.unet3d_t1/*", 1.0), ("fold_0/.unet3d_t2/*/epoch*", 0.5)),
    *(("fold_0/.unet3d_cet1/*", 2.0), ("fold_0/unet3d_cet1.keras", 2.0), ("fold_0/.mmfnet/*/epoch*", 0.5)),
    ("fold_0/masks/*/*", 0.2),
)


def start(*arguments):
    """The process number of a command that runs on its own."""
    if child := os.fork():
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        app(list(map(str, arguments)))
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def end(child):
    """Waits for a process; what it returned, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(patients, folder):
    for name in ("run", "report.analysis", "plots"):
        importlib.import_module(f"keras_mmfnet.{name}")
    draw = random.Random(0)
    whole, killed = folder / "undisturbed", folder / "killed"
    (folder / "recipe.json").write_text(RECIPE.to_json())

    def train(out):
        # As long as nothing was written but the cache, there is no run to resume.
        begun = ["--resume"] if (out / "cohort.json").exists() else [patients, "--recipe", folder / "recipe.json"]
        return start("train", *begun, "--out", out, "--quiet")

    if end(train(whole)):
        raise RuntimeError("the undisturbed run failed")
    for pattern, seconds in MOMENTS:
        child = train(killed)
        while not list(killed.glob(pattern)):
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError(f"a run ended before {pattern}")
            time.sleep(0.001)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        print("killed" if end(child) == -signal.SIGKILL else "ended", pattern, flush=True)
    if end(train(killed)):
        raise RuntimeError("the resumed run failed")

    def segment(out):
        return start("segment", whole, patients / "patient_00", "--out", out, "--quiet")

    before = time.monotonic()
    if end(segment(folder / "segmented")):
        raise RuntimeError("a patient was not segmented")
    seconds, out = time.monotonic() - before, folder / "stopped" / "patient_00.nii.gz"
    for share in (draw.uniform(0, 1), draw.uniform(0.8, 1)):
        child = segment(out.parent)
        time.sleep(share * seconds)
        os.kill(child, signal.SIGKILL)
        print("killed" if end(child) == -signal.SIGKILL else "ended", "segmenting", out.exists(), flush=True)
        if out.exists() and out.read_bytes() != (folder / "segmented" / out.name).read_bytes():
            raise RuntimeError("half a mask")
    if not out.exists() and end(segment(out.parent)):
        raise RuntimeError("a patient was not segmented again")


def results(folder):
    """The files of a run by their names, but for the cache and the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path.relative_to(folder)): path for path in files if path.suffix not in (".lock", ".owner")}


@pytest.mark.slow
def test_killed_at_ten_moments_and_started_again(tiny_cohort, tmp_path):
    arguments = [sys.executable, __file__, str(tiny_cohort), str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    print(done.stdout)
    assert done.stdout.count("killed") >= 8
    whole, killed = (results(tmp_path / name) for name in ("undisturbed", "killed"))
    assert sorted(killed) == sorted(whole)
    compared = 0
    for name, one in whole.items():
        other = killed[name]
        if name.endswith(".keras"):
            for a, b in zip(load_network(one).get_weights(), load_network(other).get_weights(), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        elif name.endswith("_history.csv"):
            a, b = (
                [row["val_loss"] for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())]
                for path in (one, other)
            )
            np.testing.assert_allclose(np.array(a, float), np.array(b, float), rtol=1e-3)
        elif name.endswith(".nii.gz"):
            a, b = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (one, other))
            assert np.mean(a != b) < 1e-3
        else:
            continue
        compared += 1
    assert compared == 4 + 4 + 2


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
