"""Draws the DSC of whole patients, and their mean against the minutes of training and against the patients learnt from.

    python benchmarks/charts.py --data lgg_patients

`methods.png` has a point for each patient, the mean over the trainings. Of each method, a line goes through its
results with the recipes that are planned for different minutes (`minutes.png`), or through those with a recipe and
fewer patients (`patients.png`, `whole_patients.py --learn-from`). The bars are 95% intervals of the mean, over patients
and trainings. The charts lie beside the results.
"""

import argparse
import re

import numpy as np
from matplotlib.figure import Figure
from whole_patients import FROM, RESULTS, by_patient, mean_dsc, means_of, read, read_folds, structures_of


def of_patients(results, structure):
    """By recipe and method, the DSC of each patient, and the mean with its interval."""
    return {
        f"{title(found)}, {kind}": (means_of(by_patient(found, structure)), mean_dsc(by_patient(found, structure)))
        for (kind, _), found in results.items()
    }


def against_minutes(results, structure):
    """By method, the points of its planned recipes: `{title: [(minutes, mean DSC, low, high)]}`."""
    curves = {}
    for (kind, _), found in results.items():
        if re.fullmatch(r"planned_\d+", kind):
            minutes = np.mean([one["seconds"] / 60 for one in found.values()])
            curves.setdefault(title(found), []).append((minutes, *mean_dsc(by_patient(found, structure))))
    return {name: sorted(points) for name, points in curves.items()}


def against_patients(results, structure, everyone):
    """By recipe and method, the points of fewer patients and of all: `{title: [(patients, mean DSC, low, high)]}`."""
    curves = {}
    for (kind, _), found in results.items():
        recipe, _, count = kind.partition(FROM)
        point = int(count or everyone), *mean_dsc(by_patient(found, structure))
        curves.setdefault(f"{title(found)}, {recipe}", []).append(point)
    return {name: sorted(points) for name, points in curves.items() if len(points) > 1}


def title(found):
    return next(iter(found.values()))["title"]


def draw_methods(methods, path):
    """Draws a panel for each structure: `{structure: {title: (values, (mean, low, high))}}`."""
    rows = len(next(iter(methods.values())))
    figure = Figure(figsize=(3 + 4 * len(methods), 1 + 0.4 * rows), layout="constrained")
    axes = figure.subplots(1, len(methods), squeeze=False, sharey=True)
    rng = np.random.default_rng(0)
    for axis, (structure, lines) in zip(axes[0], methods.items(), strict=True):
        for row, (values, (mean, low, high)) in enumerate(lines.values()):
            axis.scatter(values, row + rng.uniform(-0.25, 0.25, len(values)), s=9, color="tab:blue", alpha=0.5)
            axis.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color="black", capsize=3)
        axis.set(title=structure, xlabel="DSC", xlim=(-0.02, 1), yticks=range(rows), yticklabels=lines)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)


def draw_lines(curves, label, path):
    """Draws a panel for each structure: `{structure: {title: points}}`, a point with its mean and interval."""
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
    draw_methods({one: of_patients(results, one) for one in structures}, folder / "methods.png")
    minutes = {one: against_minutes(results, one) for one in structures}
    if any(len(points) > 1 for lines in minutes.values() for points in lines.values()):
        draw_lines(minutes, "minutes of training", folder / "minutes.png")
    fewer = {one: against_patients(results, one, everyone) for one in structures}
    if any(fewer.values()):
        draw_lines(fewer, "patients to learn from", folder / "patients.png")


if __name__ == "__main__":
    main()
