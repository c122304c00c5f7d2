"""Writes DICOM series for the tests."""

import uuid

import numpy as np
import pydicom
import SimpleITK as sitk
from matplotlib.path import Path as Polygon
from pydicom.dataset import Dataset, FileMetaDataset

from keras_mmfnet.data.dicom import find_objects
from keras_mmfnet.data.geometry import Grid

GRID = Grid((16, 12, 5), (0.5, 0.5, 4.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


def write_series(
    folder, grid=GRID, description="T1", patient="1", uid=None, order=1, prefix="slice", seed=0, array=None
):
    """Writes one file per slice, numbered from the first slice or, with `order=-1`, from the last.

    Returns:
        The voxels, uint16 `(depth, height, width)`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or f"1.2.826.0.1.3680043.2.1125.{uuid.uuid4().int}"[:56]
    array = np.random.default_rng(seed).integers(0, 1000, grid.shape) if array is None else array
    array = array.astype(np.uint16)
    direction = np.reshape(grid.direction, (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in range(grid.size[2]):
        image = sitk.GetImageFromArray(array[number][None])
        image.SetSpacing(grid.spacing)
        position = grid.positions(np.array([0, 0, number]))
        for tag, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",
            "0008|0018": f"{uid}.{number + 1}",
            "0008|0060": "MR",
            "0008|103e": description,
            "0010|0020": patient,
            "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000e": uid,
            "0020|0052": "1.2.826.0.1.3680043.2.1125.2",
            "0020|0013": str(number if order > 0 else grid.size[2] - number),
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.6f}" for value in direction.T[:2].ravel()),
        }.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{prefix}_{number if order > 0 else grid.size[2] - number:02d}.dcm"))
        writer.Execute(image)
    return array


def find_series(folder, patient):
    """The DICOM series in a folder and the folders in it."""
    return find_objects(folder, patient)[0]


def change_series(folder, change):
    """Applies `change(dataset, number)` to the files in a folder in the order of their names, and writes them again."""
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        image = pydicom.dcmread(path)
        change(image, number)
        image.save_as(path)


def filled(structures, grid, number=0):
    """The voxels whose centres the contours enclose, each by itself; a contour within a contour would be a hole."""
    found = np.zeros(grid.shape, bool)
    pixels = np.moveaxis(np.indices(grid.shape[1:])[::-1], 0, -1).reshape(-1, 2)
    for contour in structures.ROIContourSequence[number].ContourSequence:
        points = grid.indices(np.reshape(np.array(contour.ContourData, float), (-1, 3)))
        slices = np.unique(np.rint(points[:, 2]).astype(int))
        assert len(slices) == 1
        np.testing.assert_allclose(points[:, 2], slices[0], atol=0.01)
        found[slices[0]] ^= Polygon(points[:, :2]).contains_points(pixels).reshape(grid.shape[1:])
    return found


def item(**values):
    """A sequence of one item."""
    found = Dataset()
    for name, value in values.items():
        setattr(found, name, value)
    return [found]


def write_object(path, sop_class, **values):
    """Writes a DICOM object of some class, of the patient `"1"`."""
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.SOPClassUID, found.SOPInstanceUID = sop_class, pydicom.uid.generate_uid()
    found.SeriesInstanceUID, found.PatientID = pydicom.uid.generate_uid(), "1"
    for name, value in values.items():
        setattr(found, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save_as(path, enforce_file_format=True)


def write_enhanced(path, frames, array, spacing=(0.5, 0.5), **values):
    """Writes an enhanced MR object.

    Args:
        path: The file.
        frames: By frame, a dict of its `position`, and of what it has of `slope`, `intercept`, `echo`, `b` and `phase`.
        array: The voxels as stored, `(frames, rows, columns)`.
        spacing: The distance of the rows and of the columns in mm.
        **values: More elements.
    """
    shared = Dataset()
    shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    shared.PixelMeasuresSequence = item(PixelSpacing=list(spacing), SliceThickness=4.0)
    headers = []
    for frame in frames:
        header = Dataset()
        header.PlanePositionSequence = item(ImagePositionPatient=list(frame["position"]))
        header.PixelValueTransformationSequence = item(
            RescaleSlope=frame.get("slope", 1.0), RescaleIntercept=frame.get("intercept", 0.0), RescaleType="US"
        )
        if "echo" in frame:
            header.MREchoSequence = item(EffectiveEchoTime=frame["echo"])
        if "b" in frame:
            header.MRDiffusionSequence = item(DiffusionBValue=frame["b"])
        if "phase" in frame:
            header.FrameContentSequence = item(TemporalPositionIndex=frame["phase"])
        headers.append(header)
    described = {
        **{"Rows": array.shape[1], "Columns": array.shape[2], "NumberOfFrames": len(array), "SamplesPerPixel": 1},
        **{"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0, "HighBit": 15},
        **{"BitsAllocated": 16, "BitsStored": 16, "PixelData": array.astype("<u2").tobytes()},
        **{"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": headers},
    }
    write_object(path, "1.2.840.10008.5.1.4.1.1.4.1", **{"SeriesDescription": "T1", **described, **values})
