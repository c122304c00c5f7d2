from collections.abc import Sequence

import numpy as np


def rasterise(polygons: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside an odd number of closed polygons.

    By this even-odd rule a polygon within another is a hole, and a hole that a channel joins to the outline
    ("keyhole") is one too.

    Args:
        polygons: Float arrays `(points, 2)` of (x, y) in pixels; (0, 0) is the centre of the first pixel. The last point
            is joined to the first.
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
