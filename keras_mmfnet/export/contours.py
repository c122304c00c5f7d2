"""From a slice of a mask or a probability to polygons, in pixels: (x, y) with (0, 0) at the first pixel's centre."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

# (row, column) of the neighbour to the right, below, to the left and above.
_SIDES = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
# Pixels: half the width of the channel to a hole, and how far contours stay off each other and off pixel centres.
_GAP = 0.02
# Share of a polygon's area by which simplifying it may change that: to cut off corners alone would shrink tumours.
_AREA = 0.01


def contours(mask: np.ndarray, probability: np.ndarray | None = None) -> list[np.ndarray]:
    """The outlines of a mask's islands, one polygon for each.

    Pixels that touch at a corner alone are different islands. A hole is joined to the outline by a channel 0.04 pixels
    wide between two rows of pixels ("keyhole"), so that each polygon is simple: it neither crosses nor touches itself
    or another.

    Args:
        mask: Bool `(height, width)`.
        probability: Float `(height, width)` in [0, 1]. With it the outlines follow its level of 0.5, linear between
            pixel centres; without it, and at the image's border, the edges of pixels. Where it disagrees with the mask
            at 0.5, as after an island was removed, the mask counts.

    Returns:
        Float arrays `(points, 2)` of (x, y) in pixels, at least four points each, clockwise as the image is shown, the
        first point not repeated. The pixels whose centres they enclose are those of the mask.
    """
    mask = np.asarray(mask, bool)
    # How far the probability is from 0.5: it tells where the outline crosses from one pixel centre to the next.
    margin = np.full(mask.shape, 0.5)
    if probability is not None:
        margin = np.where((probability >= 0.5) == mask, np.abs(probability - 0.5), 0.5)
    # At the image's border, at the edges of pixels.
    margin, mask = np.pad(margin, 1, mode="edge"), np.pad(mask, 1)
    linked = _linked(mask)
    polygons = []
    for side, row, column in _loops(mask, linked):
        pixel, out, along = np.stack([row, column], 1), _SIDES[side], _SIDES[(side + 1) % 4]
        other = tuple((pixel + out).T)
        total = margin[row, column] + margin[other]
        share = np.clip(margin[row, column] / np.where(total > 0, total, 1), _GAP, 1 - _GAP)
        share[mask[other]] = 0.5 - _GAP  # a channel
        if probability is not None:
            points = pixel + share[:, None] * out
        else:
            turn, then = (np.roll(side, -1) - side) % 4, np.roll(share, -1)
            # A corner that touches another island's.
            touch = (turn == 1) & mask[tuple((pixel + out + along).T)]
            here, then = (np.where(touch, 0.5 - _GAP, values) for values in (share, then))
            reach = np.select([turn == 1, turn == 3], [then, 1 - then], 0.5)
            ends = [pixel + way[:, None] * out + reach[:, None] * along for way in (here, np.where(turn, here, then))]
            points = np.stack(ends, 1).reshape(-1, 2)
        polygons.append(_corners(points)[:, ::-1] - 1)
    return polygons


def _linked(mask):
    """Bool `(4, height, width)`: whether a pixel of the mask and its neighbour at each side are inside one outline."""
    linked = np.stack([mask & np.roll(mask, -side, (0, 1)) for side in _SIDES])
    labels, _ = ndimage.label(~mask, np.ones((3, 3)))
    for hole, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        if hole == labels[0, 0]:
            continue
        # From the hole's last column to the right: what is met there reaches further right, so channels never close.
        row, column = rows.start + np.argmax(labels[rows, columns.stop - 1] == hole), columns.stop
        end = column + np.argmin(mask[row, column:] & mask[row + 1, column:])
        linked[1, row, column:end] = linked[3, row + 1, column:end] = False
    return linked


def _loops(mask, linked):
    """Follows the sides at which pixels end clockwise; yields arrays (side, row, column) of each closed loop."""
    ends = mask & ~linked
    for side, row, column in np.argwhere(ends):
        loop = []
        while ends[side, row, column]:
            ends[side, row, column] = False
            loop.append((side, row, column))
            along = (side + 1) % 4
            if not linked[along, row, column]:
                side = along
                continue
            row, column = row + _SIDES[along, 0], column + _SIDES[along, 1]
            if linked[side, row, column]:
                row, column, side = row + _SIDES[side, 0], column + _SIDES[side, 1], (side - 1) % 4
        if loop:
            yield np.array(loop).T


def _corners(points):
    """The points of a closed polygon without those at the same place or on a straight line."""
    points = points[np.abs(points - np.roll(points, 1, axis=0)).max(axis=1) > 1e-9]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9]


def simplified(polygons: Sequence[np.ndarray], tolerance: float) -> list[np.ndarray]:
    """Polygons with fewer points and nearly the same area; none comes to cross or touch itself or another.

    Args:
        polygons: Simple polygons of one slice that neither cross nor touch each other, arrays `(points, 2)`.
        tolerance: How far from the new outline a dropped point may lie, in the units of the points.

    Returns:
        Polygons of some of the same points, at least three each.
    """
    everything = np.concatenate([*polygons, np.empty((0, 2))])
    kept, start, results = np.ones(len(everything), bool), 0, []
    for polygon in polygons if tolerance > 0 else ():
        count, before, change = len(polygon), None, 0.0
        most = _AREA * abs(_area(polygon))
        limit = most / 256
        chosen = list(range(count))
        while before != len(chosen) or limit < most:  # the least triangles first
            before, index, limit = len(chosen), 0, min(2 * limit, most)
            while index < len(chosen) and len(chosen) > 3:
                last, this, then = chosen[index - 1], chosen[index], chosen[(index + 1) % len(chosen)]
                between = polygon[np.arange(last + 1, then + count * (then <= last)) % count]
                triangle = polygon[[last, this, then]]
                kept[[start + last, start + this, start + then]] = False
                free = (
                    abs(cut := _area(triangle)) <= limit
                    and abs(change + cut) <= most
                    and _distance(between, triangle[0], triangle[2]).max() <= tolerance
                    and not _inside(everything[kept], triangle).any()
                )
                kept[[start + last, start + this, start + then]] = True, not free, True
                index += not free
                if free:
                    change += cut
                    del chosen[index]
        results.append(polygon[chosen])
        start += count
    return results if tolerance > 0 else list(polygons)


def _area(points):
    """The area of a polygon, below 0 if its points run the other way round."""
    (x, y), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    return float(x @ y1 - x1 @ y) / 2


def _distance(points, start, end):
    """Distances of points from the line between two others."""
    line = end - start
    share = np.clip((points - start) @ line / max(line @ line, 1e-30), 0, 1)
    return np.linalg.norm(points - start - share[:, None] * line, axis=1)


def _inside(points, triangle):
    """Which points lie in a triangle or on its edges."""
    edges, away = np.roll(triangle, -1, axis=0) - triangle, points[:, None] - triangle
    signs = edges[:, 0] * away[..., 1] - edges[:, 1] * away[..., 0]
    return (signs >= -1e-12).all(axis=1) | (signs <= 1e-12).all(axis=1)
