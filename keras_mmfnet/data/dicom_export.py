"""Masks as DICOM objects that a planning system opens: structure sets and segmentations."""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.case import Grid
from keras_mmfnet.data.dicom import Series, read_series
from keras_mmfnet.version import __version__

_MISSING = "writing DICOM needs the extra: pip install keras-mmfnet[dicom]"
# What an image must have for DICOM objects to refer to it, though it may be empty.
_NEEDED = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality PatientID".split()


def write_rtstruct(mask, series, path, name="tumour"):
    """Writes a mask as a DICOM RT structure set that refers to the images it was drawn on.

    The contours go through the centres of a slice's outermost pixels of tumour; the contour of a hole lies within
    another.

    Args:
        mask: A uint8 `SimpleITK.Image` {0, 1} on the grid of the series, with a voxel of 1.
        series: The DICOM `Series`, as `find_cases` gives it for the first modality.
        path: The file.
        name: What the structure is called.

    Raises:
        ImportError: The extra `dicom` is not installed.
        ValueError: The mask is empty or lies on another grid, the series is none of DICOM or lacks what is referred to,
            or the name is too long.
    """
    try:
        from rt_utils import RTStructBuilder
    except ImportError as error:
        raise ImportError(_MISSING) from error
    array = _on_series(mask, series, name)
    with _of_the_library(series), tempfile.TemporaryDirectory() as folder:
        # The library reads a folder of one series.
        for number, file in enumerate(series.files):
            Path(folder, f"{number:05d}.dcm").symlink_to(Path(file).absolute())
        target = Path(folder, "structures.dcm")
        with contextlib.redirect_stdout(io.StringIO()):  # it tells where it writes
            structures = RTStructBuilder.create_new(dicom_series_path=folder)
            structures.add_roi(mask=np.moveaxis(array, 0, -1), color=[230, 159, 0], name=name)
            structures.set_series_description(f"keras-mmfnet {__version__}")
            structures.save(str(target))
        write(Path(path), target.read_bytes())


def write_segmentation(mask, series, path, name="tumour"):
    """Writes a mask as a DICOM segmentation that refers to the images it was drawn on.

    Args:
        mask: A uint8 `SimpleITK.Image` {0, 1} on the grid of the series, with a voxel of 1.
        series: The DICOM `Series`, as `find_cases` gives it for the first modality.
        path: The file.
        name: What the segment is called.

    Raises:
        ImportError: The extra `dicom` is not installed.
        ValueError: The mask is empty or lies on another grid, the series is none of DICOM or lacks what is referred to,
            or the name is too long.
    """
    try:
        import highdicom
        import pydicom
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise ImportError(_MISSING) from error
    array = _on_series(mask, series, name)
    with _of_the_library(series):
        normal = np.reshape(mask.GetDirection(), (3, 3))[:, 2]
        images = sorted(
            (pydicom.dcmread(file) for file in series.files),
            key=lambda image: float(np.dot(normal, [float(x) for x in image.ImagePositionPatient])),
        )
        for image in images:
            image.SliceThickness = image.get("SliceThickness") or mask.GetSpacing()[2]
            # What anonymisation leaves there is often no value the standard knows.
            image.PatientSex = image.get("PatientSex") if image.get("PatientSex") in ("M", "F", "O") else ""
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name="MMFNet", version=__version__, family=codes.cid7162.ArtificialIntelligence
        )
        segment = highdicom.seg.SegmentDescription(
            segment_number=1,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Neoplasm,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        segmentation = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=array.astype(np.uint8),
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="keras-mmfnet",
            manufacturer_model_name="MMFNet",
            software_versions=__version__,
            device_serial_number="0",
        )
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "segmentation.dcm")
            segmentation.save_as(target)
            write(Path(path), target.read_bytes())


@contextlib.contextmanager
def _of_the_library(series):
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


def _on_series(mask, series, name):
    """The mask as a bool array `(depth, height, width)` after a look at whether it fits the series, and at its name."""
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
