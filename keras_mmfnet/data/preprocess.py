import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data import cache as cache_files
from keras_mmfnet.data.case import CaseError, Grid, PreprocessedCase
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.registration import moved, register_rigid

_BINS = 1024
_CLOSING_MM = 3.0
# Interpolation leaves what is exactly one half a hair below it; such a voxel counts as inside.
_HALF = 0.5 - 1e-4


def preprocess_case(case, recipe, cache=None):
    """Reads one patient and brings the images onto one grid and to one scale of intensity.

    The first modality's axes (of those that are there) are put into the order and direction of the patient's (left,
    posterior, superior), its pixels resampled to `recipe.spacing` in plane, its slices kept. The other modalities and
    the mask are brought onto that grid by the positions in their headers, or with `recipe.align="rigid"` by what fits
    best, by one linear interpolation each. Every image is then z-scored inside the body and clipped, or divided by
    `recipe.normalised_scale`.

    Args:
        case: A `Case`.
        recipe: A `DataRecipe`.
        cache: A folder in which the result is kept and looked up, under a name made of the files' contents and of the
            recipe. The arrays are then read-only and lie in the file system's memory, once for all processes.

    Returns:
        A `PreprocessedCase`: float32 images and a uint8 mask {0, 1}, each `(depth, height, width)`.

    Raises:
        CaseError: A modality is missing, and the recipe does not `allow_missing`; a file is damaged or not a 3D image
            of finite numbers; an image is constant, in all or inside the body; an image lies outside the first one's
            field of view; the mask has several labels and `recipe.mask_labels` does not choose, or no voxel of the
            labels wanted.

    Reference: Chen et al., MMFNet, section IV-A.
    """
    present = tuple(modality for modality in recipe.modalities if modality in case.images)
    if present != recipe.modalities:
        missing = ", ".join(modality for modality in recipe.modalities if modality not in present)
        if not (present and recipe.allow_missing):
            raise CaseError(
                f"{case.name}: an image of {missing} is expected, or `data.allow_missing` and a network that was "
                f"trained with `network.modality_dropout`. Received: {', '.join(case.images) or 'no image'}"
            )
        mask_from = None if recipe.mask_from in missing.split(", ") else recipe.mask_from
        recipe = recipe.model_copy(update={"modalities": present, "mask_from": mask_from})
    if cache is None:
        return _preprocess(case, recipe)
    entry = Path(cache) / cache_files.key(case, recipe)
    cached = cache_files.load(entry, case.name)
    if cached is None:
        built = _preprocess(case, recipe)
        cache_files.store(built, entry)
        # Another process may be putting its own, equal entry in place at this moment.
        cached = cache_files.load(entry, case.name) or built
    return cached


def _preprocess(case, recipe):
    # What one processor does at a time, the reading and the arithmetic, is done for several images at once.
    with ThreadPoolExecutor() as pool:
        return _preprocess_in(pool, case, recipe)


def _preprocess_in(pool, case, recipe):
    first = recipe.modalities[0]
    notes, images, motions = [], {}, {}
    read = pool.map(lambda modality: read_image(case.images[modality], case.name, sitk.sitkFloat32), recipe.modalities)
    for modality, image in zip(recipe.modalities, read, strict=True):
        where = f"{case.name}: {case.images[modality]}"
        if modality == first:
            fixed, source, upright = image, Grid.from_image(image), Grid.from_image(sitk.DICOMOrient(image, "LPS"))
            grid = in_plane_grid(upright, recipe.spacing)
            if recipe.spacing is not None and max(upright.spacing[:2]) > 2 * upright.spacing[2]:
                notes.append(f"{first}: the slices are not axial, so resampling in the axial plane crosses them")
        else:
            coverage = upright.coverage_by(Grid.from_image(image))
            if coverage == 0:
                raise CaseError(f"{where}: must overlap the field of view of {first}. Received: no overlap")
            if coverage < 0.5:
                notes.append(f"{modality}: covers {coverage:.0%} of the field of view of {first}; the rest is filled")
            if recipe.align == "rigid":
                motions[modality], note = _find_motion(fixed, image, f"{case.name}: {modality}", where)
                image = moved(image, motions[modality])
                notes.append(f"{modality}: {note}")
        lowest = _require_contrast(sitk.GetArrayViewFromImage(image), where)
        volume = resample(image, grid, background=lowest)
        _require_contrast(volume, where, f" in the field of view of {first}")
        if modality == first:
            centre = tuple((low + high) // 2 for low, high in bounding_box(volume > otsu_threshold(volume)))
        images[modality] = pool.submit(_normalise, volume, grid, recipe, modality, where)
    mask = None
    if case.mask is not None:
        mask, mask_notes = _read_mask(case, recipe, grid, upright, motions)
        notes += mask_notes
    images = {modality: normalised.result() for modality, normalised in images.items()}
    return PreprocessedCase(case.name, images, mask, grid, source, centre, tuple(notes), motions)


def _find_motion(fixed, image, name, where):
    """The rigid motion that brings an image onto the first modality's, and a note on it."""
    try:
        motion, gain = register_rigid(fixed, image, name=name)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CaseError(f"{where}: must be an image that can be aligned. Received: {reason}") from error
    if not gain:
        return motion, "stays where its header puts it: the motion that was found would have made the fit worse"
    return motion, f"aligned by {motion.shift:.1f} mm and {motion.turn:.1f} degrees"


def _require_contrast(values, where, place=""):
    """The lowest of the values; raises where they are all the same."""
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-6 * max(abs(low), abs(high)):
        raise CaseError(f"{where}: must not be constant{place}. Received: {low:g} everywhere")
    return low


# --- geometry


def in_plane_grid(grid, spacing):
    """The grid with pixels of `spacing` mm in plane, the same slices and the same first edges.

    Args:
        grid: A `Grid`.
        spacing: Pixel size in mm along x and y, or `None` to keep the grid's.

    Returns:
        A `Grid`. Every voxel's centre lies inside `grid`; its last edges are less than half a pixel from `grid`'s.
    """
    if spacing is None:
        return grid
    new = (spacing, spacing, grid.spacing[2])
    # The small number keeps a centre that would fall on the very edge, after rounding, off it.
    size = np.maximum(np.ceil(np.multiply(grid.size, grid.spacing) / new - 0.5 - 1e-6), 1).astype(int)
    first_centre = (np.divide(new, grid.spacing) - 1) / 2
    return Grid(tuple(size.tolist()), new, tuple(grid.positions(first_centre).tolist()), grid.direction)


def resample(image, grid, background):
    """The values of a float image on a grid, by position: smoothed where voxels grow, then one linear interpolation.

    Along each axis on which the grid's voxels are larger than the image's, the image is first smoothed by the
    Gaussian that widens a profile of one old voxel (full width at half maximum) to one new voxel, so that detail
    finer than a new voxel is averaged and not aliased.

    Args:
        image: A 3D SimpleITK float image.
        grid: The `Grid` wanted.
        background: Value outside the image.

    Returns:
        An array of the grid's shape.
    """
    own = Grid.from_image(image)
    # The grid's axis nearest to each of the image's.
    nearest = np.abs(np.reshape(own.direction, (3, 3)).T @ np.reshape(grid.direction, (3, 3))).argmax(axis=1)
    old, new = np.asarray(own.spacing), np.asarray(grid.spacing)[nearest]
    variance = np.maximum(new**2 - old**2, 0) / (8 * math.log(2))
    # A Gaussian narrower than a quarter of a voxel does next to nothing.
    variance[variance < (old / 4) ** 2] = 0
    if variance.any():
        image = sitk.DiscreteGaussian(image, variance.tolist(), maximumKernelWidth=256)
    return grid.resample(image, background)


# --- the body


def _slice_histograms(volume):
    """Counts `(depth, bins)` over equal bins from the volume's lowest value to its highest, the lowest, the width."""
    low, high = float(volume.min()), float(volume.max())
    width = (high - low) / _BINS
    bins = np.minimum((volume - np.float32(low)) * np.float32(1 / width), _BINS - 1).astype(np.uint16)
    return np.stack([np.bincount(plane.ravel(), minlength=_BINS) for plane in bins]), low, width


def _otsu_levels(counts):
    """How many of the lowest bins are background, by Otsu, for each histogram along the last axis.

    Otsu's threshold maximises the variance between the two classes; where bins in a row are equally good, the middle
    of them is taken.
    """
    counts = counts.astype(np.float64)
    below = np.cumsum(counts, axis=-1)
    moment = np.cumsum(counts * np.arange(counts.shape[-1]), axis=-1)
    total, total_moment = below[..., -1:], moment[..., -1:]
    spread = below * (total - below)
    between = (total_moment * below - total * moment) ** 2 / np.where(spread > 0, spread, np.inf)
    first = between.argmax(axis=-1)
    last = counts.shape[-1] - 1 - between[..., ::-1].argmax(axis=-1)
    return (first + last) / 2 + 1


def otsu_threshold(volume):
    """Otsu's threshold of a whole volume, from a histogram of 1024 bins."""
    counts, low, width = _slice_histograms(volume)
    return low + width * float(_otsu_levels(counts.sum(axis=0)))


def body_mask(volume, pixel=1.0):
    """The voxels inside the body: each slice above half its Otsu threshold, closed, with what is enclosed.

    Args:
        volume: Raw intensities `(depth, height, width)`, not constant.
        pixel: Size of a pixel in mm, `(height, width)` or one number; the closing reaches 3 mm in plane.

    Returns:
        A bool array of the same shape.

    Reference: Chen et al., MMFNet, section IV-A.
    """
    counts, low, width = _slice_histograms(volume)
    # The Otsu threshold of a slice of air lies within the noise: none may be below half the volume's.
    levels = np.maximum(_otsu_levels(counts), _otsu_levels(counts.sum(axis=0)) / 2) / 2
    inside = volume > (low + width * levels).astype(volume.dtype)[:, None, None]
    reach = [max(1, round(_CLOSING_MM / size)) for size in np.broadcast_to(pixel, 2)]
    body = sitk.GetImageFromArray(_closed(inside, reach).view(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryFillhole(body, foregroundValue=1)).view(bool)


def _closed(mask, reach):
    """The mask dilated and eroded in plane by a box that reaches so many pixels `(y, x)` to each side."""
    mask = np.pad(mask, [(0, 0), *((2 * count, 2 * count) for count in reach)])
    for combine in (np.logical_or, np.logical_and):
        for axis, count in enumerate(reach, start=1):
            mask = _in_a_row(mask.swapaxes(0, axis), combine, 2 * count + 1).swapaxes(0, axis)
    return np.ascontiguousarray(mask)


def _in_a_row(values, combine, length):
    """Combines each `length` neighbours along the first axis, with every pass twice as many."""
    done = 1
    while done < length:
        step = min(done, length - done)
        values = combine(values[:-step], values[step:])
        done += step
    return values


def bounding_box(mask, share=0.01):
    """The box around a mask `(depth, height, width)`, as one `(low, high)` per axis, `high` excluded.

    A slice, row or column belongs to the box if it holds more than `share` of the voxels of the fullest one, so that
    a few specks outside the body do not move it.
    """
    box = []
    for axis in range(3):
        counts = np.count_nonzero(mask, axis=tuple(other for other in range(3) if other != axis))
        held = np.flatnonzero(counts > share * counts.max())
        box.append((int(held[0]), int(held[-1]) + 1))
    return tuple(box)


# --- intensity


def z_score(volume, body):
    """The volume minus its mean inside the body, divided by its (population) standard deviation there.

    Args:
        volume: Float array.
        body: Bool array of the same shape.

    Returns:
        An array of the volume's shape and dtype.

    Raises:
        ValueError: The values inside the body are all the same, or the body is empty.
    """
    values = volume[body]
    mean, std = (values.mean(), values.std()) if values.size else (0, 0)
    if not std > 1e-6 * abs(mean):
        raise ValueError(f"the values inside the body must vary. Received: {values.size} voxels, all of {mean:g}")
    scored = volume - mean
    scored *= 1 / std
    return scored


def _normalise(volume, grid, recipe, modality, where):
    if recipe.normalised_scale is not None:
        return volume / np.float32(recipe.normalised_scale)
    try:
        volume = z_score(volume, body_mask(volume, pixel=grid.spacing[1::-1]))
    except ValueError as error:
        raise CaseError(f"{where}: {error}") from error
    return np.clip(volume, *recipe.clip[modality], out=volume) if modality in recipe.clip else volume


# --- the mask


def tumour_voxels(values, labels=None):
    """The voxels of a mask that are tumour.

    Args:
        values: Array of finite numbers.
        labels: The values that count as tumour. `None`: the one value besides 0; in a mask of fractions, as
            interpolation leaves it, what is above half the largest value.

    Returns:
        A bool array of the same shape.

    Raises:
        ValueError: There is no tumour voxel, or there are several labels and none was chosen.
    """
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if np.abs(values - whole).max() < 1e-3:
            values = whole
        elif labels is None:
            values = values > values.max() / 2
        else:
            raise ValueError(f"must hold whole numbers. Received: {_listed(np.unique(values))}")
    found = np.unique(values[values != 0])
    if labels is None and len(found) > 1:
        raise ValueError(
            "must have one label besides 0, unless the recipe's `mask_labels` say which ones count as tumour. "
            f"Received: the labels {_listed(found)}"
        )
    tumour = values != 0 if labels is None else np.isin(values, labels)
    if not tumour.any():
        wanted = "a value besides 0" if labels is None else f"one of the labels {_listed(labels)}"
        raise ValueError(f"must have a voxel with {wanted}. Received: {_listed(found) or 'only 0'}")
    return tumour


def _listed(values):
    """Up to ten values as text."""
    return ", ".join(f"{value:g}" for value in values[:10]) + (", ..." if len(values) > 10 else "")


def read_tumour(case, recipe, preprocessed):
    """The expert's tumour of a patient on the first modality's own grid, by position.

    Args:
        case: A `Case` with a mask.
        recipe: The `DataRecipe`, whose `mask_labels` and `mask_from` choose what counts as tumour.
        preprocessed: The `PreprocessedCase` of the same patient: its `source` is the grid, its `motions` bring masks
            drawn on other modalities there.

    Returns:
        A uint8 array {0, 1} of the grid's shape.

    Raises:
        CaseError: The file is damaged, or has no voxel of the labels wanted.
    """
    return _tumour_on(case, recipe, preprocessed.source, preprocessed.motions)[0]


def _tumour_on(case, recipe, grid, motions):
    """The tumour on `grid`, the grids of its files in the order of the patient's axes, and its volume in them in ml.

    Of masks drawn on several modalities the one that counts, or what is in any or in all of them. A mask moves with the
    modality it was drawn on: the one that its name or `mask_from` says, or else the first.
    """
    several = recipe.mask_from in ("union", "intersection")
    wanted = recipe.modalities[0] if several or recipe.mask_from is None else recipe.mask_from
    sources = {wanted: case.mask}
    if isinstance(case.mask, Mapping):
        if len(case.mask) == 1 and recipe.mask_from is None:
            [wanted] = case.mask
        if not several and wanted not in case.mask:
            raise CaseError(
                f"{case.name}: a mask drawn on {wanted} is expected, or another `mask_from`. "
                f"Received: masks of {', '.join(case.mask)}"
            )
        sources = case.mask if several else {wanted: case.mask[wanted]}
    found = (_one_tumour_on(case, source, recipe, grid, motions.get(modality)) for modality, source in sources.items())
    tumours, grids, volumes = zip(*found, strict=True)
    combine = np.logical_and if recipe.mask_from == "intersection" else np.logical_or
    return combine.reduce(tumours).astype(np.uint8), grids, sum(volumes) / len(volumes)


def _one_tumour_on(case, source, recipe, grid, motion):
    """The same for one file: whether each voxel of `grid` is tumour, the file's grid, and the volume."""
    image = read_image(source, case.name)
    image = moved(image, motion) if motion else image
    own = Grid.from_image(image)
    try:
        tumour = tumour_voxels(sitk.GetArrayViewFromImage(image), recipe.mask_labels)
    except ValueError as error:
        raise CaseError(f"{case.name}: {source}: {error}") from error
    near = _surroundings(tumour, 2 * max(grid.spacing) / np.asarray(own.spacing[::-1]))
    image_near = own.crop(*near).image(tumour[tuple(map(slice, *near))].astype(np.float32))
    inside = resample(image_near, grid, background=0.0) >= _HALF
    return inside, Grid.from_image(sitk.DICOMOrient(image, "LPS")), _millilitres(tumour, own)


def _read_mask(case, recipe, grid, upright, motions):
    """The mask on `grid` and notes on it; `upright` is the first modality's own grid in the order of `grid`."""
    mask, grids, volume = _tumour_on(case, recipe, grid, motions)
    first, kept = recipe.modalities[0], _millilitres(mask, grid)
    where = case.mask if not isinstance(case.mask, Mapping) else ", ".join(map(str, case.mask.values()))
    if not kept:
        raise CaseError(
            f"{case.name}: {where}: must mark a tumour within {first} and no smaller than a voxel. "
            f"Received: {volume:.3g} ml of tumour, none of which is left on the grid of {first}"
        )
    notes = []
    if isinstance(case.mask, Mapping) and recipe.mask_from is None and first not in case.mask:
        notes.append(f"mask: drawn on {', '.join(case.mask)}, there is none on {first}")
    if not all(upright.matches(own) for own in grids):
        notes.append(
            f"mask: lies on another grid than {first}, resampled by position: {volume:.3g} ml, now {kept:.3g} ml"
        )
    return mask, notes


def _millilitres(mask, grid):
    return np.count_nonzero(mask) * math.prod(grid.spacing) / 1000


def _surroundings(mask, margin):
    """Lowest and highest indices, the latter excluded, of the box about a mask and a margin of voxels around it.

    A mask's empty rest need not be resampled, and is most of it.
    """
    low, high = np.transpose(bounding_box(mask, share=0))
    margin = np.ceil(margin).astype(int) + 1
    return np.maximum(low - margin, 0), np.minimum(high + margin, mask.shape)
