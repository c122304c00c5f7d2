from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import session


def evaluate(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="Folder of predicted masks.")],
    truth: Annotated[
        Path, typer.Argument(metavar="TRUTH", help="Folder of the expert's masks, or of patients' folders with one.")
    ],
    structure: options.Structure = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name of the mask in a patient's folder, as data.mask.", show_default="the network's"
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each patient's numbers as CSV.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers as JSON.")] = None,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
):
    """Compares two folders of masks, patient by patient, with 95% intervals of the means."""
    with session(quiet) as terminal:
        from keras_mmfnet._files import csv_text, write
        from keras_mmfnet.evaluation import mean_over_structures, metrics_json, summarise
        from keras_mmfnet.mask_folders import compare_folders
        from keras_mmfnet.recipe import Recipe

        for path in filter(None, (csv, as_json)):
            options.require_new(path, "--csv, --json")
        for folder in (predictions, truth):
            options.require_folder(folder, "PREDICTIONS, TRUTH")
        changes = {**options.parse_structures(structure), "data.allow_empty": True}
        recipe = Recipe().replace(changes | ({"data.mask": mask} if mask else {})).data
        with options.use_workers(workers):
            rows = compare_folders(predictions, truth, recipe)
        if csv:
            write(csv, csv_text(rows))
        if as_json:
            write(as_json, metrics_json(rows))
        terminal.metrics(rows)
        if quiet:
            mean = summarise(mean_over_structures(rows))["dsc"]["mean"]
            terminal.say("-" if mean is None else mean, always=True)
