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


def plot_methods(scores, label="DSC"):
    """Compares methods: each one's mean over patients with its 95% interval, beside the paper's number.

    Args:
        scores: `{title: (a number for each patient, the paper's mean or None)}`.
        label: Name of the number.

    Returns:
        A Matplotlib figure, one line per method in the order given.

    Raises:
        ValueError: There is no method, or one without patients.
    """
    from matplotlib.figure import Figure

    empty = [title for title, (values, _) in scores.items() if not len(values)]
    if not scores or empty:
        raise ValueError(f"`scores` must hold methods with patients. Received: {empty or 'no method'}")
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for line, (values, paper) in enumerate(scores.values()):
        values = np.asarray(values, float)
        means = values[rng.integers(len(values), size=(2000, len(values)))].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        axes.plot([low, high], [line, line], color=PREDICTION_COLOUR, linewidth=3, solid_capstyle="butt")
        axes.plot(values.mean(), line, "o", color="#0072B2")
        if paper is not None:
            axes.plot(paper, line, "D", markerfacecolor="none", color=TRUTH_COLOUR)
    axes.plot([], [], "o-", color="#0072B2", label="here: mean over patients, 95% interval")
    axes.plot([], [], "D", markerfacecolor="none", color=TRUTH_COLOUR, label="paper, on its own patients")
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def plot_learning_curves(charts):
    """Validation loss against updates, several curves in each of several panels.

    Args:
        charts: `{title of a panel: {label of a curve: (updates, losses)}}`; the labels have one colour in all panels.

    Returns:
        A Matplotlib figure.

    Raises:
        ValueError: There is no panel.
    """
    from matplotlib.figure import Figure

    if not charts:
        raise ValueError(f"`charts` must hold at least one panel. Received: {charts}")
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    labels = list(dict.fromkeys(label for curves in charts.values() for label in curves))
    figure = Figure(figsize=(4.2 * len(charts), 3.6), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(1, len(charts), squeeze=False, sharey=True)[0], charts.items(), strict=True
    ):
        for label, (updates, losses) in curves.items():
            axes.plot(updates, losses, "o-", markersize=3, color=colours[labels.index(label) % len(colours)])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation Dice loss")
    lines = [figure.axes[0].plot([], [], "o-", color=colours[i % len(colours)])[0] for i in range(len(labels))]
    figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
