"""Plots the share of each modality in each fusion block of a run's network, for one patient.

    python examples/explain_patient.py RUN PATIENT attention.png

The command `mmfnet explain` also draws the spatial attention and gradient maps.
"""

import os
import sys

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from keras_mmfnet.data import preprocess_case, read_case_folder
from keras_mmfnet.explain import fusion_attention, tumour_window
from keras_mmfnet.inference import predict_volume
from keras_mmfnet.models import load_network
from keras_mmfnet.plots import plot_attention
from keras_mmfnet.run import Run


def main(folder, patient, out):
    run = Run(folder)
    recipe = run.recipe
    network = load_network(run.network(run.trained_folds()[0]), recipe)
    case = preprocess_case(read_case_folder(patient, recipe.data, require_mask=False), recipe.data)
    images = case.images_of(recipe.data.modalities)
    probability = predict_volume(network, images, recipe.patches.shape, recipe.patches.stride, case.centre)
    batch, _ = tumour_window(images, probability.max(axis=-1) >= 0.5, recipe.patches.shape, case.centre)
    _, _, share = fusion_attention(network, batch)
    plot_attention(share).savefig(out, dpi=110)
    for block, shares in share.items():
        print(block, *(f"{name} {value[0]:.0%}" for name, value in shares.items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
