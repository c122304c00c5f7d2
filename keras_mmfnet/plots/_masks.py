"""The masks of a picture."""

import numpy as np

from keras_mmfnet.plots._colours import PREDICTION_COLOUR, TRUTH_COLOUR


def expert_and_prediction(truth, prediction):
    """`{name: (mask, colour)}` of those that there are."""
    masks = {"expert": (truth, TRUTH_COLOUR), "prediction": (prediction, PREDICTION_COLOUR)}
    return {name: (np.asarray(mask) > 0, colour) for name, (mask, colour) in masks.items() if mask is not None}


def union(images, masks):
    """Where any mask is; raises where the shapes differ."""
    shapes = {name: np.shape(array) for name, array in images.items()} | {n: m.shape for n, (m, _) in masks.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"images and masks must have one shape. Received: {shapes}")
    return np.any([mask for mask, _ in masks.values()], axis=0)
