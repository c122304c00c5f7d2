"""What a structure set and a segmentation have in common."""

import contextlib
import warnings

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.dicom import Series, read_series
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.version import __version__

MISSING = "writing DICOM needs the extra: pip install keras-mmfnet[dicom]"
# What every object says of itself; at most 64 characters.
MANUFACTURER, MODEL, VERSION = "keras-mmfnet", "MMFNet", __version__
UNREVIEWED = "AI, not reviewed"
SERIES_DESCRIPTION = f"{MODEL} ({UNREVIEWED})"
CHARACTER_SET = "ISO_IR 192"  # UTF-8
# What an image must have for DICOM objects to refer to it, though it may be empty.
_NEEDED = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality PatientID".split()


@contextlib.contextmanager
def library_errors(series: Series):
    """Keeps a library's warnings and errors from naming the patient, and says what it could not refer to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            import pydicom

            image = pydicom.dcmread(series.files[0], stop_before_pixels=True)
            lacking = [tag for tag in _NEEDED if tag not in image]
            received = f"images without {', '.join(lacking)}" if lacking else f"a {type(error).__name__} of the library"
            raise ValueError(
                f"{series}: must be images that a DICOM object can refer to. Received: {received}"
            ) from None


def mask_on_series(mask: sitk.Image, series: Series, name: str) -> np.ndarray:
    """The mask as a bool array `(depth, height, width)`, after a check that it fits the series, and of its name.

    Raises:
        ValueError: The mask is empty or lies on another grid, the series is none of DICOM, or the name is too long.
    """
    if not 1 <= len(name) <= 64 or "\\" in name:
        raise ValueError(f"`name` must have 1 to 64 characters and no backslash. Received: {name!r}")
    if not isinstance(series, Series):
        raise ValueError(f"the image must be a DICOM series to be referred to. Received: {series}")
    array = sitk.GetArrayFromImage(mask) > 0
    if not array.any():
        raise ValueError("the mask must hold a voxel of tumour to be written as DICOM. Received: an empty mask")
    image = read_series(series, "the patient")
    if not Grid.from_image(image).matches(Grid.from_image(mask)):
        raise ValueError(f"the mask must lie on the grid of its series. Received: {mask.GetSize()} voxels, elsewhere")
    return array
