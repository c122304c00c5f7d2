"""Slices of a patient with masks, in radiological orientation: seen from below."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from keras_mmfnet.data.body import bounding_box, otsu_threshold
from keras_mmfnet.plots._masks import ERROR_COLOURS, Masks, Outline, expert_and_prediction, structure_colours, union


def plot_segmentation(
    images: Mapping[str, np.ndarray],
    prediction: Masks,
    truth: Masks | None = None,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    depth: int | None = None,
    margin: float | None = None,
) -> Figure:
    """Draws one slice of each modality with the contours of the prediction and the expert (Figure 7 of the paper).

    The patient's right is on the left. Several structures have a colour each, in which the expert's contours are
    dotted.

    Args:
        images: `{modality: (depth, height, width)}`, on axes of (superior, posterior, left).
        prediction: Mask of 0 and 1, of the images' shape, or `{structure: mask}`.
        truth: That of the expert, of the same structures, or `None`.
        spacing_zyx: Voxel size in mm.
        depth: Number of the slice; `None` for the one with the largest contour.
        margin: Crop the slice to this distance in mm from the contours; `None` shows the whole slice.

    Returns:
        A Matplotlib figure, one panel per modality. The title has the slice and, if there is a truth, its Dice
        similarity coefficient by structure.

    Raises:
        ValueError: The shapes or the structures differ.
    """
    masks = expert_and_prediction(truth, prediction)
    either = union(images, masks)
    depth = _largest(either) if depth is None else depth
    view = _view(either[depth], spacing_zyx, margin)

    figure = _dark_figure(3.4 * len(images), 3.9)
    for axes, (name, image) in zip(figure.subplots(1, len(images), squeeze=False)[0], images.items(), strict=True):
        _show(axes, image[depth], view, spacing_zyx)
        _outline(axes, masks, depth, spacing_zyx)
        axes.set_title(name, color="white")
    title = f"slice {depth + 1} of {len(either)}"
    if truth is not None:
        slices = {(one.who, one.structure): one.mask[depth] for one in masks.values()}
        scores = {name: _dice(slices["expert", name], slices["prediction", name]) for name in _structures(masks)}
        title += ", DSC " + ", ".join(f"{name} {score}".strip() for name, score in scores.items())
    figure.suptitle(title, color="white")
    _legend_of_masks(figure, masks)
    return figure


def plot_errors(
    images: Mapping[str, np.ndarray],
    predictions: Mapping[str, np.ndarray],
    truth: np.ndarray,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    depth: int | None = None,
    margin: float | None = None,
) -> Figure:
    """Draws one slice with the correct, false and missed voxels of each method (Figure 9 of the paper).

    The patient's right is on the left.

    Args:
        images: `{modality: (depth, height, width)}`, on axes of (superior, posterior, left).
        predictions: `{method: mask of 0 and 1}`, of the images' shape.
        truth: The expert's mask, of the same shape.
        spacing_zyx: Voxel size in mm.
        depth: Number of the slice; `None` for the one with the expert's largest contour.
        margin: Crop the slice to this distance in mm from the masks; `None` shows the whole slice.

    Returns:
        A Matplotlib figure, a row of panels per modality and a column per method, titled with the Dice similarity
        coefficient of the slice.

    Raises:
        ValueError: The shapes differ, or there is no method.
    """
    if not predictions:
        raise ValueError(f"`predictions` must hold at least one method. Received: {predictions}")
    masks = {name: Outline(np.asarray(mask) > 0) for name, mask in {**predictions, "the expert": truth}.items()}
    either, truth = union(images, masks), masks.pop("the expert").mask
    depth = _largest(truth) if depth is None else depth
    view = _view(either[depth], spacing_zyx, margin)

    figure = _dark_figure(2.6 * len(masks) + 0.2, 2.6 * len(images) + 0.9)
    panels = figure.subplots(len(images), len(masks), squeeze=False)
    for row, (modality, image) in zip(panels, images.items(), strict=True):
        for axes, (method, (mask, *_)) in zip(row, masks.items(), strict=True):
            _show(axes, image[depth], view, spacing_zyx)
            kinds = (mask & truth, mask & ~truth, truth & ~mask)
            for kind, colour in zip(kinds, ERROR_COLOURS.values(), strict=True):
                layer = kind[depth][..., None] * np.array(to_rgba(colour, 0.75))
                axes.imshow(layer, extent=_extent(layer.shape, spacing_zyx), interpolation="nearest")
            if axes in panels[0]:
                axes.set_title(f"{method}\nDSC {_dice(truth[depth], mask[depth])}", color="white", fontsize=10)
        _write(row[0], 0.5, 0.02, modality, ha="center", va="bottom")
    figure.suptitle(f"slice {depth + 1} of {len(either)}", color="white", fontsize=10)
    _legend(figure, ERROR_COLOURS, filled=True)
    return figure


def plot_montage(
    image: np.ndarray,
    prediction: Masks,
    truth: Masks | None = None,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    margin: float | None = None,
) -> Figure:
    """Draws all slices of a patient with the contours of the prediction and the expert.

    The patient's right is on the left; the lowest slice comes first.

    Args:
        image: Image `(depth, height, width)`, on axes of (superior, posterior, left).
        prediction: Mask of 0 and 1, of the image's shape, or `{structure: mask}`; see `plot_segmentation`.
        truth: That of the expert, of the same structures, or `None`.
        spacing_zyx: Voxel size in mm.
        margin: Crop the slices to this distance in mm from the contours; `None` shows whole slices.

    Returns:
        A Matplotlib figure, one panel per slice, with the slice's number.

    Raises:
        ValueError: The shapes differ.
    """
    masks = expert_and_prediction(truth, prediction)
    either = union({"image": image}, masks)
    view = _view(either.any(axis=0), spacing_zyx, margin)
    columns = math.ceil(math.sqrt(1.4 * len(either)))
    rows = math.ceil(len(either) / columns)

    figure = _dark_figure(1.7 * columns, 1.7 * rows + 0.4)
    figure.get_layout_engine().set(wspace=0, hspace=0)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    limits = _grey_limits(image[:, view[0], view[1]])
    for depth, axes in enumerate(panels[: len(either)]):
        _show(axes, image[depth], view, spacing_zyx, limits)
        _outline(axes, masks, depth, spacing_zyx)
        _write(axes, 0.02, 0.98, depth + 1, ha="left", va="top")
    for axes in panels[len(either) :]:
        axes.remove()
    _legend_of_masks(figure, masks)
    return figure


def plot_heat(
    images: Mapping[str, np.ndarray],
    maps: Mapping[str, np.ndarray],
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    depth: int | None = None,
    title: str | None = None,
    truth: np.ndarray | None = None,
    prediction: np.ndarray | None = None,
) -> Figure:
    """Draws one slice of each modality, cropped to the body, with a heat map over it.

    The patient's right is on the left.

    Args:
        images: `{modality: (depth, height, width)}`, on axes of (superior, posterior, left).
        maps: `{modality: map of the images' shape}`.
        spacing_zyx: Voxel size in mm.
        depth: Number of the slice; `None` for the one with the largest sum of the maps.
        title: Title of the figure, or `None`.
        truth: The expert's mask or `None`. Its contour is drawn.
        prediction: The predicted mask or `None`. Its contour is drawn.

    Returns:
        A Matplotlib figure, one panel per modality with a common colour scale.

    Raises:
        ValueError: The shapes differ.
    """
    masks = expert_and_prediction(truth, prediction)
    union({**images, **{f"map of {name}": heat for name, heat in maps.items()}}, masks)
    total = sum(np.asarray(heat, np.float64) for heat in maps.values())
    depth = int(np.argmax(total.sum(axis=(1, 2)))) if depth is None else depth
    low, high = (function([function(heat) for heat in maps.values()]) for function in (np.min, np.max))
    view = _body_view(images)
    figure = _dark_figure(3.4 * len(images) + 0.6, 4.2)
    panels = figure.subplots(1, len(images), squeeze=False)[0]
    for axes, (name, image) in zip(panels, images.items(), strict=True):
        _show(axes, image[depth], view, spacing_zyx)
        heat = maps[name][depth]
        # Transparent at low values, so that the anatomy is visible.
        alpha = 0.7 * (heat - low) / max(high - low, 1e-9)
        extent = _extent(heat.shape, spacing_zyx)
        shown = axes.imshow(heat, cmap="viridis", alpha=alpha, vmin=low, vmax=high, extent=extent)
        _outline(axes, masks, depth, spacing_zyx)
        axes.set_title(name, color="white")
    figure.colorbar(shown, ax=list(panels), shrink=0.7).ax.tick_params(colors="white")
    where = f"slice {depth + 1} of {len(total)}"
    figure.suptitle(f"{title}\n{where}" if title else where, color="white", fontsize=11)
    drawn = {name: one for name, one in masks.items() if one.mask[depth].any()}
    if drawn:
        _legend_of_masks(figure, drawn)
    return figure


def slice_strips(
    images: Mapping[str, np.ndarray],
    prediction: Masks,
    truth: Masks,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
    side: int = 160,
    margin: float = 30.0,
    most: int = 64,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Concatenates the slices around a tumour to one image, with an overlay, for a web page with a slider.

    The patient's right is on the left; the lowest slice comes first.

    Args:
        images: `{modality: (depth, height, width)}`, on axes of (superior, posterior, left).
        prediction: Mask of 0 and 1, of the images' shape, or `{structure: mask}`; see `plot_segmentation`.
        truth: That of the expert, of the same structures.
        spacing_zyx: Voxel size in mm.
        side: Largest height and width of a slice of one modality in pixels.
        margin: Margin around the masks in plane in mm; along z it is two slices.
        most: Largest number of slices; if there are more, only every second, third, ... is shown, among them the one
            with the largest masks.

    Returns:
        `(strip, marks, numbers)`: the images, uint8 `(slices * height, modalities * width, 3)`; the contours of all
        masks and, translucent and of one structure only, the false positives and false negatives, uint8 RGBA
        `(slices * 2 * height, 2 * width, 4)`; and the slice numbers, from 0.

    Raises:
        ValueError: The shapes or the structures differ.
    """
    from scipy import ndimage

    masks = expert_and_prediction(truth, prediction)
    either = union(images, masks)
    view = _view(either.any(axis=0), spacing_zyx, margin)
    held = np.flatnonzero(either.any(axis=(1, 2))) if either.any() else np.arange(len(either))
    numbers = np.arange(max(held[0] - 2, 0), min(held[-1] + 3, len(either)))
    step = math.ceil(len(numbers) / most)
    numbers = numbers[_largest(either[numbers]) % step :: step]
    part = (numbers, *view)
    size = np.array([(index.stop - index.start) * step for index, step in zip(view, spacing_zyx[1:], strict=True)])
    # Pixels are not smaller than those of the images.
    pixel = max(max(size) / side, min(spacing_zyx[1:]))

    def scaled(volume, times):
        shape = np.maximum(np.round(size / pixel), 1) * times
        zoom = (1, *(shape / volume.shape[1:]))
        return ndimage.zoom(np.asarray(volume, np.float32), zoom, order=1, mode="nearest", grid_mode=True)

    strips = []
    for image in images.values():
        low, high = _grey_limits(image[part])
        grey = scaled(np.clip((image[part] - low) / (high - low), 0, 1), 1)
        strips.append(np.round(255 * grey).astype(np.uint8).reshape(-1, grey.shape[2]))
    inside = [scaled(one.mask[part], 2) >= 0.5 for one in masks.values()]
    marks = np.zeros((*inside[0].shape, 4))
    shown = []
    if len(inside) == 2:
        (expert, predicted), (_, false, missed) = inside, ERROR_COLOURS.values()
        shown = [(predicted & ~expert, false, 0.45), (expert & ~predicted, missed, 0.45)]
    dots = np.add.outer(*(np.arange(size) // 3 for size in marks.shape[1:3])) % 2 == 0
    for mask, one in zip(inside, masks.values(), strict=True):
        line = mask & ~ndimage.binary_erosion(mask, np.ones((1, 3, 3)), iterations=2 + one.rank)
        shown.append((line & dots if one.style == "dotted" else line, one.colour, 1))
    for where, colour, alpha in shown:
        marks[where] = to_rgba(colour, alpha)
    marks = np.round(255 * marks).astype(np.uint8).reshape(-1, marks.shape[2], 4)
    strip = np.repeat(np.concatenate(strips, axis=1)[..., None], 3, axis=-1)
    return strip, marks, numbers.tolist()


def _body_view(images):
    """The rows and columns of the body as two slices: the voxels of any image above its Otsu threshold."""
    whole = [(0, size) for size in np.shape(next(iter(images.values())))[1:]]
    # The image of a missing modality is constant.
    found = [bounding_box(image > otsu_threshold(image))[1:] for image in images.values() if np.ptp(image)]
    boxes = np.array(found or [whole])
    return tuple(slice(*pair) for pair in zip(boxes[..., 0].min(axis=0), boxes[..., 1].max(axis=0), strict=True))


def _largest(mask):
    """Number of the slice with the most voxels of a mask."""
    return int(np.argmax(np.count_nonzero(mask, axis=(1, 2))))


def _dice(truth, mask):
    """The DSC of a slice as text; `-` without tumour."""
    size = np.count_nonzero(truth) + np.count_nonzero(mask)
    return f"{2 * np.count_nonzero(truth & mask) / size:.3f}" if truth.any() else "-"


def _view(mask, spacing_zyx, margin):
    """The rows and columns to show as two slices: all, or those up to `margin` mm from the mask."""
    if margin is None or not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    reach = [round(margin / size) for size in spacing_zyx[1:]]
    return tuple(
        slice(max(index.min() - r, 0), min(index.max() + r + 1, size))
        for index, r, size in zip(np.nonzero(mask), reach, mask.shape, strict=True)
    )


def _extent(shape, spacing_zyx):
    """Edges of a slice in mm, for the right aspect ratio of anisotropic pixels."""
    (height, width), (_, y, x) = shape[:2], spacing_zyx
    return [-0.5 * x, (width - 0.5) * x, (height - 0.5) * y, -0.5 * y]


def _grey_limits(values):
    low, high = np.percentile(values, (1, 99.5))
    return low, max(high, low + 1e-6)


def _dark_figure(width, height):
    return Figure(figsize=(width, height), layout="constrained", facecolor="black")


def _show(axes, image, view, spacing_zyx, limits=None):
    """Shows a slice in grey and marks the patient's sides."""
    low, high = limits or _grey_limits(image[view])
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, extent=_extent(image.shape, spacing_zyx))
    rows, columns = view
    axes.set_xlim((columns.start - 0.5) * spacing_zyx[2], (columns.stop - 0.5) * spacing_zyx[2])
    axes.set_ylim((rows.stop - 0.5) * spacing_zyx[1], (rows.start - 0.5) * spacing_zyx[1])
    axes.set_axis_off()
    _write(axes, 0.02, 0.5, "R", ha="left", va="center")
    _write(axes, 0.98, 0.5, "L", ha="right", va="center")


def _write(axes, x, y, text, **alignment):
    """Writes a short text on a panel."""
    box = {"facecolor": "black", "edgecolor": "none", "pad": 1.0, "alpha": 0.7}
    axes.text(x, y, text, color="white", fontsize=8, bbox=box, transform=axes.transAxes, **alignment)


def _outline(axes, masks, depth, spacing_zyx):
    """Draws the contours of the masks on a slice."""
    for mask, colour, style, rank, *_ in masks.values():
        if mask[depth].any():
            x, y = (np.arange(size) * step for size, step in zip(mask.shape[:0:-1], spacing_zyx[:0:-1], strict=True))
            line = {"colors": [colour], "linewidths": 1.6 + 0.8 * rank, "linestyles": [style]}
            axes.contour(x, y, mask[depth], levels=[0.5], **line)


def _structures(masks):
    """The names of the structures of masks, as from `expert_and_prediction`; `""` of one."""
    return list(dict.fromkeys(one.structure for one in masks.values()))


def _legend_of_masks(figure, masks):
    """Adds a legend of contours: a colour for the expert and for the prediction, or for each of several structures."""
    names = _structures(masks)
    if len(names) == 1:
        return _legend(figure, {name: one.colour for name, one in masks.items()})
    styles = {one.who: one.style for one in masks.values()}
    return _legend(figure, structure_colours(names), styles=styles)


def _legend(figure, colours, filled=False, styles=()):
    """Adds a legend below all panels, of colours and of styles of lines."""
    kind = Patch if filled else functools.partial(Line2D, [], [])
    handles = [kind(color=colour, label=name) for name, colour in colours.items()]
    handles += [Line2D([], [], color="white", label=name, linestyle=styles[name]) for name in styles]
    style = {"frameon": False, "labelcolor": "white", "fontsize": 9}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **style)
