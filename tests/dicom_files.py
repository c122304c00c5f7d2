"""Writes DICOM series for the tests."""

import uuid

import numpy as np
import SimpleITK as sitk

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
