"""Options that several subcommands have, and what they mean."""

import contextlib
import functools
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

_log = logging.getLogger(__name__)
# Bytes that preprocessing a large patient takes, and seconds after which an idle process ends.
_MEMORY, _IDLE = 4e9, 10

DATA = typer.Argument(metavar="DATA", help="Folder of patients, or a dataset of nnU-Net or Decathlon.")
Data = Annotated[Path, DATA]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
RunOrBundle = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or a bundle: a folder or .zip.")]
Patient = Annotated[Path, typer.Argument(metavar="PATIENT", help="The patient, in any layout that train reads.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe in JSON.")]
Paper = Annotated[bool, typer.Option("--paper", help="The paper's recipe, for a GPU.")]
Small = Annotated[bool, typer.Option("--small", help="A fixed recipe for a CPU, without planning.")]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Planning: memory of one training step, such as 24GB.", show_default="8GB"),
]
Time = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Planning: time to train one fold, such as 30min or 1d.", show_default="2h"),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Change the recipe: training.epochs=20. May be repeated."),
]
Modules = Annotated[
    list[Path] | None,
    typer.Option("--import", metavar="FILE", help="Python file that registers methods or losses of your own."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out patients that cannot be used, and list them.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare the files of a run that is resumed by content, not by size and time.")
]
Groups = Annotated[
    Path | None, typer.Option(metavar="FILE", help="CSV with columns patient and group; a group is never divided.")
]
Splits = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Your own folds as JSON, such as nnU-Net's splits_final.json.")
]
Structure = Annotated[
    list[str] | None,
    typer.Option(
        "--structure",
        metavar="NAME=LABELS|PATTERN",
        help="A structure: its label values in the mask (core=1,4), or a pattern for the name of its file or DICOM "
        "structures (gtv='GTV.*'). May be repeated.",
    ),
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="cpu, gpu or gpu:1.")]
Devices = Annotated[
    str | None,
    typer.Option("--devices", metavar="N|all", help="Train on several GPUs, which share each batch.", show_default="1"),
]
SyncBatchNorm = Annotated[
    bool,
    typer.Option(
        "--sync-batch-norm/--no-sync-batch-norm",
        help="With --devices: batch normalization over the whole batch, or over each device's share.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Run preprocessing and training as Snakemake jobs, N at a time."),
]
Profile = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="With --jobs: a profile of Snakemake, such as one for Slurm.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="With --jobs: only show the jobs.")]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Largest number of processes that read patients.", show_default="by cores and memory"
    ),
]
Track = Annotated[
    str | None,
    typer.Option(metavar="TOOL", help="Send the losses of each epoch to a tool: tensorboard or mlflow."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and where the result is.")]


def parse_changes(changes: list[str] | None) -> dict:
    """From `["training.epochs=20", "patches.stride=4,none,none"]` to values by the path of the field."""
    values = {}
    for change in changes or ():
        field, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"--set: FIELD=VALUE is expected, such as training.epochs=20. Received: {change}")
        values[field.strip()] = _value(text)
    return values


def _value(text):
    try:
        return None if text.strip().lower() == "none" else json.loads(text)
    except ValueError:
        return tuple(_value(part.strip()) for part in text.split(",")) if "," in text else text


def choose_recipe(file: Path | None, paper: bool, changes: list[str] | None, structures=None, default=None):
    """The `Recipe` of the options `--recipe`, `--paper`, `--set` and `--structure`."""
    from keras_mmfnet.recipe import Recipe

    if file and paper:
        raise ValueError("--recipe, --paper: one of the two is expected. Received: both")
    recipe = Recipe.load(file) if file else Recipe() if paper else default or Recipe.small()
    return recipe.replace(parse_given(changes, structures))


def parse_given(changes: list[str] | None, structures: list[str] | None) -> dict:
    """The changes of a recipe by the options `--set` and `--structure`."""
    return {**parse_changes(changes), **parse_structures(structures)}


def parse_structures(structures: list[str] | None) -> dict:
    """From `["core=1,4", "whole=1,2,4"]`, or `["GTV.*"]` for one without a name, to the change of the recipe."""
    values = {}
    for text in structures or ():
        name, equals, what = text.partition("=")
        if not equals:
            name, what = "tumour", text
        if name in values:
            raise ValueError(f"--structure: NAME=LABELS or NAME=PATTERN, each name once, is expected. Received: {text}")
        if re.fullmatch(r" *-?\d+ *(, *-?\d+ *)*", what):
            values[name] = tuple(map(int, what.split(",")))
        elif re.fullmatch(r"[\d,\s-]+", what):
            expected = "label values (core=1,4) or a pattern with other characters (gtv='GTV.*') are expected"
            raise ValueError(f"--structure: {expected}. Received: {text}")
        else:
            values[name] = what
    return {"data.structures": values} if values else {}


def parse_amount(text: str, option: str, units: dict[str, float]) -> float:
    """From `"8GB"` to a number by the units that are known, `{"GB": 1e9}`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([a-z]+)", text.strip(), re.IGNORECASE)
    unit = found and {name.lower(): value for name, value in units.items()}.get(found[2].lower())
    if not unit or not float(found[1]):
        raise ValueError(f"{option}: a number with one of {', '.join(units)} is expected. Received: {text}")
    return float(found[1]) * unit


@contextlib.contextmanager
def use_devices(number: str | None, sync_batch_norm: bool) -> Iterator[None]:
    """Trains on these devices in the block. In any process but the first, the block is replaced by its trainings."""
    from keras_mmfnet.devices import set_devices, started_with_others
    from keras_mmfnet.training import follow

    check_devices(number)
    if number in (None, "1"):
        if started_with_others():
            raise ValueError(
                "--devices: all is expected, as this is one of several processes that were started together. "
                f"Received: {number or 'nothing'}"
            )
        yield
        return
    group = set_devices(number if number == "all" else int(number), sync_batch_norm)
    if group.process:
        follow()
        raise typer.Exit()
    _log.info("Training on %d device%s", group.number, "s" * (group.number > 1))
    try:
        yield
    finally:
        set_devices(1)


def use_workers(number: int | None):
    """Reads patients in up to `number` processes in the block; by default as cores and half of the memory allow."""
    import joblib

    from keras_mmfnet._machine import available_cores, available_memory

    number = number or max(1, min(available_cores(), int(available_memory() / 2 // _MEMORY)))
    return joblib.parallel_config("loky", n_jobs=number, idle_worker_timeout=_IDLE)


def check_track(tool: str | None) -> None:
    """Refuses what is not a value of `--track`."""
    from keras_mmfnet.tracking import TOOLS

    if tool not in (None, *TOOLS):
        raise ValueError(f"--track: {' or '.join(TOOLS)} is expected. Received: {tool}")


def check_devices(number: str | None) -> None:
    """Refuses what is not a value of `--devices`."""
    if number not in (None, "all") and not (number.isdecimal() and int(number)):
        raise ValueError(f"--devices: a number of 1 or more, or all, is expected. Received: {number}")


def import_files(files: list[Path] | None) -> None:
    """Runs Python files, which register methods or losses."""
    for path in files or ():
        if not path.is_file():
            raise ValueError(f"--import: a Python file is expected. Received: {path}")
        spec = importlib.util.spec_from_file_location(f"mmfnet_import_{path.stem}", path)
        # Under this name the other processes of a training find its classes.
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def read_division(groups: Path | None, splits: Path | None) -> dict:
    """The arguments of `Run.start` for the options `--groups` and `--splits`."""
    from keras_mmfnet.data.folds import read_groups, read_splits

    for option, path in (("--groups", groups), ("--splits", splits)):
        if path and not path.is_file():
            raise ValueError(f"{option}: a file that exists is expected. Received: {path}")
    return {"groups": groups and read_groups(groups), "splits": splits and read_splits(splits)}


def choose_folds(folds: list[str] | None, count: int, default: list[int]) -> list[int]:
    """Numbers of folds from `["0", "2"]` or `["all"]`."""
    if not folds:
        return default
    if folds == ["all"]:
        return list(range(count))
    known = [str(number) for number in range(count)]
    if not set(folds) <= set(known):
        raise ValueError(f"--fold: numbers from 0 to {count - 1}, or all, are expected. Received: {', '.join(folds)}")
    return sorted({int(number) for number in folds})


def require_new(path: Path, option: str) -> None:
    """Refuses to overwrite a file or folder, and one in a folder that does not exist."""
    problem = "exists already" if path.exists() else None
    if not path.parent.is_dir():
        problem = "is in a folder that does not exist"
    if problem:
        raise ValueError(f"{option}: a new one in a folder that exists is expected. Received: {path}, which {problem}")


def recipe_of_run(folder: Path, what: str = "RUN: the folder of a run"):
    """The recipe of a run, before the backend is imported, which takes seconds."""
    from keras_mmfnet.recipe import RECIPE_FILE, Recipe

    if not (folder / RECIPE_FILE).is_file():
        problem = "" if folder.exists() else ", which does not exist"
        if (folder / "cache").is_dir():
            problem = ", whose patients are not all preprocessed; run the command that began it again, without --resume"
        raise ValueError(f"{what}, with a {RECIPE_FILE}, is expected. Received: {folder}{problem}")
    return Recipe.load(folder / RECIPE_FILE)


def open_bundle(path: Path, what: str = "RUN"):
    """The recipe of a bundle or a run, and the `Bundle`, `None` for a run; before the backend is imported."""
    from keras_mmfnet.bundle import Bundle, is_bundle

    bundle = Bundle(path) if is_bundle(path) else None
    return bundle.recipe if bundle else recipe_of_run(path, f"{what}: a bundle, or the folder of a run"), bundle


def left_out(skip_bad: bool):
    """The argument `on_error` of `Run.start` for the option `--skip-bad`."""
    return functools.partial(_log.warning, "Left out: %s") if skip_bad else None


def require_folder(path: Path, what: str) -> None:
    """Finds a mistyped folder before the backend is imported, which takes seconds."""
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{what}: a folder is expected. Received: {path}, which {problem}")


def load_networks(run, folds: list[int] | None = None):
    """The trained networks of the folds of a run or bundle; of all that there are if `None`."""
    from keras_mmfnet.models import load_network

    return [load_network(run.network(fold), run.recipe) for fold in choose_trained(run, folds)]


def check_structure_name(name: str, structures: list[str]) -> None:
    """Refuses a name that the one structure of a network cannot have in DICOM files."""
    if not 1 <= len(name) <= 64 or "\\" in name or len(structures) > 1:
        expected = "1 to 64 characters without a backslash, for a network of one structure,"
        raise ValueError(f"--structure: {expected} are expected. Received: {name} for {', '.join(structures)}")


def choose_trained(run, folds: list[int] | None = None) -> list[int]:
    """The folds of a run or bundle that are trained; refuses others."""
    trained = run.trained_folds()
    if not trained:
        raise ValueError(f"{run}: the folder of a run with trained folds is expected. Received: a run without one")
    if lacking := sorted(set(folds or ()) - set(trained)):
        raise ValueError(
            f"--fold: a fold of {run} that is trained ({', '.join(map(str, trained))}) is expected. "
            f"Received: {', '.join(map(str, lacking))}"
        )
    return sorted(set(folds or trained))
