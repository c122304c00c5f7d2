"""Draws where MMFNet's attention looks: the spatial weights of each fusion block, of several test patients.

    python benchmarks/attention_maps.py --run OUT --method mmfnet --fold 0 --patients 10

OUT is a run of reproduce_tables.py or whole_patients.py. The picture, OUT/attention_maps.png, has a row for each
patient: the slice with most of the tumour and the expert's contour, in the first sequence and over the weights. The
file of results has, for each block and patient, the mean weight inside the tumour and in the rest of the body, and each
sequence's share of the weighted features around the tumour.
"""

import argparse
import os
from pathlib import Path

# Off by default on some processors; a prediction is faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
from machine import machine, report
from matplotlib.figure import Figure
from trained import add_arguments, open_run

from keras_mmfnet.explain import cohort_shares, spatial_attention
from keras_mmfnet.inference import predict_volume

RESULTS = Path(__file__).parent / "results" / "attention_maps"


def weights_of(model, case, recipe, blocks):
    """The spatial weights of each block on the patient's grid: `{block: (depth, height, width)}`."""
    call, patches = spatial_attention(model, blocks), recipe.patches
    found = predict_volume(call, case.images_of(model.modalities), patches.shape, patches.stride, case.centre)
    return dict(zip(blocks, np.moveaxis(found, -1, 0), strict=True))


def means(maps, case):
    """The mean weight inside the tumour and in the rest of the body: `{block: [inside, rest]}`."""
    image, tumour = next(iter(case.images.values())), case.mask > 0
    rest = (image > image.mean()) & ~tumour
    # Outside the windows the weights are 0.
    return {block: [float(heat[place & (heat > 0)].mean()) for place in (tumour, rest)] for block, heat in maps.items()}


def draw(cases, maps, path):
    """Draws a row for each patient: the first sequence, and the weights of each block."""
    blocks = list(maps[0])
    figure = Figure(figsize=(2.2 * (1 + len(blocks)), 2.2 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 1 + len(blocks), squeeze=False)
    for row, case, heats in zip(axes, cases, maps, strict=True):
        depth = int(np.argmax(case.mask.sum(axis=(1, 2))))
        name, image = next(iter(case.images.items()))
        for axis, (title, shown) in zip(row, [(name, image), *heats.items()], strict=True):
            limits = {"cmap": "gray"} if shown is image else {"cmap": "viridis", "vmin": 0, "vmax": 1}
            drawn = axis.imshow(shown[depth], aspect=case.spacing[1] / case.spacing[2], **limits)
            axis.contour(case.mask[depth], levels=[0.5], colors="red", linewidths=0.8)
            axis.set(xticks=[], yticks=[], title=title if case is cases[0] else "")
        row[0].set_ylabel(case.name, fontsize=6)
    figure.colorbar(drawn, ax=axes, shrink=1 / len(cases), label="spatial weight")
    figure.savefig(path, dpi=60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--patients", type=int, default=10, metavar="N", help="(%(default)s)")
    parser.add_argument("--name", help="name of the files of results (default: that of the method)")
    parsed = parser.parse_args()
    load, recipe, _, test = open_run(parsed)
    model, cases = load(), [case for case in test if case.mask.any()][: parsed.patients]
    shares = cohort_shares(model, cases)
    maps = [weights_of(model, case, recipe, list(shares)) for case in cases]
    weights = {case.name: means(one, case) for case, one in zip(cases, maps, strict=True)}
    result = {
        "machine": machine("keras", keras.backend.backend()),
        "method": parsed.method,
        "fold": parsed.fold,
        "share": {block: {name: float(x.mean()) for name, x in one.items()} for block, one in shares.items()},
        "inside_and_rest": weights,
    }
    report(result, RESULTS / f"{parsed.name or parsed.method}.json")
    draw(cases, maps, parsed.run / "attention_maps.png")


if __name__ == "__main__":
    main()
