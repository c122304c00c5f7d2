"""The positions of the windows of a volume, and cropping them. Pure functions over shapes and arrays."""

import itertools
from collections.abc import Sequence

import numpy as np


def window_starts(
    shape: Sequence[int],
    patch_shape: Sequence[int],
    stride: Sequence[int | None],
    centre: Sequence[float],
) -> list[tuple[int, int, int]]:
    """The first voxel of each window of a volume (section IV-A).

    Along an axis with a stride, the windows cover the whole volume and the last one ends at its edge. Along an axis
    without a stride, there is one window at the centre, shifted if necessary to lie inside the volume. If the volume is
    smaller than the patch, one window is centred on it and extends beyond both edges.

    Args:
        shape: `(depth, height, width)` of the volume in voxels.
        patch_shape: `(depth, height, width)` of a window in voxels.
        stride: Steps in voxels; `None` for a single window.
        centre: `(z, y, x)` in voxels, the centre of a single window.

    Returns:
        A list of `(z, y, x)` in voxels, negative for a window that extends beyond the volume.
    """
    axes = []
    for size, patch, step, middle in zip(shape, patch_shape, stride, centre, strict=True):
        last = size - patch
        if last <= 0:
            axes.append([last // 2])
        elif step is None:
            axes.append([min(max(round(middle - patch / 2), 0), last)])
        else:
            axes.append([*range(0, last, step), last])
    return list(itertools.product(*axes))


def window_box(
    shape: Sequence[int],
    patch_shape: Sequence[int],
    stride: Sequence[int | None],
    centre: Sequence[float],
) -> tuple[slice, slice, slice]:
    """The voxels of a volume that lie in its windows; the arguments are those of `window_starts`."""
    starts = np.array(window_starts(shape, patch_shape, stride, centre))
    low, high = np.maximum(starts.min(axis=0), 0), np.minimum(starts.max(axis=0) + patch_shape, shape)
    return tuple(slice(int(first), int(last)) for first, last in zip(low, high, strict=True))


def gaussian_weights(patch_shape: Sequence[int]) -> np.ndarray:
    """Gaussian weights of the voxels of a window, for the average of overlapping windows.

    Args:
        patch_shape: `(depth, height, width)` of a window in voxels.

    Returns:
        Float32 `(depth, height, width)` in [0.001, 1]. The standard deviation is an eighth of the window, as in
        nnU-Net.
    """
    squares = [((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2 for n in patch_shape]
    total = sum(square.reshape([-1 if i == axis else 1 for i in range(3)]) for axis, square in enumerate(squares))
    weights = np.exp(-total / 2).astype(np.float32)
    return np.maximum(weights / weights.max(), np.float32(1e-3))


def crop(volume: np.ndarray, start: Sequence[int], shape: Sequence[int], fill: float) -> np.ndarray:
    """Crops a window from a volume, and pads the part that lies outside the volume.

    Args:
        volume: Array.
        start: First voxel of the window; may be negative.
        shape: Shape of the window in voxels.
        fill: Value outside the volume.

    Returns:
        The window; a view if it lies inside the volume.
    """
    inside, target = [], []
    for first, length, size in zip(start, shape, volume.shape, strict=True):
        low, high = min(max(first, 0), size), max(min(first + length, size), 0)
        inside.append(slice(low, high))
        target.append(slice(low - first, max(high, low) - first))
    if all(s.stop - s.start == n for s, n in zip(inside, shape, strict=True)):
        return volume[tuple(inside)]
    patch = np.full(shape, fill, volume.dtype)
    patch[tuple(target)] = volume[tuple(inside)]
    return patch
