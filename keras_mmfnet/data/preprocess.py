import math
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data import cache as cache_files
from keras_mmfnet.data.case import Case, CaseError, Grid, PreprocessedCase
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.registration import moved, register_rigid
from keras_mmfnet.recipe import DataRecipe

_BINS = 1024
_CLOSING_MM = 3.0
# Interpolation leaves what is exactly one half a hair below it; such a voxel counts as inside.
_HALF = 0.5 - 1e-4
# Of the 99th percentile: how far below 0 the interpolation of a magnitude brings its 1st percentile at most.
_OVERSHOOT = 0.02


def preprocess_case(case: Case, recipe: DataRecipe, cache: str | os.PathLike | None = None) -> PreprocessedCase:
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
            of finite numbers; the images are z-scores already and the recipe has no `normalised_scale`; an image is
            constant, in all or inside the body; an image lies outside the first one's field of view; the mask has
            several labels and `recipe.mask_labels` does not choose, or no voxel of the labels wanted.

    Reference: Chen et al., MMFNet, section IV-A.
    """
    recipe = recipe_of(case, recipe)
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


def recipe_of(case: Case, recipe: DataRecipe) -> DataRecipe:
    """The recipe without the modalities that the patient lacks.

    Raises:
        CaseError: A modality is missing, and the recipe does not `allow_missing`.
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
        return recipe.model_copy(update={"modalities": present, "mask_from": mask_from})
    return recipe


def _preprocess(case, recipe):
    # What one processor does at a time, the reading and the arithmetic, is done for several images at once.
    with ThreadPoolExecutor() as pool:
        return _preprocess_in(pool, case, recipe)


def _preprocess_in(pool, case, recipe):
    first = recipe.modalities[0]
    notes, images, motions, intensities = [], {}, {}, {}
    read = pool.map(lambda modality: read_image(case.images[modality], case.name, sitk.sitkFloat32), recipe.modalities)
    for modality, image in zip(recipe.modalities, read, strict=True):
        where = f"{case.name}: {case.images[modality]}"
        if modality == first:
            fixed, source = image, Grid.from_image(image)
            upright = upright_grid(source)
            grid = in_plane_grid(upright, recipe.spacing)
            notes += reference_notes(upright, recipe)
        else:
            notes += coverage_notes(case, modality, upright.coverage_by(Grid.from_image(image)), first)
            if recipe.align == "rigid":
                motions[modality], note = _find_motion(fixed, image, f"{case.name}: {modality}", where)
                image = moved(image, motions[modality])
                notes.append(f"{modality}: {note}")
        values = sitk.GetArrayViewFromImage(image)
        lowest = _require_contrast(values, where)
        if lowest < 0 and recipe.normalised_scale is None and not isinstance(case.images[modality], Series):
            intensities[modality] = _Intensities.of(values)
        volume = resample(image, grid, background=lowest)
        _require_contrast(volume, where, f" in the field of view of {first}")
        if modality == first:
            centre = tuple((low + high) // 2 for low, high in bounding_box(volume > otsu_threshold(volume)))
        images[modality] = pool.submit(_normalise, volume, grid, recipe, modality, where)
    notes += _normalised_notes(case, recipe, intensities)
    mask = None
    if case.mask is not None:
        mask, mask_notes = _read_mask(case, recipe, grid, upright, motions)
        notes += mask_notes
    images = {modality: normalised.result() for modality, normalised in images.items()}
    return PreprocessedCase(case.name, images, mask, grid, source, centre, tuple(notes), motions)


def reference_notes(grid: Grid, recipe: DataRecipe) -> list[str]:
    """Notes on the reference modality, whose grid in the order of the patient's axes is `grid`."""
    if recipe.spacing is not None and max(grid.spacing[:2]) > 2 * grid.spacing[2]:
        return [f"{recipe.modalities[0]}: the slices are not axial, so resampling in the axial plane crosses them"]
    return []


def coverage_notes(case: Case, modality: str, coverage: float, first: str) -> list[str]:
    """Notes on the share of the reference modality's field of view that another one covers.

    Raises:
        CaseError: It covers nothing.
    """
    if coverage == 0:
        where = f"{case.name}: {case.images[modality]}"
        raise CaseError(f"{where}: must overlap the field of view of {first}. Received: no overlap")
    if coverage < 0.5:
        return [f"{modality}: covers {coverage:.0%} of the field of view of {first}; the rest is filled"]
    return []


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


def upright_grid(grid: Grid) -> Grid:
    """The grid of the same voxels whose axes have the order and direction of the patient's (left, posterior, superior).

    SimpleITK's `DICOMOrient` brings an image onto it.
    """
    voxel = sitk.Image(1, 1, 1, sitk.sitkUInt8)
    voxel.SetDirection(grid.direction)
    direction = sitk.DICOMOrient(voxel, "LPS").GetDirection()
    turn = np.rint(np.reshape(grid.direction, (3, 3)).T @ np.reshape(direction, (3, 3)))
    order = np.abs(turn).argmax(axis=0)
    corner = np.where(turn.sum(axis=1) < 0, np.asarray(grid.size) - 1, 0)
    size, spacing = (tuple(np.asarray(values)[order].tolist()) for values in (grid.size, grid.spacing))
    return Grid(size, spacing, tuple(grid.positions(corner).tolist()), direction)


def in_plane_grid(grid: Grid, spacing: float | None) -> Grid:
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


def resample(image: sitk.Image, grid: Grid, background: float) -> np.ndarray:
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


def otsu_threshold(volume: np.ndarray) -> float:
    """Otsu's threshold of a whole volume, from a histogram of 1024 bins."""
    counts, low, width = _slice_histograms(volume)
    return low + width * float(_otsu_levels(counts.sum(axis=0)))


def body_mask(volume: np.ndarray, pixel: float | Sequence[float] = 1.0) -> np.ndarray:
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


def bounding_box(mask: np.ndarray, share: float = 0.01) -> tuple[tuple[int, int], ...]:
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


def z_score(volume: np.ndarray, body: np.ndarray) -> np.ndarray:
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


class _Intensities(NamedTuple):
    """Of an image's voxels that are not 0, and how far negative its 1st percentile is, as a share of the 99th."""

    low: float
    high: float
    mean: float
    std: float
    negative: float
    hounsfield: bool

    @classmethod
    def of(cls, values):
        values = values[values != 0]
        first, last = np.percentile(values, (1, 99)).tolist()
        # CT: a twentieth of the voxels are air, and nothing lies below it.
        hounsfield = first >= -1100 and bool(np.mean(np.abs(values + 1000) < 100) > 0.05)
        moments = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        return cls(float(values.min()), float(values.max()), *moments, -first / max(last, 1e-9), hounsfield)

    def __str__(self):
        return f"values from {self.low:.3g} to {self.high:.3g}, mean {self.mean:.3g}, standard deviation {self.std:.3g}"


def _normalised_notes(case, recipe, intensities):
    """Refuses a patient whose images are z-scores already, in which the body would be looked for in vain.

    MRI's intensities are magnitudes: below 0 is only what an interpolation overshoots, 2% of the 99th percentile at
    most. Patients are refused of whom every image lies further below 0, half of them 4%, with a standard deviation
    within a factor of 2.5 of a power of ten, as of a part of an image that was z-scored. CT is let be, and what comes
    from a scanner as DICOM. Where only some images lie below 0, or the scale is another, there is a note.
    """
    below = {m: one for m, one in intensities.items() if one.std > 0 and one.negative > _OVERSHOOT}
    if all(one.hounsfield for one in below.values()):
        return []
    exponent = math.log10(statistics.median(one.std for one in below.values()))
    scale = f"{10.0 ** round(exponent):g}"
    if (
        len(below) == len(recipe.modalities)
        and statistics.median_low(one.negative for one in below.values()) > 2 * _OVERSHOOT
        and abs(exponent - round(exponent)) < math.log10(2.5)
    ):
        listed = "; ".join(f"{modality} with {one}" for modality, one in below.items())
        raise CaseError(
            f"{case.name}: {case.images[next(iter(below))]}: must be raw intensities; of z-scores, their scale must be "
            f"given by `--set data.normalised_scale={scale}`. Received: {listed}"
        )
    return [
        f"{modality}: has {one}; if all images are z-scores, set data.normalised_scale={scale}"
        for modality, one in below.items()
    ]


def _normalise(volume, grid, recipe, modality, where):
    if recipe.normalised_scale is not None:
        return volume / np.float32(recipe.normalised_scale)
    try:
        volume = z_score(volume, body_mask(volume, pixel=grid.spacing[1::-1]))
    except ValueError as error:
        raise CaseError(f"{where}: {error}") from error
    return np.clip(volume, *recipe.clip[modality], out=volume) if modality in recipe.clip else volume


# --- the mask


def tumour_voxels(values: np.ndarray, labels: Sequence[int] | None = None) -> np.ndarray:
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


def read_tumour(case: Case, recipe: DataRecipe, preprocessed: PreprocessedCase) -> np.ndarray:
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


def mask_sources(case: Case, recipe: DataRecipe) -> Mapping[str, object]:
    """The masks that count, by the modality each was drawn on.

    That is the modality that the mask's name or `recipe.mask_from` says, or else the reference modality.

    Raises:
        CaseError: There is none drawn on the modality wanted.
    """
    several = recipe.mask_from in ("union", "intersection")
    wanted = recipe.modalities[0] if several or recipe.mask_from is None else recipe.mask_from
    if isinstance(case.mask, Mapping):
        if len(case.mask) == 1 and recipe.mask_from is None:
            [wanted] = case.mask
        if not several and wanted not in case.mask:
            raise CaseError(
                f"{case.name}: a mask drawn on {wanted} is expected, or another `mask_from`. "
                f"Received: masks of {', '.join(case.mask)}"
            )
        return case.mask if several else {wanted: case.mask[wanted]}
    return {wanted: case.mask}


def mask_notes(case: Case, recipe: DataRecipe) -> list[str]:
    """Notes on which masks there are."""
    if isinstance(case.mask, Mapping) and recipe.mask_from is None and recipe.modalities[0] not in case.mask:
        return [f"mask: drawn on {', '.join(case.mask)}, there is none on {recipe.modalities[0]}"]
    return []


def _tumour_on(case, recipe, grid, motions):
    """The tumour on `grid`, the grids of its files in the order of the patient's axes, and its volume in them in ml.

    Of masks drawn on several modalities the one that counts, or what is in any or in all of them. A mask moves with the
    modality it was drawn on.
    """
    sources = mask_sources(case, recipe)
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
    return inside, upright_grid(own), _millilitres(tumour, own)


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
    notes = mask_notes(case, recipe)
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
