"""What a report shows, section by section."""

import json
from pathlib import Path

import keras
import numpy as np

from keras_mmfnet._machine import machine
from keras_mmfnet.evaluation import METRICS, defined_metrics, mean_over_structures, rows_by_structure, summarise
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.plots import plot_attention, plot_boxes, plot_learning_curves, plot_training
from keras_mmfnet.plots._strips import encoded_strips
from keras_mmfnet.postprocess import MaskRule
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import _comparison as comparison
from keras_mmfnet.report import _page as page
from keras_mmfnet.run import Run

_PACKAGES = ("keras-mmfnet", "keras", "tensorflow", "torch", "jax", "numpy", "SimpleITK", "scikit-learn", "matplotlib")
# The metrics beside a patient's slices.
_SHOWN = ("dsc", "hd95", "sensitivity", "precision", "volume_ml", "predicted_ml", "false_positive_ml")
_BOXES = "DSC of the test patients{of}: quartiles, and a dot for each patient; in brackets how many they are."


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
    every = [{"fold": result["fold"], **row} for result in results for row in result["patients"]]
    rows, structures = mean_over_structures(every), run.recipe.data.structure_names
    # Those without tumour come last.
    rows.sort(key=lambda row: (0, row["dsc"]) if np.isfinite(row["dsc"]) else (1, -row["false_positive_ml"]))
    dsc = summarise(rows)["dsc"]
    interval = "of one patient" if dsc["low"] is None else f"95% interval {dsc['low']:.3f} to {dsc['high']:.3f}"
    if len(structures) > 1:
        interval = f"{comparison.MEAN} {', '.join(structures)}; {interval}"
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
        (
            "Results",
            [
                *_results(rows, every),
                *_subsets(run, {method.title: results}),
                *_detection({method.title: results}),
            ],
        ),
        ("Patients, worst first", _patients(run, method.name, rows, every)),
        ("Share of each modality in the fusion blocks", _attention({method.title: results})),
        ("Training", _training(run, method)),
        ("Post-processing", _postprocessing(results)),
        *_setting(run, results),
    ]
    return page.write_page(run.report_file, f"{method.title}: {run.folder.resolve().name}", facts, sections, structures)


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
    rows, charts = comparison.write_tables(results, run.folder, baseline)
    best = max(rows, key=lambda row: row["dsc"] or 0)
    titled, structures = {folds[0]["title"]: folds for folds in results.values()}, comparison.structures_of(results)
    facts = [
        (
            "Highest mean DSC",
            "-" if best["dsc"] is None else f"{best['dsc']:.3f}",
            best["title"] + (f"; {comparison.MEAN}" if len(structures) > 1 else ""),
        ),
        ("Methods", str(len(results)), f"compared with {METHODS[baseline].title if baseline in METHODS else baseline}"),
        ("Patients tested", str(max(row["patients"] for row in rows)), f"of {len(run.cohort['patients'])}"),
        ("Folds", f"{max(row['folds'] for row in rows)} of {len(run.folds)}", "of the cross-validation"),
    ]
    every = [result for folds in results.values() for result in folds]
    parts = [page.heading(text) for text in comparison.headings(structures)]
    of = f", {comparison.MEAN}" if parts else ""
    boxes = _boxes({title: comparison.by_patient(folds).values() for title, folds in titled.items()}, of)
    attention = _attention(titled)
    sections = [
        ("Run", [_origin(run, every)]),
        (
            "Results",
            [
                *parts[:1],
                page.table(comparison.COLUMNS, comparison.cells(rows, baseline)),
                page.explained(comparison.OF_PAPER + comparison.DISTANCES),
                *parts[1:],
                *([page.table(*comparison.dsc_of_each(rows, structures))] if parts else []),
                *_subsets(run, titled),
                *_detection(titled),
            ],
        ),
        ("Charts", [*(page.figure(*chart) for chart in charts.values()), *boxes]),
        ("Share of each modality in the fusion blocks", attention),
        *_setting(run, every),
    ]
    return page.write_page(run.report_file, f"Comparison: {run.folder.resolve().name}", facts, sections)


def _origin(run, results):
    """The command, if the log has it, and how long it took."""
    log = run.log_file.read_text(encoding="utf-8") if run.log_file.exists() else ""
    commands = dict.fromkeys(line.partition("Command: ")[2] for line in log.splitlines() if "Command: " in line)
    folds = sorted({result["fold"] for result in results})
    trained = sum(row["seconds"] for fold in folds for epochs in run.histories(fold).values() for row in epochs)
    times = [row["seconds"] for result in results for row in mean_over_structures(result["patients"])]
    return page.texts(
        *(f"Command: {command}" for command in commands),
        f"Training the networks of {len(folds)} fold{'s' * (len(folds) > 1)} took {_duration(trained)}, "
        f"{len(times)} segmentation{'s' * (len(times) > 1)} took {_duration(sum(times))}.",
    )


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _results(rows, every):
    """The numbers of each patient and their means; of several structures, those of each and the mean over them."""
    metrics = defined_metrics(rows)
    folds = sorted({row["fold"] for row in rows})
    structures = rows_by_structure(every)
    of = f", {comparison.MEAN}" if len(structures) > 1 else ""
    boxes = _boxes({f"fold {fold}": [row for row in rows if row["fold"] == fold] for fold in folds}, of)
    if len(structures) < 2:
        return [_of_patients(rows, metrics), page.explained(metrics), *boxes]
    order, tables = [row["patient"] for row in rows], []
    for name, some in structures.items():
        some = sorted(some, key=lambda row: order.index(row["patient"]))
        tables += [page.heading(f"Patients: {name}"), _of_patients(some, defined_metrics(some))]
    return [
        page.heading("Each structure"),
        _means(structures, rows),
        *_boxes({**structures, comparison.MEAN: rows}),
        page.explained(metrics),
        page.heading(f"Patients: {comparison.MEAN}"),
        _of_patients(rows, metrics),
        *boxes,
        *tables,
    ]


def _of_patients(rows, metrics):
    """A line for each patient, and their mean."""
    summary = summarise(rows)
    lines = [[row["patient"], row["fold"], *(m.text(row.get(key)) for key, m in metrics.items())] for row in rows]
    labels = {"mean": "mean", "low": "mean, 95% from", "high": "mean, 95% to", "std": "standard deviation"}
    foot = [[label, "", *(m.text(summary[key][name]) for key, m in metrics.items())] for name, label in labels.items()]
    foot.append(["patients", "", *(str(summary[key]["patients"]) for key in metrics)])
    titles = [metric.title for metric in metrics.values()]
    return page.table(["Patient", "Fold", *titles], lines, foot=foot if len(rows) > 1 else [])


def _means(structures, rows):
    """A line for each structure: its mean DSC with the interval, and the other means."""
    keys = [key for key in _SHOWN if key in defined_metrics(rows)]
    lines = []
    for name, some in {**structures, comparison.MEAN: rows}.items():
        summary = summarise(some)
        interval = [METRICS["dsc"].text(summary["dsc"][end]) for end in ("low", "high")]
        dsc, *others = [METRICS[key].text(summary[key]["mean"]) for key in keys]
        lines.append([name, dsc, *interval, *others, summary["dsc"]["patients"]])
    first, *titles = [METRICS[key].title for key in keys]
    return page.table(["Structure", first, "95% from", "to", *titles, "Patients with it"], lines[:-1], foot=lines[-1:])


def _boxes(rows, of=""):
    scores = comparison.dsc_scores(rows)
    return [page.figure(plot_boxes(scores), _BOXES.format(of=of))] if scores else []


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
            rows = [row for name, row in comparison.by_patient(folds).items() if subsets[name] == subset]
            if rows:
                dsc = summarise(rows)["dsc"]
                numbers = (METRICS["dsc"].text(dsc[key]) for key in ("mean", "low", "high"))
                lines.append([title, subset, *numbers, dsc["patients"]])
    return [
        page.table(["Method", "Sequences that the patients have", "DSC", "95% from", "to", "Patients"], lines, left=2)
    ]


def _detection(results):
    """In how many patients with a structure it was found, and in how many without nothing was, where there are some."""
    lines, structures = [], {row["structure"] for folds in results.values() for row in folds[0]["patients"]}
    for title, folds in results.items():
        for name, rows in rows_by_structure([row for result in folds for row in result["patients"]]).items():
            if without := [row for row in rows if row["detection_specificity"] in (0, 1)]:
                found, nothing = (summarise(rows)[f"detection_{kind}"] for kind in ("sensitivity", "specificity"))
                false = summarise(without)["false_positive_ml"]["mean"]
                which = [name] if len(structures) > 1 else []
                numbers = [found["patients"], found["mean"], len(without), nothing["mean"], false]
                lines.append([title, *which, *numbers])
    columns = ["With tumour", "Share detected", "Without", "Share with nothing found", "False ml, mean of these"]
    header = ["Method", "Structure", "With it", *columns[1:]] if len(structures) > 1 else ["Method", *columns]
    return [page.table(header, lines, left=len(header) - 5)] if lines else []


def _postprocessing(results):
    """What each fold chose on its validation patients, and what that raised."""
    lines = []
    for result in results:
        chosen = result.get("postprocess", {"rules": {"structures": {}}})
        for name, rule in chosen["rules"]["structures"].items():
            gain = chosen["gains"][name]
            dsc = [METRICS["dsc"].text(gain[key]) for key in ("before", "after")]
            lines.append([name, str(MaskRule(**rule)), result["fold"], gain["patients"], *dsc])
    header = ["Structure", "Mask", "Fold", "Validation patients", "Their DSC without", "With"]
    about = "Chosen on the validation patients of each fold, by their mean DSC alone, and applied to its test patients."
    return [page.texts(about), page.table(header, lines, left=2)] if lines else []


def _patients(run, method, rows, every):
    """A block for each test patient, with the slices about the tumour."""
    paths = {row["patient"]: run.masks(row["fold"], method, row["patient"]) for row in rows}
    gone = [name for name, files in paths.items() if not all(path.exists() for path in files.values())]
    blocks = [page.texts(f"Without pictures, because their masks are gone: {', '.join(gone)}.")] if gone else []
    shown = [row for row in rows if row["patient"] not in gone]
    patients = run.patients([row["patient"] for row in shown])
    strips = encoded_strips([(one, paths[one.name]) for one in patients], run.recipe.data.structures)
    for row, patient, strip in zip(shown, patients, strips, strict=True):
        own = rows_by_structure([one for one in every if one["patient"] == patient.name])
        block = {
            "kind": "patient",
            "name": patient.name,
            "fold": row["fold"],
            "numbers": {name: _numbers(one) for name, (one,) in own.items()},
            "modalities": list(patient.images),
            "strip": page.uri(strip["strip"], "jpeg"),
            "marks": page.uri(strip["marks"], "png"),
            "slices": [number + 1 for number in strip["slices"]],
            **{key: strip[key] for key in ("start", "depth", "width", "height")},
        }
        blocks.append(block)
    return blocks


def _numbers(row):
    """The metrics beside a patient's slices, each with its label."""
    numbers = {key: f"{METRICS[key].text(row[key])} {METRICS[key].unit}".strip() for key in _SHOWN}
    islands = row["false_islands"]
    numbers["hd95"] += f", {islands or 'no'} false island{'s' * (islands > 1)}"
    return [(METRICS[key].label, text) for key, text in numbers.items()]


def _attention(results):
    """The contribution of each modality to the fusion blocks of each method, over its test patients; see `run_fold`."""
    blocks = []
    for title, folds in results.items():
        # Methods without fusion blocks have none.
        found = [result["shares"] for result in folds if result["shares"]]
        if not found:
            continue
        shares = {
            block: {name: np.concatenate([share[block][name] for share in found]) for name in found[0][block]}
            for block in found[0]
        }
        mean = {name: np.mean([share[name] for share in shares.values()]) for name in next(iter(shares.values()))}
        most = ", ".join(f"{name} {mean[name]:.0%}" for name in sorted(mean, key=mean.get, reverse=True))
        blocks += [
            page.texts(f"{title}: {most}, over all fusion blocks and test patients."),
            page.figure(
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
            blocks.append(page.figure(figure, f"{method.title}, fold {fold}."))
        for modality, name in method.encoders.items():
            if name in histories:
                updates = [(row["epoch"] + 1) * run.recipe.training.steps_per_epoch for row in histories[name]]
                losses = [row["val_loss"] for row in histories[name]]
                single.setdefault(modality, {})[f"fold {fold}"] = updates, losses
    if single:
        caption = f"The single-modality networks, before {method.title}."
        blocks.append(page.figure(plot_learning_curves(single), caption))
    return blocks


def _setting(run, results):
    """The sections about the patients, the recipe and the software."""
    # The versions of the first result, and of what else is installed.
    software = {"backend of Keras": keras.backend.backend(), **machine(*_PACKAGES), **results[0]["machine"]}
    return [
        ("Patients", _cohort(run)),
        ("Recipe", _recipe(run.recipe)),
        ("Software", [page.table(["", "Version"], software.items(), left=2)]),
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
    }
    volumes, names = [patient.tumour_ml for patient in patients], run.recipe.data.structure_names
    if len(names) > 1:
        values |= {f"{name}, ml": [patient.structures_ml[name] for patient in patients] for name in names}
    else:
        values["tumour, ml"] = volumes
    without = volumes.count(0)
    lines = [[name, float(np.median(some)), min(some), max(some)] for name, some in values.items()]
    folds = [[number, len(fold.train), len(fold.validation), len(fold.test)] for number, fold in enumerate(run.folds)]
    blocks = [
        page.texts(
            f"{len(patients)} patients{f', {without} of them without tumour' if without else ''}. The sizes are those "
            "of the reference modality's images as they came."
        ),
        page.table(["", "Median", "Smallest", "Largest"], lines),
        page.table(["Fold", "Training", "Validation", "Test"], folds),
    ]
    if cohort["skipped"]:
        blocks.append(page.texts(f"Left out ({len(cohort['skipped'])}):"))
        blocks.append(page.table(["Patient", "Why"], cohort["skipped"].items(), left=2))
    notes = [(name, "; ".join(some)) for name, some in cohort["patients"].items() if some]
    return [*blocks, page.table(["Patient", "Note"], notes, left=2)] if notes else blocks


def _recipe(recipe):
    """The fields that differ from the paper's, by path, and then the others."""
    paper, ours = (
        {f"{part}.{name}": json.dumps(value) for part, fields in parts.items() for name, value in fields.items()}
        for parts in (one.model_dump(mode="json", exclude={"reasons"}) for one in (Recipe(), recipe))
    )
    why = recipe.reasons
    differing = [
        [path, value, paper[path], *([why.get(path, "")] if why else [])]
        for path, value in ours.items()
        if value != paper[path]
    ]
    same = [[path, value] for path, value in ours.items() if value == paper[path]]
    blocks = [page.texts(f"{len(differing)} of {len(ours)} values differ from the paper's.")]
    if differing:
        blocks.append(page.table(["Differs", "This run", "Paper", *(["Why"] if why else [])], differing, left=4))
    return [*blocks, page.table(["As in the paper", "Value"], same, left=2)]
