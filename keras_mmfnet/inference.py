import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.windows import cut, gaussian_weights, window_starts


def predict_volume(
    predict, images, patch_shape, stride=(4, None, None), centre=None, batch_size=2, weights=None, mirror_axis=None
):
    """Probabilities of a whole volume from overlapping windows, their average where several overlap (section IV-A).

    Args:
        predict: A Keras model, or any callable, that takes `{modality: float32 (batch, depth, height, width, 1)}`
            and returns probabilities of the same shape.
        images: `{modality: (depth, height, width)}`, preprocessed, all of the same shape.
        patch_shape: `(depth, height, width)` of a window in voxels.
        stride: Steps between windows in voxels, `None` for one window about the centre.
        centre: `(z, y, x)` in voxels; `None` for the volume's middle.
        batch_size: Windows predicted together. Every batch has this size, so that nothing is compiled twice.
        weights: How much each voxel of a window counts in the average, an array of its shape such as
            `gaussian_weights(patch_shape)`; `None` for all the same.
        mirror_axis: Each window is also predicted mirrored along this axis of `(z, y, x)`, 0 to 2, and the two are
            averaged; `None` for once.

    Returns:
        Float32 probabilities `(depth, height, width)`; 0 where no window reaches.

    Raises:
        ValueError: The images differ in shape.
    """
    shapes = {name: image.shape for name, image in images.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"`images` must be of one shape. Received: {shapes}")
    shape = next(iter(shapes.values()))
    centre = centre if centre is not None else [n / 2 for n in shape]
    call = getattr(predict, "predict_on_batch", predict)
    call = call if mirror_axis is None else _mirrored(call, mirror_axis + 1)
    weights = np.ones(patch_shape, np.float32) if weights is None else weights

    starts = window_starts(shape, patch_shape, stride, centre)
    fill = {name: image.min() for name, image in images.items()}
    total, count = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for first in range(0, len(starts), batch_size):
        chosen = starts[first : first + batch_size]
        filled = chosen + chosen[-1:] * (batch_size - len(chosen))
        batch = {
            name: np.stack([cut(image, start, patch_shape, fill[name]) for start in filled])[..., None]
            for name, image in images.items()
        }
        for start, probability in zip(chosen, np.asarray(call(batch))[..., 0], strict=False):
            # The part of the window inside the volume, in the volume's and in the window's voxels.
            low = np.maximum(start, 0)
            high = np.minimum(np.add(start, patch_shape), shape)
            there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            total[there] += cut(probability * weights, low - start, high - low, 0)
            count[there] += cut(weights, low - start, high - low, 0)
    return total / np.where(count > 0, count, 1)


def _mirrored(call, axis):
    """The average of what a network says of a batch and of its mirror image."""

    def both(batch):
        # An array each time: a network may give its own tensor, and need not take views with negative strides.
        flipped = {name: np.ascontiguousarray(np.flip(image, axis)) for name, image in batch.items()}
        return (np.asarray(call(batch)) + np.flip(np.asarray(call(flipped)), axis)) / 2

    return both


def segment_case(predict, case, recipe, threshold=0.5, mirror=False, gaussian=False):
    """Segments a preprocessed patient on the grid of the first modality's own image.

    Args:
        predict: A Keras model, or a callable as for `predict_volume`.
        case: A `PreprocessedCase`.
        recipe: The `Recipe` the network was trained with.
        threshold: A voxel counts as tumour from this probability on.
        mirror: Average with the mirror image, along the axis that was mirrored in training.
        gaussian: Weight the middle of each window more than its rim.

    Returns:
        `(mask, probability)`, two `SimpleITK.Image`s on the patient's own grid: uint8 of 0 and 1, and float32.

    Raises:
        ValueError: `mirror`, and nothing was mirrored in training.
    """
    return segment_ensemble([predict], case, recipe, threshold, mirror, gaussian)[:2]


def segment_ensemble(predicts, case, recipe, threshold=0.5, mirror=False, gaussian=False):
    """Segments a preprocessed patient with several networks, such as those of a run's folds.

    Args:
        predicts: Keras models or callables as for `predict_volume`, at least one.
        case: A `PreprocessedCase`.
        recipe: The `Recipe` the networks were trained with.
        threshold: A voxel counts as tumour from this average probability on.
        mirror: Average with the mirror image, along the axis that was mirrored in training.
        gaussian: Weight the middle of each window more than its rim.

    Returns:
        `(mask, probability, disagreement)`, three `SimpleITK.Image`s on the patient's own grid: uint8 of 0 and 1, the
        average probability, and the standard deviation of the networks' probabilities, both float32.

    Raises:
        ValueError: There is no network; or `mirror`, and nothing was mirrored in training.
    """
    predicts = list(predicts)
    if not predicts:
        raise ValueError("`predicts` must hold at least one network. Received: []")
    if mirror and recipe.patches.flip_axis is None:
        raise ValueError("`mirror` needs a network that was trained on mirrored patches. Received: flip_axis=None")
    images = case.images_of(recipe.data.modalities)
    options = {
        "weights": gaussian_weights(recipe.patches.shape) if gaussian else None,
        "mirror_axis": recipe.patches.flip_axis if mirror else None,
    }
    # Running sums: a volume of each network at once may be too much to hold.
    total, squares = 0.0, 0.0
    for predict in predicts:
        volume = predict_volume(predict, images, recipe.patches.shape, recipe.patches.stride, case.centre, **options)
        total, squares = total + volume, squares + volume.astype(np.float64) ** 2
    average = total / len(predicts)
    spread = np.sqrt(np.maximum(squares / len(predicts) - average.astype(np.float64) ** 2, 0))
    probability = case.to_source(average)
    mask = sitk.Cast(probability >= threshold, sitk.sitkUInt8)
    return mask, probability, case.to_source(spread)
