import datetime
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.polygons import rasterise
from keras_mmfnet.export import _dicom
from keras_mmfnet.export._dicom import Structure
from keras_mmfnet.export.contours import contours, simplified

# Dice that simplified contours must reach with the mask of a slice.
_DICE = 0.98


def write_rtstruct(
    mask: sitk.Image | Sequence[Structure],
    series: Series,
    path: str | os.PathLike,
    name: str = "tumour",
    probability: sitk.Image | None = None,
    tolerance: float = 0.0,
    max_points: int | None = None,
    reviewed_by: str | None = None,
) -> None:
    """Writes a mask as a DICOM RT structure set (RTSTRUCT) that refers to the images it was drawn on.

    The structure is of type GTV, generated automatically, unapproved, and labelled as not reviewed unless somebody has
    reviewed it. Its contours lie in
    the planes of the images and enclose the centres of the mask's pixels, and no others: the file is read back and
    compared with the mask before it is kept. A hole is joined to the outline by a narrow channel (the "keyhole" of
    PS3.3 C.8.8.6.3), so that each contour is one simple polygon of type CLOSED_PLANAR.

    Args:
        mask: A uint8 image {0, 1} on the grid of the series, with a voxel of 1; or several `Structure`s.
        series: The DICOM `Series`, as `find_cases` gives it for the reference modality.
        path: The file.
        name: What the structure is called.
        probability: A float image in [0, 1] on the same grid. With it contours follow the level of 0.5 between pixels;
            without it, the edges of pixels.
        tolerance: How far in mm from a contour the points may lie that it leaves out; 0 leaves out none. It is less
            where a slice would otherwise have a Dice below 0.98 with the mask, or a contour another area by over 1%.
        max_points: Most points that a contour may have; `None`: any number.
        reviewed_by: The expert who accepted or corrected the mask; `None`: it is labelled as not reviewed.

    Raises:
        ValueError: `tolerance` is negative or not finite, a mask is empty or lies on another grid, the series is none
            of DICOM or lacks what is referred to, a name cannot be used, a contour has more than `max_points` within
            `tolerance`, or what is read back differs from the mask. No file is written then.
    """
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"`tolerance` must be 0 or more mm. Received: {tolerance}")
    structures = [Structure(name, mask, probability)] if isinstance(mask, sitk.Image) else list(mask)
    grid, slices, arrays = _dicom.arrays(structures, series)
    with _dicom.library_errors(series):
        planes = _dicom.planes(series, grid, slices)
        reviewer = _dicom.reviewer_of(reviewed_by)
        dataset = _structure_set(planes, reviewer)
        for number, (structure, array) in enumerate(zip(structures, arrays, strict=True), start=1):
            _add(dataset, number, structure, array, planes, tolerance, max_points)
            if reviewer:
                dataset.StructureSetROISequence[-1].ROIGenerationAlgorithm = "SEMIAUTOMATIC"
                observation = dataset.RTROIObservationsSequence[-1]
                observation.ROIInterpreter, observation.ROIObservationDescription = reviewer, f"reviewed by {reviewer}"
        content, back = _dicom.encode(dataset, planes[0].image, [structure.name for structure in structures])
        for contour, structure, array in zip(back.ROIContourSequence, structures, arrays, strict=True):
            found = _read(contour, planes, array.shape)
            _dicom.require_same(found, array, structure, _DICE if tolerance > 0 else 1.0)
        write(Path(path), content)


def _structure_set(planes, reviewer):
    """A structure set without structures."""
    from pydicom import Dataset, uid
    from pydicom.dataset import FileMetaDataset

    now = datetime.datetime.now()
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    # In the implicit transfer syntax a contour may have more than the 64 KiB that the explicit one allows.
    dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = uid.RTStructureSetStorage, uid.generate_uid(None)
    _dicom.describe(dataset, planes[0].image, reviewer)
    dataset.Modality, dataset.SeriesInstanceUID, dataset.SeriesNumber = "RTSTRUCT", uid.generate_uid(None), 901
    dataset.InstanceNumber, dataset.OperatorsName = 1, None
    dataset.StructureSetLabel = "reviewed" if reviewer else "AI not reviewed"  # at most 16 characters
    dataset.StructureSetDescription = f"reviewed by {reviewer}" if reviewer else _dicom.UNREVIEWED
    for name in ("InstanceCreation", "StructureSet"):
        setattr(dataset, f"{name}Date", now.strftime("%Y%m%d"))
        setattr(dataset, f"{name}Time", now.strftime("%H%M%S"))
    dataset.ApprovalStatus = "UNAPPROVED"

    image = planes[0].image
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = image.SeriesInstanceUID
    series.ContourImageSequence = [plane.reference() for plane in planes]
    study.ReferencedSOPClassUID = "1.2.840.10008.3.1.2.3.1"  # the study management class, retired but required
    study.ReferencedSOPInstanceUID = image.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID = image.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence = [], [], []
    return dataset


def _add(dataset, number, structure, array, planes, tolerance, max_points):
    """Adds a structure and its contours."""
    from pydicom import Dataset

    roi, outline, observation = Dataset(), Dataset(), Dataset()
    roi.ROINumber, roi.ROIName = number, structure.name
    roi.ReferencedFrameOfReferenceUID = planes[0].image.FrameOfReferenceUID
    roi.ROIGenerationAlgorithm = "AUTOMATIC"
    roi.ROIGenerationDescription = f"{_dicom.MODEL} {_dicom.VERSION}"
    dataset.StructureSetROISequence.append(roi)

    outline.ReferencedROINumber, outline.ROIDisplayColor = number, list(_dicom.colour(structure, number))
    outlines = []
    values = None if structure.probability is None else sitk.GetArrayViewFromImage(structure.probability)
    for index in np.flatnonzero(array.any(axis=(1, 2))):
        plane = planes[index]
        spacing = np.linalg.norm(plane.axes, axis=0)
        polygons = contours(array[index], None if values is None else values[index])
        for polygon in _fewer_points(polygons, spacing, array[index], tolerance):
            if max_points is not None and len(polygon) > max_points:
                raise CaseError(
                    f"{structure.name!r}: each contour must have at most {max_points} points with a tolerance of "
                    f"{tolerance} mm. Received: {len(polygon)} points in slice {index}"
                )
            contour = Dataset()
            contour.ContourImageSequence = [plane.reference()]
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(polygon)
            points = plane.origin + polygon @ plane.axes.T
            contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
            outlines.append(contour)
    if outlines:
        outline.ContourSequence = outlines
    dataset.ROIContourSequence.append(outline)

    observation.ObservationNumber, observation.ReferencedROINumber = number, number
    observation.ROIObservationDescription = _dicom.UNREVIEWED
    observation.RTROIInterpretedType, observation.ROIInterpreter = structure.kind, None
    if code := _dicom.code(structure):
        item = Dataset()
        item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
        observation.RTROIIdentificationCodeSequence = [item]
    dataset.RTROIObservationsSequence.append(observation)


def _fewer_points(polygons, spacing, mask, tolerance):
    """Simplified polygons, by less than the tolerance where they are so small that it would change their area much."""
    for share in (1, 0.5, 0.25, 0.125):
        fewer = simplified([polygon * spacing for polygon in polygons], share * tolerance)
        fewer = [polygon / spacing for polygon in fewer]
        if _dicom.dice(rasterise(fewer, mask.shape), mask) >= _DICE:
            return fewer
    return polygons


def _read(outline, planes, shape):
    """The mask of a structure's contours, each on the image that it refers to."""
    found, numbers = np.zeros(shape, bool), {}
    for index, plane in enumerate(planes):
        numbers[plane.image.SOPInstanceUID, plane.frame] = index
    for contour in outline.get("ContourSequence", []):
        [image] = contour.ContourImageSequence
        index = numbers[image.ReferencedSOPInstanceUID, image.get("ReferencedFrameNumber")]
        away = np.reshape(np.array(contour.ContourData, float), (-1, 3)) - planes[index].origin
        pixels = np.linalg.lstsq(planes[index].axes, away.T)[0].T
        found[index] ^= rasterise([pixels], shape[1:])
    return found
