"""Surfaces of masks in 3D."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection

from keras_mmfnet.plots._masks import expert_and_prediction, union

# The corners of a voxel's upper face along z, y and x, in half voxels from its centre, counterclockwise as seen from
# outside.
_FACES = (
    ((1, -1, -1), (1, -1, 1), (1, 1, 1), (1, 1, -1)),
    ((-1, 1, 1), (-1, 1, -1), (1, 1, -1), (1, 1, 1)),
    ((-1, -1, 1), (-1, 1, 1), (1, 1, 1), (1, -1, 1)),
)


def plot_surfaces(
    prediction: np.ndarray, truth: np.ndarray | None = None, spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0)
) -> Figure:
    """Draws the surfaces of the expert's mask and the prediction in 3D (Figure 8 of the paper).

    The view is from the front: the patient's right is on the left. A surface consists of the faces of the voxels,
    without smoothing.

    Args:
        prediction: Mask of 0 and 1, `(depth, height, width)`, on axes of (superior, posterior, left).
        truth: The expert's mask, of the same shape, or `None`.
        spacing_zyx: Voxel size in mm.

    Returns:
        A Matplotlib figure, one panel per mask with common axes in mm.

    Raises:
        ValueError: The shapes differ, or all masks are empty.
    """
    masks = expert_and_prediction(truth, prediction)
    found = np.argwhere(union({}, masks))
    if not len(found):
        raise ValueError(f"at least one mask must not be empty. Received: {', '.join(masks)} of zeros")
    low, high = (found.min(axis=0) - 0.5) * spacing_zyx, (found.max(axis=0) + 0.5) * spacing_zyx

    figure = Figure(figsize=(4.2 * len(masks), 4.0), layout="constrained")
    for number, (name, (mask, colour, *_)) in enumerate(masks.items(), start=1):
        axes = figure.add_subplot(1, len(masks), number, projection="3d")
        faces = voxel_faces(mask, spacing_zyx)
        if len(faces):
            # Matplotlib's axes are x, y and z.
            axes.add_collection3d(Poly3DCollection(faces[..., ::-1], facecolors=colour, shade=True))
        axes.set(zlim=(low[0], high[0]), ylim=(low[1], high[1]), xlim=(low[2], high[2]))
        axes.set_box_aspect((high - low)[::-1], zoom=0.8)
        axes.view_init(elev=20, azim=-70)
        axes.set_title(name)
        axes.set_xlabel("right to left, mm", fontsize=8)
        axes.set_ylabel("front to back, mm", fontsize=8)
        axes.set_zlabel("up, mm", fontsize=8)
        axes.tick_params(labelsize=7)
    return figure


def voxel_faces(mask: np.ndarray, spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Finds the faces between a mask and its background, which includes everything outside the volume.

    Args:
        mask: Mask of 0 and 1, `(depth, height, width)`.
        spacing_zyx: Voxel size in mm.

    Returns:
        Corners `(faces, 4, 3)` in mm, `(z, y, x)` relative to the first voxel's centre, counterclockwise as seen from
        outside the mask.
    """
    padded = np.pad(np.asarray(mask) > 0, 1)
    faces = []
    for axis, corners in enumerate(np.array(_FACES)):
        for step in (1, -1):
            ends = np.argwhere(padded & ~np.roll(padded, -step, axis)) - 1
            outward = corners.copy()
            if step < 0:
                # The opposite face has the reverse order of corners.
                outward[:, axis] = -1
                outward = outward[::-1]
            faces.append(ends[:, None] + 0.5 * outward)
    return np.concatenate(faces) * spacing_zyx
