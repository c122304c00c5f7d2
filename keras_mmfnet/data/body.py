"""The body in an image, and the normalisation of its intensities (section IV-A)."""

from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

_BINS = 1024
_CLOSING_MM = 3.0


def _slice_histograms(volume):
    """Histograms `(depth, bins)` over the range of the volume, the lowest value, and the width of a bin."""
    low, high = float(volume.min()), float(volume.max())
    width = (high - low) / _BINS
    bins = np.minimum((volume - np.float32(low)) * np.float32(1 / width), _BINS - 1).astype(np.uint16)
    return np.stack([np.bincount(plane.ravel(), minlength=_BINS) for plane in bins]), low, width


def _otsu_levels(counts):
    """The number of bins below Otsu's threshold, for each histogram along the last axis.

    The threshold maximises the variance between the two classes; it is the middle of consecutive bins that tie.
    """
    counts = counts.astype(np.float64)
    below = np.cumsum(counts, axis=-1)
    moment = np.cumsum(counts * np.arange(counts.shape[-1]), axis=-1)
    total, total_moment = below[..., -1:], moment[..., -1:]
    spread = below * (total - below)
    between = (total_moment * below - total * moment) ** 2 / np.where(spread > 0, spread, np.inf)
    first = between.argmax(axis=-1)
    last = counts.shape[-1] - 1 - between[..., ::-1].argmax(axis=-1)
    return (first + last) / 2 + 1


def otsu_threshold(volume: np.ndarray) -> float:
    """Otsu's threshold of a whole volume, from a histogram of 1024 bins."""
    counts, low, width = _slice_histograms(volume)
    return low + width * float(_otsu_levels(counts.sum(axis=0)))


def body_mask(volume: np.ndarray, pixel: float | Sequence[float] = 1.0) -> np.ndarray:
    """The voxels inside the body: each slice above half its Otsu threshold, closed and with its holes filled.

    Args:
        volume: Raw intensities `(depth, height, width)`, not constant.
        pixel: Size of a pixel in mm, `(height, width)` or one number; the radius of the closing is 3 mm.

    Returns:
        A bool array of the same shape.
    """
    counts, low, width = _slice_histograms(volume)
    # In a slice of air the Otsu threshold lies within the noise, so half the volume's is the lower bound.
    levels = np.maximum(_otsu_levels(counts), _otsu_levels(counts.sum(axis=0)) / 2) / 2
    inside = volume > (low + width * levels).astype(volume.dtype)[:, None, None]
    reach = [max(1, round(_CLOSING_MM / size)) for size in np.broadcast_to(pixel, 2)]
    body = sitk.GetImageFromArray(_closed(inside, reach).view(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(body, foregroundValue=1)).view(bool)


def _closed(mask, reach):
    """Closes a mask in plane by a box that extends `reach` pixels `(y, x)` to each side."""
    mask = np.pad(mask, [(0, 0), *((2 * count, 2 * count) for count in reach)])
    for combine in (np.logical_or, np.logical_and):
        for axis, count in enumerate(reach, start=1):
            mask = _in_a_row(mask.swapaxes(0, axis), combine, 2 * count + 1).swapaxes(0, axis)
    return np.ascontiguousarray(mask)


def _in_a_row(values, combine, length):
    """Combines each `length` consecutive values along the first axis; each pass doubles their number."""
    done = 1
    while done < length:
        step = min(done, length - done)
        values = combine(values[:-step], values[step:])
        done += step
    return values


def bounding_box(mask: np.ndarray, share: float = 0.01) -> tuple[tuple[int, int], ...]:
    """The bounding box of a mask `(depth, height, width)`: `(low, high)` per axis, `high` excluded.

    A slice, row or column belongs to the box if it has more than `share` times the voxels of the fullest one, so that
    isolated voxels outside the body are ignored.
    """
    box = []
    for axis in range(3):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
        held = np.flatnonzero(counts > share * counts.max())
        box.append((int(held[0]), int(held[-1]) + 1))
    return tuple(box)


def z_score(volume: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Subtracts the mean inside the body and divides by the population standard deviation there.

    Args:
        volume: Float array.
        body: Bool array of the same shape.

    Returns:
        An array of the volume's shape and dtype.

    Raises:
        ValueError: All values inside the body are equal or too large, or the body is empty.
    """
    values = volume[body]
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = (values.mean(), values.std()) if values.size else (0, 0)
    if not std > 1e-6 * abs(mean):
        raise ValueError(f"the values inside the body must vary. Received: {values.size} voxels, all of {mean:g}")
    if not np.isfinite(std):
        raise ValueError(f"the values inside the body must be below 1e18. Received: {np.abs(values).max():g}")
    scored = volume - mean
    scored *= 1 / std
    return scored
