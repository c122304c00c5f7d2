import json
import logging
import shlex
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import Terminal, session
from keras_mmfnet.cli.check import find

_log = logging.getLogger(__name__)
_BYTES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def plan(
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File for the recipe in JSON, with the reasons.")],
    memory: options.Memory = None,
    time: options.Time = None,
    changes: options.Changes = None,
    structure: options.Structure = None,
    skip_bad: options.SkipBad = False,
    device: options.Device = None,
    workers: options.Workers = None,
    quiet: options.Quiet = False,
):
    """Reads the patients and plans a recipe for them, with the reason for each number."""
    with session(quiet) as terminal:
        options.require_folder(data, "DATA")
        options.require_new(out, "--out")
        given, budget = options.parse_given(changes, structure), parse_budget(memory, time)
        start_backend(device)
        from keras_mmfnet._files import write

        with options.use_workers(workers):
            write(out, plan_patients(terminal, data, given, budget, skip_bad).to_json())
        terminal.say(f"Train it: mmfnet train {shlex.quote(str(data))} --recipe {shlex.quote(str(out))} --out RUN")
        if quiet:
            terminal.say(out, always=True)


def parse_budget(memory: str | None, time: str | None) -> dict[str, float]:
    """The arguments of `plan_recipe` for the options `--memory` and `--time`."""
    return {
        "memory": options.parse_amount(memory or "8GB", "--memory", _BYTES),
        "seconds": options.parse_amount(time or "2h", "--time", _SECONDS),
    }


def plan_patients(terminal: Terminal, data, given, budget, skip_bad=False, cache=None, groups=None):
    """Plans a recipe and prints it."""
    from keras_mmfnet.data import CaseError, find_cases
    from keras_mmfnet.losses import make_loss
    from keras_mmfnet.methods import method_of
    from keras_mmfnet.plan import given_recipe, measure_cost, plan_recipe

    chosen = given_recipe(given)
    method_of(chosen)  # One sequence and an unknown loss are refused before the patients are read.
    make_loss(chosen.training.loss)
    cases, errors = find(data, chosen.data)
    if lacking := [name for name in chosen.data.modalities if not any(name in case.images for case in cases)]:
        find_cases(data, chosen.data.model_copy(update={"allow_missing": False}))  # which says what there is instead
        raise ValueError(f"{data}: must hold images of {', '.join(lacking)}. Received: no such image")
    for case in [case for case in cases if case.mask is None]:
        errors.append(CaseError(f"{case.name}: a mask is needed to plan. Received: no mask"))
        cases.remove(case)
    if errors and not (skip_bad and cases):
        raise CaseError.of_several(errors, len(cases) + len(errors))
    for error in errors:
        _log.warning("Left out: %s", error)
    recipe = plan_recipe(
        cases, given, **budget, cost=measure_cost(), cache=cache, on_error=options.left_out(skip_bad), groups=groups
    )
    values = recipe.model_dump(mode="json")
    rows = [[path, _text(values, path), reason] for path, reason in recipe.reasons.items()]
    terminal.table(["planned", "value", "because"], rows, left=3)
    terminal.say("All other fields are the paper's, but for those that were given.")
    return recipe


def _text(values, path):
    part, field = path.split(".")
    return json.dumps(values[part][field]).replace('"', "")
