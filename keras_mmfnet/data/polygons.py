"""Masks from polygons in pixels."""

import itertools
from collections.abc import Sequence

import numpy as np

# In pixels: how far a contour within another may lie outside it, as one that touches it does once it is rounded; and
# from which mean distance on two contours are not one that was drawn twice.
_TOUCHING, _TWICE = 0.2, 0.5


def rasterise(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside an odd number of closed polygons.

    By this even-odd rule a polygon within another is a hole, and a hole that a channel joins to the outline
    ("keyhole") is one too.

    Args:
        polygons: Float arrays `(points, 2)` of (x, y) in pixels; (0, 0) is the centre of the first pixel. The last
            point is joined to the first.
        shape: `(height, width)` in pixels.

    Returns:
        Bool `(height, width)`. Of a centre that lies exactly on an edge, edges to the left and above are inside.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), np.int32)
    if polygons:
        start = np.concatenate(polygons)
        end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
        first, last = (
            np.clip(np.ceil(kind(start[:, 1], end[:, 1])), 0, height).astype(int) for kind in (np.minimum, np.maximum)
        )
        edge = np.repeat(np.arange(len(start)), last - first)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
        (x0, y0), (x1, y1) = start[edge].T, end[edge].T
        column = np.ceil(x0 + (row - y0) * (x1 - x0) / (y1 - y0))
        np.add.at(crossings, (row, np.clip(column, 0, width).astype(int)), 1)
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1


def fill_nested(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray | None:
    """The pixels whose centres lie inside polygons, of which some may lie inside others.

    A polygon inside another is a hole, and one inside a hole is an island. Polygons that cross, or that are nearly the
    same, are joined.

    Args:
        polygons: As for `rasterise`.
        shape: `(height, width)` in pixels.

    Returns:
        Bool `(height, width)`; `None` if a polygon crosses a hole.
    """
    masks = [rasterise([polygon], shape) for polygon in polygons]
    low, high = (np.array([end(polygon, axis=0) for polygon in polygons]) for end in (np.min, np.max))
    within, near = np.zeros((2, len(masks), len(masks)), bool)
    for i, j in np.argwhere(((low[:, None] > low - 1) & (high[:, None] < high + 1)).all(-1)):
        if i != j:
            inside, away = _relation(_sampled(polygons[i]), polygons[j])
            within[i, j], near[i, j] = (inside | (away < _TOUCHING)).all(), away.mean() < _TWICE
    same = near & near.T
    first = [index for index in range(len(masks)) if not same[index, :index].any()]
    within &= ~same
    hole = within[:, first].sum(axis=1) % 2 == 1
    for i, j in itertools.product(np.flatnonzero(hole), np.flatnonzero(~hole)):
        if not (within[i, j] or within[j, i] or same[i, j]) and (masks[i] & masks[j]).any():
            return None
    array = np.zeros(shape, bool)
    for index in np.argsort(within[:, first].sum(axis=1), kind="stable"):
        array[masks[index]] = not hole[index]
    return array


def _sampled(polygon):
    """Points on the outline of a polygon, at most half a pixel apart."""
    edges = np.roll(polygon, -1, axis=0) - polygon
    counts = np.maximum(np.ceil(2 * np.linalg.norm(edges, axis=1)), 1).astype(int)
    share = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) / np.repeat(counts, counts)
    return np.repeat(polygon, counts, axis=0) + share[:, None] * np.repeat(edges, counts, axis=0)


def _relation(points, polygon):
    """Whether points lie in a polygon, and how far from its outline, in pixels."""
    edges = np.roll(polygon, -1, axis=0) - polygon
    lengths = np.maximum((edges**2).sum(-1), 1e-12)
    inside, away = [], []
    for some in np.array_split(points, len(points) * len(polygon) // 10**6 + 1):
        offset = some[:, None] - polygon
        share = np.clip((offset * edges).sum(-1) / lengths, 0, 1)
        away.append(np.linalg.norm(offset - share[..., None] * edges, axis=-1).min(axis=1))
        spans = (offset[..., 1] >= 0) != (offset[..., 1] >= edges[:, 1])
        slope = edges[:, 0] / np.where(edges[:, 1] == 0, 1, edges[:, 1])
        inside.append((spans & (offset[..., 0] < offset[..., 1] * slope)).sum(axis=1) % 2 == 1)
    return np.concatenate(inside), np.concatenate(away)
