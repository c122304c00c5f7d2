import io
import os
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.export import _dicom


def write_segmentation(mask: sitk.Image, series: Series, path: str | os.PathLike, name: str = "tumour") -> None:
    """Writes a mask as a DICOM segmentation (SEG) that refers to the images it was drawn on.

    The segment is a neoplasm, generated automatically, and labelled as not reviewed.

    Args:
        mask: A uint8 image {0, 1} on the grid of the series, with a voxel of 1.
        series: The DICOM `Series`, as `find_cases` gives it for the reference modality.
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
        raise ImportError(_dicom.MISSING) from error
    array = _dicom.mask_on_series(mask, series, name)
    with _dicom.library_errors(series):
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
            name=_dicom.MODEL, version=_dicom.VERSION, family=codes.cid7162.ArtificialIntelligence
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
            manufacturer=_dicom.MANUFACTURER,
            manufacturer_model_name=_dicom.MODEL,
            software_versions=_dicom.VERSION,
            device_serial_number="0",
            series_description=_dicom.SERIES_DESCRIPTION,
            content_description=_dicom.UNREVIEWED,
            content_label="AI_NOT_REVIEWED",
        )
        segmentation.SpecificCharacterSet = _dicom.CHARACTER_SET
        content = io.BytesIO()
        segmentation.save_as(content)
        write(Path(path), content.getvalue())
