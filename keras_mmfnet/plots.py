import numpy as np

# Colours that people with any colour vision tell apart (Okabe and Ito).
TRUTH_COLOUR = "#E69F00"
PREDICTION_COLOUR = "#56B4E9"


def plot_segmentation(images, prediction, truth=None, spacing=(1.0, 1.0, 1.0), depth=None, margin=None):
    """One slice of each modality with the contours of the prediction and of the expert (as the paper's Figure 7).

    The slice is shown as radiologists see it, from below: the patient's right is on the left.

    Args:
        images: `{modality: (depth, height, width)}`, on axes of (superior, posterior, left), as preprocessing makes
            them.
        prediction: Mask of 0 and 1, of the images' shape.
        truth: The expert's mask, of the same shape, or `None`.
        spacing: Voxel size in mm, `(z, y, x)`.
        depth: Number of the slice; `None` for the one with the largest contour.
        margin: Show only the contours' surroundings, up to this many mm from them; `None` for the whole slice.

    Returns:
        A Matplotlib figure, one panel per modality. The title gives the slice and, with a truth, its Dice similarity
        coefficient.

    Raises:
        ValueError: The shapes differ.
    """
    from matplotlib.figure import Figure

    masks = {"expert": (truth, TRUTH_COLOUR), "prediction": (prediction, PREDICTION_COLOUR)}
    masks = {name: (np.asarray(mask) > 0, colour) for name, (mask, colour) in masks.items() if mask is not None}
    shapes = {name: np.shape(array) for name, array in images.items()} | {n: m.shape for n, (m, _) in masks.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"images and masks must have one shape. Received: {shapes}")
    either = np.any([mask for mask, _ in masks.values()], axis=0)
    if depth is None:
        depth = int(np.argmax(np.count_nonzero(either, axis=(1, 2))))
    height, width = either.shape[1:]
    rows, columns = (0, height), (0, width)
    if margin is not None and either[depth].any():
        found = np.nonzero(either[depth])
        reach = [round(margin / size) for size in spacing[1:]]
        (rows, columns) = (
            (max(index.min() - r, 0), min(index.max() + r + 1, size))
            for index, r, size in zip(found, reach, (height, width), strict=True)
        )
    # Edges in mm, so that pixels that are not square are not shown so.
    extent = [-0.5 * spacing[2], (width - 0.5) * spacing[2], (height - 0.5) * spacing[1], -0.5 * spacing[1]]
    x, y = np.arange(width) * spacing[2], np.arange(height) * spacing[1]

    figure = Figure(figsize=(3.4 * len(images), 3.9), layout="constrained", facecolor="black")
    for axes, (name, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        low, high = np.percentile(image[depth, slice(*rows), slice(*columns)], (1, 99.5))
        axes.imshow(image[depth], cmap="gray", vmin=low, vmax=max(high, low + 1e-6), extent=extent)
        for mask, colour in masks.values():
            if mask[depth].any():
                axes.contour(x, y, mask[depth], levels=[0.5], colors=[colour], linewidths=1.6)
        axes.set_xlim((columns[0] - 0.5) * spacing[2], (columns[1] - 0.5) * spacing[2])
        axes.set_ylim((rows[1] - 0.5) * spacing[1], (rows[0] - 0.5) * spacing[1])
        axes.set_title(name, color="white")
        axes.set_axis_off()
        for side, position in (("R", 0.02), ("L", 0.98)):
            box = {"facecolor": "black", "edgecolor": "none", "pad": 1.5}
            axes.text(position, 0.5, side, color="white", transform=axes.transAxes, ha="center", va="center", bbox=box)
    title = f"slice {depth + 1} of {len(either)}"
    if truth is not None:
        both = [np.count_nonzero(mask[depth]) for mask, _ in masks.values()]
        overlap = np.count_nonzero(np.all([mask[depth] for mask, _ in masks.values()], axis=0))
        title += f", DSC {2 * overlap / sum(both) if sum(both) else 1:.3f}"
    figure.suptitle(title, color="white")
    lines = [figure.axes[0].plot([], [], color=colour, label=name)[0] for name, (_, colour) in masks.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, labelcolor="white")
    return figure
