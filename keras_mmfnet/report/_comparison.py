"""The tables and charts of a comparison of methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from keras_mmfnet._files import csv_text, write
from keras_mmfnet.evaluation import METRICS, mean_over_structures, paired_difference, rows_by_structure, summarise
from keras_mmfnet.plots import plot_learning_curves, plot_methods

# The metrics of a comparison: those that the paper gives, and those that it does not.
OF_PAPER, DISTANCES = ("dsc", "ap", "dice_loss"), ("hd95", "assd")
COLUMNS = (
    "Method",
    *(f"{METRICS[key].title}{of}" for key in OF_PAPER for of in (" paper", "")),
    *(METRICS[key].title for key in DISTANCES),
    *("DSC less the baseline's [95%]", "p", "Folds", "Patients", "Parameters", "Training s", "Patient s"),
)
MEAN = "mean over the structures"


def write_tables(
    results: Mapping[str, Sequence[Mapping]], folder: Path, baseline: str = "multi_encoder"
) -> tuple[list[dict], dict[str, tuple]]:
    """Writes `table.md`, `table.csv`, `methods.png` and, with results of both kinds, `self_transfer.png`.

    Of several structures there is a second table in `table.md`, with the DSC of each.

    Args:
        results: As `Run.results` returns them.
        folder: Folder for the tables and the charts.
        baseline: Name of the method that the others are compared with.

    Returns:
        The rows, as from `compare_results`, and `{name of a chart's file: (figure, caption)}`.

    Raises:
        ValueError: There are no results.
    """
    if not results:
        raise ValueError(f"a run with the results of a method is expected. Received: {folder}")
    rows = compare_results(results, baseline)
    structures, tables = structures_of(results), [(COLUMNS, cells(rows, baseline))]
    titles = [f"{text}:\n\n" for text in headings(structures)]
    tables += [dsc_of_each(rows, structures)] if titles else []
    texts = [_markdown(*table, [row["method"] == baseline for row in rows]) for table in tables]
    write(folder / "table.md", "\n".join(h + t for h, t in zip(titles or [""], texts, strict=True)))
    write(folder / "table.csv", csv_text(rows))
    charts = _charts(results, structures)
    for name, (figure, _) in charts.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return rows, charts


def _markdown(header, lines, bold):
    text = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for (title, *cells), is_bold in zip(lines, bold, strict=True):
        text.append(f"| {' | '.join([f'**{title}**' if is_bold else title, *cells])} |")
    return "\n".join(text) + "\n"


def structures_of(results):
    """The names of the structures that methods were tested on."""
    return list(rows_by_structure([row for folds in results.values() for one in folds for row in one["patients"]]))


def headings(structures):
    """Those of both tables of a comparison, of several structures."""
    return [f"Means over the structures {', '.join(structures)}", "DSC of each structure"] * (len(structures) > 1)


def dsc_of_each(rows, structures):
    """The header and the lines of a table of methods and structures."""
    text, keys = METRICS["dsc"].text, [*(f"dsc_{name}" for name in structures), "dsc"]
    lines = [[f"{text(row[key])} ± {text(row[f'{key}_std'])}" for key in keys] for row in rows]
    return ["Method", *structures, "Mean"], [[row["title"], *line] for row, line in zip(rows, lines, strict=True)]


def compare_results(results: Mapping[str, Sequence[Mapping]], baseline: str) -> list[dict]:
    """One dict for each method: what its row of the table shows.

    Args:
        results: As `Run.results` returns them.
        baseline: Name of the method that the others are compared with, on the patients that both have.

    Returns:
        Dicts of `method`, `title`, `folds`, `patients`, means of the metrics, their standard deviations and 95%
        intervals, the paper's, the numbers of `paired_difference` in DSC, `parameters` and times in seconds. Of several
        structures the metrics are each patient's means over them, and there is the DSC of each, such as `dsc_core`.
    """
    reference, rows = by_patient(results.get(baseline, [])), []
    for name, folds in results.items():
        patients = by_patient(folds)
        summary = summarise(list(patients.values()))
        row = {"method": name, "title": folds[0]["title"], "folds": len(folds), "patients": len(patients)}
        for key in OF_PAPER + DISTANCES:
            if key in OF_PAPER:
                row[f"paper_{key}"] = folds[0]["paper"].get(key)
            for of in ("mean", "std", "low", "high"):
                row[key if of == "mean" else f"{key}_{of}"] = summary[key][of] if patients else None
        common = [n for n in patients if n in reference and np.isfinite(patients[n]["dsc"] + reference[n]["dsc"])]
        same = name == baseline or not common
        difference = {} if same else paired_difference(*[[p[n]["dsc"] for n in common] for p in (patients, reference)])
        if len(common) == 1:  # of which there is no interval
            difference |= {"low": None, "high": None}
        row |= {f"difference_{key}": difference.get(key) for key in ("mean", "low", "high", "p", "patients")}
        structures = rows_by_structure([one for result in folds for one in result["patients"]])
        for structure, some in structures.items() if len(structures) > 1 else ():
            dsc = summarise(some)["dsc"]
            row |= {f"dsc_{structure}": dsc["mean"], f"dsc_{structure}_std": dsc["std"]}
        row["parameters"] = folds[0]["parameters"]
        row["training_seconds"] = float(np.mean([result["training_seconds"] for result in folds]))
        row["patient_seconds"] = summary["seconds"]["mean"] if patients else None
        rows.append(row)
    return rows


def by_patient(folds):
    """`{patient: numbers}` over the folds of a method."""
    rows = mean_over_structures([row for result in folds for row in result["patients"]])
    return {row["patient"]: row for row in rows}


def cells(rows, baseline):
    """The table's lines, a text for each of `COLUMNS`."""
    lines = []
    for row in rows:
        cells = [row["title"]]
        for key in OF_PAPER + DISTANCES:
            metric = METRICS[key]
            if key in OF_PAPER:
                cells.append("" if row[f"paper_{key}"] is None else metric.text(row[f"paper_{key}"]))
            cells.append("" if row[key] is None else f"{metric.text(row[key])} ± {metric.text(row[f'{key}_std'])}")
            if row[f"{key}_low"] is not None:
                cells[-1] += f" [{metric.text(row[f'{key}_low'])}, {metric.text(row[f'{key}_high'])}]"
        if row["difference_mean"] is None:
            cells += ["baseline" if row["method"] == baseline else "", ""]
        else:
            low, high, p = row["difference_low"], row["difference_high"], row["difference_p"]
            interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
            cells += [f"{row['difference_mean']:+.4f}{interval}", f"{p:.1g}" if p < 0.1 else f"{p:.2f}"]
        cells += [str(row["folds"]), str(row["patients"]), f"{row['parameters']:,}"]
        cells += [f"{row['training_seconds']:.0f}", f"{row['patient_seconds']:.3f}" if row["patients"] else "-"]
        lines.append(cells)
    return lines


def _charts(results, structures):
    """What can be drawn of the results: `{name of the file: (figure, caption)}`."""
    paper = {folds[0]["title"]: folds[0]["paper"].get("dsc") for folds in results.values()}
    scores = dsc_scores({folds[0]["title"]: by_patient(folds).values() for folds in results.values()})
    methods = {title: (some, paper[title]) for title, some in scores.items()}
    of = f", {MEAN}" if len(structures) > 1 else ""
    caption = f"Each method's mean DSC{of}, beside the paper's."
    charts = {"methods": (plot_methods(methods), caption)} if methods else {}
    losses = transfer_curves(results)
    if losses:
        charts["self_transfer"] = plot_learning_curves(losses), "Without and with self-transfer; mean of the folds."
    return charts


def transfer_curves(results: Mapping[str, Sequence[Mapping]]) -> dict[str, dict]:
    """Validation loss against updates, without and with self-transfer, of the methods that have both.

    Args:
        results: As `Run.results` returns them.

    Returns:
        `{title: {curve: (updates, losses)}}` for `plot_learning_curves`, the mean of the folds that both have.
    """
    charts = {}
    for name in results:
        pair = {"from random weights": results[name], "with self-transfer": results.get(f"{name}_transfer", [])}
        folds = set.intersection(*[{result["fold"] for result in found} for found in pair.values()])
        losses = {
            label: [[epoch["val_loss"] for epoch in result["history"]] for result in found if result["fold"] in folds]
            for label, found in pair.items()
        }
        if folds:
            first, curves = results[name][0], {}
            each = first["updates"] / len(first["history"])
            for label, lines in losses.items():
                # Trainings may have ended early: as far as all of them went.
                epochs = min(map(len, lines))
                curves[label] = each * np.arange(1, epochs + 1), np.mean([line[:epochs] for line in lines], axis=0)
            charts[first["title"]] = curves
    return charts


def dsc_scores(rows):
    """The DSC of each patient that has one, by title; titles without are left out."""
    scores = {title: [row["dsc"] for row in some if np.isfinite(row["dsc"])] for title, some in rows.items()}
    return {title: some for title, some in scores.items() if some}
