"""Small patients on disk: a head with a tumour, at the same position in mm on any grid."""

import dataclasses

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.case import Case
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.recipe import Recipe

MODALITIES = ("t1", "t2", "cet1")
# Columns: the directions of x, y and z.
IDENTITY = np.eye(3)
RAW = Recipe().replace({"data.spacing": None, "data.clip": {}})


def make_grid(size=(60, 50, 8), spacing=(0.8, 0.8, 4.0), direction=IDENTITY, middle=(1.0, -2.0, 30.0)):
    """A grid around a middle in mm."""
    grid = Grid(tuple(size), tuple(spacing), (0.0, 0.0, 0.0), tuple(np.ravel(direction).tolist()))
    origin = np.asarray(middle) - grid.positions((np.asarray(size) - 1) / 2)
    return dataclasses.replace(grid, origin=tuple(origin.tolist()))


def voxel_positions(grid):
    """Positions in mm of all voxels, (D, H, W, 3) in (x, y, z)."""
    return grid.positions(np.stack(np.indices(grid.shape)[::-1], axis=-1))


def distance(grid, middle=(1.0, -2.0, 30.0), radii=(18.0, 15.0, 14.0)):
    """Distance from a middle, 1 on an ellipsoid of the given radii in mm."""
    return np.linalg.norm((voxel_positions(grid) - middle) / radii, axis=-1)


def head(grid, seed=0):
    """A head of varying tissue in noisy air, at the same position on any grid."""
    positions = voxel_positions(grid)
    tissue = 600 + 150 * np.sin(positions[..., 0] / 3 + seed) * np.cos(positions[..., 1] / 4)
    noise = np.abs(np.random.default_rng(seed).normal(0, 15, grid.shape))
    return ((distance(grid) < 1) * tissue + noise).astype(np.float32)


def tumour(grid):
    return (distance(grid, (5.0, 0.0, 32.0), (7.0, 6.0, 7.0)) < 1).astype(np.uint8)


def write(path, grid, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(grid.image(array), str(path))
    return path


def make_case(folder, grid=None, other_grid=None, mask_grid=None, mask=None, name="ann", suffix=".nii.gz"):
    """A patient on disk: t1 on `grid`, t2 and cet1 on `other_grid`, the mask on `mask_grid`."""
    grid = grid or make_grid()
    grids = {"t1": grid, "t2": other_grid or grid, "cet1": other_grid or grid, "mask": mask_grid or grid}
    images = {
        m: write(folder / f"{m}{suffix}", grids[m], head(grids[m], seed).astype(np.int16))
        for seed, m in enumerate(MODALITIES)
    }
    mask = tumour(grids["mask"]) if mask is None else mask
    return Case(name, images, write(folder / f"mask{suffix}", grids["mask"], mask))


def only(case, *modalities):
    return dataclasses.replace(case, images={m: case.images[m] for m in modalities}, mask=None)
