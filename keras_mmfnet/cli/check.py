import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import session


def check(
    data: options.Data,
    deep: Annotated[bool, typer.Option("--deep", help="Read the voxels too; tells tumour volumes.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as CSV.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all of it as JSON.")] = None,
    recipe: options.RecipeFile = None,
    paper: options.Paper = False,
    changes: options.Changes = None,
    quiet: options.Quiet = False,
):
    """Lists the patients of a folder: grids, orientations, what would be resampled or refused, and why."""
    with session(quiet) as terminal:
        from keras_mmfnet._files import write
        from keras_mmfnet._log import progress
        from keras_mmfnet.data import CaseError, find_cases, find_duplicates
        from keras_mmfnet.data.fingerprint import CaseSurvey, survey
        from keras_mmfnet.evaluation import metrics_csv

        for path in filter(None, (csv, as_json)):
            options.require_new(path, "--csv, --json")
        chosen, errors, done = options.choose_recipe(recipe, paper, changes).data, [], []
        cases = find_cases(data, chosen, on_error=errors.append)

        def count(row):
            done.append(row)
            progress("checking", len(done), len(cases))

        rows = survey(cases, chosen, deep, count)
        rows += [CaseSurvey(error.patient, {}, None, None, None, (str(error),), ()) for error in errors]
        rows.sort(key=lambda row: row.name)
        header = ["patient", "sequence", "voxels", "mm", "axes", "resampled", "tumour ml", "usable"]
        terminal.table(header, [line for row in rows for line in _lines(row)])
        for row in rows:
            for kind, texts in (("unusable", row.problems), ("note", row.notes)):
                for text in texts:
                    terminal.say(f"{kind}: {row.name}: {text.removeprefix(f'{row.name}: ')}")
        for names in find_duplicates(cases):
            terminal.say(f"the same images: {', '.join(names)}")
        if csv:
            write(csv, metrics_csv([_columns(row, chosen.modalities) for row in rows]))
        if as_json:
            write(as_json, json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
        unusable = [row.name for row in rows if row.problems]
        if unusable:
            remedy = "mmfnet train --skip-bad leaves them out"
            raise CaseError(f"{len(unusable)} of {len(rows)} patients cannot be used; {remedy}: {', '.join(unusable)}")
        seen = "" if deep else ", as far as headers tell; --deep reads the voxels"
        terminal.say(f"{len(rows)} patients can be used{seen}")


def _lines(row):
    """The table's lines about a patient: one for all sequences on the same grid."""
    grids = {}
    for name, image in row.images.items():
        about = (_by(image.size), _by(image.spacing_xyz), image.orientation, "yes" if image.resampled else "no")
        grids.setdefault(about, []).append(name)
    known = "-" if row.tumour_ml is None else f"{row.tumour_ml:.1f}", "no" if row.problems else "yes"
    lines = [["", " ".join(names), *about, "", ""] for about, names in grids.items()] or [["", *["-"] * 5, "", ""]]
    lines[0] = [row.name, *lines[0][1:-2], *known]
    return lines


def _columns(row, modalities):
    """A patient as a line of the CSV file."""
    columns = {"patient": row.name, "usable": not row.problems, "tumour_ml": row.tumour_ml}
    for name in modalities:
        image = row.images.get(name)
        columns[f"{name}_voxels"] = image and _by(image.size)
        columns[f"{name}_spacing_mm"] = image and _by(image.spacing_xyz)
        columns[f"{name}_axes"] = image and image.orientation
        columns[f"{name}_resampled"] = image and image.resampled
    return {**columns, "problems": "; ".join(row.problems), "notes": "; ".join(row.notes)}


def _by(sizes):
    return "x".join(f"{size:.4g}" for size in sizes)
