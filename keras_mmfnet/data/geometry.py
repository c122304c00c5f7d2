"""Grids of images, and resampling."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import SimpleITK as sitk


@dataclasses.dataclass(frozen=True)
class Grid:
    """The geometry of a 3D image: size, spacing, origin and direction.

    The fields are in SimpleITK's order `(x, y, z)`. Arrays on the grid have the reverse order,
    `(depth, height, width)`, which is `shape`.

    Args:
        size: Voxels along x, y and z.
        spacing: Distance between voxel centres in mm.
        origin: Position of the first voxel's centre in mm.
        direction: The 3x3 matrix, in row-major order, whose columns are the directions of the axes.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @classmethod
    def from_image(cls, image: sitk.Image) -> Self:
        """The grid of a 3D SimpleITK image."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The grid of a dict from `to_dict`, also after conversion to JSON and back."""
        return cls(**{field.name: tuple(values[field.name]) for field in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, which can be converted to JSON."""
        return dataclasses.asdict(self)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels `(depth, height, width)`."""
        return self.size[::-1]

    @property
    def axes(self) -> np.ndarray:
        """The 3x3 matrix whose columns are the steps in mm from one voxel to the next along x, y and z."""
        return np.reshape(self.direction, (3, 3)) * self.spacing

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Positions in mm of voxel indices `(..., 3)`, both in `(x, y, z)` order; indices may be fractions."""
        return indices @ self.axes.T + self.origin

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Voxel indices of positions in mm `(..., 3)`, the inverse of `positions`."""
        return (positions - np.asarray(self.origin)) @ np.linalg.inv(self.axes).T

    def matches(self, other: "Grid") -> bool:
        """Whether both grids have the same voxels. The tolerance is 0.01 voxels, because file headers are rounded."""
        if self.size != other.size:
            return False
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.size]), axis=-1)
        return bool(np.abs(self.indices(other.positions(corners)) - corners).max() < 0.01)

    def coverage_by(self, other: "Grid") -> float:
        """The share of this grid's volume that lies inside another, in [0, 1], estimated from 16 x 16 x 16 points."""
        points = np.stack(np.meshgrid(*[(np.arange(16) + 0.5) / 16 * n - 0.5 for n in self.size]), axis=-1)
        indices = other.indices(self.positions(points))
        return float(np.all((indices >= -0.5) & (indices <= np.asarray(other.size) - 0.5), axis=-1).mean())

    def crop(self, low: Sequence[int], high: Sequence[int]) -> "Grid":
        """The part of the grid from voxel `low` (included) to `high` (excluded), both `(z, y, x)`."""
        low, high = np.asarray(low)[::-1], np.asarray(high)[::-1]
        origin = tuple(self.positions(low).tolist())
        return dataclasses.replace(self, size=tuple((high - low).tolist()), origin=origin)

    def image(self, array: np.ndarray) -> sitk.Image:
        """A SimpleITK image of an array of this grid's `shape`."""
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def resample(self, image: sitk.Image, background: float = 0.0, extend: bool = False) -> np.ndarray:
        """Resamples an image to this grid by position, with linear interpolation.

        An image with the same voxels, in any order of axes, is not interpolated.

        Args:
            image: A 3D SimpleITK image.
            background: Value outside the image.
            extend: Outside the image, use the nearest voxel instead of `background`.

        Returns:
            An array of this grid's `shape` and the image's dtype.
        """
        order = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)
        reordered = sitk.DICOMOrient(image, order)
        if not self.matches(Grid.from_image(reordered)):
            reordered = sitk.Resample(
                image,
                self.size,
                sitk.Transform(),
                sitk.sitkLinear,
                self.origin,
                self.spacing,
                self.direction,
                background,
                image.GetPixelID(),
                extend,
            )
        return sitk.GetArrayFromImage(reordered)


def nearest_rotation(axes: np.ndarray) -> np.ndarray:
    """The matrix of orthonormal columns nearest to the columns of a 3x3 matrix; one that has such columns is kept."""
    axes = axes / np.linalg.norm(axes, axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() < 1e-6:
        return axes
    left, _, right = np.linalg.svd(axes)
    return left @ right


def upright_grid(grid: Grid) -> Grid:
    """The grid of the same voxels whose axes follow the patient's: left, posterior, superior.

    SimpleITK's `DICOMOrient` reorders an image to it.
    """
    voxel = sitk.Image(1, 1, 1, sitk.sitkUInt8)
    voxel.SetDirection(grid.direction)
    direction = sitk.DICOMOrient(voxel, "LPS").GetDirection()
    rotation = np.rint(np.reshape(grid.direction, (3, 3)).T @ np.reshape(direction, (3, 3)))
    order = np.abs(rotation).argmax(axis=0)
    corner = np.where(rotation.sum(axis=1) < 0, np.asarray(grid.size) - 1, 0)
    size, spacing = (tuple(np.asarray(values)[order].tolist()) for values in (grid.size, grid.spacing))
    return Grid(size, spacing, tuple(grid.positions(corner).tolist()), direction)


def in_plane_grid(grid: Grid, spacing: float | None) -> Grid:
    """The grid with pixels of `spacing` mm in plane, and the same slices and first edges.

    Args:
        grid: A `Grid`.
        spacing: Pixel size in mm along x and y; `None` keeps that of the grid.

    Returns:
        A `Grid`. All voxel centres lie inside `grid`; its last edges are less than half a pixel from those of `grid`.
    """
    if spacing is None:
        return grid
    new = (spacing, spacing, grid.spacing[2])
    # 1e-6 excludes a centre that would lie on the edge after rounding.
    size = np.maximum(np.ceil(np.multiply(grid.size, grid.spacing) / new - 0.5 - 1e-6), 1).astype(int)
    first_centre = (np.divide(new, grid.spacing) - 1) / 2
    return Grid(tuple(size.tolist()), new, tuple(grid.positions(first_centre).tolist()), grid.direction)


def resample(image: sitk.Image, grid: Grid, background: float) -> np.ndarray:
    """Resamples a float image to a grid by position, with antialiasing and linear interpolation.

    Along each axis on which the grid's voxels are larger than the image's, the image is first smoothed. The Gaussian
    widens a profile from the full width at half maximum of one old voxel to that of one new voxel.

    Args:
        image: A 3D SimpleITK float image.
        grid: The target `Grid`.
        background: Value outside the image.

    Returns:
        An array of the grid's shape.
    """
    own = Grid.from_image(image)
    # The grid's axis nearest to each of the image's.
    nearest = np.abs(np.reshape(own.direction, (3, 3)).T @ np.reshape(grid.direction, (3, 3))).argmax(axis=1)
    old, new = np.asarray(own.spacing), np.asarray(grid.spacing)[nearest]
    variance = np.maximum(new**2 - old**2, 0) / (8 * math.log(2))
    # A Gaussian narrower than a quarter of a voxel has hardly any effect.
    variance[variance < (old / 4) ** 2] = 0
    if variance.any():
        image = sitk.DiscreteGaussian(image, variance.tolist(), maximumKernelWidth=256)
    return grid.resample(image, background)
