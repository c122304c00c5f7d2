"""DICOM structure sets and segmentations as masks."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._dicom_header import pydicom_errors
from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.dicom import Series, frame_value, read_frames, require_geometry, series_grid
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.polygons import rasterise

# SOP classes: RT Structure Set, Segmentation, Label Map Segmentation.
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_UNDAMAGED = "an undamaged DICOM structure set or segmentation"
# How far contours may lie from a slice, and frames from the regular line, as a share of the distance between slices.
_BETWEEN = 0.2


@dataclasses.dataclass(frozen=True)
class Structures:
    """Structures of a DICOM structure set or segmentation, as one mask.

    Args:
        path: The file.
        series: The image series that it refers to, if it is there; a structure set is read on its grid.
        patterns: Regular expressions that the structures' whole names must match, in any case. The structures of the
            n-th pattern have the label n. None: the only structure of the file, with the label 1.
        names: The names of all structures in the file that are not empty.
    """

    path: Path
    series: Series | None
    patterns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.path} ({', '.join(map(repr, self.names)) or 'no structure'})"


def find_structures(
    objects: Mapping[str, Sequence[Path]], series: Sequence[Series], patterns: Sequence[str], patient: str
) -> list[Structures]:
    """The structure sets and segmentations among a patient's DICOM objects.

    Args:
        objects: Files by SOP class, as `find_objects` gives them.
        series: The patient's image series.
        patterns: As those of `Structures`.
        patient: The patient's name, for messages.

    Returns:
        Those files that have structures for all patterns; all files if none has.

    Raises:
        CaseError: A file is damaged; or it is the only one, and no structure or several match.
    """
    found = []
    for path in (path for kind in (STRUCTURE_SET, *SEGMENTATIONS) for path in objects.get(kind, ())):
        refuse = refuser(path, patient)
        with pydicom_errors(refuse, _UNDAMAGED):
            file, structures = _open(path, refuse)
            # Its own series, which holds no image, is one of these.
            referred = {element.value for element in file.iterall() if element.keyword == "SeriesInstanceUID"}
        own = next((one for one in series if one.uid in referred), None)
        found.append(Structures(path, own, tuple(patterns), tuple(name for name, _ in structures)))
    found = [one for one in found if all(_matching(pattern, one.names) for pattern in patterns)] or found
    if len(found) == 1:
        _choose(found[0].names, patterns, refuser(found[0].path, patient))
    return found


def read_structures(source: Structures, patient: str) -> sitk.Image:
    """Reads structures as a label image.

    Contours count by the even-odd rule in each slice: a contour within another is a hole. Where structures of several
    patterns overlap, the later one counts. Fractions of a segmentation count from one half on.

    Args:
        source: The `Structures`.
        patient: The patient's name, for messages.

    Returns:
        A uint8 image: of a structure set on the grid of its series, of a segmentation on the grid of its frames.

    Raises:
        CaseError: The file is damaged; no structure or several match; the series is unknown; or contours do not lie in
            its slices.
    """
    refuse = refuser(source.path, patient)
    with pydicom_errors(refuse, _UNDAMAGED):
        file, found = _open(source.path, refuse)
        chosen = _choose([name for name, _ in found], source.patterns, refuse)
        if file.SOPClassUID != STRUCTURE_SET:
            grid, frames = _frames(source.path, file, patient, refuse)
            array = np.zeros(grid.shape, np.uint8)
            for label, index in chosen:
                for number, pixels in frames:
                    array[number][pixels(found[index][1])] = label
            return grid.image(array)
        if source.series is None:
            raise refuse("a structure set that refers to a series in the patient's folder", "one of another series")
        grid, _ = series_grid(source.series, patient)
        array = np.zeros(grid.shape, np.uint8)
        for label, index in chosen:
            for number, polygons in _by_slice(*found[index], grid, refuse):
                array[number][rasterise(polygons, grid.shape[1:])] = label
        return grid.image(array)


def _matching(pattern, names):
    return [index for index, name in enumerate(names) if re.fullmatch(pattern, name, re.IGNORECASE)]


def _choose(names, patterns, refuse):
    """`(label, index)` of the structures that count."""
    listed = ", ".join(map(repr, names)) or "none"
    if not patterns and len(names) != 1:
        raise refuse("a file of one structure, unless `data.mask_structures` says which ones count", listed)
    chosen = []
    for label, pattern in enumerate(patterns or [".*"], start=1):
        found = _matching(pattern, names)
        if not found:
            raise refuse(f"a file with a structure whose name matches {pattern!r}", listed)
        chosen += [(label, index) for index in found]
    return chosen


def _open(path, refuse):
    """The pydicom dataset; and the name of each structure that is not empty, with its contours or segment number."""
    import pydicom

    file = pydicom.dcmread(path)
    if file.SOPClassUID in SEGMENTATIONS:
        return file, [(str(one.SegmentLabel), int(one.SegmentNumber)) for one in file.SegmentSequence]
    if file.SOPClassUID != STRUCTURE_SET:
        raise refuse("a DICOM structure set or segmentation", file.SOPClassUID.name)
    contours = {int(roi.ReferencedROINumber): list(_contours(roi)) for roi in file.get("ROIContourSequence") or []}
    names = [(str(roi.get("ROIName") or ""), int(roi.ROINumber)) for roi in file.StructureSetROISequence]
    return file, [(name, contours[number]) for name, number in names if contours.get(number)]


def _contours(roi) -> Iterator[np.ndarray]:
    """The closed contours of a structure in mm, `(points, 3)`, each once."""
    seen = set()
    for contour in roi.get("ContourSequence", []):
        data = tuple(contour.ContourData or ())
        if contour.ContourGeometricType in _CLOSED and len(data) >= 9 and data not in seen:
            seen.add(data)
            yield np.reshape(np.array(data, float), (-1, 3))


def _by_slice(name: str, contours: Sequence[np.ndarray], grid: Grid, refuse):
    """The polygons of each slice in pixels, by the number of the slice."""
    slices = {}
    for contour in contours:
        points = grid.indices(contour)
        number = int(np.rint(points[:, 2].mean()))
        if np.abs(points[:, 2] - number).max() > _BETWEEN:
            raise refuse("contours in the slices of the series", f"one of {name!r} between them or across them")
        if not 0 <= number < grid.size[2]:
            raise refuse("contours in the slices of the series", f"one of {name!r} outside all {grid.size[2]} slices")
        slices.setdefault(number, []).append(points[:, :2])
    steps = np.diff(sorted(slices))
    if len(steps) > 1 and steps.min() > 1:
        raise refuse(
            "contours on each slice of the structure",
            f"{name!r} on every {steps.min()} or more slices, with nothing in between",
        )
    return slices.items()


def _frames(path, file, patient, refuse):
    """The `Grid` of a segmentation; and for each frame its slice and a function that gives the pixels of a segment."""
    slices = read_frames(path, file)
    for one in slices:
        require_geometry(one, patient)
        if not np.allclose(one.orientation, slices[0].orientation, atol=1e-3):
            raise refuse("a segmentation of one orientation", "frames of several")
    positions, first = np.array([one.position for one in slices]), slices[0]
    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    along = positions @ normal
    steps = np.diff(np.unique(np.round(along, 3)))
    step = float(steps.min()) if len(steps) else first.thickness[0]
    numbers = np.rint((along - along.min()) / step).astype(int)
    origin = positions[along.argmin()]
    line = origin + np.outer(numbers * step, normal)
    if (aside := np.linalg.norm(positions - line, axis=1).max()) > _BETWEEN * step:
        raise refuse("a segmentation of evenly spaced frames", f"one {aside:.3g} mm off the line of the others")
    size, direction = (*first.size, int(numbers.max()) + 1), np.stack([row, column, normal], 1)
    grid = Grid(size, (*first.spacing[::-1], step), tuple(origin.tolist()), tuple(direction.ravel().tolist()))

    def chosen(frame, values):
        if file.SegmentationType == "LABELMAP":
            return lambda segment: values == segment
        own = frame_value(file, frame, "SegmentIdentification", "ReferencedSegmentNumber")
        half = file.MaximumFractionalValue / 2 if file.SegmentationType == "FRACTIONAL" else 1
        return lambda segment: (values >= half) & (segment == own)

    pixels = np.reshape(file.pixel_array, (-1, *grid.shape[1:]))
    return grid, [(number, chosen(frame, pixels[frame])) for frame, number in enumerate(numbers)]
