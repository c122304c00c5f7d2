"""Trains MMFNet with self-transfer on a folder of patients, and segments those held back.

Without arguments it makes synthetic patients and trains on them, in a few minutes on two CPU cores:

    python examples/train_npc.py

With a folder of patients (one folder each, with the files t1, t2, cet1 and mask in any format SimpleITK reads):

    python examples/train_npc.py --data DIR --out DIR
"""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

# TensorFlow leaves it off on some processors; a step takes a third of the time with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from keras_mmfnet._log import log_to_file, log_to_terminal
from keras_mmfnet.data import find_cases
from keras_mmfnet.evaluation import metrics_table
from keras_mmfnet.recipe import Recipe, add_recipe_arguments, recipe_changes
from keras_mmfnet.report import write_run_report
from keras_mmfnet.synthetic import make_synthetic_cohort
from keras_mmfnet.training import cross_validate

# The synthetic patients are easy enough to end the demonstration here.
DEMONSTRATION = {"steps_per_epoch": 40, "epochs": 4, "warmup_epochs": 1}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of patients; without it a synthetic cohort is made")
    add("--out", type=Path, help="folder for the results (default: runs/<date-time>)")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--skip-bad", action="store_true", help="leave out patients that cannot be used, and list them")
    add("--paper", action="store_true", help="the full recipe of the paper, in place of the small one for a CPU")
    add("--fold", default="0", metavar="N|all", help="fold of the cross-validation to run (default: 0)")
    add("--quiet", action="store_true", help="nothing on the terminal but errors and where the numbers are")
    add("--modalities", nargs="+", default=argparse.SUPPRESS, metavar="NAME",
        help="file names of the modalities, two or more")  # fmt: skip
    add_recipe_arguments(parser)

    parsed = parser.parse_args(arguments)
    parsed.changes = recipe_changes(parsed)
    if len(parsed.changes.get("modalities", "12")) < 2:
        parser.error(f"--modalities: two or more are expected. Received: {parsed.modalities}")
    if parsed.resume and not parsed.out:
        parser.error("--resume: the folder of the run is expected as --out. Received: no --out")
    if parsed.fold != "all" and not parsed.fold.isdecimal():
        parser.error(f"--fold: a number or 'all' is expected. Received: {parsed.fold}")
    return parsed


def choose_recipe(parsed, out):
    if parsed.resume and (out / "recipe.json").exists() and not parsed.paper:
        return Recipe.load(out / "recipe.json").replace(parsed.changes)
    if parsed.paper:
        return Recipe().replace(parsed.changes)
    return Recipe.small().replace(({} if parsed.data else DEMONSTRATION) | parsed.changes)


def main():
    parsed = parse_arguments()
    log_to_terminal(quiet=parsed.quiet)
    out = parsed.out or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        recipe = choose_recipe(parsed, out)
        data = parsed.data
        if data is None:
            data = out / "phantom"
            if parsed.resume and (out / "recipe.json").exists() and not data.exists():
                raise ValueError(f"the run is of patients of your own: --data is expected. Received: {out}")
            logging.info("Making synthetic patients in %s", data)
            make_synthetic_cohort(data, seed=recipe.training.seed, modalities=recipe.data.modalities)
        left_out = []
        skip = left_out.append if parsed.skip_bad else None
        cases = find_cases(data, recipe.data, on_error=skip)
        folds = None if parsed.fold == "all" else [int(parsed.fold)]
        with log_to_file(out / "run.log"):
            rows = cross_validate(cases, recipe, out, folds, parsed.resume, on_error=skip)
            for error in left_out:
                logging.info("Left out: %s", error)
            logging.info("The report is %s", write_run_report(out, cases))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if parsed.quiet:
        print(out / "metrics.csv")
    else:
        print(f"\n{metrics_table(rows)}\n")
        print(f"Models, masks and numbers are in {out}")


if __name__ == "__main__":
    main()
