"""Draws the mean DSC of whole patients against the minutes of training, and against the patients learnt from.

    python benchmarks/curves.py --data lgg_patients

Of each method, a line goes through its results with the recipes that are planned for different minutes, or through
those with a recipe and fewer patients (`whole_patients.py --learn-from`). The bars are 95% intervals over patients and
trainings. The charts lie beside the results, as `minutes.png` and `patients.png`.
"""

import argparse
import re

import numpy as np
from bootstrap import interval, resample
from matplotlib.figure import Figure
from whole_patients import FROM, RESULTS, by_patient, common, read, read_folds, structures_of


def against_minutes(results, structure):
    """By method, the points of its planned recipes: `{title: [(minutes, mean DSC, low, high)]}`."""
    curves = {}
    for (kind, _), found in results.items():
        if re.fullmatch(r"planned_\d+", kind):
            minutes = np.mean([one["seconds"] / 60 for one in found.values()])
            curves.setdefault(title(found), []).append((minutes, *mean_dsc(found, structure)))
    return {name: sorted(points) for name, points in curves.items()}


def against_patients(results, structure, everyone):
    """By recipe and method, the points of fewer patients and of all: `{title: [(patients, mean DSC, low, high)]}`."""
    curves = {}
    for (kind, _), found in results.items():
        recipe, _, count = kind.partition(FROM)
        point = int(count or everyone), *mean_dsc(found, structure)
        curves.setdefault(f"{title(found)}, {recipe}", []).append(point)
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def title(found):
    return next(iter(found.values()))["title"]


def mean_dsc(found, structure):
    """The mean over patients and trainings, and its 95% interval."""
    [values] = common({"": by_patient(found, structure)}).values()
    return values.mean(), *interval(resample({"": values})[""])


def draw(curves, label, path):
    """Draws a panel for each structure: `{structure: {title: points}}`."""
    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)
    for axis, (structure, lines) in zip(axes[0], curves.items(), strict=True):
        for name, points in lines.items():
            x, mean, low, high = np.transpose(points)
            axis.errorbar(x, mean, (mean - low, high - mean), marker="o", capsize=3, label=name)
        axis.set(title=structure, xlabel=label, ylabel="mean DSC")
        axis.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="NAME", help="name of the data set")
    folder = RESULTS / parser.parse_args().data
    if not (folder / "folds.json").exists():
        parser.error(f"--data: a data set with results in {RESULTS} is expected. Received: {folder.name}")
    results, folds = read(folder), read_folds(folder / "folds.json")
    everyone = round(np.mean([len(fold.train) + len(fold.validation) for fold in folds]))
    structures = structures_of(results)
    draw({one: against_minutes(results, one) for one in structures}, "minutes of training", folder / "minutes.png")
    fewer = {one: against_patients(results, one, everyone) for one in structures}
    if any(fewer.values()):
        draw(fewer, "patients to learn from", folder / "patients.png")


if __name__ == "__main__":
    main()
