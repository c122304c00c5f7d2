"""Makes the table and the charts of reproduce_tables.py from the numbers it has written.

python benchmarks/tables.py DIR
"""

import argparse
import json
from pathlib import Path

import numpy as np

from keras_mmfnet._files import write
from keras_mmfnet.evaluation import metrics_csv, paired_difference, summarise
from keras_mmfnet.methods import METHODS
from keras_mmfnet.plots import plot_boxes, plot_learning_curves, plot_methods
from keras_mmfnet.report import figure_html, shares_html, table_html

NUMBERS = ("dsc", "ap", "dice_loss", "hd95", "assd")
# Which method is trained without and which with self-transfer, for the learning curves.
TRANSFER = {
    "mmfnet_base": "mmfnet_base_transfer",
    "mmfnet_mlp": "mmfnet_mlp_transfer",
    "mmfnet_mlp_std": "mmfnet_mlp_std_transfer",
}


def read_results(folder):
    """The numbers of each method, in the order of the registry: `{name: [result of a fold, ...]}`."""
    results = {}
    for path in sorted(folder.glob("fold_*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        results.setdefault(result["method"], []).append(result)
    order = [*METHODS, *sorted(set(results) - set(METHODS))]
    return {name: results[name] for name in order if name in results}


def by_patient(folds):
    """`{patient: numbers}` over the folds of a method."""
    return {row["patient"]: row for result in folds for row in result["patients"]}


def make_rows(results, baseline):
    """One dict for each method: what the table shows."""
    reference = by_patient(results.get(baseline, []))
    rows = []
    for name, folds in results.items():
        patients = by_patient(folds)
        summary = summarise([{key: row[key] for key in NUMBERS} for row in patients.values()])
        row = {"method": name, "title": folds[0]["title"], "folds": len(folds), "patients": len(patients)}
        for key in NUMBERS:
            if key in NUMBERS[:3]:
                row[f"paper_{key}"] = folds[0]["paper"].get(key)
            row[key], row[f"{key}_std"] = summary[key]["mean"], summary[key]["std"]
        common = [patient for patient in patients if patient in reference]
        same = name == baseline or not common
        difference = {} if same else paired_difference(*[[p[n]["dsc"] for n in common] for p in (patients, reference)])
        row |= {f"difference_{key}": difference.get(key) for key in ("mean", "low", "high", "p", "patients")}
        row["parameters"] = folds[0]["parameters"]
        row["training_seconds"] = float(np.mean([result["training_seconds"] for result in folds]))
        row["patient_seconds"] = float(np.mean([patient["seconds"] for patient in patients.values()]))
        rows.append(row)
    return rows


HEADER = (
    *("Method", "DSC paper", "DSC", "AP paper", "AP", "Dice loss paper", "Dice loss", "HD95 mm", "ASSD mm"),
    *("DSC less the baseline's [95%]", "p", "Folds", "Patients", "Parameters", "Training s", "Patient s"),
)


def table_cells(rows, baseline):
    """The table's lines, a text for each column of `HEADER`."""
    lines = []
    for row in rows:
        cells = [row["title"]]
        for key in NUMBERS:
            if key in NUMBERS[:3]:
                cells.append(f"{row[f'paper_{key}']:.4f}" if row[f"paper_{key}"] is not None else "")
            digits = 4 if key in NUMBERS[:3] else 2
            defined = row[key] is not None
            cells.append(f"{row[key]:.{digits}f} ± {row[f'{key}_std']:.{digits}f}" if defined else "")
        if row["difference_mean"] is None:
            cells += ["baseline" if row["method"] == baseline else "", ""]
        else:
            low, high, p = row["difference_low"], row["difference_high"], row["difference_p"]
            cells += [f"{row['difference_mean']:+.4f} [{low:+.4f}, {high:+.4f}]", f"{p:.1g}" if p < 0.1 else f"{p:.2f}"]
        cells += [str(row["folds"]), str(row["patients"]), f"{row['parameters']:,}"]
        cells += [f"{row['training_seconds']:.0f}", f"{row['patient_seconds']:.3f}"]
        lines.append(cells)
    return lines


def markdown(rows, baseline):
    """The table as Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for row, (title, *cells) in zip(rows, table_cells(rows, baseline), strict=True):
        title = f"**{title}**" if row["method"] == baseline else title
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines) + "\n"


def curves(results):
    """Validation loss against updates, without and with self-transfer, by chart and curve."""
    charts = {}
    for without, with_transfer in TRANSFER.items():
        pair = {"from random weights": results.get(without), "with self-transfer": results.get(with_transfer)}
        if not all(pair.values()):
            continue
        folds = set.intersection(*[{result["fold"] for result in found} for found in pair.values()])
        losses = {
            label: [[epoch["val_loss"] for epoch in result["history"]] for result in found if result["fold"] in folds]
            for label, found in pair.items()
        }
        result = pair["from random weights"][0]
        updates = result["updates"] / len(result["history"]) * np.arange(1, len(result["history"]) + 1)
        charts[result["title"]] = {label: (updates, np.mean(lines, axis=0)) for label, lines in losses.items() if lines}
    return {title: lines for title, lines in charts.items() if len(lines) == 2}


def write_tables(folder, out, baseline="multi_encoder"):
    """Writes `table.md`, `table.csv`, `methods.png` and, with results of both kinds, `self_transfer.png`.

    Args:
        folder: Folder with the results, `fold_<number>/<method>.json`.
        out: Folder for the table and the charts.
        baseline: Method that the others are compared with.

    Raises:
        ValueError: There are no results.
    """
    results = read_results(folder)
    if not results:
        raise ValueError(f"a folder with results of reproduce_tables.py is expected. Received: {folder}")
    rows = make_rows(results, baseline)
    write(out / "table.md", markdown(rows, baseline))
    write(out / "table.csv", metrics_csv(rows))
    for name, (figure, _) in make_charts(results).items():
        figure.savefig(out / f"{name}.png", dpi=110)


def make_charts(results):
    """What can be drawn of the results: `{name of the file: (figure, caption)}`."""
    scores = {
        folds[0]["title"]: ([row["dsc"] for row in by_patient(folds).values()], folds[0]["paper"].get("dsc"))
        for folds in results.values()
    }
    charts = {"methods": (plot_methods(scores), "Each method's mean DSC, beside the paper's.")}
    losses = curves(results)
    if losses:
        charts["self_transfer"] = plot_learning_curves(losses), "Without and with self-transfer; mean of the folds."
    return charts


def results_sections(folder, baseline="multi_encoder"):
    """The table and the charts as sections of a report, `(heading, HTML)` each.

    Args:
        folder: Folder with the results.
        baseline: Method that the others are compared with.

    Returns:
        A list of sections.
    """
    results = read_results(folder)
    scores = {folds[0]["title"]: [row["dsc"] for row in by_patient(folds).values()] for folds in results.values()}
    boxes = "The patients' DSC by method: quartiles, and a dot for each patient; in brackets how many they are."
    figures = [*make_charts(results).values(), (plot_boxes(scores), boxes)]
    table = table_html(HEADER, table_cells(make_rows(results, baseline), baseline), numeric=HEADER[1:])
    sections = [("Results", table), ("Charts", "\n".join(figure_html(*figure) for figure in figures))]
    attention = attention_html(results)
    return [*sections, ("Which modality is listened to", attention)] if attention else sections


def attention_html(results):
    """How much the fusion blocks of each method listen to each modality of the test patients, as HTML text."""
    pictures = []
    for folds in results.values():
        # Methods without fusion blocks have none, and results of earlier versions do not have them.
        found = [result["shares"] for result in folds if result.get("shares")]
        if found:
            shares = {
                block: {name: np.concatenate([share[block][name] for share in found]) for name in found[0][block]}
                for block in found[0]
            }
            pictures.append(shares_html(folds[0]["title"], shares))
    return "\n".join(pictures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results, or --out of reproduce_tables.py")
    parser.add_argument("--out", type=Path, help="folder for the table and the charts (default: the same)")
    parser.add_argument("--baseline", default="multi_encoder", help="method that the others are compared with")
    parsed = parser.parse_args()
    write_tables(parsed.folder, parsed.out or parsed.folder, parsed.baseline)
