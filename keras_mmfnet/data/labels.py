"""Structures as label values of one image. Pure functions over arrays."""

from collections.abc import Mapping

import numpy as np

# Structures by name, as `DataRecipe.structures` has them.
Structures = Mapping[str, tuple[int, ...] | str | None]


def join_masks(masks: Mapping[str, np.ndarray], structures: Structures) -> np.ndarray | None:
    """One label image of the masks of all structures.

    One structure alone has the label 1. Of several, each voxel gets the label value whose structures agree best with
    the masks: all of them where the masks fit together as the labels do. If two labels agree equally well, that of
    fewer structures counts, so a region outside the one around it may get lost.

    Args:
        masks: `{structure: mask}`, of the same shape.
        structures: The structures of the recipe, in the same order.

    Returns:
        An array of labels, uint8 where they fit; `None` if several structures are files of their own, which no label
        image can hold where they overlap.
    """
    if len(structures) == 1:
        return (next(iter(masks.values())) > 0).astype(np.uint8)
    if not all(isinstance(labels, tuple) for labels in structures.values()):
        return None
    labels, members = _labels(structures)
    codes = np.arange(2 ** len(structures))
    wanted = codes[:, None] >> np.arange(len(structures)) & 1
    agreeing = (wanted[:, None] == members).sum(axis=2)
    found = sum((masks[name] > 0).astype(np.intp) << number for number, name in enumerate(structures))
    return labels[agreeing.argmax(axis=1)][found]


def split_labels(values: np.ndarray, structures: Structures) -> dict[str, np.ndarray]:
    """The masks of all structures in a label image of `join_masks`.

    Args:
        values: Array of labels.
        structures: The structures of the recipe; several must have label values.

    Returns:
        `{structure: bool array}`.
    """
    if len(structures) == 1:
        return {name: values > 0 for name in structures}
    return {name: np.isin(values, labels) for name, labels in structures.items()}


def _labels(structures):
    """The label values, 0 for the background first, then those of few structures; and the structures of each."""
    every = dict.fromkeys([label for labels in structures.values() for label in labels])
    every = sorted(every, key=lambda label: sum(label in labels for labels in structures.values()))
    values = np.array([0, *every])
    members = np.array([[label in labels for labels in structures.values()] for label in values])
    return values.astype(np.result_type(*map(np.min_scalar_type, (values.min(), values.max())))), members
