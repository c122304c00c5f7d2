"""Tests whether MMFNet's attention depends on the patient, by replacing its weights with their means.

    python benchmarks/fixed_attention.py --run OUT --method mmfnet_mlp_std --fold 0

OUT is a run of reproduce_tables.py or whole_patients.py, whose method is `mmfnet`. In the trained network each channel
weight is replaced by its mean over the validation patients, the spatial weights of each block by their overall mean, or
both. The loss of DSC on the test patients measures what the attention adapts to each patient.
"""

import argparse
import os
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
from machine import machine, report
from trained import add_arguments, open_run, scores

from keras_mmfnet.evaluation import paired_difference
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.layers import FusionBlock3D

RESULTS = Path(__file__).parent / "results" / "fixed_attention"
KINDS = {"channel": ("channel",), "spatial": ("spatial",), "both": ("channel", "spatial")}


def attentions(model, kind):
    """The channel or spatial attention of each fusion block."""
    return [getattr(layer, f"{kind}_attention") for layer in model.layers if isinstance(layer, FusionBlock3D)]


def mean_weights(model, patients, recipe):
    """By kind, the mean channel weights of each block over the patients, and the overall mean spatial weight."""
    seen = {}
    for kind, axes in (("channel", 0), ("spatial", None)):
        seen[kind] = [record(layer, axes) for layer in attentions(model, kind)]

    def call(batch):
        # Eager: the weights cannot be recorded in a graph.
        return keras.ops.convert_to_numpy(model(batch))

    for case in patients:
        predict_volume(call, case.images, recipe.patches.shape, recipe.patches.stride, case.centre)
    return {kind: [np.mean(weights, axis=0) for weights in blocks] for kind, blocks in seen.items()}


def record(layer, axes):
    """A list to which the attention appends the mean of its weights at every call."""
    compute, weights = layer.scores, []

    def scores(*arguments, **options):
        values = compute(*arguments, **options)
        weights.append(keras.ops.convert_to_numpy(values).mean(axis=axes, keepdims=True))
        return values

    layer.scores = scores
    return weights


def fix(model, kind, means):
    """Replaces the weights computed from the inputs by these means."""
    for layer, mean in zip(attentions(model, kind), means, strict=True):

        def scores(features, *_, mean=mean, **options):
            batch = keras.ops.shape(features[0])[0]
            return keras.ops.repeat(keras.ops.cast(mean, features[0].dtype), batch, axis=0)

        layer.scores = scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--name", help="name of the file of results (default: that of the method)")
    parsed = parser.parse_args()
    load, recipe, validation, test = open_run(parsed)

    means = mean_weights(load(), validation, recipe)
    own = scores(load(), test, recipe)
    result = {
        "machine": machine("keras", keras.backend.backend()),
        "method": parsed.method,
        "fold": parsed.fold,
        "patients": len(test),
        "dsc": float(np.mean(own)),
        "less_the_network's_own": {},
    }
    for name, kinds in KINDS.items():
        model = load()
        for kind in kinds:
            fix(model, kind, means[kind])
        result["less_the_network's_own"][name] = paired_difference(scores(model, test, recipe), own)
    report(result, RESULTS / f"{parsed.name or parsed.method}.json")


if __name__ == "__main__":
    main()
