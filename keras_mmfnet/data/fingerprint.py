"""Surveys a cohort: its geometry, what preprocessing would change or refuse, and what a plan is made from."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._log import progress
from keras_mmfnet.data.body import body_mask, bounding_box
from keras_mmfnet.data.case import Case, CaseError, PreprocessedCase, files_of
from keras_mmfnet.data.geometry import in_plane_grid, upright_grid
from keras_mmfnet.data.image_io import read_grid, read_image
from keras_mmfnet.data.preprocess import (
    coverage_notes,
    mask_notes,
    mask_sources,
    position_notes,
    preprocess_case,
    recipe_of,
    reference_notes,
)
from keras_mmfnet.data.registration import register_rigid
from keras_mmfnet.data.structures import DicomStructures
from keras_mmfnet.recipe import DataRecipe


@dataclasses.dataclass(frozen=True)
class ImageSurvey:
    """One image of a patient, from its header.

    Args:
        path: The file, or the series.
        size: Voxels along x, y and z.
        spacing_xyz: Distance between voxel centres in mm.
        orientation: The directions of x, y and z in the patient, such as `"LPS"` (left, posterior, superior).
        resampled: Whether preprocessing interpolates it.
        coverage: Share of the reference modality's field of view that it covers, in [0, 1]; `None` if the reference
            modality cannot be read.
    """

    path: str
    size: tuple[int, int, int]
    spacing_xyz: tuple[float, float, float]
    orientation: str
    resampled: bool
    coverage: float | None


@dataclasses.dataclass(frozen=True)
class CaseSurvey:
    """One patient, as returned by `survey_case`.

    Args:
        name: The patient's name.
        images: `{modality: survey}` of the images that can be read.
        mask: The paths of the masks, or `None` if there is none.
        labels: The non-zero values in the masks; `None` if the voxels were not read.
        tumour_ml: Volume of all structures together in ml; `None` if it was not read or is refused.
        problems: Error messages of preprocessing, if it would refuse the patient.
        notes: Remarks on the preprocessing for the user, one sentence each.
        structures_ml: Volume of each structure in ml; `None` as for `tumour_ml`.
    """

    name: str
    images: Mapping[str, ImageSurvey]
    mask: str | None
    labels: tuple[float, ...] | None
    tumour_ml: float | None
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    structures_ml: Mapping[str, float] | None = None


def survey(cases: Sequence[Case], recipe: DataRecipe, deep: bool = False) -> list[CaseSurvey]:
    """Surveys patients in parallel.

    Args:
        cases: The patients.
        recipe: A `DataRecipe`.
        deep: Also read the voxels, and preprocess each patient.

    Returns:
        One `CaseSurvey` per patient, in the order of `cases`.
    """
    rows = []
    # Preprocessing a patient takes gigabytes and several threads.
    with ThreadPoolExecutor(2 if deep else None) as pool:
        for row in pool.map(lambda case: survey_case(case, recipe, deep), cases):
            rows.append(row)
            progress("checking", len(rows), len(cases))
    return rows


def survey_case(case: Case, recipe: DataRecipe, deep: bool = False) -> CaseSurvey:
    """Surveys one patient from the headers or, if `deep`, by preprocessing it.

    Args:
        case: A `Case`.
        recipe: A `DataRecipe`.
        deep: Also read the voxels, and preprocess the patient.

    Returns:
        A `CaseSurvey`. Errors are listed in its `problems`.
    """
    problems, notes, images, labels, volume, volumes = [], [], {}, None, None, None

    def attempt(function, *args):
        try:
            return function(*args)
        except CaseError as error:
            problems.append(str(error))

    known = attempt(recipe_of, case, recipe)
    modalities = known.modalities if known else tuple(m for m in recipe.modalities if m in case.images)
    recipe = known or recipe.model_copy(update={"modalities": modalities})
    grids = {modality: attempt(read_grid, case.images[modality], case.name) for modality in modalities}
    reference = grids.get(modalities[0]) if modalities else None
    notes += (attempt(position_notes, case, recipe) or []) if modalities else []
    if reference:
        upright = upright_grid(reference)
        target = in_plane_grid(upright, recipe.spacing)
        notes += reference_notes(upright, recipe)
    for modality, grid in grids.items():
        if grid:
            coverage = upright.coverage_by(grid) if reference else None
            resampled = not reference or not target.matches(upright_grid(grid)) or recipe.align == "rigid"
            orientation = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(grid.direction)
            path = str(case.images[modality])
            images[modality] = ImageSurvey(path, grid.size, grid.spacing, orientation, resampled, coverage)
            if reference:
                notes += attempt(coverage_notes, case, modality, coverage, modalities[0]) or []
    masks = (attempt(mask_sources, case, recipe) or {}) if case.mask is not None and modalities else {}
    notes += mask_notes(case, recipe) if masks else []
    files = [file for source in masks.values() for file in files_of(source)]
    for source in files:
        grid = attempt(read_grid, source, case.name)
        if grid and reference and not upright.matches(upright_grid(grid)):
            notes.append(f"mask: lies on another grid than {modalities[0]}, resampled by position")
    if deep and not problems:
        labels = attempt(_labels, files, case.name)
        preprocessed = attempt(preprocess_case, case, recipe)
        if preprocessed:
            notes = [*preprocessed.notes, *_unclaimed(labels, recipe)]
            if preprocessed.mask is not None:
                volume, volumes = preprocessed.tumour_ml, preprocessed.structures_ml
    drawn = case.mask.values() if isinstance(case.mask, Mapping) else [case.mask]
    drawn = [file for source in drawn for file in files_of(source) if isinstance(file, DicomStructures)]
    notes = [*(f"structures in {source}" for source in drawn), *notes]
    where = ", ".join(map(str, case.mask.values())) if isinstance(case.mask, Mapping) else case.mask and str(case.mask)
    problems, notes = (tuple(dict.fromkeys(texts)) for texts in (problems, notes))
    return CaseSurvey(case.name, images, where, labels, volume, problems, notes, volumes)


def _unclaimed(labels, recipe):
    """A note on labels of a mask that belong to no structure, though structures are given by labels."""
    claimed = {label for some in recipe.structures.values() if isinstance(some, tuple) for label in some}
    others = [f"{label:g}" for label in labels or () if label not in claimed]
    return [f"mask: has labels that belong to no structure: {', '.join(others)}"] if claimed and others else []


def _labels(sources, patient):
    """The non-zero values of masks; at most ten of each, as an interpolated mask can have any number."""
    values = [np.unique(sitk.GetArrayFromImage(read_image(source, patient)))[:10] for source in sources]
    return tuple(np.unique([value for found in values for value in found if value]).tolist())


# --- what a plan is made from

# Smallest extent in mm of images that can be registered, and what no patient moves between two sequences.
_FIELD_OF_VIEW = 60.0
_MOST_MM, _MOST_DEGREES = 10.0, 10.0
# Quantiles that stand for the values of one image.
_QUANTILES = (np.arange(200) + 0.5) / 200


@dataclasses.dataclass(frozen=True)
class CaseFingerprint:
    """The geometry of a preprocessed patient; all positions are voxels `(z, y, x)` of its grid.

    Args:
        name: The patient's name.
        modalities: The sequences that the patient has.
        shape: Voxels `(depth, height, width)`.
        spacing: Voxel size in mm `(z, y, x)`.
        centre: The centre of the body's bounding box.
        volumes: `{structure: ml}`.
        box: First voxel and last, the latter excluded, of the box about all structures; `None` if there is none.
    """

    name: str
    modalities: tuple[str, ...]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    centre: tuple[int, ...]
    volumes: Mapping[str, float]
    box: tuple[tuple[int, ...], tuple[int, ...]] | None


def fingerprint_case(patient: PreprocessedCase) -> CaseFingerprint:
    """The geometry of a patient and its structures."""
    voxel = float(np.prod(patient.spacing)) / 1000
    volumes = {name: np.count_nonzero(mask) * voxel for name, mask in patient.masks.items()}
    boxes = [np.array(bounding_box(mask, share=0)).T for mask in patient.masks.values() if mask.any()]
    box = boxes and (np.min([low for low, _ in boxes], axis=0), np.max([high for _, high in boxes], axis=0))
    return CaseFingerprint(
        patient.name,
        tuple(patient.images),
        patient.shape,
        patient.spacing,
        patient.centre,
        volumes,
        tuple(tuple(edge.tolist()) for edge in box) if box else None,
    )


def intensities(patient: PreprocessedCase) -> dict[str, np.ndarray]:
    """Quantiles of a patient's values by modality, 200 each of the body's and of the structures' voxels, `(2, 200)`.

    The body is read from every second row and column.
    """
    values = {}
    for name, image in patient.images.items():
        coarse = image[:, ::2, ::2]
        body = coarse[body_mask(coarse, pixel=[2 * size for size in patient.spacing[1:]])]
        inside = image[patient.mask > 0] if patient.mask is not None and patient.mask.any() else body
        values[name] = np.stack([np.quantile(some, _QUANTILES) for some in (body, inside)])
    return values


def misalignment(case: Case, recipe: DataRecipe) -> dict[str, tuple[float, float]]:
    """How far each sequence lies from the reference modality, by rigid registration.

    Args:
        case: A `Case`.
        recipe: A `DataRecipe`.

    Returns:
        `{modality: (mm, degrees)}`, the displacement of the centre and the rotation. Images smaller than 60 mm along an
        axis are not registered, and transforms beyond 10 mm or 10 degrees are left out, as failed.

    Raises:
        CaseError: An image is missing or damaged.
    """
    first, *others = recipe_of(case, recipe).modalities
    fixed, found = read_image(case.images[first], case.name, sitk.sitkFloat32), {}
    for modality in others:
        moving = read_image(case.images[modality], case.name, sitk.sitkFloat32)
        if min(np.multiply(image.GetSize(), image.GetSpacing()).min() for image in (fixed, moving)) < _FIELD_OF_VIEW:
            continue
        try:
            transform, _ = register_rigid(fixed, moving, name=f"{case.name}: {modality}", coarse=True)
        except RuntimeError:  # they do not overlap
            continue
        if transform.shift <= _MOST_MM and transform.rotation <= _MOST_DEGREES:
            found[modality] = transform.shift, transform.rotation
    return found
