"""What a structure set and a segmentation have in common."""

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import DRAFT, Series, Slice, series_grid
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.version import __version__

# What every object says of itself; at most 64 characters.
MANUFACTURER, MODEL, VERSION = "keras-mmfnet", "MMFNet", __version__
UNREVIEWED = "AI, not reviewed"
# What an image must have for DICOM objects to refer to it: elements of type 1, neither absent nor empty.
NEEDED = "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID".split()
# Of the patient and the study. Those of type 2 are in every object, though they may be empty; the others as they are.
TYPE_2 = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime ReferringPhysicianName StudyID "
    "AccessionNumber PositionReferenceIndicator"
).split()
_COPIED = (
    "IssuerOfPatientID AnatomicalOrientationType PatientIdentityRemoved DeidentificationMethod StudyDescription"
).split()
# Colours that the colour-blind tell apart (Okabe and Ito).
_COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
NEOPLASM = ("108369006", "SCT", "Neoplasm")
_CODES = {
    **dict.fromkeys(("tumour", "tumor", "neoplasm"), NEOPLASM),
    **dict.fromkeys(("gtv", "gross tumor volume"), ("228791009", "SCT", "Gross Tumor Volume")),
    **dict.fromkeys(("oedema", "edema"), ("79654002", "SCT", "Edema")),
    "necrosis": ("6574001", "SCT", "Necrosis"),
}


@dataclasses.dataclass(frozen=True)
class Structure:
    """One of the structures of a DICOM object. Its number is its place among them, from 1.

    Args:
        name: What it is called, 1 to 64 characters without a backslash.
        mask: A uint8 image {0, 1} on the grid of the series.
        probability: A float image in [0, 1] on the same grid, whose level of 0.5 contours follow. The mask decides
            where the two disagree. `None`: contours follow the edges of pixels.
        kind: RT ROI Interpreted Type, such as `"GTV"` or `"ORGAN"`; may be empty.
        colour: (red, green, blue), 0 to 255; `None` for one by number.
        code: Code value, scheme and meaning, such as `("6574001", "SCT", "Necrosis")`; `None` for the one of a known
            name ("tumour", "GTV", "edema", "necrosis").

    Raises:
        ValueError: `colour` is not three whole numbers from 0 to 255.
    """

    name: str
    mask: sitk.Image
    probability: sitk.Image | None = None
    kind: str = "GTV"
    colour: tuple[int, int, int] | None = None
    code: tuple[str, str, str] | None = None

    def __post_init__(self):
        if self.colour is not None and not (len(self.colour) == 3 and all(c in range(256) for c in self.colour)):
            raise ValueError(f"`colour` must be three whole numbers from 0 to 255. Received: {self.colour}")


@dataclasses.dataclass(frozen=True)
class Plane:
    """A slice as its image's header places it.

    Args:
        image: The header.
        frame: Number of the frame in a file of several, from 1, or `None`.
        origin: Position of the first pixel's centre in mm.
        axes: `(3, 2)`, the steps in mm to the next column and to the next row.
    """

    image: Any
    frame: int | None
    origin: np.ndarray
    axes: np.ndarray

    def reference(self):
        """An item that refers to the image."""
        import pydicom

        item = pydicom.Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = self.image.SOPClassUID, self.image.SOPInstanceUID
        if self.frame:
            item.ReferencedFrameNumber = self.frame
        return item


@contextlib.contextmanager
def library_errors(series: Series):
    """Keeps a library's warnings, logs and errors from naming the patient."""
    import pydicom

    # What an image holds against the standard is judged here, or kept as it is.
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        try:
            yield
        except (OSError, CaseError):
            raise
        except Exception as error:
            raise refused(series, f"a {type(error).__name__} of the library") from None


def refused(series, received):
    """The error for images that no object can refer to."""
    return CaseError(f"{series}: must be images that a DICOM object can refer to. Received: {received}")


def arrays(structures: Sequence[Structure], series: Series) -> tuple[Grid, list[Slice], list[np.ndarray]]:
    """The grid, its slices and the bool masks `(depth, height, width)` of structures, which must fit the series.

    Raises:
        ValueError: All masks are empty, one lies on another grid, the series is none of DICOM, or a name or a
            probability cannot be used.
    """
    names = [structure.name for structure in structures]
    for name in names:
        if not (1 <= len(name) <= 64 and name.strip() == name and name.isprintable()) or "\\" in name:
            raise ValueError(f"`name` must have 1 to 64 characters and no backslash. Received: {name!r}")
    if len(set(names)) < len(names) or not names:
        raise ValueError(f"structures must be one or more with names that differ. Received: {names}")
    if not isinstance(series, Series):
        raise ValueError(f"the image must be a DICOM series to be referred to. Received: {series}")
    found = [sitk.GetArrayFromImage(structure.mask) > 0 for structure in structures]
    if not any(array.any() for array in found):
        raise ValueError("the mask must hold a voxel of tumour to be written as DICOM. Received: an empty mask")
    grid, slices = series_grid(series, "the patient")
    for structure in structures:
        for what, image in (("mask", structure.mask), ("probability", structure.probability)):
            if image is not None and not grid.matches(Grid.from_image(image)):
                received = f"{image.GetSize()} voxels, elsewhere"
                raise ValueError(f"the {what} must lie on the grid of its series. Received: {received}")
        if structure.probability is not None:
            values = sitk.GetArrayViewFromImage(structure.probability)
            if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
                received = f"{values.min()} to {values.max()}"
                raise ValueError(f"the probability must lie in [0, 1]. Received: {received}")
    return grid, slices, found


def planes(series: Series, grid: Grid, slices: Sequence[Slice]) -> list[Plane]:
    """The slices of a grid as the headers of a series place them; no pixel is read or decoded.

    Raises:
        CaseError: A header lacks what an object must refer to, or places its slice half a pixel or more elsewhere.
    """
    import pydicom

    images = {path: pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in series.files}
    for image in images.values():
        if lacking := [f"{pydicom.tag.Tag(keyword)} {keyword}" for keyword in NEEDED if not image.get(keyword)]:
            raise refused(series, f"images without {', '.join(lacking)}")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if len({image[keyword].value for image in images.values()}) > 1:
            raise refused(series, f"images with several {keyword}s")
    corners, found = np.array([(0, 0), (grid.size[0] - 1, 0), (0, grid.size[1] - 1)]), []
    for index, one in enumerate(slices):
        axes = np.reshape(one.orientation, (2, 3)).T * one.spacing[::-1]
        plane = Plane(images[one.path], None if one.frame is None else one.frame + 1, np.array(one.position), axes)
        expected = grid.positions(np.c_[corners, np.full(3, index)])
        away = np.linalg.norm(plane.origin + corners @ plane.axes.T - expected, axis=1).max()
        if away > 0.5 * min(grid.spacing[:2]) + 0.05 * grid.spacing[2]:
            raise refused(series, f"slice {index} {away:.3g} mm from where its image lies")
        found.append(plane)
    if len({(plane.image.SOPInstanceUID, plane.frame) for plane in found}) < len(found):
        raise refused(series, "one image for several slices")
    return found


def describe(dataset: Any, image: Any, reviewer: str | None) -> None:
    """Gives an object the patient and study of an image and our labels."""
    from pydicom import config
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import validate_value

    for keyword in (*TYPE_2, "StudyInstanceUID", "FrameOfReferenceUID", *_COPIED):
        kind, value = dictionary_VR(keyword), image.get(keyword)
        if keyword in _COPIED and not value:
            continue
        if kind in ("DA", "TM"):  # anonymised ones are often none; empty is allowed
            try:
                validate_value(kind, value, config.RAISE)
            except ValueError:
                value = None
        if keyword == "PatientSex" and value not in ("M", "F", "O"):
            value = None
        setattr(dataset, keyword, value)
    dataset.Manufacturer, dataset.ManufacturerModelName, dataset.SoftwareVersions = MANUFACTURER, MODEL, VERSION
    dataset.SeriesDescription = DRAFT if reviewer is None else f"{MODEL}, reviewed by {reviewer}"[:64]


def reviewer_of(name: str | None) -> str | None:
    """A name as DICOM's elements can hold it; `None` if nobody has reviewed."""
    return None if name is None else re.sub(r"[\\^=\x00-\x1f]", " ", name).strip()[:40] or "an expert"


def colour(structure: Structure, number: int) -> tuple[int, int, int]:
    """The colour of the structure with a number."""
    return structure.colour or _COLOURS[(number - 1) % len(_COLOURS)]


def code(structure: Structure) -> tuple[str, str, str] | None:
    """The code of a structure, if known."""
    return structure.code or _CODES.get(structure.name.lower())


def encode(dataset: Any, image: Any, names: Sequence[str]) -> tuple[bytes, Any]:
    """A file's content, in the image's character set if that has all letters, else in UTF-8, and what is read from it.

    Raises:
        CaseError: A text is not read back as it was.
    """
    import pydicom
    from pydicom.charset import python_encoding

    own = image.get("SpecificCharacterSet")
    known = all(part in python_encoding for part in ([own] if isinstance(own, str) else own or []))
    # Without a character set letters beyond ASCII are not allowed; the image's own are left as they are.
    for charset in [own] * (known and (bool(own) or all(map(str.isascii, names)))) + ["ISO_IR 192"]:
        if charset:
            dataset.SpecificCharacterSet = charset
        pydicom.dcmwrite(content := io.BytesIO(), dataset, enforce_file_format=True)
        back = pydicom.dcmread(io.BytesIO(content.getvalue()))
        if _texts(back) == _texts(dataset):
            return content.getvalue(), back
    raise CaseError("the object must be read back as it was written. Received: other texts")


def _texts(dataset):
    return [
        str(element.value or "").strip()
        for element in dataset.iterall()
        if element.VR in ("PN", "LO", "SH", "ST", "LT", "UI", "CS")
    ]


def dice(found: np.ndarray, expected: np.ndarray) -> float:
    """Dice of two bool masks; 1 of two empty ones."""
    total = np.count_nonzero(found) + np.count_nonzero(expected)
    return 2 * np.count_nonzero(found & expected) / total if total else 1.0


def require_same(found: np.ndarray, expected: np.ndarray, structure: Structure, least: float = 1.0) -> None:
    """Refuses what was read back if its Dice with the mask is below `least`."""
    if (received := dice(found, expected)) < least:
        message = f"{structure.name!r}: must be read back as it was written, with a Dice of {least} or more"
        raise CaseError(f"{message}. Received: {received:.4f}; nothing was written")
