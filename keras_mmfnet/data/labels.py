"""Structures as label values of one image. Pure functions over arrays."""

import functools
from collections.abc import Mapping

import numpy as np


def join_masks(
    masks: Mapping[str, np.ndarray], structures: Mapping[str, tuple[int, ...] | str | None]
) -> np.ndarray | None:
    """One label image of the masks of all structures.

    One structure alone has the label 1. Of several, each voxel gets the label whose structures differ least from the
    masks; ties go to fewer structures, so a core outside its whole is dropped.

    Args:
        masks: `{structure: mask}`, of the same shape.
        structures: `DataRecipe.structures`, in the same order.

    Returns:
        An array of labels, uint8 where they fit; `None` if several structures are files of their own, which no label
        image can hold where they overlap.
    """
    if len(structures) == 1:
        return (next(iter(masks.values())) > 0).astype(np.uint8)
    if not all(isinstance(labels, tuple) for labels in structures.values()):
        return None
    labels, members = _labels(structures)
    inside = functools.reduce(np.logical_or, (masks[name] > 0 for name in structures))
    columns = np.stack([masks[name][inside] > 0 for name in structures])
    chosen, best = np.zeros((2, columns.shape[1]), np.int32)
    for label, member in zip(labels[1:], members[1:], strict=True):
        # How many structures less differ than from the background.
        gain = 2 * columns[member].sum(axis=0, dtype=np.int32) - np.int32(member.sum())
        better = gain > best
        chosen[better], best[better] = label, gain[better]
    found = np.zeros(inside.shape, labels.dtype)
    found[inside] = chosen
    return found


def split_labels(values: np.ndarray, structures: Mapping[str, tuple[int, ...] | str | None]) -> dict[str, np.ndarray]:
    """The masks of all structures in a label image of `join_masks`.

    Args:
        values: Array of labels.
        structures: `DataRecipe.structures`; several must have label values.

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
