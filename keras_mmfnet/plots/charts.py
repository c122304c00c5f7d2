"""Charts of methods, patients and trainings."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from keras_mmfnet.evaluation import calibration, mean_interval
from keras_mmfnet.plots._masks import LINE_COLOURS, PREDICTION_COLOUR, TRUTH_COLOUR


def plot_methods(scores: Mapping[str, tuple[Sequence[float], float | None]], label: str = "DSC") -> Figure:
    """Plots the mean of each method over patients with its 95% interval, and the paper's number.

    Args:
        scores: `{title: (a number per patient, the paper's mean or None)}`.
        label: Name of the number.

    Returns:
        A Matplotlib figure, one line per method in the order given.

    Raises:
        ValueError: There is no method, or a method has no patients.
    """
    empty = [title for title, (values, _) in scores.items() if not len(values)]
    if not scores or empty:
        raise ValueError(f"`scores` must hold methods with patients. Received: {empty or 'no method'}")
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for line, (values, paper) in enumerate(scores.values()):
        axes.plot(mean_interval(values), [line, line], color=PREDICTION_COLOUR, linewidth=3, solid_capstyle="butt")
        axes.plot(np.mean(values), line, "o", color=LINE_COLOURS[0])
        if paper is not None:
            axes.plot(paper, line, "D", markerfacecolor="none", color=TRUTH_COLOUR)
    axes.plot([], [], "o-", color=LINE_COLOURS[0], label="here: mean over patients, 95% interval")
    axes.plot([], [], "D", markerfacecolor="none", color=TRUTH_COLOUR, label="paper, on its own patients")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def plot_learning_curves(charts: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """Plots validation losses against updates, in one panel or several.

    Args:
        charts: `{title of a panel: {label of a curve: (updates, losses)}}`. A label has the same colour in all panels.

    Returns:
        A Matplotlib figure.

    Raises:
        ValueError: There is no panel.
    """
    if not charts:
        raise ValueError(f"`charts` must hold at least one panel. Received: {charts}")
    labels = list(dict.fromkeys(label for curves in charts.values() for label in curves))
    figure = Figure(figsize=(4.2 * len(charts), 3.6), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(charts), squeeze=False, sharey=True)[0], charts.items(), strict=True
    ):
        for label, (updates, losses) in curves.items():
            axes.plot(updates, losses, "o-", markersize=3, color=_colour(labels.index(label)))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss")
    lines = [figure.axes[0].plot([], [], "o-", color=_colour(i))[0] for i in range(len(labels))]
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def plot_training(history: Sequence[Mapping], choose_by: str = "loss") -> Figure:
    """Plots losses, Dice scores and learning rate of a training by epoch.

    Args:
        history: Rows of a `<network>_history.csv` as dicts by column; values are numbers or strings.
        choose_by: The recipe's `training.choose_by`.

    Returns:
        A Matplotlib figure of three panels, which mark the end of the warm-up and the best epoch, that of the lowest
        validation loss or, by `"dsc"`, the highest DSC.

    Raises:
        ValueError: There is no epoch.
    """
    if not history:
        raise ValueError(f"`history` must hold at least one epoch. Received: {history}")
    stages = [row["stage"] for row in history]
    epochs = np.array([int(row["epoch"]) for row in history]) + 1
    costs = [float(row["val_loss"]) if choose_by == "loss" else -float(row["val_dice_score"]) for row in history]
    best = int(np.argmin(costs))
    panels = {"loss": "loss", "DSC": "dice_score", "learning rate": "learning_rate"}
    figure = Figure(figsize=(10.5, 3.0), layout="constrained")
    for axes, (title, name) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        columns = {
            label: key for label, key in (("training", name), ("validation", f"val_{name}")) if key in history[0]
        }
        for colour, (label, column) in zip(LINE_COLOURS, columns.items(), strict=False):
            values = [float(row[column]) for row in history]
            axes.plot(epochs, values, ".-", color=colour, label=label)
            if label == "validation":
                axes.plot(epochs[best], values[best], "o", color=colour, markerfacecolor="none", label="best epoch")
        for end in np.flatnonzero([one != other for one, other in itertools.pairwise(stages)]):
            axes.axvline(epochs[end] + 0.5, color="0.4", linestyle=":", label="end of the warm-up")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    axes.set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def plot_boxes(scores: Mapping[str, Sequence[float | None]], label: str = "DSC") -> Figure:
    """Draws a box plot over patients per method, with a dot per patient.

    Args:
        scores: `{title: a number per patient}`; an undefined number is `None` or NaN.
        label: Name of the number.

    Returns:
        A Matplotlib figure, one line per method in the order given. The whiskers extend to the outermost patients
        within 1.5 times the interquartile range.

    Raises:
        ValueError: There is no method, or a method has no defined number.
    """
    values = {title: np.array(numbers, float) for title, numbers in scores.items()}
    values = {title: numbers[np.isfinite(numbers)] for title, numbers in values.items()}
    empty = [title for title, numbers in values.items() if not len(numbers)]
    if not scores or empty:
        raise ValueError(f"`scores` must hold methods with numbers. Received: {empty or 'no method'}")
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(9, 1.0 + 0.45 * len(scores)), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(
        list(values.values()),
        positions=range(len(values)),
        widths=0.6,
        orientation="horizontal",
        showfliers=False,
        medianprops={"color": LINE_COLOURS[1], "linewidth": 2},
    )
    for line, numbers in enumerate(values.values()):
        apart = line + rng.uniform(-0.2, 0.2, len(numbers))
        axes.plot(numbers, apart, "o", color=LINE_COLOURS[0], markersize=3, alpha=0.5)
    axes.set_yticks(range(len(values)), [f"{title} ({len(numbers)})" for title, numbers in values.items()])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return figure


def plot_reliability(probabilities: Mapping[str, tuple[np.ndarray, np.ndarray]], bins: int = 10) -> Figure:
    """Plots the calibration of probabilities: the share of tumour among voxels of similar predicted probability.

    Args:
        probabilities: `{title: (probabilities in [0, 1], the expert's mask of the same shape)}`. One array may hold the
            voxels of several patients.
        bins: Number of bins of equal width.

    Returns:
        A Matplotlib figure: above, the share of tumour against the mean probability of each bin, with the expected
        calibration error (ECE) of each title; below, the number of voxels in each bin.

    Raises:
        ValueError: `probabilities` is empty, or the shapes differ.
    """
    if not probabilities:
        raise ValueError(f"`probabilities` must hold at least one title. Received: {probabilities}")
    figure = Figure(figsize=(4.6, 6.2), layout="constrained")
    curves, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curves.plot([0, 1], [0, 1], ":", color="0.4")
    for number, (title, (probability, truth)) in enumerate(probabilities.items()):
        mean, share, voxels, error = calibration(probability, truth, bins)
        curves.plot(mean, share, "o-", markersize=4, color=_colour(number), label=f"{title}, ECE {error:.4f}")
        counts.stairs(voxels, np.linspace(0, 1, bins + 1), color=_colour(number), baseline=None)
    curves.set(ylabel="share of tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    curves.legend(frameon=False, fontsize=9)
    counts.set(xlabel="probability of tumour", ylabel="voxels", yscale="symlog")
    # Matplotlib's automatic limit ignores the highest step.
    counts.set_ylim(0, max(np.size(truth) for _, truth in probabilities.values()))
    for axes in (curves, counts):
        axes.grid(alpha=0.3)
    return figure


def plot_attention(share: Mapping[str, Mapping[str, np.ndarray]], title: str | None = None) -> Figure:
    """Plots the share of each modality in the weighted features of each fusion block.

    Args:
        share: `{block: {modality: (patients or windows,)}}`, as returned by `explain.fusion_attention`.
        title: Title of the figure.

    Returns:
        A Matplotlib figure: a group of bars per block with the mean and, for several patients, the standard deviation.
    """
    modalities = list(next(iter(share.values())))
    figure = Figure(figsize=(1.5 + 1.3 * len(share), 3.6), layout="constrained")
    axes, width = figure.subplots(), 0.8 / len(modalities)
    for index, name in enumerate(modalities):
        values = [np.asarray(block[name]) for block in share.values()]
        places = np.arange(len(share)) + (index - (len(modalities) - 1) / 2) * width
        spread = [value.std() for value in values] if len(values[0]) > 1 else None
        means = [value.mean() for value in values]
        axes.bar(places, means, width, yerr=spread, color=_colour(index), label=name)
    axes.axhline(1 / len(modalities), color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(share)), list(share))
    axes.set_ylabel("share of the weighted features")
    figure.legend(loc="outside lower center", ncols=len(modalities), frameon=False)
    figure.suptitle(title or "", fontsize=10)
    return figure


def _colour(number):
    return LINE_COLOURS[number % len(LINE_COLOURS)]
