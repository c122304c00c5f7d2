import dataclasses
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
from keras_mmfnet.data._errors import reason
from keras_mmfnet.data.body import body_mask, bounding_box, otsu_threshold, z_score
from keras_mmfnet.data.case import Case, CaseError, PreprocessedCase, StructureFiles, ZScoreError, files_of, listed
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.geometry import Grid, in_plane_grid, resample, upright_grid
from keras_mmfnet.data.image_io import position_problems, read_grid, read_image
from keras_mmfnet.data.registration import apply_transform, register_rigid
from keras_mmfnet.data.structures import DicomStructures, lost_contours
from keras_mmfnet.recipe import DataRecipe

# Interpolation leaves what is exactly one half slightly below it; such a voxel counts as inside.
_HALF = 0.5 - 1e-4
# Share of a mask's volume that must be left on the reference grid.
_KEPT = 2 / 3
# Voxels of the reference grid that one structure of several may lose besides.
_FEW = 10
# Share of the reference grid that a structure fills at most; more, and the mask's background is not 0.
_FULL = 0.95
# Of the 99th percentile: how far below 0 the interpolation of a magnitude brings its 1st percentile at most.
_OVERSHOOT = 0.02


def preprocess_case(case: Case, recipe: DataRecipe, cache: str | os.PathLike | None = None) -> PreprocessedCase:
    """Reads one patient and brings the images onto one grid and to one scale of intensity (section IV-A).

    The reference modality's axes (of those that are there) are put into the order and direction of the patient's (left,
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
        A `PreprocessedCase`: float32 images and uint8 masks {0, 1}, each `(depth, height, width)`.

    Raises:
        CaseError: A modality is missing, and the recipe does not `allow_missing`; a file is damaged or not a 3D image
            of finite numbers; the images are z-scores already and the recipe has no `normalised_scale`, or are not
            and it has one; an image is constant, in all or inside the body; an image lies outside the reference
            modality's field of view; the mask fills the image, or has several labels and `recipe.structures` does not
            choose, or no voxel of those wanted.
    """
    recipe = recipe_of(case, recipe)
    try:
        return _cached(case, recipe, cache)
    except (RuntimeError, MemoryError) as error:  # SimpleITK's and NumPy's
        received = reason(error) if str(error) else "images too large for the memory"
        raise CaseError(f"{case.name}: must have images that can be preprocessed. Received: {received}") from error


def _cached(case, recipe, cache):
    if cache is None:
        return _preprocess(case, recipe)
    entry = Path(cache) / cache_files.key(case, recipe, cache)
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
        missing = [modality for modality in recipe.modalities if modality not in present]
        if not (present and recipe.allow_missing):
            raise CaseError(
                f"{case.name}: an image of {', '.join(missing)} is expected, or `data.allow_missing` and a network "
                f"that was trained with `network.modality_dropout`. Received: {', '.join(case.images) or 'no image'}"
            )
        mask_from = None if recipe.mask_from in missing else recipe.mask_from
        return recipe.model_copy(update={"modalities": present, "mask_from": mask_from})
    return recipe


def key_of_images(case: Case, recipe: DataRecipe, cache: str | os.PathLike | None = None) -> str:
    """A hash of a patient's images, whatever the masks: see `cache.key`."""
    return cache_files.key(dataclasses.replace(case, mask=None), recipe_of(case, recipe), cache)


def _preprocess(case, recipe):
    first = recipe.modalities[0]
    notes, images, transforms, intensities = position_notes(case, recipe), {}, {}, {}
    z_scores = recipe.normalised_scale is not None
    # What one processor does at a time, the reading and the arithmetic, is done for several images at once.
    with ThreadPoolExecutor() as pool:
        read = pool.map(
            lambda modality: read_image(case.images[modality], case.name, sitk.sitkFloat32), recipe.modalities
        )
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
                    transforms[modality], note = _align(fixed, image, f"{case.name}: {modality}", where)
                    image = apply_transform(image, transforms[modality])
                    notes.append(f"{modality}: {note}")
            values = sitk.GetArrayViewFromImage(image)
            lowest = _require_contrast(values, where)
            if z_scores or (lowest < 0 and not isinstance(case.images[modality], Series)):
                intensities[modality] = _Intensities.of(values)
            volume = resample(image, grid, background=lowest)
            _require_contrast(volume, where, f" in the field of view of {first}")
            if modality == first:
                centre = tuple((low + high) // 2 for low, high in bounding_box(volume > otsu_threshold(volume)))
            images[modality] = pool.submit(_normalise, volume, grid, recipe, modality, where)
        notes += (_raw_notes if z_scores else _normalised_notes)(case, recipe, intensities)
        masks = None
        if case.mask is not None:
            masks, mask_notes = _read_masks(case, recipe, grid, upright, transforms)
            notes += mask_notes
        images = {modality: normalised.result() for modality, normalised in images.items()}
    return PreprocessedCase(case.name, images, masks, grid, source, centre, tuple(notes), transforms)


def reference_notes(grid: Grid, recipe: DataRecipe) -> list[str]:
    """Notes on the reference modality, whose grid in the order of the patient's axes is `grid`."""
    if recipe.spacing is not None and max(grid.spacing[:2]) > 2 * grid.spacing[2]:
        return [f"{recipe.modalities[0]}: the slices are not axial, so resampling in the axial plane crosses them"]
    return []


def position_notes(case: Case, recipe: DataRecipe) -> list[str]:
    """Notes on images and masks whose positions may not fit those of the others.

    Raises:
        CaseError: The headers of some have a position, and those of others have none; or structures were drawn on an
            image that is no modality, in another frame of reference.
    """
    first, notes, without = recipe.modalities[0], [], []
    masks = mask_sources(case, recipe) if case.mask is not None else {}
    sources = [(modality, case.images[modality], first) for modality in recipe.modalities]
    sources += [
        ("mask", file, name if name in case.images else first)
        for name, source in masks.items()
        for file in files_of(source)
    ]
    for name, source, other in sources:
        has_position, problem = position_problems(source, case.name)
        without += [] if has_position else [f"{name} ({source})"]
        if problem:
            notes.append(f"{name}: {problem} in {source}; the sform counts, as in nibabel, but not in all programs")
        frames = [getattr(one, "frame_of_reference", "") for one in (source, case.images[other])]
        apart = all(frames) and frames[0] != frames[1]
        if apart and isinstance(source, DicomStructures) and source.series not in case.images.values():
            raise CaseError(
                f"{case.name}: {source}: must be drawn on a modality or in the frame of reference of {other}; "
                "resample the structures to its series with the registration between both, and give them as an image. "
                "Received: structures of another frame of reference, on none of the modalities"
            )
        if apart and (recipe.align != "rigid" or name == "mask"):
            notes.append(
                f"{name}: in another frame of reference than {other}, so positions may not fit; register the images "
                "with data.align=rigid"
            )
    if len(without) == len(sources) > 1:
        grids = [read_grid(source, case.name) for _, source, _ in sources]
        if any(one.size != grids[0].size or not np.allclose(one.spacing, grids[0].spacing, 1e-3) for one in grids):
            received = "; ".join(
                f"{name} of {' x '.join(map(str, one.size))} voxels of {' x '.join(f'{s:.4g}' for s in one.spacing)} mm"
                for (name, *_), one in zip(sources, grids, strict=True)
            )
            raise CaseError(
                f"{case.name}: images without a position in their headers must have the same size and spacing. "
                f"Received: {received}"
            )
    if 0 < len(without) < len(sources):
        raise CaseError(
            f"{case.name}: all images and masks must have a position in their headers, an sform or a qform, or none of "
            f"them. Received: {', '.join(without)} without"
        )
    return notes


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


def _align(fixed, image, name, where):
    """The rigid transform that brings an image onto the reference modality's, and a note on it."""
    try:
        transform, gain = register_rigid(fixed, image, name=name)
    except RuntimeError as error:
        raise CaseError(f"{where}: must be an image that can be aligned. Received: {reason(error)}") from error
    if not gain:
        return transform, "not aligned: the rigid transform found fits worse"
    return transform, f"aligned by {transform.shift:.1f} mm and {transform.rotation:.1f} degrees"


def _require_contrast(values, where, place=""):
    """The lowest of the values; raises where they are all the same."""
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-6 * max(abs(low), abs(high)):
        raise CaseError(f"{where}: must not be constant{place}. Received: {low:g} everywhere")
    return low


# --- intensity


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
    within a factor of 2.5 of a power of ten, as of a part of an image that was z-scored. CT and DICOM are
    exempt. Where only some images lie below 0, or the scale is another, there is a note.
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
        raise ZScoreError(
            f"{case.name}: {case.images[next(iter(below))]}: must be raw intensities; for z-scores, the network "
            f"must be trained with `--set data.normalised_scale={scale}`. Received: {listed}",
            float(scale),
        )
    return [
        f"{modality}: has {one}; if all images are z-scores, set data.normalised_scale={scale}"
        for modality, one in below.items()
    ]


def _raw_notes(case, recipe, intensities):
    """Refuses a patient whose images are said to be z-scores and are raw intensities, on which a network finds nothing.

    z-scores lie on both sides of 0, whatever they were multiplied by. Patients are refused of whom no image lies below
    0 and all have a mean of more than ten times the scale or a standard deviation of less than a tenth of it. Where
    that is not as plain, there is a note.
    """
    unit, scale = recipe.normalised_scale, f"{recipe.normalised_scale:g}"
    raw = {modality: one for modality, one in intensities.items() if one.negative <= _OVERSHOOT}
    if len(raw) == len(recipe.modalities) and all(one.mean > 10 * unit or one.std < unit / 10 for one in raw.values()):
        listed = "; ".join(f"{modality} with {one}" for modality, one in raw.items())
        raise CaseError(
            f"{case.name}: {case.images[next(iter(raw))]}: must be z-scores times {scale}, since the recipe has "
            f"`data.normalised_scale={scale}`; raw intensities need a network trained with "
            f"`--set data.normalised_scale=none`. Received: {listed}"
        )
    about = f"values on one side of 0; raw intensities are not normalised with data.normalised_scale={scale}, and the "
    about += "network finds nothing in them"
    return [f"{', '.join(raw)}: {about}"] if raw else []


def _normalise(volume, grid, recipe, modality, where):
    if recipe.normalised_scale is not None:
        return volume / np.float32(recipe.normalised_scale)
    try:
        volume = z_score(volume, body_mask(volume, pixel=grid.spacing[1::-1]))
    except ValueError as error:
        raise CaseError(f"{where}: {error}") from error
    return np.clip(volume, *recipe.clip[modality], out=volume) if modality in recipe.clip else volume


# --- the mask


def structure_voxels(values: np.ndarray, labels: Sequence[int] | None = None, allow_empty: bool = False) -> np.ndarray:
    """The voxels of a mask that belong to a structure.

    Args:
        values: Array of finite numbers.
        labels: The structure's values. `None`: the one value besides 0; in a mask of one label and
            fractions of it, as interpolation leaves it, what is above half the label.
        allow_empty: Whether there may be no voxel of it.

    Returns:
        A bool array of the same shape.

    Raises:
        ValueError: There is no voxel of the structure, or there are several labels and none was chosen.
    """
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if np.abs(values - whole).max() < 1e-3:
            values = whole
        elif labels is None and _is_one_label(values, whole):
            values = values > values.max() / 2
        else:
            raise ValueError(f"must hold whole numbers. Received: {_listed(np.unique(values))}")
    found = np.unique(values[values != 0])
    if labels is None and len(found) > 1:
        raise ValueError(
            "must have one label besides 0, unless --structure (`data.structures`) says which ones belong to which "
            f"structure. Received: the labels {_listed(found)}"
        )
    inside = values != 0 if labels is None else np.isin(values, labels)
    if not (inside.any() or allow_empty):
        wanted = "a value besides 0" if labels is None else f"one of the labels {_listed(labels)}"
        raise ValueError(
            f"must have a voxel with {wanted}, unless `data.allow_empty` says that patients may have no "
            f"tumour. Received: {_listed(found) or 'only 0'}"
        )
    return inside


def _is_one_label(values, whole):
    """Whether fractions are those of one label: nearly all whole values besides 0 are the largest."""
    exact = (np.abs(values - whole) < 1e-3) & (whole != 0)
    labels = whole[exact]
    if values.max() < 0.5 or (labels.size and np.mean(labels == whole.max()) <= 0.9):
        return False
    # Between a label and the background, interpolation leaves sheets of the values between them, and nothing thicker.
    inside = exact & (whole != whole.max())
    for axis in range(inside.ndim):
        slices = np.moveaxis(inside, axis, 0)
        inside = np.moveaxis(slices[:-2] & slices[1:-1] & slices[2:], 0, axis)
    return not inside.any()


def _listed(values):
    """The first values as text."""
    return listed([f"{value:g}" for value in values])


def read_masks(case: Case, recipe: DataRecipe, preprocessed: PreprocessedCase) -> dict[str, np.ndarray]:
    """The expert's structures of a patient on the reference modality's own grid, by position.

    Args:
        case: A `Case` with a mask.
        recipe: The `DataRecipe`, whose `structures` and `mask_from` choose what counts.
        preprocessed: The `PreprocessedCase` of the same patient: its `source` is the grid, its `transforms` bring masks
            drawn on other modalities there.

    Returns:
        `{structure: uint8 array {0, 1}}` of the grid's shape.

    Raises:
        CaseError: A file is damaged, has no voxel of the labels wanted, or a structure that is lost on that grid.
    """
    return _masks_on(case, recipe_of(case, recipe), preprocessed.source, preprocessed.transforms)[0]


def mask_sources(case: Case, recipe: DataRecipe) -> Mapping[str, object]:
    """The masks that count, by the modality each was drawn on.

    That is the modality that the mask's name or `recipe.mask_from` says, or else the reference modality.

    Raises:
        CaseError: There is none drawn on the modality wanted, or a structure has no file without `recipe.allow_empty`.
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
    found = case.mask if isinstance(case.mask, Mapping) else {wanted: case.mask}
    found = found if several else {wanted: found[wanted]}
    for source in found.values():
        files = source.files if isinstance(source, StructureFiles) else recipe.structures
        if not (recipe.allow_empty or all(name in files for name in recipe.structures)):
            raise CaseError(
                f"{case.name}: {source}: must be a file for each of the structures {', '.join(recipe.structures)}. "
                f"Received: files of {', '.join(files)}"
            )
    return found


def mask_notes(case: Case, recipe: DataRecipe) -> list[str]:
    """Notes on which masks there are, and whether the images they were drawn on are there."""
    notes, lacking = [], [modality for modality in mask_sources(case, recipe) if modality not in case.images]
    if isinstance(case.mask, Mapping) and recipe.mask_from is None and recipe.modalities[0] not in case.mask:
        notes.append(f"mask: drawn on {', '.join(case.mask)}, there is none on {recipe.modalities[0]}")
    if lacking:
        notes.append(f"mask: drawn on {', '.join(lacking)}, whose image is missing; it counts where its header says")
    return notes


def contour_notes(case: Case, recipe: DataRecipe) -> list[str]:
    """Notes on the contours of structure sets that leave nothing of them.

    Raises:
        CaseError: A structure set is damaged.
    """
    files = [file for source in mask_sources(case, recipe).values() for file in files_of(source)]
    drawn = [file for file in files if isinstance(file, DicomStructures)]
    return [f"mask: {note}" for file in drawn for note in lost_contours(file, case.name)]


def _masks_on(case, recipe, grid, transforms):
    """The structures on `grid`, the grids of their files in the order of the patient's axes, their volumes there, and
    the labels that belong to no structure.

    Of masks drawn on several modalities the one that counts, or what is in any or in all of them. A mask moves with the
    modality it was drawn on.
    """
    sources, grids, found = mask_sources(case, recipe), [], {name: [] for name in recipe.structures}
    others = set()
    for modality, source in sources.items():
        there = structures_in(source, recipe, case.name)
        others |= unclaimed_labels(there, recipe)
        for name, (image, inside) in there.items():
            image = apply_transform(image, transforms[modality]) if modality in transforms else image
            grids.append(Grid.from_image(image))
            found[name].append(_one_on(f"{case.name}: {source}", name, inside, grids[-1], recipe, grid))
    combine = np.logical_and if recipe.mask_from == "intersection" else np.logical_or
    masks, volumes = {}, {}
    for name, parts in found.items():
        inside, volume = zip(*parts, strict=True)
        masks[name], volumes[name] = combine.reduce(inside), sum(volume) / len(volume)
        if len(parts) > 1 and all(volume) and not masks[name].any():
            raise CaseError(
                f"{case.name}: {', '.join(map(str, sources.values()))}: must overlap. Received: {name} in each, "
                "none of which is left in all"
            )
    if recipe.exclusive:  # a voxel that is half in two structures belongs to the first one
        taken = np.zeros(grid.shape, bool)
        for name, inside in masks.items():
            masks[name] = inside & ~taken
            taken |= inside
    masks = {name: inside.astype(np.uint8) for name, inside in masks.items()}
    return masks, [upright_grid(g) for g in grids], volumes, others


def structures_in(source: object, recipe: DataRecipe, patient: str) -> dict[str, tuple[sitk.Image, np.ndarray]]:
    """Reads the structures of a mask, on its own grid.

    One structure alone may be empty only if the recipe allows it; of several, not all of them.

    Args:
        source: The source of a mask, as in a `Case`.
        recipe: The `DataRecipe`, whose `structures` say what is in it.
        patient: The patient's name, for messages.

    Returns:
        `{structure: (the image it was read from, bool array)}`; one whose file is missing is empty.

    Raises:
        CaseError: A file is damaged, or has no voxel of the structures or several labels of which none was chosen.
    """
    names, several, view = recipe.structure_names, len(recipe.structures) > 1, sitk.GetArrayViewFromImage
    try:
        if isinstance(source, StructureFiles):
            images, labels = {name: read_image(file, patient) for name, file in source.files.items()}, {}
        elif recipe.named_structures:
            raise ValueError(f"must be a file for each of the structures {', '.join(names)}. Received: one file")
        else:
            images, labels = dict.fromkeys(names, read_image(source, patient)), recipe.structures
        found = {
            name: (image, structure_voxels(view(image), labels.get(name), several or recipe.allow_empty))
            for name, image in images.items()
        }
        image = next(iter(images.values()))
        if not (recipe.allow_empty or any(inside.any() for _, inside in found.values())):
            # None has a voxel, so this raises.
            structure_voxels(view(image), sorted({label for some in labels.values() for label in some}) or None)
    except ValueError as error:
        raise CaseError(f"{patient}: {source}: {error}") from error
    # Of a patient who lacks the file of a structure, as the recipe allows.
    nothing = image, np.zeros(image.GetSize()[::-1], bool)
    return {name: found.get(name, nothing) for name in names}


def unclaimed_labels(found: Mapping[str, tuple[sitk.Image, np.ndarray]], recipe: DataRecipe) -> set[float]:
    """The values in a mask, besides 0, that belong to no structure, where the structures are given by label values.

    Args:
        found: What `structures_in` returns for the mask.
        recipe: The `DataRecipe`.
    """
    if not any(isinstance(labels, tuple) for labels in recipe.structures.values()):
        return set()
    [image, *_], inside = zip(*found.values(), strict=True)  # all are read from one image
    values = sitk.GetArrayViewFromImage(image)
    return set(np.unique(values[(values != 0) & ~np.any(inside, axis=0)]).tolist())


def _one_on(where, name, inside, own, recipe, grid):
    """Whether each voxel of `grid` is inside a structure, given on its `own` grid; and its volume there."""
    if not inside.any():
        return np.zeros(grid.shape, bool), 0.0
    near = _surroundings(inside, 2 * max(grid.spacing) / np.asarray(own.spacing[::-1]))
    image_near = own.crop(*near).image(inside[tuple(map(slice, *near))].astype(np.float32))
    resampled, volume = resample(image_near, grid, background=0.0) >= _HALF, _millilitres(inside, own)
    kept, several = _millilitres(resampled, grid), len(recipe.structures) > 1
    # Of several structures, some may be a few voxels.
    if kept < _KEPT * volume and not (several and volume - kept < _FEW * math.prod(grid.spacing) / 1000):
        raise CaseError(
            f"{where}: must lie within {recipe.modalities[0]} and be large enough for its voxels of "
            f"{' x '.join(f'{step:.3g}' for step in grid.spacing)} mm. Received: {volume:.3g} ml of "
            f"{name}, of which {kept:.3g} ml are left on that grid"
        )
    return resampled, volume


def _read_masks(case, recipe, grid, upright, transforms):
    """The masks on `grid` and notes on them; `upright` is the reference modality's own grid in the order of `grid`."""
    masks, grids, volumes, others = _masks_on(case, recipe, grid, transforms)
    files = [file for source in mask_sources(case, recipe).values() for file in files_of(source)]
    for name, mask in masks.items():
        if (share := np.count_nonzero(mask) / mask.size) > _FULL:
            raise CaseError(
                f"{case.name}: {', '.join(map(str, files))}: must have a background, of the value 0. "
                f"Received: {name} in {share:.1%} of the voxels"
            )
    first, kept = recipe.modalities[0], {name: _millilitres(mask, grid) for name, mask in masks.items()}
    notes = mask_notes(case, recipe) + contour_notes(case, recipe)
    if others:
        notes.append(f"mask: has labels that belong to no structure: {_listed(sorted(others))}")
    if not any(kept.values()):
        images = [read_image(file, case.name) for file in files]
        labels = np.unique([label for image in images for label in np.unique(sitk.GetArrayViewFromImage(image))])
        other = _listed(labels[labels != 0])
        notes.append(f"mask: without tumour{f', but with the labels {other}' if other else ''}")
    elif lacking := [name for name in masks if not kept[name]]:
        lost = [
            f"{name} ({volumes[name]:.2g} ml, too small for the grid)" if volumes[name] else name for name in lacking
        ]
        notes.append(f"mask: without {', '.join(lost)}")
    if not all(upright.matches(own) for own in grids):
        _masks_on(case, recipe, upright, transforms)  # on which they are compared in the end, if none is lost there
        listed = ", ".join(
            f"{f'{name} ' * (len(masks) > 1)}{volumes[name]:.3g} ml, now {kept[name]:.3g} ml" for name in masks
        )
        notes.append(f"mask: lies on another grid than {first}, resampled by position: {listed}")
    return masks, notes


def _millilitres(mask, grid):
    return np.count_nonzero(mask) * math.prod(grid.spacing) / 1000


def _surroundings(mask, margin):
    """Lowest and highest indices, the latter excluded, of the box about a mask and a margin of voxels around it.

    A mask's empty rest need not be resampled, and is most of it.
    """
    low, high = np.transpose(bounding_box(mask, share=0))
    margin = np.ceil(margin).astype(int) + 1
    return np.maximum(low - margin, 0), np.minimum(high + margin, mask.shape)
