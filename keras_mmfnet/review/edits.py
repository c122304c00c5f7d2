"""Drawings, and edits of masks: functions over arrays `(depth, height, width)`."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

# How many structures may overlap in any way: the classes are as many as fit into uint8.
_MOST = 8


class Classes:
    """What a voxel of a drawing can be: the sets of structures to which it may belong, 0 being none.

    A drawing is one uint8 array of the numbers of these classes. Structures with label values of their own have a class
    each; regions that share label values have one for each label; structures in files of their own overlap in any way.

    Args:
        structures: `DataRecipe.structures`.

    Raises:
        ValueError: There are more classes than uint8 can hold.
    """

    def __init__(self, structures: Mapping[str, tuple[int, ...] | str | None]):
        self.structures = tuple(structures)
        if all(isinstance(labels, tuple) for labels in structures.values()) and len(structures) > 1:
            every = sorted({label for labels in structures.values() for label in labels})
            sets = [tuple(label in labels for labels in structures.values()) for label in every]
        elif len(structures) > _MOST:
            raise ValueError(f"at most {_MOST} structures that may overlap can be drawn. Received: {len(structures)}")
        else:
            sets = list(itertools.product((False, True), repeat=len(structures)))
        sets = sorted({tuple([False] * len(structures)), *sets}, key=lambda one: (sum(one), [not x for x in one]))
        if len(sets) > 256:
            raise ValueError(f"at most 255 structures can be drawn. Received: {len(structures)}")
        # (classes, structures): whether a class is in a structure.
        self.members = np.array(sets)
        # (structures, classes): what becomes of each class where a structure is drawn, and where it is erased.
        self.drawn, self.erased = (
            np.array([[self._nearest(old, n, inside) for old in self.members] for n in range(len(sets[0]))], np.uint8)
            for inside in (True, False)
        )

    def _nearest(self, members, number, inside):
        """The class most like one of these members, but with a structure or without it; of few structures at best."""
        wanted = members.copy()
        wanted[number] = inside
        differing = (self.members != wanted).sum(axis=1) + np.where(self.members[:, number] == inside, 0, 1000)
        return int(differing.argmin())

    def join(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """The drawing of the masks of all structures.

        Args:
            masks: The mask of each structure, of the same shape.

        Returns:
            A uint8 array.

        Raises:
            ValueError: A voxel belongs to structures that exclude each other.
        """
        columns = np.stack([np.ravel(mask) > 0 for mask in masks])
        drawing, known = np.zeros(columns.shape[1], np.uint8), ~columns.any(axis=0)
        for number, members in enumerate(self.members):
            same = (columns == members[:, None]).all(axis=0)
            drawing[same], known = number, known | same
        if not known.all():
            raise ValueError(
                f"masks of {', '.join(self.structures)} that overlap as their labels do are expected. Received: "
                f"{np.count_nonzero(~known)} voxels of other structures"
            )
        return drawing.reshape(masks[0].shape)

    def split(self, drawing: np.ndarray) -> list[np.ndarray]:
        """The masks of a drawing, a bool array for each structure: the inverse of `join`."""
        return [members[drawing] for members in self.members.T]

    def replace(self, drawing: np.ndarray, number: int, mask: np.ndarray) -> np.ndarray:
        """A drawing in which one structure has another mask.

        Args:
            drawing: A uint8 array.
            number: Number of the structure, from 0.
            mask: Its voxels. They leave the structures that exclude it, and join those that contain it.

        Returns:
            A uint8 array.
        """
        return np.where(mask, self.drawn[number][drawing], self.erased[number][drawing])


def interpolate_slices(mask: np.ndarray, axis: int, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Fills the empty slices between drawn ones by interpolating their signed distances to the contour.

    Shape-based interpolation, Raya and Udupa 1990.

    Args:
        mask: Voxels of a structure.
        axis: Axis along which the slices lie, 0 to 2.
        spacing: Size of a voxel in mm `(z, y, x)`.

    Returns:
        A bool array, which contains the mask.
    """
    slices = np.moveaxis(mask > 0, axis, 0).copy()
    steps = [step for number, step in enumerate(spacing) if number != axis]
    drawn = np.flatnonzero(slices.any(axis=(1, 2)))
    for low, high in itertools.pairwise(drawn):
        if high - low > 1:
            first, last = (_signed_distance(slices[n], steps) for n in (low, high))
            for n in range(low + 1, high):
                share = (n - low) / (high - low)
                slices[n] = (1 - share) * first + share * last > 0
    return np.moveaxis(slices, 0, axis)


def _signed_distance(inside, spacing):
    """Distance to the edge, positive inside. Both sides are measured to the nearest voxel of the other one."""
    return ndimage.distance_transform_edt(inside, spacing) - ndimage.distance_transform_edt(~inside, spacing)


def grow(probability: np.ndarray, threshold: float, mask: np.ndarray) -> np.ndarray:
    """The voxels of at least this probability that are connected with a mask; all of them where the mask is empty.

    Args:
        probability: Values in [0, 1].
        threshold: The lowest probability.
        mask: Voxels of the structure so far.

    Returns:
        A bool array.
    """
    inside = probability >= threshold
    if not mask.any():
        return inside
    labels, _ = ndimage.label(inside)
    touched = np.unique(labels[mask > 0])
    return np.isin(labels, touched[touched > 0])


def difference(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The voxels in which two drawings differ.

    Args:
        before: A uint8 array.
        after: A uint8 array of the same shape.

    Returns:
        The flat indices of those voxels, uint32, and their values in `after`, uint8.
    """
    indices = np.flatnonzero(before.ravel() != after.ravel())
    return indices.astype(np.uint32), after.ravel()[indices]
