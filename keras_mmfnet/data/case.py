import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.registration import Motion


class CaseError(ValueError):
    """A patient's files cannot be used.

    The message starts with the patient's name, names the file, says what was expected and ends with what was received.
    """

    @property
    def patient(self) -> str:
        """The patient's name."""
        return str(self).partition(": ")[0]

    @classmethod
    def of_several(cls, errors: Sequence["CaseError"], patients: int | None = None) -> "CaseError":
        """One error for the patients who cannot be used.

        Args:
            errors: Their errors, one or more.
            patients: The number of all patients, if known.

        Returns:
            An error that counts them and lists the first 20; of a single error that error, with the remedy if there
            are other patients.
        """
        if len(errors) == 1:
            return errors[0] if patients in (None, 1) else cls(f"{errors[0]} (--skip-bad leaves this patient out)")
        listed = [f"  {error}" for error in errors[:20]]
        if len(errors) > 20:
            listed.append(f"  ... and {len(errors) - 20} more")
        count = f"{len(errors)} of {patients}" if patients else len(errors)
        return cls("\n".join([f"{count} patients cannot be used; --skip-bad leaves them out:", *listed]))


@dataclasses.dataclass(frozen=True)
class Case:
    """The paths of one patient's files; nothing is read.

    Args:
        name: The patient's name.
        images: By modality, the path of an image file, a DICOM `Series` or a `Volume` of a file.
        mask: The same for the tumour mask, or a dict of masks by the modality they were drawn on, or `None`.
    """

    name: str
    images: Mapping[str, object]
    mask: object = None

    def __post_init__(self):
        object.__setattr__(self, "images", {modality: _path(source) for modality, source in self.images.items()})
        several = isinstance(self.mask, Mapping)
        mask = {modality: _path(source) for modality, source in self.mask.items()} if several else _path(self.mask)
        object.__setattr__(self, "mask", mask)


def _path(source):
    return Path(source) if isinstance(source, str) else source


@dataclasses.dataclass(frozen=True)
class Grid:
    """The geometry of a 3D image: size, spacing, origin and direction.

    The fields are in SimpleITK's order `(x, y, z)`. Arrays on the grid have the opposite order,
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
        """The grid that `to_dict` wrote, also after conversion to JSON and back."""
        return cls(**{field.name: tuple(values[field.name]) for field in dataclasses.fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that can be written as JSON."""
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
        """Whether both grids have the same voxels, within a hundredth of a voxel, as file headers are rounded."""
        if self.size != other.size:
            return False
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.size]), axis=-1)
        return bool(np.abs(self.indices(other.positions(corners)) - corners).max() < 0.01)

    def coverage_by(self, other: "Grid") -> float:
        """Share of this grid's volume in [0, 1] that lies inside another, from 16 x 16 x 16 points."""
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

        An image with the same voxels, in any order of its axes, is not interpolated: its values are unchanged.

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


@dataclasses.dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """One preprocessed patient, with the grids that lead back to the original image.

    Args:
        name: The patient's name.
        images: By modality, a float32 array `(depth, height, width)`, all on `grid`.
        mask: The tumour, uint8 {0, 1} on `grid`, or `None`.
        grid: The grid of the arrays; its axes are as close as possible to the patient's (left, posterior, superior).
        source: The grid of the reference modality's image.
        centre: Voxel indices `(z, y, x)` of the centre of the body's bounding box.
        notes: What the user may want to know about the preprocessing, one sentence each.
        motions: By modality, the rigid transform that aligned it with the reference modality.
    """

    name: str
    images: Mapping[str, np.ndarray]
    mask: np.ndarray | None
    grid: Grid
    source: Grid
    centre: tuple[int, int, int]
    notes: tuple[str, ...] = ()
    motions: Mapping[str, Motion] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of each array `(depth, height, width)`."""
        return self.grid.shape

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm `(z, y, x)`."""
        return self.grid.spacing[::-1]

    def images_of(self, modalities: Iterable[str]) -> dict[str, np.ndarray]:
        """The images of these modalities by name; zeros for a missing one, as in modality dropout."""
        return {name: self.images.get(name, np.zeros(self.shape, np.float32)) for name in modalities}

    def to_source(self, array: np.ndarray, threshold: float | None = None) -> sitk.Image:
        """Resamples an array on `grid`, such as a probability map, to the grid of the reference modality's image.

        Args:
            array: Values `(depth, height, width)`, of this case's `shape`.
            threshold: Lowest value that belongs to the mask; `None` for no mask.

        Returns:
            A SimpleITK image on `source`: float32, linearly interpolated; with a threshold, a uint8 mask {0, 1}.

        Raises:
            ValueError: The array has another shape.
        """
        array = np.asarray(array, dtype=np.float32)
        if array.shape != self.shape:
            raise ValueError(f"`array` must have the shape {self.shape} of {self.name}. Received: {array.shape}")
        # The grid may be up to half a voxel smaller than its source: `extend` fills that edge.
        values = self.source.resample(self.grid.image(array), extend=True)
        return self.source.image(values if threshold is None else (values >= threshold).astype(np.uint8))
