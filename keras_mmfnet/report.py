import base64
import csv
import html
import importlib.metadata
import io
import json
import os
import platform
from pathlib import Path

import keras
import numpy as np

from keras_mmfnet._files import write
from keras_mmfnet.data.preprocess import preprocess_case
from keras_mmfnet.evaluation import summarise
from keras_mmfnet.explain import cohort_shares
from keras_mmfnet.models import load_network
from keras_mmfnet.plots import plot_attention, plot_boxes, plot_learning_curves, plot_segmentation, plot_training
from keras_mmfnet.recipe import Recipe

_NUMBERS = {
    "dsc": "DSC",
    "ap": "AP",
    "dice_loss": "Dice loss",
    "hd95": "HD95 mm",
    "assd": "ASSD mm",
    "seconds": "Seconds",
}
_PACKAGES = ("keras-mmfnet", "keras", "tensorflow", "torch", "jax", "numpy", "SimpleITK", "scikit-learn", "matplotlib")
_MARGIN_MM = 40

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 0 auto;
  padding: 1.5rem 1rem 4rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 0.5rem; padding-bottom: 0.2rem; border-bottom: 1px solid #ccc; }}
p, ul {{ max-width: 44rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; margin: 0.8rem 0; }}
th, td {{ padding: 0.2rem 0.7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #eee; }}
th {{ vertical-align: bottom; border-bottom-color: #999; }}
td:first-child {{ min-width: 8rem; }}
.number {{ text-align: right; }}
td.number {{ white-space: nowrap; }}
figure {{ margin: 1.2rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption {{ font-size: 0.88rem; color: #555; overflow-wrap: anywhere; }}
@media print {{
  body {{ max-width: none; font-size: 11pt; padding: 0; }}
  .wide {{ overflow: visible; }}
  table {{ font-size: 8pt; }}
  th, td {{ padding: 0.1rem 0.25rem; }}
  td.number {{ white-space: normal; }}
  figure, tr {{ break-inside: avoid; }}
  h2 {{ break-after: avoid; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def report_html(title, sections):
    """A report as one page of HTML, which needs no other file, no network and no script.

    Args:
        title: Title of the page.
        sections: `(heading, HTML)` of each section, in order; the HTML as `text_html`, `table_html` and `figure_html`
            make it.

    Returns:
        The page as text.
    """
    parts = [f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>" for heading, content in sections]
    return _PAGE.format(title=html.escape(title), sections="\n".join(parts))


def text_html(*lines):
    """Lines of text as HTML: one as a paragraph, several as a list."""
    if len(lines) == 1:
        return f"<p>{html.escape(lines[0])}</p>"
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def table_html(header, rows, numeric=()):
    """A table as HTML, columns of numbers on the right.

    Args:
        header: A text for each column.
        rows: A value for each column: text, a number, or `None` for one that is not defined.
        numeric: Names of columns that belong on the right though they hold text.

    Returns:
        HTML text.
    """
    columns = [_texts(column) for column in zip(*rows, strict=True)] or [([], False)] * len(header)
    right = [numbers or name in numeric for name, (_, numbers) in zip(header, columns, strict=True)]
    kinds = [' class="number"' if number else "" for number in right]

    def line(cells, tag):
        filled = (f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    body = "\n".join(line(row, "td") for row in zip(*(texts for texts, _ in columns), strict=True))
    head = line(header, "th")
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _texts(column):
    """A column's cells as texts with the same number of decimals, and whether they are numbers."""
    if any(isinstance(value, str) for value in column):
        return ["-" if value is None else str(value) for value in column], False
    digits = 4 if max((abs(value) for value in column if value is not None), default=0) <= 1 else 2
    texts = [f"{value:.{digits}f}" if isinstance(value, float) else str(value) for value in column]
    return ["-" if value is None else text for value, text in zip(column, texts, strict=True)], True


def figure_html(figure, caption):
    """A picture as HTML that holds it.

    Args:
        figure: A Matplotlib figure.
        caption: Text below it.

    Returns:
        HTML text.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    data, caption = base64.b64encode(png.getvalue()).decode(), html.escape(caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def write_run_report(directory, cases):
    """Writes `report.html` about a run of `cross_validate`, as far as it has come, into the run's folder.

    Args:
        directory: Folder of the run, with one finished fold or more.
        cases: The run's `Case`s.

    Returns:
        The path of the report.
    """
    directory = Path(directory)
    recipe = Recipe.load(directory / "recipe.json")
    cohort = json.loads((directory / "cohort.json").read_text(encoding="utf-8"))
    rows = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["patients"]
    # From the cache, and their arrays stay on disk until they are looked at.
    patients = {
        case.name: preprocess_case(case, recipe.data, directory / "cache")
        for case in cases
        if case.name in cohort["patients"]
    }
    sections = [
        ("Results", results_html(rows)),
        ("Best, median and worst patient", patients_html(directory, rows, patients)),
        ("Which modality is listened to", attention_html(directory, recipe, cohort["folds"], patients)),
        ("Training", training_html(directory, recipe)),
        ("Patients", cohort_html(patients.values(), cohort)),
        ("Recipe", recipe_html(recipe)),
        ("Software", software_html()),
    ]
    path = directory / "report.html"
    write(path, report_html(f"MMFNet: {directory.resolve().name}", sections))
    return path


def results_html(rows):
    """The numbers of all test patients, their mean and standard deviation, and how the DSC spreads.

    Args:
        rows: Dicts as `cross_validate` returns them.

    Returns:
        HTML text.
    """
    summary = summarise(rows)
    lines = [[row["patient"], row["fold"], *(row[key] for key in _NUMBERS)] for row in rows]
    for name in ("mean", "std"):
        lines.append([name, None, *(summary[key][name] for key in _NUMBERS)])
    folds = sorted({row["fold"] for row in rows})
    boxes = {f"fold {fold}": [row["dsc"] for row in rows if row["fold"] == fold] for fold in folds}
    caption = "DSC of the test patients: quartiles, and a dot for each patient; in brackets how many they are."
    return table_html(["Patient", "Fold", *_NUMBERS.values()], lines) + figure_html(plot_boxes(boxes), caption)


def patients_html(directory, rows, patients):
    """The patients with the highest, the median and the lowest DSC, on the slice with the largest contour.

    Args:
        directory: Folder of the run.
        rows: Dicts as `cross_validate` returns them.
        patients: `{name: PreprocessedCase}`.

    Returns:
        HTML text.
    """
    import SimpleITK as sitk

    order = sorted(rows, key=lambda row: row["dsc"])
    ranks = {}
    for rank, row in (("Best", order[-1]), ("Median", order[(len(order) - 1) // 2]), ("Worst", order[0])):
        ranks.setdefault(row["patient"], (row, []))[1].append(rank)
    pictures = []
    for row, names in ranks.values():
        patient = patients[row["patient"]]
        mask = sitk.ReadImage(str(directory / f"fold_{row['fold']}" / "masks" / f"{patient.name}.nii.gz"))
        prediction = patient.grid.resample(sitk.Cast(mask, sitk.sitkFloat32)) >= 0.5
        figure = plot_segmentation(patient.images, prediction, patient.mask, patient.spacing, margin=_MARGIN_MM)
        caption = f"{', '.join(names)}: {patient.name}, fold {row['fold']}, DSC {row['dsc']:.4f} in three dimensions."
        pictures.append(figure_html(figure, caption))
    return "\n".join(pictures)


def attention_html(directory, recipe, folds, patients):
    """How much each fold's network listens to each modality of its test patients, about their tumours.

    Args:
        directory: Folder of the run.
        recipe: Its `Recipe`.
        folds: Its folds, as `cohort.json` has them.
        patients: `{name: PreprocessedCase}`.

    Returns:
        HTML text.
    """
    pictures = []
    for path in sorted(directory.glob("fold_*/mmfnet.keras"), key=_fold):
        test = [patients[name] for name in folds[_fold(path)]["test"]]
        shares = cohort_shares(load_network(path, recipe), test)
        pictures.append(shares_html(f"Fold {_fold(path)}", shares))
    return "\n".join(pictures)


def shares_html(title, shares):
    """How much a network's fusion blocks listen to each modality of its test patients.

    Args:
        title: Which network.
        shares: As `explain.cohort_shares` returns them.

    Returns:
        HTML text.
    """
    caption = (
        f"{title}: each modality's share of the features that a fusion block passes on, the mean and standard "
        "deviation over the test patients; the finest level first."
    )
    return figure_html(plot_attention(shares), caption)


def training_html(directory, recipe):
    """The curves of MMFNet's training in each fold, and of the networks of one modality before it.

    Args:
        directory: Folder of the run.
        recipe: Its `Recipe`.

    Returns:
        HTML text.
    """
    pictures, single = [], {}
    for path in sorted(directory.glob("fold_*/*_history.csv"), key=lambda path: (_fold(path), path.name)):
        with open(path, newline="", encoding="utf-8") as file:
            history = list(csv.DictReader(file))
        fold, network = f"fold {_fold(path)}", path.name.removesuffix("_history.csv")
        if network == "mmfnet":
            pictures.append(figure_html(plot_training(history), f"MMFNet, {fold}."))
        else:
            updates = [(int(row["epoch"]) + 1) * recipe.training.steps_per_epoch for row in history]
            losses = [float(row["val_loss"]) for row in history]
            single.setdefault(network, {})[fold] = updates, losses
    if single:
        single = {modality: single[modality] for modality in recipe.data.modalities if modality in single}
        pictures.append(figure_html(plot_learning_curves(single), "The networks of one modality, before MMFNet."))
    return "\n".join(pictures)


def _fold(path):
    return int(path.parent.name.removeprefix("fold_"))


def cohort_html(patients, cohort):
    """How many patients there are, how they were divided, what their images and tumours are like.

    Args:
        patients: `PreprocessedCase`s with a mask.
        cohort: What a run's `cohort.json` holds: `folds`, and, where there are any, notes on `patients` and those
            `skipped`.

    Returns:
        HTML text.
    """
    patients = list(patients)
    values = {
        "slices": [patient.source.size[2] for patient in patients],
        "distance of slices, mm": [patient.source.spacing[2] for patient in patients],
        "rows of a slice": [patient.source.size[1] for patient in patients],
        "columns of a slice": [patient.source.size[0] for patient in patients],
        "size of a pixel, mm": [patient.source.spacing[0] for patient in patients],
        "tumour, ml": [np.count_nonzero(p.mask) * float(np.prod(p.spacing)) / 1000 for p in patients],
    }
    lines = [[name, float(np.median(some)), min(some), max(some)] for name, some in values.items()]
    folds = [[number, *(len(fold[part]) for part in ("train", "validation", "test"))]
             for number, fold in enumerate(cohort["folds"])]  # fmt: skip
    parts = [
        text_html(f"{len(patients)} patients. The sizes are those of the first modality's images as they came."),
        table_html(["", "Median", "Smallest", "Largest"], lines),
        table_html(["Fold", "Training", "Validation", "Test"], folds),
    ]
    skipped = cohort.get("skipped", {})
    if skipped:
        parts.append(text_html(f"Left out ({len(skipped)}):") + table_html(["Patient", "Why"], skipped.items()))
    notes = [] if "skipped" not in cohort else [(n, "; ".join(some)) for n, some in cohort["patients"].items() if some]
    if notes:
        parts.append(table_html(["Patient", "Note"], notes))
    return "\n".join(parts)


def recipe_html(recipe):
    """Every number of a `Recipe`, and which differ from the paper's, as HTML text."""
    paper, ours = json.loads(Recipe().to_json()), json.loads(recipe.to_json())
    rows = [[name, _json(value), "" if value == paper[name] else _json(paper[name])] for name, value in ours.items()]
    return table_html(["", "This run", "Paper, if not so"], rows)


def software_html():
    """The system, the backend and the versions of what is installed, as HTML text."""
    rows = [
        ["backend of Keras", keras.backend.backend()],
        ["system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"],
        ["Python", platform.python_version()],
    ]
    for name in _PACKAGES:
        try:
            rows.append([name, importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            continue
    return table_html(["", "Version"], rows)


def _json(value):
    return value if isinstance(value, str) else json.dumps(value)
