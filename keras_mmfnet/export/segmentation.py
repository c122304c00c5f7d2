import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import Series, frame_value
from keras_mmfnet.export import _dicom
from keras_mmfnet.export._dicom import Structure

# What derived objects say as well.
_LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")


def write_segmentation(
    mask: sitk.Image | Sequence[Structure],
    series: Series,
    path: str | os.PathLike,
    name: str = "tumour",
    reviewed_by: str | None = None,
) -> None:
    """Writes a mask as a DICOM segmentation (SEG) that refers to the images it was drawn on.

    The segment is generated automatically, labelled as not reviewed unless somebody has reviewed it, and a neoplasm
    unless its name or `Structure` says otherwise. It has a frame for each slice from the first to the last with tumour,
    and their distance is that of the slices' positions. The file is read back and compared with the mask before it is
    kept.

    Args:
        mask: A uint8 image {0, 1} on the grid of the series, with a voxel of 1; or several `Structure`s.
        series: The DICOM `Series`, as `find_cases` gives it for the reference modality.
        path: The file.
        name: What the segment is called.
        reviewed_by: The expert who accepted or corrected the mask; `None`: it is labelled as not reviewed.

    Raises:
        ImportError: The extra `dicom` is not installed.
        ValueError: A mask is empty or lies on another grid, the series is none of DICOM or lacks what is referred to,
            a name cannot be used, or what is read back differs from the mask. No file is written then.
    """
    try:
        import highdicom
        from pydicom.sr.codedict import codes
        from pydicom.valuerep import DSfloat
    except ImportError as error:
        raise ImportError(
            "DICOM segmentations need the extra: pip install 'keras-mmfnet[dicom]'. Received: no module highdicom"
        ) from error
    structures = [Structure(name, mask)] if isinstance(mask, sitk.Image) else list(mask)
    grid, slices, arrays = _dicom.arrays(structures, series)
    with _dicom.library_errors(series):
        planes = _dicom.planes(series, grid, slices)
        image = planes[0].image
        reviewer, kinds = _dicom.reviewer_of(reviewed_by), highdicom.seg.SegmentAlgorithmTypeValues
        algorithm = highdicom.AlgorithmIdentificationSequence(
            name=_dicom.MODEL, version=_dicom.VERSION, family=codes.cid7162.ArtificialIntelligence
        )
        segments = [
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=structure.name,
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                segmented_property_type=highdicom.sr.CodedConcept(*(_dicom.code(structure) or _dicom.NEOPLASM)),
                algorithm_type=kinds.SEMIAUTOMATIC if reviewer else kinds.AUTOMATIC,
                algorithm_identification=algorithm,
                display_color=highdicom.color.CIELabColor.from_rgb(*_dicom.colour(structure, number)),
            )
            for number, structure in enumerate(structures, start=1)
        ]
        pixels = np.stack(arrays, axis=-1).astype(np.uint8)
        used = np.flatnonzero(pixels.any(axis=(1, 2, 3)))
        # Readers that take frames for a stack without a gap are right as well.
        there = slice(used[0], used[-1] + 1)
        thickness = _thickness(image) or grid.spacing[2]
        sources = _sources(planes[there], thickness)
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=pixels[there],
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer=_dicom.MANUFACTURER,
            manufacturer_model_name=_dicom.MODEL,
            software_versions=_dicom.VERSION,
            device_serial_number="0",
            content_description=f"reviewed by {reviewer}" if reviewer else _dicom.UNREVIEWED,
            content_label="REVIEWED" if reviewer else "AI_NOT_REVIEWED",
            content_creator_name=reviewer,
            omit_empty_frames=False,
            pixel_measures=highdicom.PixelMeasuresSequence(
                pixel_spacing=grid.spacing[1::-1],
                slice_thickness=thickness,
                spacing_between_slices=grid.spacing[2],
            ),
        )
        # Of a single frame the library makes it 1.
        _measures(segmentation).SpacingBetweenSlices = DSfloat(grid.spacing[2], auto_format=True)
        _dicom.describe(segmentation, image, reviewer)
        if planes[0].frame:
            _refer_to_frames(segmentation, sources, planes[there])
        content, back = _dicom.encode(segmentation, image, [structure.name for structure in structures])
        found, measures = _read(back, planes, pixels.shape), _measures(back)
        read = (*measures.PixelSpacing[::-1], measures.SpacingBetweenSlices)
        if not np.allclose(read, grid.spacing, rtol=1e-4):
            raise CaseError(f"voxels must be read back as {grid.spacing} mm. Received: {read} mm; nothing was written")
        for number, (structure, array) in enumerate(zip(structures, arrays, strict=True)):
            _dicom.require_same(found[..., number], array, structure)
        write(Path(path), content)


def _thickness(image):
    """The thickness of the slices in mm, 0 if the header does not tell."""
    try:
        return max(float(image.get("SliceThickness") or 0), 0.0)
    except ValueError:
        return 0.0


def _sources(planes, thickness):
    """An image for each plane, as the library reads them: what it needs of their headers, and nothing that is wrong."""
    from pydicom import Dataset, uid
    from pydicom.valuerep import DSfloat

    sources = []
    for plane in planes:
        image = Dataset()
        for keyword in _dicom.NEEDED:
            setattr(image, keyword, plane.image[keyword].value)
        if plane.frame:  # the library does not take some of the frames of a file; `_refer_to_frames` puts that right
            image.SOPClassUID, image.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid(None)
        for keyword in _dicom.TYPE_2:
            setattr(image, keyword, None)
        for keyword in filter(plane.image.get, _LOSSY):
            setattr(image, keyword, plane.image[keyword].value)
        spacing = np.linalg.norm(plane.axes, axis=0)
        image.Rows, image.Columns, image.SliceThickness = plane.image.Rows, plane.image.Columns, thickness
        for keyword, values in (
            ("PixelSpacing", spacing[::-1]),
            ("ImagePositionPatient", plane.origin),
            ("ImageOrientationPatient", (plane.axes / spacing).T.ravel()),
        ):
            setattr(image, keyword, [DSfloat(value, auto_format=True) for value in values])
        sources.append(image)
    return sources


def _refer_to_frames(segmentation, sources, planes):
    """Refers to the frames of files in place of the images that the library was told of."""
    planes = {source.SOPInstanceUID: plane for source, plane in zip(sources, planes, strict=True)}
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        for item in frame.DerivationImageSequence[0].SourceImageSequence:
            item.update(planes[item.ReferencedSOPInstanceUID].reference())
    [series] = segmentation.ReferencedSeriesSequence
    files = {plane.image.SOPInstanceUID: plane.reference() for plane in planes.values()}
    for item in files.values():
        item.pop("ReferencedFrameNumber", None)
    series.ReferencedInstanceSequence = list(files.values())


def _measures(dataset):
    return dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]


def _read(dataset, planes, shape):
    """The masks of a segmentation's frames, `(depth, height, width, segments)`, each at its position."""
    found = np.zeros(shape, bool)
    origins = np.array([plane.origin for plane in planes])
    frames = dataset.pixel_array.reshape(-1, *shape[1:3])
    for frame, pixels in enumerate(frames):
        position = np.array(frame_value(dataset, frame, "PlanePosition", "ImagePositionPatient"), float)
        segment = frame_value(dataset, frame, "SegmentIdentification", "ReferencedSegmentNumber")
        found[np.linalg.norm(origins - position, axis=1).argmin(), ..., segment - 1] |= pixels > 0
    return found
