import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import counted, session


def check(
    data: options.Data,
    no_mask: Annotated[
        bool, typer.Option("--no-mask", help="Do not require masks (patients to be segmented).")
    ] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also read the voxels and report volumes.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")] = None,
    recipe: options.RecipeFile = None,
    paper: options.Paper = False,
    changes: options.Changes = None,
    structure: options.Structure = None,
    groups: options.Groups = None,
    splits: options.Splits = None,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
):
    """Lists patients and their grids, what would be resampled or refused and why, and the folds of a training.

    Without --recipe or --paper, patients are checked as by mmfnet plan.
    """
    with session(quiet) as terminal:
        from keras_mmfnet._files import csv_text, write
        from keras_mmfnet.data import CaseError, find_duplicates, same_ids
        from keras_mmfnet.data.case import group_messages
        from keras_mmfnet.data.survey import CaseSurvey, survey
        from keras_mmfnet.plan import given_recipe, recipe_to_check

        for path in filter(None, (csv, as_json)):
            options.require_new(path, "--csv, --json")
        division, given = options.read_division(groups, splits), options.parse_given(changes, structure)
        fixed = recipe or paper
        whole = options.choose_recipe(recipe, paper, changes, structure) if fixed else given_recipe(given)
        cases, errors = find(data, whole.data, no_mask)
        if not fixed:
            if any(all(name not in case.images for case in cases) for name in whole.data.modalities):
                given["data.allow_missing"] = False  # A sequence that nobody has is not planned with.
                cases, errors = find(data, given_recipe(given).data, no_mask)
            whole = recipe_to_check(cases, given, voxels=deep, groups=division["groups"])
            if reason := whole.reasons.get("data.normalised_scale"):
                terminal.say(f"note: {reason}, and are used as they are")
        chosen = whole.data
        with options.use_workers(workers):
            rows = survey(cases, chosen, deep)
        if not no_mask:
            lacking = "a mask is needed to train on this patient; --no-mask checks patients to be segmented"
            for index, row in enumerate(rows):
                problems = (*row.problems, f"{row.name}: {lacking}. Received: no mask")
                rows[index] = row if row.mask else dataclasses.replace(row, problems=problems)
        rows += [CaseSurvey(error.patient, {}, None, None, None, (str(error),), ()) for error in errors]
        rows.sort(key=lambda row: row.name)
        names = chosen.structure_names if len(chosen.structures) > 1 else ()
        volumes = [f"{name} ml" for name in names or ("tumour",)]
        header = ["patient", "sequence", "voxels", "mm", "axes", "resampled", *volumes, "usable"]
        terminal.table(header, [line for row in rows for line in _lines(row, names)])
        for kind, field in (("unusable", "problems"), ("note", "notes")):
            texts = [(row.name, text.removeprefix(f"{row.name}: ")) for row in rows for text in getattr(row, field)]
            for line in group_messages(f"{name}: {text}" for name, text in texts):
                terminal.say(f"{kind}: {line}")
        copies = find_duplicates(cases)
        for same in copies:
            terminal.say(f"the same images: {', '.join(same)}")
        for same in same_ids(cases):
            terminal.say(f"the same PatientID: {', '.join(same)}")
        if csv:
            write(csv, csv_text([_columns(row, chosen.modalities, names) for row in rows]))
        if as_json:
            write(as_json, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
        if not no_mask:
            _show_folds(terminal, cases, rows, whole, copies, **division)
        unusable = [row.name for row in rows if row.problems]
        if unusable:
            remedy = "" if no_mask or len(unusable) == len(rows) else "; mmfnet train --skip-bad leaves them out"
            count = f"{len(unusable)} of {counted(len(rows), 'patient')}"
            raise CaseError(f"{count} cannot be used{remedy}: {', '.join(unusable)}")
        seen = "" if deep else ", as far as headers tell; --deep reads the voxels"
        terminal.say(f"{counted(len(rows), 'patient')} can be used{seen}")


def find(data, recipe, no_mask=False):
    """The patients, and the errors of those that lack something."""
    from keras_mmfnet.data import find_cases, find_patients

    errors, others = [], []
    if not no_mask:
        try:
            return find_cases(data, recipe, on_error=errors.append), errors
        except ValueError:
            pass  # No patient has all the files: there may be one patient, or none with a mask.
    try:
        return find_patients(data, recipe, others.append), others
    except ValueError:
        if errors or others:
            return [], others or errors
        raise


def _show_folds(terminal, cases, rows, recipe, copies, groups, splits):
    """Who lacks what, and what the folds of a training would hold."""
    import statistics

    from keras_mmfnet.data import check_ids, divide_patients, group_patients, refuse_duplicates
    from keras_mmfnet.data.case import listed

    usable = {row.name: row for row in rows if not row.problems}
    modalities = recipe.data.modalities
    lacking = {f"lacking {m}": {n for n, row in usable.items() if m not in row.images} for m in modalities}
    lacking["without tumour"] = {name for name, row in usable.items() if row.tumour_ml == 0}
    for structure in recipe.data.structures if len(recipe.data.structures) > 1 else ():
        some = {name for name, row in usable.items() if row.structures_ml and not row.structures_ml[structure]}
        lacking[f"without {structure}"] = some
    lacking = {what: names for what, names in lacking.items() if names}
    for what, names in lacking.items():
        terminal.say(f"{what}: {counted(len(names), 'patient')}: {listed(sorted(names))}")
    used = set(usable).intersection(*([set().union(*(fold.names for fold in splits))] if splits else []))
    volumes = {name: usable[name].tumour_ml for name in used}
    if recipe.training.balance and None in volumes.values():
        return terminal.say("the folds are balanced by volume, which --deep reads")
    try:
        chosen = [case for case in cases if case.name in used]
        grouped = group_patients(chosen, recipe.training.group, groups)
        check_ids(chosen, grouped)
        refuse_duplicates([same for names in copies if len(same := used.intersection(names)) > 1], grouped)
        folds = divide_patients(used, recipe.training, grouped, splits, volumes, [r.name for r in rows if r.problems])
    except ValueError as error:
        if groups or splits:
            raise
        return terminal.say(f"no folds: {error}")
    together = Counter(grouped.values())
    if together and max(together.values()) > 1:
        terminal.say(
            f"groups: {len(together)} of {counted(len(grouped), 'patient')}, the largest of {max(together.values())}"
        )
    lines, empty, measured = [], [], any(volume is not None for volume in volumes.values())
    for number, fold in enumerate(folds):
        for part, names in dataclasses.asdict(fold).items():
            counts = {what: len(some.intersection(names)) for what, some in lacking.items()}
            known = [volumes[name] for name in names if volumes[name] is not None]
            median = [f"{statistics.median(known):.1f}" if known else "-"] * measured
            lines.append([str(number), part, str(len(names)), *map(str, counts.values()), *median])
            for what in (what for what, n in counts.items() if n == len(names)):
                empty.append(f"fold {number}, {part}: all {what}{_refusal(part, what, recipe)}")
    volume = "all structures" if len(recipe.data.structures) > 1 else "tumour"
    terminal.table(["fold", "part", "patients", *lacking, *[f"{volume} ml, median"] * measured], lines)
    for line in empty:
        terminal.say(f"note: {line}")


def _refusal(part, what, recipe):
    """What is said of a training of a fold, if `what` is true of all patients of a part."""
    if part == "test" or (what.startswith("lacking") and not recipe.training.self_transfer):
        return ""
    if what.startswith("lacking"):
        return "; its training with self-transfer will be refused"
    # A structure alone is needed to train only.
    return "; its training will be refused" * (part == "train" or what == "without tumour")


def _lines(row, structures):
    """The table's lines about a patient: one for all sequences on the same grid."""
    grids = {}
    for name, image in row.images.items():
        about = (_by(image.size), _by(image.spacing_xyz), image.orientation, "yes" if image.resampled else "no")
        grids.setdefault(about, []).append(name)
    volumes = [(row.structures_ml or {}).get(name) for name in structures] or [row.tumour_ml]
    known = [*("-" if volume is None else f"{volume:.1f}" for volume in volumes), "no" if row.problems else "yes"]
    rest = [""] * len(known)
    lines = [["", " ".join(names), *about, *rest] for about, names in grids.items()] or [["", *["-"] * 5, *rest]]
    lines[0] = [row.name, *lines[0][1:6], *known]
    return lines


def _columns(row, modalities, structures):
    """A patient as a line of the CSV file."""
    columns = {"patient": row.name, "usable": not row.problems, "tumour_ml": row.tumour_ml}
    columns |= {f"{name}_ml": (row.structures_ml or {}).get(name) for name in structures}
    for name in modalities:
        image = row.images.get(name)
        columns[f"{name}_voxels"] = image and _by(image.size)
        columns[f"{name}_spacing_mm"] = image and _by(image.spacing_xyz)
        columns[f"{name}_axes"] = image and image.orientation
        columns[f"{name}_resampled"] = image and image.resampled
    return {**columns, "problems": "; ".join(row.problems), "notes": "; ".join(row.notes)}


def _by(sizes):
    return "x".join(f"{size:.4g}" for size in sizes)
