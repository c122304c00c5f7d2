import logging
import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session
from keras_mmfnet.cli.train import run_training

_log = logging.getLogger(__name__)
# The synthetic patients are easy enough to end here. Few updates need higher rates.
_SHORT = {
    "training.steps_per_epoch": 40,
    "training.epochs": 4,
    "training.warmup_epochs": 1,
    "training.pretrain_learning_rate": 1e-2,
    "training.warmup_learning_rate": 1e-2,
}


def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Folder for the results.", show_default="runs/DATE-TIME")
    ] = None,
    changes: options.Changes = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Makes synthetic patients and trains on them, in five to ten minutes on two CPU cores."""
    out = out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    folder = shlex.quote(str(out))
    commands = {"resume_with": f"mmfnet train --out {folder} --resume", "start_with": f"mmfnet demo --out {folder}"}
    with session(quiet, **commands) as terminal:
        from keras_mmfnet.recipe import Recipe

        recipe = Recipe.small().replace(_SHORT | options.parse_changes(changes))
        start_backend(device)
        from keras_mmfnet.run import Run
        from keras_mmfnet.synthetic import make_synthetic_cohort

        if Run(out).recipe_file.exists():
            raise ValueError(f"{out}: must hold no run; resume with mmfnet train --out {out} --resume. Received: a run")
        _log.info("Making synthetic patients in %s", out / "phantom")
        make_synthetic_cohort(out / "phantom", seed=recipe.training.seed, modalities=recipe.data.modalities)
        run_training(terminal, out, out / "phantom", recipe, [0])
        patient = shlex.quote(str(out / "phantom" / Run(out).folds[0].test[0]))
        terminal.say(f"Look at it: mmfnet review {folder}")
        terminal.say(f"Try it: mmfnet segment {folder} {patient} --out contours --picture")
        terminal.say("With your own patients: mmfnet check PATIENTS, then mmfnet train PATIENTS --out RUN")
