import contextlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.export import _dicom


def write_rtstruct(mask: sitk.Image, series: Series, path: str | os.PathLike, name: str = "tumour") -> None:
    """Writes a mask as a DICOM RT structure set (RTSTRUCT) that refers to the images it was drawn on.

    The structure is of type GTV, generated automatically, unapproved, and labelled as not reviewed. The contours go
    through the centres of a slice's outermost pixels of tumour; the contour of a hole lies within another.

    Args:
        mask: A uint8 image {0, 1} on the grid of the series, with a voxel of 1.
        series: The DICOM `Series`, as `find_cases` gives it for the reference modality.
        path: The file.
        name: What the structure is called.

    Raises:
        ImportError: The extra `dicom` is not installed.
        ValueError: The mask is empty or lies on another grid, the series is none of DICOM or lacks what is referred to,
            or the name is too long.
    """
    try:
        import pydicom
        from rt_utils import RTStructBuilder
    except ImportError as error:
        raise ImportError(_dicom.MISSING) from error
    array = _dicom.mask_on_series(mask, series, name)
    with _dicom.library_errors(series), tempfile.TemporaryDirectory() as folder:
        # The library reads a folder of one series.
        for number, file in enumerate(series.files):
            Path(folder, f"{number:05d}.dcm").symlink_to(Path(file).absolute())
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            builder = RTStructBuilder.create_new(dicom_series_path=folder)
            builder.add_roi(mask=np.moveaxis(array, 0, -1), color=[230, 159, 0], name=name)
        content = io.BytesIO()
        pydicom.dcmwrite(content, _described(builder.ds), enforce_file_format=True)
        write(Path(path), content.getvalue())


def _described(structures):
    """The structure set with our labels in place of the library's."""
    structures.SpecificCharacterSet = _dicom.CHARACTER_SET
    structures.Manufacturer = _dicom.MANUFACTURER
    structures.ManufacturerModelName = _dicom.MODEL
    structures.SoftwareVersions = _dicom.VERSION
    del structures.InstitutionName  # the library's authors'
    structures.SeriesDescription = _dicom.SERIES_DESCRIPTION
    structures.StructureSetLabel = "AI not reviewed"  # at most 16 characters
    structures.StructureSetDescription = _dicom.UNREVIEWED
    structures.ApprovalStatus = "UNAPPROVED"
    for roi in structures.StructureSetROISequence:
        roi.ROIGenerationAlgorithm = "AUTOMATIC"
        roi.ROIGenerationDescription = f"{_dicom.MODEL} {_dicom.VERSION}"
    for observation in structures.RTROIObservationsSequence:
        observation.RTROIInterpretedType = "GTV"
        observation.ROIObservationDescription = _dicom.UNREVIEWED
    return structures
