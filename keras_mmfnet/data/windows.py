"""Where the windows of a volume lie, and cutting them out: pure functions over shapes and arrays."""

import itertools

import numpy as np


def window_starts(shape, patch_shape, stride, centre):
    """First voxels of the windows that cover a volume (section IV-A).

    Along an axis with a stride the windows go from end to end of the volume, the last one flush with its end; along an
    axis without one there is one window about the centre, moved into the volume. Where the volume is smaller than the
    patch, one window is centred on it and sticks out.

    Args:
        shape: `(depth, height, width)` of the volume in voxels.
        patch_shape: `(depth, height, width)` of a window in voxels.
        stride: Steps in voxels, `None` for one window.
        centre: `(z, y, x)` in voxels, about which a single window lies.

    Returns:
        A list of `(z, y, x)`; negative where a window sticks out.
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


def gaussian_weights(patch_shape):
    """How much each voxel of a window counts where windows overlap: most in the middle, where the network sees most.

    Args:
        patch_shape: `(depth, height, width)` of a window in voxels.

    Returns:
        Float32 `(depth, height, width)`: a Gaussian about the centre with a standard deviation of an eighth of the
        window (as nnU-Net has it), 1 at the most and 0.001 at least.
    """
    squares = [((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2 for n in patch_shape]
    total = sum(square.reshape([-1 if i == axis else 1 for i in range(3)]) for axis, square in enumerate(squares))
    weights = np.exp(-total / 2).astype(np.float32)
    return np.maximum(weights / weights.max(), np.float32(1e-3))


def cut(volume, start, shape, fill):
    """The part of `volume` of the given shape from the voxel `start` on, with `fill` outside the volume."""
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
