import itertools
import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._jobs import choose_jobs
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import Terminal, TrainingProgress, session
from keras_mmfnet.cli.plan import parse_budget, plan_patients

_log = logging.getLogger(__name__)


def train(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for the results.")],
    data: Annotated[Path | None, options.DATA] = None,
    recipe: options.RecipeFile = None,
    paper: options.Paper = False,
    small: options.Small = False,
    memory: options.Memory = None,
    time: options.Time = None,
    changes: options.Changes = None,
    structure: options.Structure = None,
    fold: Annotated[
        list[str] | None, typer.Option(metavar="N|all", help="Fold to run; may be repeated.", show_default="0")
    ] = None,
    groups: options.Groups = None,
    splits: options.Splits = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="BUNDLE", help="Fine-tune: the recipe and pretrained encoders of a bundle or run."
        ),
    ] = None,
    corrections: Annotated[
        bool, typer.Option("--corrections", help="With --from: learn from the masks corrected in mmfnet review.")
    ] = False,
    modules: options.Modules = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run; needs only --out.")] = False,
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
    """Trains MMFNet by cross-validation on a folder of patients and segments the test patients.

    Without --recipe, --paper, --small or --from it plans a recipe first, as mmfnet plan does.
    """
    again = shlex.join(
        ["mmfnet", "train", "--out", str(out), "--resume", *(f"--import={file}" for file in modules or ())]
        + [f"--device={device}"] * bool(device)
        + [f"--devices={devices}"] * bool(devices)
        + ["--no-sync-batch-norm"] * (not sync_batch_norm)
        + [f"--jobs={jobs}"] * bool(jobs)
        + [f"--profile={profile}"] * bool(profile)
        + [f"--track={track}"] * bool(track)
        + [f"--workers={workers}"] * bool(workers)
    )
    with session(quiet, resume_with=again) as terminal:
        _check_corrections(corrections, data, resume, dry_run, source)
        if data is None and not (resume or corrections):
            raise ValueError("DATA: a folder of patients is expected. Received: no folder")
        if data is not None:
            options.require_folder(data, "DATA")
        fixed = {"--recipe": recipe, "--paper": paper, "--small": small, "--resume": resume, "--from": source}
        planned = _is_planned(fixed, memory or time)
        default, opened = options.open_bundle(source, "--from") if source else (None, None)
        # A plan's reasons are of other patients.
        default = default and default.model_copy(update={"reasons": {}})
        if planned:
            from keras_mmfnet.plan import given_recipe

            given, budget = options.parse_given(changes, structure), parse_budget(memory, time)
            chosen = given_recipe(given)
        else:
            default = options.recipe_of_run(out) if resume else default
            chosen = options.choose_recipe(recipe, paper, changes, structure, None if small else default)
        division = options.read_division(groups, splits)
        for_each = {"modules": modules, "device": device, "devices": devices, "sync_batch_norm": sync_batch_norm}
        options.check_track(track)
        scheduled = choose_jobs(jobs, profile, dry_run, workers, track=track, **for_each)
        if scheduled and planned:
            expected = "one of --recipe, --paper, --small, --from and --resume is expected with it"
            raise ValueError(f"--jobs: {expected}; mmfnet plan makes a recipe. Received: none")

        def choose_folds():
            return options.choose_folds(fold, len(division["splits"] or range(chosen.training.folds)), [0])

        if not resume:
            folds = choose_folds()  # A wrong number is found before the long work.
        start_backend("cpu" if scheduled else device)
        options.import_files(modules)
        from keras_mmfnet.data import cache
        from keras_mmfnet.data.layouts import reviewed_patients
        from keras_mmfnet.run import Run
        from keras_mmfnet.tracking import tracked_with

        before, opened = Run(out), opened or (source and Run(source))
        with (
            options.use_devices(None if scheduled else devices, sync_batch_norm),
            options.use_workers(workers),
            tracked_with(track),
        ):
            # Only the first process gets here. Others may start after it has begun to write.
            if not resume:
                before.require_none()
            if corrections:
                data = _export_reviewed(source, out)
            if verify and not dry_run:
                cache.verify(before.cache)
            if planned:
                chosen = fit_batch(
                    plan_patients(terminal, data, given, budget, skip_bad, before.cache, division["groups"])
                )
                folds = choose_folds()  # Few patients have fewer folds.
            if resume:
                folds = options.choose_folds(fold, len(before.folds), before.begun_folds or [0])
                # What was left out before is left out again.
                data, skip_bad = data or before.cohort["data"], skip_bad or bool(before.cohort["skipped"])
            if not (fold or resume) and reviewed_patients(data):
                if scheduled:
                    raise ValueError("--fold: N or all is expected with --jobs on reviewed patients. Received: none")
                folds = None
            arguments = {"skip_bad": skip_bad, **division}
            if scheduled and dry_run:
                request, _ = scheduled.request(out, data, chosen, folds, **_donor_of(opened), **arguments)
                scheduled.show(terminal, request)
            else:
                run_training(terminal, out, data, chosen, folds, resume, opened, scheduled, **arguments)


def _check_corrections(corrections, data, resume, dry_run, source):
    if corrections and (data or resume or dry_run or not source):
        given = {"DATA": data, "--resume": resume, "--dry-run": dry_run, "no --from": not source}
        expected = "a reviewed run (--from) is expected with it, no DATA, no --resume and no --dry-run"
        received = ", ".join(name for name, there in given.items() if there)
        raise ValueError(f"--corrections: {expected}. Received: {received}")


def _is_planned(fixed, budget):
    """Whether the recipe is planned: no option fixes it. A budget is for a plan only."""
    received = [option for option, value in fixed.items() if value]
    if budget and received:
        raise ValueError(f"--memory, --time: a training that is planned is expected. Received: {received[0]}")
    if fixed["--small"] and (fixed["--recipe"] or fixed["--paper"]):
        raise ValueError("--recipe, --paper, --small: one of them is expected. Received: several")
    return not received


def _export_reviewed(source, out):
    """Writes the corrected masks of a run to a new folder, which can be trained on."""
    from keras_mmfnet.review.exports import export_corrections
    from keras_mmfnet.review.patients import find_reviewed

    names = itertools.chain(["reviewed"], (f"reviewed_{number}" for number in itertools.count(2)))
    folder = next(out / name for name in names if not (out / name).exists())
    export_corrections(find_reviewed(source), source / "corrections", folder)
    return folder


def run_training(
    terminal: Terminal, out: Path, data, recipe, folds, resume=False, source=None, jobs=None, skip_bad=False, **division
) -> None:
    """Cross-validates a recipe, writes the report and prints the numbers.

    `folds` is `None` for the fold with the most reviewed patients in its training part; `source` is a run or bundle to
    start from; `jobs`: run the trainings as these `Jobs`.
    """
    from keras_mmfnet._log import log_to_file
    from keras_mmfnet.methods import method_of
    from keras_mmfnet.report import write_report
    from keras_mmfnet.run import Run, cross_validate

    method, donor, run = method_of(recipe), _donor_of(source), Run(out)
    with log_to_file(run.log_file):
        log_command()
        if jobs:
            request, cases = jobs.request(out, data, recipe, folds, **donor, skip_bad=skip_bad, **division)
            _warn_of_seen(source, cases)
            jobs.run(terminal, request)
        else:
            run = Run.start(out, data, recipe, resume, options.left_out(skip_bad), **donor, **division, folds=folds)
            if source:
                sequences, first = ", ".join(run.donated(method)), options.choose_trained(source)[0]
                _log.info("Starting from the encoders of %s of %s, fold %d", sequences, source, first)
            _warn_of_seen(source, run.cases.values())
            folds = _choose_reviewed_folds(run, folds)
            for number in folds:  # --resume resumes the folds that have a folder.
                run.fold_folder(number).mkdir(exist_ok=True)
            progress = progress_of(run, [method], folds)
            if resume:
                trained = {run.network(number).with_suffix("") for number in run.trained_folds()}
                trained |= {path for path, share in progress.shares.items() if share}
                listed = ", ".join(f"{path.parent.name} {path.name}" for path in sorted(trained))
                _log.info("Resumed; trained already: %s", listed or "no network")
            terminal.follow(progress)
            cross_validate(run, method, folds)
            _log.info("Writing the report")
            write_report(run)
    terminal.metrics(run.rows(method.name))
    terminal.say(f"Networks, masks and numbers: {run}\nReport: {run.report_file}")
    terminal.say(f"Segment a new patient: mmfnet segment {shlex.quote(str(run))} PATIENT --out FOLDER")
    if terminal.quiet:
        terminal.say(run.folder / "metrics.csv", always=True)


def _choose_reviewed_folds(run, folds):
    """Chooses the folds if they are `None`; says how many of the patients that were reviewed each of them learns from.

    Those who were reviewed in another run were its test patients, and may be test patients again.
    """
    from keras_mmfnet.data.layouts import reviewed_patients

    reviewed = set(reviewed_patients(run.cohort["data"]))
    learnt = [len(reviewed.intersection(one.train)) for one in run.folds]
    folds = [learnt.index(max(learnt))] if folds is None else folds
    for number in folds if reviewed else ():
        about = "Fold %d learns from %d of %d reviewed patients"
        _log.log(logging.INFO if learnt[number] else logging.WARNING, about, number, learnt[number], len(reviewed))
    return folds


def _donor_of(source):
    """The argument `donor` of `Run.start`: the first trained network of a run or bundle."""
    return {"donor": source.network(options.choose_trained(source)[0])} if source else {}


def _warn_of_seen(source, cases):
    """Warns of patients on whom the network to start from was trained."""
    if not source:
        return
    first = options.choose_trained(source)[:1]
    if seen := [case.name for case in cases if source.seen_in_training(case, first)]:
        about = "That network was trained on %s: if they are test patients here, their numbers are too good"
        _log.warning(about, ", ".join(seen))


def fit_batch(recipe):
    """A planned recipe, whose batches the devices can share: a share is not larger than the batch that was planned."""
    from keras_mmfnet.devices import get_devices

    number, size = get_devices().number, recipe.training.batch_size
    if not size % number:
        return recipe
    fitting = size + -size % number
    _log.info("training.batch_size is %d instead of %d, which %d devices share", fitting, size, number)
    return recipe.replace({"training.batch_size": fitting})


def log_command() -> None:
    """Adds the command to the log, not to what the terminal shows."""
    logging.getLogger("mmfnet").info("Command: %s", shlex.join(["mmfnet", *sys.argv[1:]]))


def progress_of(run, methods, folds) -> TrainingProgress:
    """What is to be trained for some methods, each network counted by its modalities."""
    from keras_mmfnet.methods import find_method

    weights, done = {}, []
    for fold in folds:
        for method in methods:
            for one in (*map(find_method, run.borrowed(method).values()), method):
                path = run.fold_folder(fold) / one.name
                weights[path] = len(one.adapt(run.recipe).data.modalities)
                if run.network(fold, one.name).exists() or run.result(fold, one.name).exists():
                    done.append(path)
    return TrainingProgress(weights, run.recipe.training.steps_per_epoch, done)
