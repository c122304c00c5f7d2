"""Measures the DSC of a trained network when modalities are missing.

    python benchmarks/missing_modalities.py --run OUT --method mmfnet_mlp_std --fold 0

OUT is a run of reproduce_tables.py, with --modality-dropout or without.
"""

import argparse
import os
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
from machine import machine, report
from trained import add_arguments, open_run, scores, subsets

from keras_mmfnet.evaluation import paired_difference

RESULTS = Path(__file__).parent / "results" / "missing_modalities"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parsed = parser.parse_args()
    load, recipe, _, test = open_run(parsed)
    network, names = load(), recipe.data.modalities
    whole = scores(network, test, recipe)
    result = {
        "machine": machine("keras", keras.backend.backend()),
        "method": parsed.method,
        "modality_dropout": recipe.network.modality_dropout,
        "fold": parsed.fold,
        "patients": len(test),
        "dsc": float(np.mean(whole)),
        "without": {},
    }
    for missing in subsets(names):
        found = scores(network, test, recipe, missing)
        result["without"][", ".join(missing)] = {"dsc": float(np.mean(found)), **paired_difference(found, whole)}
    report(result, RESULTS / f"{parsed.method}_dropout_{recipe.network.modality_dropout:g}.json")


if __name__ == "__main__":
    main()
