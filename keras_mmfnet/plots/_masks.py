"""The masks of a figure, and a palette for all kinds of colour vision (Okabe and Ito)."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

TRUTH_COLOUR = "#E69F00"
PREDICTION_COLOUR = "#56B4E9"
ERROR_COLOURS = {"true positive": "#56B4E9", "false positive": "#D55E00", "false negative": "#F0E442"}
# Of several structures, in whose colour the expert's contour is dotted and the predicted one solid.
STRUCTURE_COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
# Dark enough for lines and markers on white.
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# A mask of 0 and 1, or one for each structure by name.
Masks = np.ndarray | Mapping[str, np.ndarray]


class Outline(NamedTuple):
    """A mask, how it is drawn, who drew it, and of several structures which one it is.

    `rank` tells how much thicker it is than the thinnest, so that equal contours all show.
    """

    mask: np.ndarray
    colour: str | None = None
    style: str = "solid"
    rank: int = 0
    who: str = ""
    structure: str = ""


def structure_colours(names: Iterable[str]) -> dict[str, str]:
    """`{structure: colour}`, in their order; the colours in which figures draw several structures."""
    return dict(zip(names, itertools.cycle(STRUCTURE_COLOURS), strict=False))


def expert_and_prediction(truth, prediction):
    """`{name: Outline}` of the masks that are not `None`, those of the expert first.

    Each may be one mask, or `{structure: mask}`. Of several structures a colour is that of the structure.
    """
    given = {"expert": truth, "prediction": prediction}
    given = {who: m if isinstance(m, Mapping) else {"": m} for who, m in given.items() if m is not None}
    if len({tuple(m) if len(m) > 1 else 1 for m in given.values()}) > 1:
        listed = "; ".join(", ".join(m) for m in given.values())
        raise ValueError(f"masks of the same structures are expected. Received: {listed}")
    masks = {}
    for who, by_structure in given.items():
        colours = structure_colours(by_structure)
        for number, (name, mask) in enumerate(by_structure.items(), start=1):
            mask = np.asarray(mask) > 0
            if len(by_structure) > 1:
                style, rank = "dotted" if who == "expert" else "solid", min(len(by_structure) - number, 2)
                masks[f"{who} {name}"] = Outline(mask, colours[name], style, rank, who, name)
            else:
                masks[who] = Outline(mask, TRUTH_COLOUR if who == "expert" else PREDICTION_COLOUR, who=who)
    return masks


def union(images, masks):
    """The union of the masks; raises `ValueError` if the shapes differ."""
    shapes = {name: np.shape(array) for name, array in images.items()} | {n: m.mask.shape for n, m in masks.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"images and masks must have the same shape. Received: {shapes}")
    return np.any([one.mask for one in masks.values()], axis=0)
