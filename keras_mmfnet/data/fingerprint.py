"""What a plan is made from: a patient's geometry, values and misalignment."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.body import body_mask, bounding_box
from keras_mmfnet.data.case import Case, PreprocessedCase
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.preprocess import recipe_of
from keras_mmfnet.data.registration import register_rigid
from keras_mmfnet.recipe import DataRecipe

# Smallest extent in mm of images that can be registered.
_FIELD_OF_VIEW = 60.0
# Quantiles that stand for the values of one image.
_QUANTILES = (np.arange(200) + 0.5) / 200


@dataclasses.dataclass(frozen=True)
class CaseFingerprint:
    """The geometry of a preprocessed patient; all positions are voxels `(z, y, x)` of its grid.

    Args:
        shape: Voxels `(depth, height, width)`.
        spacing: Voxel size in mm `(z, y, x)`.
        centre: The centre of the body's bounding box.
        volumes: `{structure: ml}`.
        box: First voxel and last, the latter excluded, of the box about all structures; `None` if there is none.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    centre: tuple[int, ...]
    volumes: Mapping[str, float]
    box: tuple[tuple[int, ...], tuple[int, ...]] | None


def fingerprint_case(patient: PreprocessedCase) -> CaseFingerprint:
    """The geometry of a patient and its structures."""
    boxes = [np.array(bounding_box(mask, share=0)).T for mask in patient.masks.values() if mask.any()]
    box = boxes and (np.min([low for low, _ in boxes], axis=0), np.max([high for _, high in boxes], axis=0))
    return CaseFingerprint(
        patient.shape,
        patient.spacing,
        patient.centre,
        patient.structures_ml,
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
        axis are not registered, and those that do not overlap are left out.

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
        found[modality] = transform.shift, transform.rotation
    return found
