import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk


class CaseError(ValueError):
    """Something is wrong with one patient's files.

    The message starts with the patient's name, names the file, says what was expected and ends with what was found.
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
            patients: How many patients there are in all, where that is known.

        Returns:
            An error that counts and lists them, at most 20; or the only one, with its remedy if there are others.
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
    """Where the files of one patient are; nothing is read.

    Args:
        name: The patient's name.
        images: By modality, the path of the image file; or a DICOM series, or a volume of a file.
        mask: The same for the tumour mask, or a dict of it by the modality it was drawn on; `None` for a patient
            without one.
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
    """The positions of a 3D image's voxels in the scanner's space.

    The fields are in SimpleITK's order `(x, y, z)`, as its images give them; arrays on the grid have the opposite
    order, `(depth, height, width)`, which is `shape`.

    Args:
        size: Voxels along x, y and z.
        spacing: Distance between voxel centres in mm.
        origin: Position of the first voxel's centre in mm.
        direction: The 3x3 matrix, row by row, whose columns are the axes' directions.
    """

    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[float, ...]

    @classmethod
    def from_image(cls, image):
        """The grid of a 3D SimpleITK image."""
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @classmethod
    def from_dict(cls, values):
        """The grid that `to_dict` described, also after a way through JSON."""
        return cls(**{field.name: tuple(values[field.name]) for field in dataclasses.fields(cls)})

    def to_dict(self):
        """The fields as a dict that JSON can hold."""
        return dataclasses.asdict(self)

    @property
    def shape(self):
        """Voxels `(depth, height, width)`."""
        return self.size[::-1]

    @property
    def axes(self):
        """The 3x3 matrix whose columns are the steps in mm from one voxel to the next along x, y and z."""
        return np.reshape(self.direction, (3, 3)) * self.spacing

    def positions(self, indices):
        """Positions in mm of voxel indices `(..., 3)`, both in `(x, y, z)` order; indices need not be whole."""
        return indices @ self.axes.T + self.origin

    def indices(self, positions):
        """Voxel indices of positions in mm `(..., 3)`, the inverse of `positions`."""
        return (positions - np.asarray(self.origin)) @ np.linalg.inv(self.axes).T

    def matches(self, other):
        """Whether both grids have the same voxels, up to the rounding of file headers (a hundredth of a voxel)."""
        if self.size != other.size:
            return False
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.size]), axis=-1)
        return bool(np.abs(self.indices(other.positions(corners)) - corners).max() < 0.01)

    def coverage_by(self, other):
        """Share of this grid's volume, 0 to 1, that lies inside another; counted on 16 x 16 x 16 points."""
        points = np.stack(np.meshgrid(*[(np.arange(16) + 0.5) / 16 * n - 0.5 for n in self.size]), axis=-1)
        indices = other.indices(self.positions(points))
        return float(np.all((indices >= -0.5) & (indices <= np.asarray(other.size) - 0.5), axis=-1).mean())

    def crop(self, low, high):
        """The part of the grid from voxel `low` up to `high`, excluded, both `(z, y, x)` as an array is sliced."""
        low, high = np.asarray(low)[::-1], np.asarray(high)[::-1]
        origin = tuple(self.positions(low).tolist())
        return dataclasses.replace(self, size=tuple((high - low).tolist()), origin=origin)

    def image(self, array):
        """A SimpleITK image with the values of `array`, of this grid's `shape`."""
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)
        return image

    def resample(self, image, background=0.0, extend=False):
        """The values of an image at this grid's voxels, by position, in one linear interpolation.

        An image that has the same voxels, perhaps stored in another order of the axes, is not interpolated: its
        values come back unchanged.

        Args:
            image: A 3D SimpleITK image.
            background: Value outside the image.
            extend: Outside the image, take its nearest voxel instead of `background`.

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
    """One patient as the network sees it, and the way back to the patient's own grid.

    Args:
        name: The patient's name.
        images: One float32 array `(depth, height, width)` by modality, all on `grid`.
        mask: The tumour, uint8 {0, 1} on `grid`, or `None`.
        grid: The grid of the arrays; its axes are the patient's (left, posterior, superior), as near as may be.
        source: The first modality's own grid.
        centre: Voxel indices `(z, y, x)` of the centre of the body's bounding box.
        notes: What was done that the user may want to know, one sentence each.
        motions: By modality, the rigid motion by which it was aligned with the first one.
    """

    name: str
    images: Mapping[str, np.ndarray]
    mask: np.ndarray | None
    grid: Grid
    source: Grid
    centre: tuple[int, int, int]
    notes: tuple[str, ...] = ()
    motions: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def shape(self):
        """Voxels of each array `(depth, height, width)`."""
        return self.grid.shape

    @property
    def spacing(self):
        """Size of a voxel in mm `(z, y, x)`."""
        return self.grid.spacing[::-1]

    def images_of(self, modalities):
        """The images of these modalities by name; zeros for one that is missing, as in training with dropout."""
        return {name: self.images.get(name, np.zeros(self.shape, np.float32)) for name in modalities}

    def to_source(self, array, threshold=None):
        """Brings an array on `grid`, such as a probability map, back onto the first modality's own grid.

        Args:
            array: Numbers `(depth, height, width)`, of this case's `shape`.
            threshold: `None`, or the lowest value that belongs to the mask that is wanted.

        Returns:
            A SimpleITK image on `source`: float32, linearly interpolated; with a threshold, the uint8 mask {0, 1}
            of it.

        Raises:
            ValueError: The array has another shape.
        """
        array = np.asarray(array, dtype=np.float32)
        if array.shape != self.shape:
            raise ValueError(f"`array` must have the shape {self.shape} of {self.name}. Received: {array.shape}")
        # The grid may end up to half a voxel before its source does: `extend` fills that edge.
        values = self.source.resample(self.grid.image(array), extend=True)
        return self.source.image(values if threshold is None else (values >= threshold).astype(np.uint8))
