"""Surveys a cohort for `mmfnet check`: its geometry, and what preprocessing would change or refuse."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._parallel import map_patients
from keras_mmfnet.data.case import Case, CaseError, files_of
from keras_mmfnet.data.geometry import in_plane_grid, upright_grid
from keras_mmfnet.data.image_io import read_grid, read_image
from keras_mmfnet.data.preprocess import (
    contour_notes,
    coverage_notes,
    mask_notes,
    mask_sources,
    position_notes,
    preprocess_case,
    recipe_of,
    reference_notes,
)
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
    """Surveys patients, in parallel processes within `joblib.parallel_config`.

    Args:
        cases: The patients.
        recipe: A `DataRecipe`.
        deep: Also read the voxels, and preprocess each patient.

    Returns:
        One `CaseSurvey` per patient, in the order of `cases`.
    """
    names = [case.name for case in cases]
    return list(map_patients(functools.partial(survey_case, recipe=recipe, deep=deep), cases, names, "checking"))


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
    if masks:
        notes += mask_notes(case, recipe) + (attempt(contour_notes, case, recipe) or [])
    files = [file for source in masks.values() for file in files_of(source)]
    for source in files:
        grid = attempt(read_grid, source, case.name)
        if grid and reference and not upright.matches(upright_grid(grid)):
            notes.append(f"mask: lies on another grid than {modalities[0]}, resampled by position")
    if deep and not problems:
        labels = attempt(_labels, files, case.name)
        preprocessed = attempt(preprocess_case, case, recipe)
        if preprocessed:
            notes = list(preprocessed.notes)
            if preprocessed.mask is not None:
                volume, volumes = preprocessed.tumour_ml, preprocessed.structures_ml
    drawn = case.mask.values() if isinstance(case.mask, Mapping) else [case.mask]
    drawn = [file for source in drawn for file in files_of(source) if isinstance(file, DicomStructures)]
    notes = [*(f"structures in {source}" for source in drawn), *notes]
    where = ", ".join(map(str, case.mask.values())) if isinstance(case.mask, Mapping) else case.mask and str(case.mask)
    problems, notes = (tuple(dict.fromkeys(texts)) for texts in (problems, notes))
    return CaseSurvey(case.name, images, where, labels, volume, problems, notes, volumes)


def _labels(sources, patient):
    """The non-zero values of masks; at most ten of each, as an interpolated mask can have any number."""
    values = [np.unique(sitk.GetArrayFromImage(read_image(source, patient)))[:10] for source in sources]
    return tuple(np.unique([value for found in values for value in found if value]).tolist())
