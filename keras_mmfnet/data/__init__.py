"""From files to patches.

case, layouts, names              a patient's files: found in folders and datasets, and by what sequences are called
image_io, dicom, structures       reads images, DICOM series, and DICOM structure sets and segmentations as masks
geometry, polygons, labels        grids and resampling; masks from contours; several masks as one label image
preprocess, body, registration    brings a patient onto one grid and scale; body mask; rigid registration
cache                             preprocessed patients on disk
survey, fingerprint               what `mmfnet check` shows; what a plan is made from
duplicates, folds                 who occurs several times; divides patients into training, validation and test
windows, voxels                   windows of a volume; voxels in memory or in files
augment, patches                  augmented training patches
"""

from typing import TYPE_CHECKING

from keras_mmfnet.data.case import Case, CaseError, PreprocessedCase
from keras_mmfnet.data.duplicates import check_ids, find_duplicates, refuse_duplicates, same_ids
from keras_mmfnet.data.folds import Fold, divide_patients, five_folds, group_patients, read_groups, read_splits
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.layouts import find_cases, find_patients, read_case_folder
from keras_mmfnet.data.preprocess import preprocess_case

if TYPE_CHECKING:
    from keras_mmfnet.data.patches import patch_dataset


def __getattr__(name):
    # Imported on first use, because it needs TensorFlow.
    if name == "patch_dataset":
        from keras_mmfnet.data.patches import patch_dataset

        return patch_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Case",
    "CaseError",
    "Fold",
    "Grid",
    "PreprocessedCase",
    "check_ids",
    "divide_patients",
    "find_cases",
    "find_duplicates",
    "find_patients",
    "five_folds",
    "group_patients",
    "patch_dataset",
    "preprocess_case",
    "read_case_folder",
    "read_groups",
    "read_splits",
    "refuse_duplicates",
    "same_ids",
]
