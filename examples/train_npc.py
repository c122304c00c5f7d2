"""Trains MMFNet with self-transfer on a fold of patients, and segments its test patients.

Without arguments it trains on synthetic patients, in five to ten minutes on two CPU cores:

    python examples/train_npc.py

With a folder of patients and a folder for the results:

    python examples/train_npc.py DATA OUT

The command `mmfnet train` does the same, and can resume.
"""

import logging
import os
import sys
import time
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from keras_mmfnet.evaluation import METRICS, summarise
from keras_mmfnet.methods import method_of
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.report import write_report
from keras_mmfnet.run import Run, cross_validate
from keras_mmfnet.synthetic import make_synthetic_cohort


def main(arguments):
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    recipe = Recipe.small()
    if arguments:
        data, out = map(Path, arguments)
    else:
        out = Path("runs") / time.strftime("%Y%m%d-%H%M%S")
        data = out / "phantom"
        make_synthetic_cohort(data)
        # A short training is enough for synthetic patients.
        recipe = recipe.replace({"training.steps_per_epoch": 40, "training.epochs": 4, "training.warmup_epochs": 1})
    run = Run.start(out, data, recipe)
    summary = summarise(cross_validate(run, method_of(recipe), folds=[0]))
    for name in ("dsc", "hd95"):
        metric, numbers = METRICS[name], summary[name]
        print(f"{metric.title}: mean {metric.text(numbers['mean'])} over {numbers['patients']} test patients")
    print(f"Report: {write_report(run)}")


if __name__ == "__main__":
    main(sys.argv[1:])
