import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.windows import cut, window_starts


def predict_volume(predict, images, patch_shape, stride=(4, None, None), centre=None, batch_size=2):
    """Probabilities of a whole volume from overlapping windows, their average where several overlap (section IV-A).

    Args:
        predict: A Keras model, or any callable, that takes `{modality: float32 (batch, depth, height, width, 1)}`
            and returns probabilities of the same shape.
        images: `{modality: (depth, height, width)}`, preprocessed, all of the same shape.
        patch_shape: `(depth, height, width)` of a window in voxels.
        stride: Steps between windows in voxels, `None` for one window about the centre.
        centre: `(z, y, x)` in voxels; `None` for the volume's middle.
        batch_size: Windows predicted together. Every batch has this size, so that nothing is compiled twice.

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
            total[there] += cut(probability, low - start, high - low, 0)
            count[there] += 1
    return total / np.maximum(count, 1)


def segment_case(predict, case, recipe, threshold=0.5):
    """Segments a preprocessed patient on the grid of the first modality's own image.

    Args:
        predict: A Keras model, or a callable as for `predict_volume`.
        case: A `PreprocessedCase`.
        recipe: The `Recipe` the network was trained with.
        threshold: A voxel counts as tumour from this probability on.

    Returns:
        `(mask, probability)`, two `SimpleITK.Image`s on the patient's own grid: uint8 of 0 and 1, and float32.
    """
    images = {name: case.images[name] for name in recipe.modalities}
    volume = predict_volume(predict, images, recipe.patch_shape, recipe.window_stride, case.centre)
    probability = case.to_source(volume)
    return sitk.Cast(probability >= threshold, sitk.sitkUInt8), probability
