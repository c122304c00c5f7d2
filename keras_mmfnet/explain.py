"""Attention of the fusion blocks on every backend, and gradient maps on TensorFlow."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import keras_mmfnet._backend  # noqa: F401  # isort: skip
import keras
import numpy as np
from keras import ops

from keras_mmfnet.data.case import PreprocessedCase
from keras_mmfnet.data.windows import crop, window_starts
from keras_mmfnet.inference import masks_of, predict_volume
from keras_mmfnet.layers import FusionBlock3D
from keras_mmfnet.models._blocks import block_output
from keras_mmfnet.postprocess import PostProcessing
from keras_mmfnet.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++", "saliency": "saliency"}
METHODS = tuple(_TITLES)

_log = logging.getLogger(__name__)


def explain_patient(
    model: keras.Model,
    case: PreprocessedCase,
    recipe: Recipe,
    methods: Sequence[str] = ("gradcam",),
    structure: str | None = None,
    postprocess: PostProcessing | None = None,
) -> "dict[str, Figure]":
    """Draws the attention and the gradient maps of a network for one patient.

    Args:
        model: An `MMFNet`.
        case: A `PreprocessedCase`. The contours of the prediction and of its mask, if any, are drawn.
        recipe: The network's `Recipe`.
        methods: Gradient maps, of `METHODS`. They need the TensorFlow backend and are left out on others.
        structure: Name of the structure that is explained; `None` for the recipe's first one.
        postprocess: How masks are made of the probabilities; `None` for the default of `PostProcessing`.

    Returns:
        `{name: Matplotlib figure}`: `attention`, the share of each modality in each fusion block around the tumour;
        `spatial_<block>`, the spatial weights of a block; and a gradient map per method (`gradcam`, `gradcampp`,
        `saliency`). Maps are shown on the slice with the largest contour.

    Raises:
        ValueError: The network has no fusion block, or a method or the structure is unknown.
    """
    from keras_mmfnet.plots import plot_attention, plot_heat

    unknown = sorted(set(methods) - set(METHODS))
    if unknown:
        raise ValueError(f"`methods` must be of {', '.join(METHODS)}. Received: {unknown}")
    structure = structure or recipe.data.structure_names[0]
    if structure not in recipe.data.structures:
        listed = ", ".join(recipe.data.structures)
        raise ValueError(f"`structure` must be one of {listed}. Received: {structure!r}")
    number, truth = recipe.data.structure_names.index(structure), case.masks and case.masks[structure] > 0
    images, patches = case.images_of(recipe.data.modalities), recipe.patches

    def whole(call):
        return predict_volume(call, images, patches.shape, patches.stride, case.centre)

    _log.info("Segmenting %s", case.name)
    probabilities = dict(zip(recipe.data.structures, np.moveaxis(whole(model), -1, 0), strict=True))
    masks, _ = masks_of(probabilities, recipe.data, postprocess, case.spacing)
    probability, predicted = probabilities[structure], masks[structure]
    tumour = predicted if truth is None else truth
    contours = {"prediction": predicted} if truth is None else {"truth": tumour, "prediction": predicted}
    depth = int(np.argmax((tumour if tumour.any() else probability).sum(axis=(1, 2))))
    batch, start = tumour_window(images, predicted if predicted.any() else tumour, patches.shape, case.centre)
    share = fusion_attention(model, batch)[2]
    title = f"{case.name}: share of each modality in the weighted features of each fusion block"
    figures = {"attention": plot_attention(share, title)}
    weights = np.moveaxis(whole(spatial_attention(model, list(share))), -1, 0)
    for block, heat in zip(share, weights, strict=True):
        title = f"{case.name}: spatial attention of {block} (0 to 1)"
        maps = dict.fromkeys(images, heat)
        figures[f"spatial_{block}"] = plot_heat(images, maps, case.spacing, depth, title, **contours)
    if methods and keras.backend.backend() != "tensorflow":
        _log.warning("Gradient maps need TensorFlow: run again with KERAS_BACKEND=tensorflow")
        return figures
    if methods and not predicted.any():
        _log.warning("No %s is predicted: the mean probability of the whole window is explained", structure)
    window = {name: image[0, ..., 0] for name, image in batch.items()}
    contours = {name: crop(mask, start, patches.shape, 0) for name, mask in contours.items()}
    inside = min(max(depth - start[0], 0), patches.shape[0] - 1)
    for method in methods:
        maps = gradient_maps(model, batch, method, score=lambda y: _predicted(y[..., number : number + 1]))
        maps = {name: heat[0] for name, heat in maps.items()}
        title = f"{case.name}: {_TITLES[method]} of the predicted {structure}, in the window around it"
        figure = plot_heat(window, maps, case.spacing, inside, title, **contours)
        figures[method.replace("+", "p")] = figure
    return figures


def fusion_attention(model: keras.Model, images: Mapping[str, np.ndarray]) -> tuple[dict, dict, dict]:
    """Computes the attention weights of every fusion block for a batch, on every backend.

    Args:
        model: An `MMFNet`.
        images: `{modality: float32 (batch, depth, height, width, 1)}`.

    Returns:
        `(channel, spatial, share)`, each a dict by block name. `channel[block]` is `{modality: (batch, channels)}`, the
        weights of eq. 7. `spatial[block]` is `(batch, d, h, w)`, the weights of eq. 11 at the block's resolution.
        `share[block]` is `{modality: (batch,)}`, the modality's share of the weighted features: the mean of `|W_c F|`
        over its channels, divided by the sum over all modalities. The weights alone are hard to interpret, because the
        weight of a channel of zeros is arbitrary.

    Raises:
        ValueError: The network has no fusion block.
    """
    # From the finest level to the coarsest.
    blocks = sorted((layer for layer in model.layers if isinstance(layer, FusionBlock3D)), key=lambda b: b.name)
    if not blocks:
        raise ValueError(f"`model` must have fusion blocks. Received: {model.name}")
    features = keras.Model(model.input, [list(block.input) for block in blocks])(images, training=False)
    channel, spatial, share = {}, {}, {}
    for block, tensors in zip(blocks, features, strict=True):
        _, weights, where = block(tensors, training=False, return_attention_scores=True)
        weights, where = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (weights, where))
        tensors = [ops.convert_to_numpy(ops.cast(x, "float32")) for x in tensors]
        parts = np.split(weights, np.cumsum([x.shape[-1] for x in tensors])[:-1], axis=-1)
        sizes = [np.abs(x * w).mean(axis=(1, 2, 3, 4)) for x, w in zip(tensors, parts, strict=True)]
        total = np.maximum(np.sum(sizes, axis=0), np.finfo(np.float32).tiny)
        channel[block.name] = {
            name: part.reshape(len(part), -1) for name, part in zip(model.modalities, parts, strict=True)
        }
        spatial[block.name] = where[..., 0]
        share[block.name] = {name: size / total for name, size in zip(model.modalities, sizes, strict=True)}
    return channel, spatial, share


def tumour_window(
    images: Mapping[str, np.ndarray], tumour: np.ndarray, patch_shape: Sequence[int], centre: Sequence[int]
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """Crops the window around a tumour.

    Args:
        images: `{modality: (depth, height, width)}`, preprocessed.
        tumour: Mask `(depth, height, width)`; the window is centred on the median of its voxels.
        patch_shape: `(depth, height, width)` of the window.
        centre: `(z, y, x)`, the centre of the window if the mask is empty.

    Returns:
        `(batch, start)`: `{modality: float32 (1, depth, height, width, 1)}`, and the window's first voxel `(z, y, x)`.
    """
    centre = [int(np.median(index)) for index in np.nonzero(tumour)] if np.any(tumour) else centre
    start = window_starts(tumour.shape, patch_shape, (None, None, None), centre)[0]
    return {name: crop(x, start, patch_shape, x.min())[None, ..., None] for name, x in images.items()}, start


def cohort_shares(model: keras.Model, cases: Iterable[PreprocessedCase]) -> dict[str, dict[str, np.ndarray]]:
    """The share of each modality in the weighted features of each fusion block, for the tumours of several patients.

    Args:
        model: An `MMFNet`.
        cases: `PreprocessedCase`s with a mask.

    Returns:
        `{block: {modality: (patients,)}}`, for `plots.plot_attention`; see `fusion_attention`.

    Raises:
        ValueError: The network has no fusion block.
    """
    shares = []
    for case in cases:
        batch, _ = tumour_window(case.images_of(model.modalities), case.mask, model.patch_shape, case.centre)
        shares.append(fusion_attention(model, batch)[2])
    return {
        block: {name: np.concatenate([share[block][name] for share in shares]) for name in model.modalities}
        for block in shares[0]
    }


def spatial_attention(model: keras.Model, blocks: Sequence[str]) -> Callable:
    """Returns a callable for `predict_volume` that computes the spatial weights of fusion blocks.

    Args:
        model: An `MMFNet`.
        blocks: Names of the fusion blocks, such as `["fusion1"]`.

    Returns:
        A function from a batch of images to weights `(batch, depth, height, width, blocks)`, upsampled trilinearly.
    """
    from scipy import ndimage

    def call(images):
        spatial, shape = fusion_attention(model, images)[1], next(iter(images.values())).shape[1:4]

        def upsampled(weights):
            factors = (1, *(size / old for size, old in zip(shape, weights.shape[1:], strict=True)))
            return ndimage.zoom(weights, factors, order=1, mode="nearest", grid_mode=True)

        return np.stack([upsampled(spatial[block]) for block in blocks], axis=-1)

    return call


def gradient_maps(
    model: keras.Model,
    images: Mapping[str, np.ndarray],
    method: str = "gradcam",
    score: Callable | None = None,
) -> dict[str, np.ndarray]:
    """Computes Grad-CAM, Grad-CAM++ or saliency maps of each modality, by tf-keras-vis on the TensorFlow backend.

    Args:
        model: A network over a dict of inputs by modality.
        images: `{modality: float32 (batch, depth, height, width, 1)}`.
        method: `"gradcam"` or `"gradcam++"`, at the last level of each modality's encoder, or `"saliency"`.
        score: Function from the output `(batch, depth, height, width, structures)` to one number per patch. `None` is
            the mean probability over the voxels of at least 0.5, or over the whole patch if there are none.

    Returns:
        `{modality: (batch, depth, height, width)}` in [0, 1], divided by the largest value of the patch over all
        modalities.

    Raises:
        ImportError: The extra `vis` is not installed.
        ValueError: The backend is not TensorFlow, or the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: {method!r}")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "gradient maps need the TensorFlow backend: save the network, start Python with "
            "KERAS_BACKEND=tensorflow and load the same weights by keras.models.load_model(path). "
            f"Received: the backend {keras.backend.backend()!r}"
        )
    try:
        from tf_keras_vis.gradcam import Gradcam, GradcamPlusPlus
        from tf_keras_vis.saliency import Saliency
    except ImportError as error:
        raise ImportError(
            "gradient maps need the extra: pip install 'keras-mmfnet[vis]'. Received: no module tf_keras_vis"
        ) from error

    listed = keras.Model([model.input[name] for name in images], model.output)
    seeds = list(images.values())
    score = score or _predicted
    if method == "saliency":
        found = Saliency(listed)(score, seeds, gradient_modifier=abs, normalize_map=False)
    else:
        last = len(model.filters), getattr(model, "residual", False)
        cam = {"gradcam": Gradcam, "gradcam++": GradcamPlusPlus}[method](listed)
        found = [
            cam(
                score,
                seeds,
                penultimate_layer=model.get_layer(block_output(name, *last)),
                seek_penultimate_conv_layer=False,
                normalize_cam=False,
            )[index]
            for index, name in enumerate(images)
        ]
    # One scale for all modalities: a modality without influence is dark.
    found = np.stack([np.asarray(heat, np.float32) for heat in found])
    found = found / np.maximum(found.max(axis=(0, 2, 3, 4), keepdims=True), np.finfo(np.float32).tiny)
    return dict(zip(images, found, strict=True))


def _predicted(output):
    axes, tumour = (1, 2, 3, 4), output >= 0.5
    none = ops.logical_not(ops.any(tumour, axis=axes, keepdims=True))
    inside = ops.cast(ops.logical_or(tumour, none), output.dtype)
    return ops.sum(output * inside, axis=axes) / ops.sum(inside, axis=axes)
