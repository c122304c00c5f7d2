"""The masks of a figure, and a palette for all kinds of colour vision (Okabe and Ito)."""

import numpy as np

TRUTH_COLOUR = "#E69F00"
PREDICTION_COLOUR = "#56B4E9"
ERROR_COLOURS = {"true positive": "#56B4E9", "false positive": "#D55E00", "false negative": "#F0E442"}
# Dark enough for lines and markers on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def expert_and_prediction(truth, prediction):
    """`{name: (mask, colour)}` of the masks that are not `None`."""
    masks = {"expert": (truth, TRUTH_COLOUR), "prediction": (prediction, PREDICTION_COLOUR)}
    return {name: (np.asarray(mask) > 0, colour) for name, (mask, colour) in masks.items() if mask is not None}


def union(images, masks):
    """The union of the masks; raises `ValueError` if the shapes differ."""
    shapes = {name: np.shape(array) for name, array in images.items()} | {n: m.shape for n, (m, _) in masks.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"images and masks must have the same shape. Received: {shapes}")
    return np.any([mask for mask, _ in masks.values()], axis=0)
