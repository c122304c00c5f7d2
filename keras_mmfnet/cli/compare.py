import logging
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._jobs import choose_jobs
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session
from keras_mmfnet.cli.train import log_command, progress_of

_log = logging.getLogger(__name__)
# All methods end with a low rate, and the encoders are frozen for the paper's 5% of the epochs at most.
_CHANGES = {"training.schedule": "cosine", "training.warmup_epochs": 1}


def compare(
    data: Annotated[Path | None, options.DATA] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder for the results; an unfinished run there is resumed.")
    ] = None,
    methods: Annotated[str, typer.Option(metavar="NAMES", help="Names separated by commas, all, or list.")] = "all",
    modules: options.Modules = None,
    baseline: Annotated[str, typer.Option(metavar="NAME", help="Method to compare the others with.")] = "multi_encoder",
    recipe: options.RecipeFile = None,
    paper: options.Paper = False,
    changes: options.Changes = None,
    structure: options.Structure = None,
    fold: Annotated[
        list[str] | None, typer.Option(metavar="N", help="Fold to run; may be repeated.", show_default="all")
    ] = None,
    groups: options.Groups = None,
    splits: options.Splits = None,
    verify: options.Verify = False,
    skip_bad: options.SkipBad = False,
    device: options.Device = None,
    devices: options.Devices = None,
    sync_batch_norm: options.SyncBatchNorm = True,
    jobs: options.Jobs = None,
    profile: options.Profile = None,
    dry_run: options.DryRun = False,
    track: options.Track = None,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
):
    """Trains and compares methods on the same folds, patches and updates; several processes share the work.

    Without --recipe or --paper, it is the recipe of mmfnet train --small, with a cosine schedule.
    """
    with session(quiet) as terminal:
        if methods != "list":
            if not (data and out):
                raise ValueError(f"DATA and --out are expected. Received: DATA {data}, --out {out}")
            options.require_folder(data, "DATA")
        chosen = options.choose_recipe(recipe, paper, changes, structure, default_recipe())
        for_each = {"modules": modules, "device": device, "devices": devices, "sync_batch_norm": sync_batch_norm}
        options.check_track(track)
        scheduled = choose_jobs(jobs, profile, dry_run, workers, track=track, **for_each)
        start_backend("cpu" if scheduled else device)
        from keras_mmfnet._log import log_to_file
        from keras_mmfnet.data import cache
        from keras_mmfnet.methods import METHODS
        from keras_mmfnet.report import write_comparison
        from keras_mmfnet.run import Run, compare_methods
        from keras_mmfnet.tracking import tracked_with

        options.import_files(modules)
        if methods == "list":
            terminal.say("\n".join(f"{name:26}{method.title}" for name, method in METHODS.items()), always=True)
            return
        names = list(METHODS) if methods == "all" else methods.split(",")
        if unknown := sorted({*names, baseline} - set(METHODS)):
            expected = "--methods, --baseline: names from --methods list are expected"
            raise ValueError(f"{expected}. Received: {', '.join(unknown)}")
        chosen = recipe_of(chosen, names, bool(recipe or paper))
        division, before = options.read_division(groups, splits), Run(out)
        known = before.folds if before.cohort_file.exists() else range(chosen.training.folds)
        count = len(division["splits"] or known)
        folds = options.choose_folds(fold, count, list(range(count)))
        compared = [METHODS[name] for name in names]
        arguments = {"methods": names, "baseline": baseline, "skip_bad": skip_bad, **division}
        if dry_run:
            return scheduled.show(terminal, scheduled.request(out, data, chosen, folds, **arguments)[0])
        with (
            options.use_devices(None if scheduled else devices, sync_batch_norm),
            options.use_workers(workers),
            tracked_with(track),
            log_to_file(before.log_file),
        ):
            log_command()
            if verify:
                cache.verify(before.cache)
            if scheduled:
                scheduled.run(terminal, scheduled.request(out, data, chosen, folds, **arguments)[0])
                run = before
            else:
                resume, on_error = before.recipe_file.exists(), options.left_out(skip_bad)
                run = Run.start(out, data, chosen, resume, on_error, **division, methods=compared, folds=folds)
                terminal.follow(progress_of(run, compared, folds))
                compare_methods(run, compared, folds)
                _log.info("Writing the report")
                write_comparison(run, baseline)
        table = run.folder / "table.md"
        terminal.say(f"\n{table.read_text(encoding='utf-8')}")
        terminal.say(table if quiet else f"Report: {run.report_file}", always=True)


def default_recipe():
    """The small recipe with a cosine schedule."""
    from keras_mmfnet.recipe import Recipe

    return Recipe.small().replace(_CHANGES)


def recipe_of(recipe, names: list[str], own: bool):
    """A recipe with the modalities of the methods; unless it is the user's own, none of them stops early."""
    from keras_mmfnet.methods import METHODS
    from keras_mmfnet.run import modalities_of

    changes = {} if own else {"training.patience": recipe.training.epochs}
    return recipe.replace({"data.modalities": modalities_of([METHODS[name] for name in names], recipe), **changes})
