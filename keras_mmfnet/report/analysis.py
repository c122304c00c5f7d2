"""What a report shows: headings over tables, figures, texts and patients, each a dict that the template shows."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import keras
import numpy as np
import SimpleITK as sitk
from matplotlib.image import imsave

from keras_mmfnet._files import csv_text, write
from keras_mmfnet._machine import machine
from keras_mmfnet.evaluation import METRICS, paired_difference, summarise
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.plots import (
    ERROR_COLOURS,
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    plot_attention,
    plot_boxes,
    plot_learning_curves,
    plot_methods,
    plot_training,
    slice_strips,
)
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run

_PACKAGES = ("keras-mmfnet", "keras", "tensorflow", "torch", "jax", "numpy", "SimpleITK", "scikit-learn", "matplotlib")
# Of all strips of slices together; base64 takes a third more.
_STRIP_BYTES = 3_300_000
# The metrics of a comparison: those that the paper gives, and those that it does not.
_OF_PAPER, _DISTANCES = ("dsc", "ap", "dice_loss"), ("hd95", "assd")
_COLUMNS = (
    "Method",
    *(f"{METRICS[key].title}{of}" for key in _OF_PAPER for of in (" paper", "")),
    *(METRICS[key].title for key in _DISTANCES),
    *("DSC less the baseline's [95%]", "p", "Folds", "Patients", "Parameters", "Training s", "Patient s"),
)
# The metrics beside a patient's slices.
_SHOWN = ("dsc", "hd95", "sensitivity", "precision", "volume_ml", "predicted_ml", "false_positive_ml")
_BOXES = "DSC of the test patients: quartiles, and a dot for each patient; in brackets how many they are."


def write_report(run: Run) -> Path:
    """Writes `report.html` about a run of `cross_validate`, as far as it has come.

    One page, which needs no other file and no network.

    Args:
        run: The `Run`, with one finished fold or more of its recipe's own method.

    Returns:
        The path of the report.

    Raises:
        ValueError: No fold is finished, or a patient of the run is no longer where its data was.
    """
    method = method_of(run.recipe)
    results = run.results().get(method.name)
    if not results:
        raise ValueError(f"{run}: must hold a finished fold of {method.title}. Received: a run without results of it")
    rows = [{"fold": result["fold"], **row} for result in results for row in result["patients"]]
    # Those without tumour come last.
    rows.sort(key=lambda row: (0, row["dsc"]) if np.isfinite(row["dsc"]) else (1, -row["false_positive_ml"]))
    dsc = summarise(rows)["dsc"]
    interval = "of one patient" if dsc["low"] is None else f"95% interval {dsc['low']:.3f} to {dsc['high']:.3f}"
    without = len(rows) - dsc["patients"]
    facts = [
        ("Mean DSC", f"{dsc['mean']:.3f}", interval)
        if dsc["patients"]
        else ("Mean DSC", "-", "no patient has a tumour"),
        ("Patients tested", str(len(rows)), f"of {len(run.cohort['patients'])}, by networks that had not seen them"),
        *([("Without tumour", str(without), "scored by what was found, without a DSC")] if without else []),
        ("Folds", f"{len(results)} of {len(run.folds)}", "of the cross-validation"),
        ("Method", method.title, "with self-transfer" if method.encoders else "without self-transfer"),
    ]
    sections = [
        ("Run", [_origin(run, results)]),
        ("Results", [*_results(rows), *_subsets(run, {method.title: results}), *_detection({method.title: results})]),
        ("Patients, worst first", _patients(run, method.name, rows)),
        ("Which modality is listened to", _attention({method.title: results})),
        ("Training", _training(run, method)),
        *_setting(run, results),
    ]
    return _write_page(run.report_file, f"{method.title}: {run.folder.resolve().name}", facts, sections)


def write_comparison(run: Run, baseline: str = "multi_encoder") -> Path:
    """Writes the tables, the charts and `report.html` about a run of `compare_methods`, as far as it has come.

    Args:
        run: The `Run`, with one finished fold or more of any method.
        baseline: Name of the method that the others are compared with.

    Returns:
        The path of the report.

    Raises:
        ValueError: There are no results, or a patient of the run is no longer where its data was.
    """
    results = run.results()
    rows, charts = write_tables(results, run.folder, baseline)
    best = max(rows, key=lambda row: row["dsc"] or 0)
    titled = {folds[0]["title"]: folds for folds in results.values()}
    facts = [
        ("Highest mean DSC", "-" if best["dsc"] is None else f"{best['dsc']:.3f}", best["title"]),
        ("Methods", str(len(results)), f"compared with {METHODS[baseline].title if baseline in METHODS else baseline}"),
        ("Patients tested", str(max(row["patients"] for row in rows)), f"of {len(run.cohort['patients'])}"),
        ("Folds", f"{max(row['folds'] for row in rows)} of {len(run.folds)}", "of the cross-validation"),
    ]
    every = [result for folds in results.values() for result in folds]
    boxes = _boxes({title: _by_patient(folds).values() for title, folds in titled.items()})
    attention = _attention(titled)
    sections = [
        ("Run", [_origin(run, every)]),
        (
            "Results",
            [
                _table(_COLUMNS, _cells(rows, baseline)),
                _explained(_OF_PAPER + _DISTANCES),
                *_subsets(run, titled),
                *_detection(titled),
            ],
        ),
        ("Charts", [*(_figure(*chart) for chart in charts.values()), *boxes]),
        ("Which modality is listened to", attention),
        *_setting(run, every),
    ]
    return _write_page(run.report_file, f"Comparison: {run.folder.resolve().name}", facts, sections)


def _write_page(path, title, facts, sections):
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    legend = {
        "expert's contour": ("line", TRUTH_COLOUR),
        "predicted contour": ("line", PREDICTION_COLOUR),
        "missed tumour": ("area", ERROR_COLOURS["false negative"]),
        "false tumour": ("area", ERROR_COLOURS["false positive"]),
    }
    sections = [(heading, blocks) for heading, blocks in sections if blocks]
    page = environment.get_template("page.html.j2")
    write(path, page.render(title=title, facts=facts, sections=sections, legend=legend))
    return path


# --- the blocks of a page


def _texts(*lines):
    return {"kind": "texts", "lines": lines}


def _table(header, rows, left=1, foot=()):
    """A table whose first columns are texts, on the left; floats get two decimals."""
    rows, foot = (
        [["-" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] for row in some]
        for some in (rows, foot)
    )
    return {"kind": "table", "header": header, "rows": rows, "left": left, "foot": foot}


def _figure(figure, caption):
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return {"kind": "figure", "picture": _uri(png, "png"), "caption": caption}


def _uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _explained(keys):
    better = {"higher": " Higher is better.", "lower": " Lower is better.", "": ""}
    terms = [(METRICS[key].title, METRICS[key].about + better[METRICS[key].better]) for key in keys]
    return {"kind": "terms", "terms": terms}


# --- what they hold


def _origin(run, results):
    """The command, if the log has it, and how long it took."""
    log = run.log_file.read_text(encoding="utf-8") if run.log_file.exists() else ""
    commands = dict.fromkeys(line.partition("Command: ")[2] for line in log.splitlines() if "Command: " in line)
    folds = sorted({result["fold"] for result in results})
    trained = sum(row["seconds"] for fold in folds for epochs in run.histories(fold).values() for row in epochs)
    times = [row["seconds"] for result in results for row in result["patients"]]
    return _texts(
        *(f"Command: {command}" for command in commands),
        f"Training the networks of {len(folds)} fold{'s' * (len(folds) > 1)} took {_duration(trained)}, "
        f"{len(times)} segmentation{'s' * (len(times) > 1)} took {_duration(sum(times))}.",
    )


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _results(rows):
    summary = summarise(rows)
    metrics = {key: metric for key, metric in METRICS.items() if summary.get(key, {}).get("patients")}
    lines = [[row["patient"], row["fold"], *(m.text(row.get(key)) for key, m in metrics.items())] for row in rows]
    labels = {"mean": "mean", "low": "mean, 95% from", "high": "mean, 95% to", "std": "standard deviation"}
    foot = [[label, "", *(m.text(summary[key][name]) for key, m in metrics.items())] for name, label in labels.items()]
    foot.append(["patients", "", *(str(summary[key]["patients"]) for key in metrics)])
    foot = foot if len(rows) > 1 else []
    folds = sorted({row["fold"] for row in rows})
    boxes = _boxes({f"fold {fold}": [row for row in rows if row["fold"] == fold] for fold in folds})
    titles = [metric.title for metric in metrics.values()]
    return [_table(["Patient", "Fold", *titles], lines, foot=foot), _explained(metrics), *boxes]


def _scores(rows):
    """The DSC of each patient that has one, by title; titles without are left out."""
    scores = {title: [row["dsc"] for row in some if np.isfinite(row["dsc"])] for title, some in rows.items()}
    return {title: some for title, some in scores.items() if some}


def _boxes(rows):
    scores = _scores(rows)
    return [_figure(plot_boxes(scores), _BOXES)] if scores else []


def _subsets(run, results):
    """The DSC over the patients with each subset of the sequences, where some patients lack one."""
    subsets = {
        name: ", ".join(m for m in run.recipe.data.modalities if m in case.images) for name, case in run.cases.items()
    }
    if len(set(subsets.values())) == 1:
        return []
    lines = []
    for title, folds in results.items():
        for subset in sorted(set(subsets.values()), key=lambda subset: (-subset.count(","), subset)):
            rows = [row for name, row in _by_patient(folds).items() if subsets[name] == subset]
            if rows:
                dsc = summarise(rows)["dsc"]
                numbers = (METRICS["dsc"].text(dsc[key]) for key in ("mean", "low", "high"))
                lines.append([title, subset, *numbers, dsc["patients"]])
    return [_table(["Method", "Sequences that the patients have", "DSC", "95% from", "to", "Patients"], lines, left=2)]


def _detection(results):
    """In how many patients with a tumour it was found, and in how many without nothing was, where there are some."""
    lines = []
    for title, folds in results.items():
        rows = list(_by_patient(folds).values())
        if without := [row for row in rows if np.isfinite(row.get("detection_specificity", np.nan))]:
            found, nothing = (summarise(rows)[f"detection_{name}"] for name in ("sensitivity", "specificity"))
            false = summarise(without)["false_positive_ml"]["mean"]
            lines.append([title, found["patients"], found["mean"], len(without), nothing["mean"], false])
    header = [
        "Method",
        "With tumour",
        "Share detected",
        "Without",
        "Share with nothing found",
        "False ml, mean of these",
    ]
    return [_table(header, lines)] if lines else []


def _patients(run, method, rows):
    """A block for each test patient, with the slices about the tumour."""
    paths = {row["patient"]: run.mask(row["fold"], method, row["patient"]) for row in rows}
    gone = [name for name, path in paths.items() if not path.exists()]
    blocks = [_texts(f"Without pictures, because their masks are gone: {', '.join(gone)}.")] if gone else []
    for row in rows:
        if row["patient"] in gone:
            continue
        (patient,) = run.patients([row["patient"]])
        mask = sitk.ReadImage(str(paths[patient.name]))
        predicted = patient.grid.resample(sitk.Cast(mask, sitk.sitkFloat32)) >= 0.5
        for side in (200, 160, 128, 96, 72):
            strip, marks, numbers = slice_strips(patient.images, predicted, patient.mask, patient.spacing, side)
            jpeg, png = io.BytesIO(), io.BytesIO()
            imsave(jpeg, strip, format="jpeg", pil_kwargs={"quality": 65})
            imsave(png, marks, format="png", pil_kwargs={"optimize": True})
            if len(jpeg.getvalue()) + len(png.getvalue()) <= _STRIP_BYTES / len(rows):
                break
        largest = np.count_nonzero((predicted | (patient.mask > 0))[numbers], axis=(1, 2)).argmax()
        texts = {key: f"{METRICS[key].text(row.get(key))} {METRICS[key].unit}".strip() for key in METRICS}
        islands = {None: "", 0: ", no false island", 1: ", 1 false island"}
        found = row.get("false_islands")
        texts["hd95"] += islands.get(found, f", {found} false islands")
        blocks.append(
            {
                "kind": "patient",
                "name": patient.name,
                "fold": row["fold"],
                "numbers": [(METRICS[key].label, texts[key]) for key in _SHOWN if row.get(key) is not None],
                "modalities": list(patient.images),
                "strip": _uri(jpeg, "jpeg"),
                "marks": _uri(png, "png"),
                "slices": [number + 1 for number in numbers],
                "start": int(largest),
                "depth": patient.shape[0],
                "width": strip.shape[1],
                "height": strip.shape[0] // len(numbers),
            }
        )
    return blocks


def _attention(results):
    """How much the fusion blocks of each method listen to each modality of its test patients; see `run_fold`."""
    blocks = []
    for title, folds in results.items():
        # Methods without fusion blocks have none, and results of earlier versions do not have them.
        found = [result["shares"] for result in folds if result.get("shares")]
        if not found:
            continue
        shares = {
            block: {name: np.concatenate([share[block][name] for share in found]) for name in found[0][block]}
            for block in found[0]
        }
        mean = {name: np.mean([share[name] for share in shares.values()]) for name in next(iter(shares.values()))}
        most = ", ".join(f"{name} {mean[name]:.0%}" for name in sorted(mean, key=mean.get, reverse=True))
        blocks += [
            _texts(f"{title}: {most}, over all fusion blocks and test patients."),
            _figure(
                plot_attention(shares),
                f"{title}: each modality's share of the features that a fusion block passes on, the mean and standard "
                "deviation over the test patients; the finest level first.",
            ),
        ]
    return blocks


def _training(run, method):
    """The curves of the method's training in each fold, and of the single-modality networks before it."""
    blocks, single = [], {}
    for fold in range(len(run.folds)):
        histories = run.histories(fold)
        if method.name in histories:
            figure = plot_training(histories[method.name], method.adapt(run.recipe).training.choose_by)
            blocks.append(_figure(figure, f"{method.title}, fold {fold}."))
        for modality, name in method.encoders.items():
            if name in histories:
                updates = [(row["epoch"] + 1) * run.recipe.training.steps_per_epoch for row in histories[name]]
                losses = [row["val_loss"] for row in histories[name]]
                single.setdefault(modality, {})[f"fold {fold}"] = updates, losses
    if single:
        caption = f"The single-modality networks, before {method.title}."
        blocks.append(_figure(plot_learning_curves(single), caption))
    return blocks


def _setting(run, results):
    """The sections about the patients, the recipe and the software."""
    # The versions of the first result, and of what else is installed.
    software = {"backend of Keras": keras.backend.backend(), **machine(*_PACKAGES), **results[0]["machine"]}
    return [
        ("Patients", _cohort(run)),
        ("Recipe", _recipe(run.recipe)),
        ("Software", [_table(["", "Version"], software.items(), left=2)]),
    ]


def _cohort(run):
    """How many patients there are, how they were divided, what their images and tumours are like."""
    cohort = run.cohort
    patients = run.patients(cohort["patients"])
    values = {
        "slices": [patient.source.size[2] for patient in patients],
        "distance of slices, mm": [patient.source.spacing[2] for patient in patients],
        "rows of a slice": [patient.source.size[1] for patient in patients],
        "columns of a slice": [patient.source.size[0] for patient in patients],
        "size of a pixel, mm": [patient.source.spacing[0] for patient in patients],
        "tumour, ml": [patient.tumour_ml for patient in patients],
    }
    without = values["tumour, ml"].count(0)
    lines = [[name, float(np.median(some)), min(some), max(some)] for name, some in values.items()]
    folds = [[number, len(fold.train), len(fold.validation), len(fold.test)] for number, fold in enumerate(run.folds)]
    blocks = [
        _texts(
            f"{len(patients)} patients{f', {without} of them without tumour' if without else ''}. The sizes are those "
            "of the reference modality's images as they came."
        ),
        _table(["", "Median", "Smallest", "Largest"], lines),
        _table(["Fold", "Training", "Validation", "Test"], folds),
    ]
    if cohort["skipped"]:
        blocks.append(_texts(f"Left out ({len(cohort['skipped'])}):"))
        blocks.append(_table(["Patient", "Why"], cohort["skipped"].items(), left=2))
    notes = [(name, "; ".join(some)) for name, some in cohort["patients"].items() if some]
    return [*blocks, _table(["Patient", "Note"], notes, left=2)] if notes else blocks


def _recipe(recipe):
    """The fields that differ from the paper's, by path, and then the others."""
    paper, ours = (
        {f"{part}.{name}": json.dumps(value) for part, fields in parts.items() for name, value in fields.items()}
        for parts in (one.model_dump(mode="json") for one in (Recipe(), recipe))
    )
    differing = [[path, value, paper[path]] for path, value in ours.items() if value != paper[path]]
    same = [[path, value] for path, value in ours.items() if value == paper[path]]
    blocks = [_texts(f"{len(differing)} of {len(ours)} values differ from the paper's.")]
    if differing:
        blocks.append(_table(["Differs", "This run", "Paper"], differing, left=3))
    return [*blocks, _table(["As in the paper", "Value"], same, left=2)]


# --- the comparison of methods


def write_tables(
    results: Mapping[str, Sequence[Mapping]], folder: Path, baseline: str = "multi_encoder"
) -> tuple[list[dict], dict[str, tuple]]:
    """Writes `table.md`, `table.csv`, `methods.png` and, with results of both kinds, `self_transfer.png`.

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
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    for row, (title, *cells) in zip(rows, _cells(rows, baseline), strict=True):
        title = f"**{title}**" if row["method"] == baseline else title
        lines.append(f"| {' | '.join([title, *cells])} |")
    write(folder / "table.md", "\n".join(lines) + "\n")
    write(folder / "table.csv", csv_text(rows))
    charts = _charts(results)
    for name, (figure, _) in charts.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return rows, charts


def compare_results(results: Mapping[str, Sequence[Mapping]], baseline: str) -> list[dict]:
    """One dict for each method: what its row of the table shows.

    Args:
        results: As `Run.results` returns them.
        baseline: Name of the method that the others are compared with, on the patients that both have.

    Returns:
        Dicts of `method`, `title`, `folds`, `patients`, means and standard deviations of the metrics, the paper's,
        the numbers of `paired_difference` in DSC, `parameters` and times in seconds.
    """
    reference, rows = _by_patient(results.get(baseline, [])), []
    for name, folds in results.items():
        patients = _by_patient(folds)
        summary = summarise(list(patients.values()))
        row = {"method": name, "title": folds[0]["title"], "folds": len(folds), "patients": len(patients)}
        for key in _OF_PAPER + _DISTANCES:
            if key in _OF_PAPER:
                row[f"paper_{key}"] = folds[0]["paper"].get(key)
            row[key], row[f"{key}_std"] = (summary[key][name] if patients else None for name in ("mean", "std"))
        common = [n for n in patients if n in reference and np.isfinite(patients[n]["dsc"] + reference[n]["dsc"])]
        same = name == baseline or not common
        difference = {} if same else paired_difference(*[[p[n]["dsc"] for n in common] for p in (patients, reference)])
        if len(common) == 1:  # of which there is no interval
            difference |= {"low": None, "high": None}
        row |= {f"difference_{key}": difference.get(key) for key in ("mean", "low", "high", "p", "patients")}
        row["parameters"] = folds[0]["parameters"]
        row["training_seconds"] = float(np.mean([result["training_seconds"] for result in folds]))
        row["patient_seconds"] = summary["seconds"]["mean"] if patients else None
        rows.append(row)
    return rows


def _by_patient(folds):
    """`{patient: numbers}` over the folds of a method."""
    return {row["patient"]: row for result in folds for row in result["patients"]}


def _cells(rows, baseline):
    """The table's lines, a text for each of `_COLUMNS`."""
    lines = []
    for row in rows:
        cells = [row["title"]]
        for key in _OF_PAPER + _DISTANCES:
            metric = METRICS[key]
            if key in _OF_PAPER:
                cells.append("" if row[f"paper_{key}"] is None else metric.text(row[f"paper_{key}"]))
            cells.append("" if row[key] is None else f"{metric.text(row[key])} ± {metric.text(row[f'{key}_std'])}")
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


def _charts(results):
    """What can be drawn of the results: `{name of the file: (figure, caption)}`."""
    paper = {folds[0]["title"]: folds[0]["paper"].get("dsc") for folds in results.values()}
    scores = _scores({folds[0]["title"]: _by_patient(folds).values() for folds in results.values()})
    methods = {title: (some, paper[title]) for title, some in scores.items()}
    charts = {"methods": (plot_methods(methods), "Each method's mean DSC, beside the paper's.")} if methods else {}
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
        first = results[name][0]
        updates = first["updates"] / len(first["history"]) * np.arange(1, len(first["history"]) + 1)
        if folds:
            charts[first["title"]] = {label: (updates, np.mean(lines, axis=0)) for label, lines in losses.items()}
    return charts
