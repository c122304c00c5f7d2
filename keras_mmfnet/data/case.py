import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.registration import RigidTransform


def group_messages(messages: Iterable[str]) -> list[str]:
    """Joins messages, each `patient: text`, that differ in nothing but the patient's name and numbers.

    Returns:
        Of each kind the first message, followed by the number of the other patients and the first five names.
    """
    kinds = {}
    for message in messages:
        name, _, text = message.partition(": ")
        kind = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text.replace(name, "*"))
        kinds.setdefault(kind, []).append((name, message))
    lines = []
    for (_, first), *others in kinds.values():
        names = listed([name for name, _ in others], 5)
        same = f" (likewise for {len(others)} other{'s' if len(others) > 1 else ''}: {names})"
        lines.append(first + same if others else first)
    return lines


def listed(texts: Sequence[str], most: int = 10) -> str:
    """The first texts of several, such as names, in one line."""
    return ", ".join(texts[:most]) + ", ..." * (len(texts) > most)


class CaseError(ValueError):
    """A patient's files cannot be used.

    The message has the patient's name, the file, what was expected and what was received.
    """

    @property
    def patient(self) -> str:
        """The patient's name."""
        return str(self).partition(": ")[0]

    @classmethod
    def of_several(cls, errors: Sequence["CaseError"], patients: int | None = None) -> "CaseError":
        """Combines the errors of several patients.

        Args:
            errors: One error per patient that cannot be used, at least one.
            patients: The number of all patients, if known.

        Returns:
            An error that counts them and lists the first 20 kinds, see `group_messages`. A single error is returned.
            The remedy is named if there may be other patients.
        """
        if len(errors) == 1:
            return errors[0] if patients in (None, 1) else cls(f"{errors[0]} (--skip-bad leaves this patient out)")
        kinds = group_messages(map(str, errors))
        listed = [f"  {line}" for line in kinds[:20]]
        if len(kinds) > 20:
            listed.append(f"  ... and {len(kinds) - 20} more")
        count = f"{len(errors)} of {patients}" if patients else len(errors)
        remedy = "" if patients == len(errors) else "; --skip-bad leaves them out"
        return cls("\n".join([f"{count} patients cannot be used{remedy}:", *listed]))


class ZScoreError(CaseError):
    """A patient's images are z-scores already, times `scale`, where the recipe expects raw intensities."""

    def __init__(self, message: str, scale: float):
        super().__init__(message)
        self.scale = scale

    def __reduce__(self):
        return type(self), (str(self), self.scale)


@dataclasses.dataclass(frozen=True)
class StructureFiles:
    """A mask that is a file for each structure.

    Args:
        files: `{structure: source}`, each a mask of one label.
    """

    files: Mapping[str, object]

    def __post_init__(self):
        object.__setattr__(self, "files", {name: _path(source) for name, source in self.files.items()})

    def __str__(self):
        return ", ".join(dict.fromkeys(map(str, self.files.values())))

    def __hash__(self):
        return hash(tuple(self.files.items()))


def files_of(mask: object) -> list[object]:
    """The sources of a mask: one, or one for each structure."""
    return list(mask.files.values()) if isinstance(mask, StructureFiles) else [mask]


@dataclasses.dataclass(frozen=True)
class Case:
    """The paths of one patient's files.

    Args:
        name: The patient's name.
        images: `{modality: source}`. A source is the path of an image file, a DICOM `Series` or a `Volume` of a file.
        mask: The source of the mask, `{modality it was drawn on: source}`, or `None`. It may be `StructureFiles`.
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


@dataclasses.dataclass(frozen=True, eq=False)
class PreprocessedCase:
    """One preprocessed patient, with the grids to map results back to the original image.

    Args:
        name: The patient's name.
        images: `{modality: float32 (depth, height, width)}`, all on `grid`.
        masks: `{structure: uint8 {0, 1}}`, each on `grid`, or `None`.
        grid: The grid of the arrays; its axes are as close as possible to the patient's (left, posterior, superior).
        source: The grid of the reference modality's image.
        centre: Voxel indices `(z, y, x)` of the centre of the body's bounding box.
        notes: Remarks on the preprocessing for the user, one sentence each.
        transforms: `{modality: rigid transform}` that aligned it with the reference modality.
        volumes_ml: Volume in ml of all structures together and of each of them, if known; otherwise the voxels are
            counted.
    """

    name: str
    images: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray] | None
    grid: Grid
    source: Grid
    centre: tuple[int, int, int]
    notes: tuple[str, ...] = ()
    transforms: Mapping[str, RigidTransform] = dataclasses.field(default_factory=dict)
    volumes_ml: tuple[float, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Voxels of each array `(depth, height, width)`."""
        return self.grid.shape

    @property
    def spacing(self) -> tuple[float, ...]:
        """Voxel size in mm `(z, y, x)`."""
        return self.grid.spacing[::-1]

    @property
    def mask(self) -> np.ndarray | None:
        """The voxels of any structure, uint8 {0, 1} on `grid`, or `None`."""
        if self.masks is None:
            return None
        first, *others = self.masks.values()
        return functools.reduce(np.maximum, others, first)

    @property
    def tumour_ml(self) -> float:
        """Volume of all structures together in ml."""
        if self.volumes_ml:
            return self.volumes_ml[0]
        return float(np.count_nonzero(self.mask) * np.prod(self.spacing) / 1000)

    @property
    def structures_ml(self) -> dict[str, float]:
        """Volume of each structure in ml, by name."""
        if self.volumes_ml:
            return dict(zip(self.masks, self.volumes_ml[1:], strict=True))
        voxel = float(np.prod(self.spacing)) / 1000
        return {name: np.count_nonzero(mask) * voxel for name, mask in (self.masks or {}).items()}

    def images_of(self, modalities: Iterable[str]) -> dict[str, np.ndarray]:
        """The images of these modalities by name. A missing one is zeros, as in modality dropout."""
        there = self.images
        return {name: there[name] if name in there else np.zeros(self.shape, np.float32) for name in modalities}

    def to_source(self, array: np.ndarray) -> sitk.Image:
        """Resamples an array on `grid`, such as a probability map, to the grid of the reference modality's image.

        Args:
            array: Values `(depth, height, width)`, of this case's `shape`.

        Returns:
            A SimpleITK image on `source`: float32, linearly interpolated.

        Raises:
            ValueError: The array has another shape.
        """
        array = np.asarray(array, dtype=np.float32)
        if array.shape != self.shape:
            raise ValueError(f"`array` must have the shape {self.shape} of {self.name}. Received: {array.shape}")
        # The grid can be up to half a voxel smaller than its source: `extend` fills this edge.
        return self.source.image(self.source.resample(self.grid.image(array), extend=True))
