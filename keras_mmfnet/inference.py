import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.labels import join_masks, split_labels
from keras_mmfnet.data.windows import crop, gaussian_weights, window_box, window_starts
from keras_mmfnet.postprocess import PostProcessing
from keras_mmfnet.recipe import DataRecipe, PatchRecipe, Recipe

# A Keras model or any other callable from `{modality: (batch, depth, height, width, 1)}` to probabilities
# `(batch, depth, height, width, structures)`.
Predictor = Callable[[dict[str, np.ndarray]], Any]


def predict_volume(
    predict: Predictor,
    images: Mapping[str, np.ndarray],
    patch_shape: Sequence[int],
    stride: Sequence[int | None] = (4, None, None),
    centre: Sequence[float] | None = None,
    batch_size: int = 2,
    weights: np.ndarray | None = None,
    flip_axes: Sequence[int] = (),
) -> np.ndarray:
    """Predicts the probabilities of a volume, averaged over overlapping windows (section IV-A).

    Args:
        predict: A Keras model or any other callable that takes `{modality: float32 (batch, depth, height, width, 1)}`
            and returns probabilities `(batch, depth, height, width, structures)`.
        images: `{modality: (depth, height, width)}`, preprocessed and of the same shape.
        patch_shape: `(depth, height, width)` of a window in voxels.
        stride: Steps between windows in voxels along each axis; `None` for one window at the centre.
        centre: `(z, y, x)` in voxels; `None` for the centre of the volume.
        batch_size: Windows per batch. The last batch is padded to this size, so that a model is compiled once.
        weights: Weights of the voxels of a window in the average, such as `gaussian_weights(patch_shape)`; `None` for
            equal weights.
        flip_axes: Axes of `(z, y, x)`, 0 to 2. The predictions of each window and of its copies that are flipped along
            some of them are averaged.

    Returns:
        Float32 probabilities `(depth, height, width, structures)`; 0 outside all windows.

    Raises:
        ValueError: The images have different shapes.
    """
    shapes = {name: image.shape for name, image in images.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"`images` must have the same shape. Received: {shapes}")
    shape = next(iter(shapes.values()))
    centre = centre if centre is not None else [n / 2 for n in shape]
    call = getattr(predict, "predict_on_batch", predict)
    for axis in flip_axes:
        call = _with_flip(call, axis + 1)
    weights = np.ones(patch_shape, np.float32) if weights is None else weights

    starts = window_starts(shape, patch_shape, stride, centre)
    fill = {name: image.min() for name, image in images.items()}
    total, count = None, np.zeros((*shape, 1), np.float32)
    weights = weights[..., None]
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        filled = chosen + chosen[-1:] * (batch_size - len(chosen))
        batch = {
            name: np.stack([crop(image, start, patch_shape, fill[name]) for start in filled])[..., None]
            for name, image in images.items()
        }
        probabilities = np.asarray(call(batch))
        if total is None:
            total = np.zeros((*shape, probabilities.shape[-1]), np.float32)
        for start, probability in zip(chosen, probabilities, strict=False):
            # The part of the window that lies inside the volume.
            low = np.maximum(start, 0)
            high = np.minimum(np.add(start, patch_shape), shape)
            there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
            total[there] += (probability * weights)[inside]
            count[there] += weights[inside]
    if not np.isfinite(total).all():
        raise ValueError(
            "the network must give finite probabilities. Received: NaN or infinity, as of extreme values in float16"
        )
    return total / np.where(count > 0, count, 1)


def _with_flip(call, axis):
    """Averages the predictions of a batch and of the flipped batch."""

    def both(batch):
        # Contiguous arrays: not every backend takes views with negative strides.
        flipped = {name: np.ascontiguousarray(np.flip(image, axis)) for name, image in batch.items()}
        return (np.asarray(call(batch)) + np.flip(np.asarray(call(flipped)), axis)) / 2

    return both


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """The structures of one patient by name, as `SimpleITK.Image`s on the patient's own grid.

    Args:
        masks: Uint8 of 0 and 1.
        probabilities: Float32.
        disagreements: The standard deviation of the networks' probabilities, float32; 0 of one network.
        label_image: All masks as one image: 1 of one structure, of several the recipe's label values, see
            `labels.join_masks`; `None` if each structure has a file of its own.
        notes: On what may lie outside the windows of the recipe, see `window_notes`.

    One structure is unpacked by `mask, probability, disagreement = segment_case(...)`; of several this is a
    `ValueError`.
    """

    masks: Mapping[str, sitk.Image]
    probabilities: Mapping[str, sitk.Image]
    disagreements: Mapping[str, sitk.Image]
    label_image: sitk.Image | None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[sitk.Image]:
        if len(self.masks) > 1:
            raise ValueError(f"one structure can be unpacked. Received: {', '.join(self.masks)}")
        for images in (self.masks, self.probabilities, self.disagreements):
            yield from images.values()


def segment_case(
    predict: Predictor,
    case: PreprocessedCase,
    recipe: Recipe,
    postprocess: PostProcessing | None = None,
    mirror: bool = False,
    gaussian: bool = False,
) -> Segmentation:
    """Segments a preprocessed patient, on the grid of the reference modality's image.

    Args:
        predict: A Keras model, or a callable as for `predict_volume`.
        case: A `PreprocessedCase`.
        recipe: The `Recipe` of the training.
        postprocess: How masks are made of the probabilities; `None` for the default of `PostProcessing`.
        mirror: Average the predictions of each window and of its copies flipped along the recipe's `flip_axes`.
        gaussian: Weight the centre of each window more than its edges.

    Returns:
        The `Segmentation`.

    Raises:
        ValueError: `mirror` is set but the recipe has no `flip_axes`.
    """
    return segment_ensemble([predict], case, recipe, postprocess, mirror, gaussian)


def segment_ensemble(
    predicts: Iterable[Predictor],
    case: PreprocessedCase,
    recipe: Recipe,
    postprocess: PostProcessing | None = None,
    mirror: bool = False,
    gaussian: bool = False,
) -> Segmentation:
    """Segments a preprocessed patient with the mean of several networks, such as those of a run's folds.

    Args:
        predicts: Keras models or callables as for `predict_volume`, at least one.
        case: A `PreprocessedCase`.
        recipe: The `Recipe` of the training.
        postprocess: How masks are made of the probabilities; `None` for the default of `PostProcessing`.
        mirror: Average the predictions of each window and of its copies flipped along the recipe's `flip_axes`.
        gaussian: Weight the centre of each window more than its edges.

    Returns:
        The `Segmentation`.

    Raises:
        ValueError: There is no network, or `mirror` is set but the recipe has no `flip_axes`.
    """
    predicts = list(predicts)
    if not predicts:
        raise ValueError("`predicts` must hold at least one network. Received: []")
    if mirror and not recipe.patches.flip_axes:
        raise ValueError("`mirror` needs a network that was trained on flipped patches. Received: flip_axes=()")
    images = case.images_of(recipe.data.modalities)
    options = {
        "weights": gaussian_weights(recipe.patches.shape) if gaussian else None,
        "flip_axes": recipe.patches.flip_axes if mirror else (),
    }
    # Running sums: the volumes of all networks may not fit in memory.
    total, squares = 0.0, 0.0
    for predict in predicts:
        volume = predict_volume(predict, images, recipe.patches.shape, recipe.patches.stride, case.centre, **options)
        total, squares = total + volume, squares + volume.astype(np.float64) ** 2
    average = total / len(predicts)

    def to_source(volume):
        channels = zip(recipe.data.structures, np.moveaxis(volume, -1, 0), strict=True)
        return {name: case.to_source(channel) for name, channel in channels}

    probabilities, image = to_source(average), case.source.image
    if len(predicts) > 1:
        spread = np.sqrt(np.maximum(squares / len(predicts) - average.astype(np.float64) ** 2, 0))
        disagreements = to_source(spread)
    else:
        disagreements = {name: image(np.zeros(case.source.shape, np.float32)) for name in probabilities}
    arrays = {name: sitk.GetArrayViewFromImage(one) for name, one in probabilities.items()}
    masks, labels = masks_of(arrays, recipe.data, postprocess, case.source.spacing[::-1])
    return Segmentation(
        {name: image(mask.astype(np.uint8)) for name, mask in masks.items()},
        probabilities,
        disagreements,
        None if labels is None else image(labels),
        window_notes(case, recipe.patches, average.max(axis=-1) > 0.5),
    )


def window_notes(case: PreprocessedCase, patches: PatchRecipe, found: np.ndarray) -> tuple[str, ...]:
    """Notes on a patient of whom a part of the tumour may lie outside the windows, where nothing is looked for.

    Args:
        case: A `PreprocessedCase`.
        patches: The `PatchRecipe` of the network.
        found: The voxels of any structure, bool, on the case's grid.

    Returns:
        A note if nothing was found and more than a twentieth of the body lies outside; or one if what was found
        reaches an edge of the windows within the body.
    """
    box = window_box(case.shape, patches.shape, patches.stride, case.centre)
    image = next(iter(case.images.values()))
    body = image > image.mean()
    inside, whole = np.count_nonzero(body[box]), np.count_nonzero(body)
    advice = "a network of larger `patches.shape`, or with a `patches.stride` in plane, sees more"
    if not found.any():
        return (f"the windows cover {inside / whole:.0%} of the body; {advice}",) if inside < 0.95 * whole else ()
    for axis, (side, size) in enumerate(zip(box, case.shape, strict=True)):
        for edge, beyond in ((side.start, side.start - 1), (side.stop - 1, side.stop)):
            on_edge = found.take(edge, axis)
            if on_edge.any() and 0 <= beyond < size and (on_edge & body.take(beyond, axis)).any():
                return (f"what was found reaches the edge of the windows and may go on beyond; {advice}",)
    return ()


def mask_file(stem: str, structure: str | None) -> str:
    """The name of the file of a structure's mask, or of all masks together under `None`."""
    return f"{stem}_{structure}.nii.gz" if structure else f"{stem}.nii.gz"


def segmentation_endings(recipe: DataRecipe) -> dict[tuple[str, str | None], str]:
    """What the names of the images of a segmented patient end with, after the patient's name.

    Args:
        recipe: The `DataRecipe` of the networks.

    Returns:
        By what they hold, `"probability"`, `"disagreement"` or, last, `"mask"`, and the structure, or `None` for all.
    """
    maps = recipe.structure_names if len(recipe.structures) > 1 else (None,)
    names = {"probability": maps, "disagreement": maps, "mask": recipe.mask_files}
    return {
        (what, one): mask_file("" if what == "mask" else f"_{what}", one)
        for what, structures in names.items()
        for one in structures
    }


def read_segmentation(
    files: Mapping[str | None, str | os.PathLike], structures: Mapping[str, Any]
) -> dict[str, sitk.Image]:
    """Reads the masks of a patient that were written as one label image, or as a file for each structure.

    Args:
        files: The files by structure, or one under `None`.
        structures: `DataRecipe.structures`.

    Returns:
        `{structure: uint8 {0, 1}}`.

    Raises:
        CaseError: A file is missing, truncated or damaged.
    """
    images = {one: read_image(Path(path), Path(path).name) for one, path in files.items()}
    if None not in images:
        return images
    image, labels = Grid.from_image(images[None]).image, sitk.GetArrayFromImage(images[None])
    return {one: image(mask.astype(np.uint8)) for one, mask in split_labels(labels, structures).items()}


def masks_of(
    probabilities: Mapping[str, np.ndarray],
    recipe: DataRecipe,
    postprocess: PostProcessing | None = None,
    spacing_zyx: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The masks of the structures, from their probabilities.

    Regions given by label values are made to fit together as the labels do; see `labels.join_masks`.

    Args:
        probabilities: `{structure: array}` in [0, 1], of the same shape `(depth, height, width)`.
        recipe: The `DataRecipe`.
        postprocess: How masks are made of the probabilities; `None` for the default of `PostProcessing`.
        spacing_zyx: Size of a voxel in mm.

    Returns:
        `{structure: bool array}`, and their label image or `None`.

    Raises:
        ValueError: `postprocess` has rules of other structures, or in another order.
    """
    postprocess = postprocess or PostProcessing.default(recipe.structure_names, recipe.exclusive)
    wanted, received = (f"{', '.join(one.structures)}, exclusive={one.exclusive}" for one in (recipe, postprocess))
    if received != wanted:
        raise ValueError(f"`postprocess` must have rules of {wanted}. Received: {received}")
    found = postprocess.apply(np.stack([probabilities[name] for name in recipe.structures], axis=-1), spacing_zyx)
    masks = {name: found[..., number] for number, name in enumerate(recipe.structures)}
    labels = join_masks(masks, recipe.structures)
    return (masks if labels is None else split_labels(labels, recipe.structures)), labels
