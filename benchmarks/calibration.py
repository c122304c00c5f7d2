"""Are the probabilities calibrated, and does a network or its repeated training tell which patients went wrong?

    python benchmarks/calibration.py --runs OUT/planned_40/seed_0,OUT/planned_40/seed_1 --folds 0,1 --name lgg

OUT is the folder of `whole_patients.py`, and the runs differ in the seed, so that none of their networks has learnt
from the test patients of a fold. The ensemble has their mean probability; with one run it is the network itself. Of
each test patient and structure, four numbers that are known without the expert's mask are compared with the DSC of
the ensemble:

- `expected_dsc`: the DSC that is expected if the probabilities are true, 2 sum(p m) / (sum(p) + sum(m)), where m is the
  mask, over voxels with p of 0.05 or more;
- `uncertainty`: the mean of 4 p (1 - p) over these voxels;
- `spread`: the mean standard deviation of the networks' probabilities over these voxels, of two runs or more;
- `agreement`: the mean DSC of the masks of each two networks, of two runs or more.

A patient with an empty mask has the worst value of each, as all patients here have a tumour. How well a number finds
the patients with a DSC below 0.5 is the area under the ROC curve, and how well it orders all of them is Spearman's rank
correlation.
"""

import argparse
import itertools
import os
from pathlib import Path

# Off by default on some processors; a prediction is faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
import SimpleITK as sitk
from machine import machine, report
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from keras_mmfnet.data.preprocess import read_masks
from keras_mmfnet.evaluation import calibration
from keras_mmfnet.inference import segment_case
from keras_mmfnet.models import load_network
from keras_mmfnet.run import Run

RESULTS = Path(__file__).parent / "results" / "calibration"
FAILED, LOW, BINS = 0.5, 0.05, 10


def dice(one, other):
    """The DSC of two masks; 1 of two that are empty."""
    total = np.count_nonzero(one) + np.count_nonzero(other)
    return 2 * np.count_nonzero(one & other) / total if total else 1.0


def numbers_of(probabilities):
    """The numbers of a patient that are known without the expert's mask, from the probabilities of each network.

    Args:
        probabilities: `(networks, z, y, x)`.

    Returns:
        A dict; `spread` and `agreement` are of two networks or more.
    """
    mean, masks = probabilities.mean(0), probabilities >= 0.5
    mask, seen = mean >= 0.5, mean >= LOW
    found, several = {"expected_dsc": 0.0, "uncertainty": 1.0}, {"spread": 0.5, "agreement": 0.0}
    if mask.any():
        found["expected_dsc"] = float(2 * mean[mask].sum() / (mean[seen].sum() + mask.sum()))
        found["uncertainty"] = float((4 * mean * (1 - mean))[seen].mean())
    if len(probabilities) == 1:
        return found
    if mask.any():
        several["spread"] = float(probabilities.std(0)[seen].mean())
        several["agreement"] = float(np.mean([dice(*pair) for pair in itertools.combinations(masks, 2)]))
    return found | several


def measure(runs, fold, method):
    """The test patients of a fold: rows of numbers, and the probabilities and masks of each structure."""
    networks = [load_network(run.network(fold, method)) for run in runs]
    recipe, rows, pooled = runs[0].recipe, [], {}
    for patient in runs[0].patients(runs[0].folds[fold].test):
        segmented = [segment_case(network, patient, recipe).probabilities for network in networks]
        for structure, truth in read_masks(runs[0].cases[patient.name], recipe.data, patient).items():
            probabilities = np.stack([sitk.GetArrayFromImage(images[structure]) for images in segmented])
            truth, mean = truth > 0, probabilities.mean(0)
            numbers = {"dsc": float(dice(mean >= 0.5, truth)), **numbers_of(probabilities)}
            rows.append({"patient": patient.name, "structure": structure, **numbers})
            pooled.setdefault(structure, []).append((mean.ravel(), truth.ravel()))
            print(f"fold {fold}, {patient.name}, {structure}: {numbers}", flush=True)
    return rows, pooled


def judge(rows):
    """How well each number finds the patients with a low DSC, `{number: {auroc, spearman}}`; `None` where undefined."""
    dsc, found = np.array([row["dsc"] for row in rows]), {}
    failed = dsc < FAILED
    for name in ("expected_dsc", "uncertainty", "spread", "agreement"):
        if name in rows[0]:
            values = np.array([row[name] for row in rows])
            worse = values if name in ("uncertainty", "spread") else -values
            found[name] = {
                "auroc": float(roc_auc_score(failed, worse)) if 0 < failed.sum() < len(failed) else None,
                "spearman": float(spearmanr(-worse, dsc).statistic) if np.ptp(values) else None,
            }
    return found


def draw(result, path):
    """Draws the reliability of the probabilities, and the DSC against what was expected."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    reliability, expected = figure.subplots(1, 2)
    for structure, found in result["structures"].items():
        reliability.plot(found["probability"], found["share"], marker="o", label=structure)
        points = [(row["expected_dsc"], row["dsc"]) for row in result["patients"] if row["structure"] == structure]
        expected.scatter(*zip(*points, strict=True), label=structure)
    for axis in (reliability, expected):
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        axis.legend()
    reliability.set(xlabel="predicted probability", ylabel="share of tumour")
    expected.set(xlabel="expected DSC", ylabel="DSC")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--runs", required=True, metavar="FOLDERS", help="runs that differ in the seed")
    add("--folds", default="0", metavar="N,..", help="(%(default)s)")
    add("--method", default="mmfnet", metavar="NAME", help="(%(default)s)")
    add("--name", required=True, help="name of the files of results")
    parsed = parser.parse_args()
    runs = [Run(folder) for folder in parsed.runs.split(",")]
    if any(run.folds != runs[0].folds for run in runs):
        parser.error(f"--runs: runs with the same folds are expected. Received: {parsed.runs}")
    rows, pooled = [], {}
    for fold in map(int, parsed.folds.split(",")):
        found, voxels = measure(runs, fold, parsed.method)
        rows += found
        for structure, parts in voxels.items():
            pooled.setdefault(structure, []).extend(parts)
    result = {
        "machine": machine("keras", keras.backend.backend()),
        "method": parsed.method,
        "networks": len(runs),
        "folds": parsed.folds,
        "structures": {},
        "patients": rows,
    }
    for structure, parts in pooled.items():
        values, truth = map(np.concatenate, zip(*parts, strict=True))
        probability, share, voxels, _ = calibration(values, truth, bins=BINS)
        # Almost all other voxels are background, and say nothing of the rest.
        seen = values >= LOW
        result["structures"][structure] = {
            "probability": probability.tolist(),
            "share": share.tolist(),
            "voxels": voxels.tolist(),
            "expected_calibration_error": calibration(values[seen], truth[seen], bins=BINS)[-1],
            "finds": judge([row for row in rows if row["structure"] == structure]),
        }
    report(result, RESULTS / f"{parsed.name}.json")
    draw(result, RESULTS / f"{parsed.name}.png")


if __name__ == "__main__":
    main()
