"""DICOM structure sets and segmentations as masks."""

import contextlib
import dataclasses
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._dicom_header import pydicom_errors, read_header
from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.case import CaseError, StructureFiles, listed
from keras_mmfnet.data.dicom import (
    SEGMENTATIONS,
    STRUCTURE_SET,
    Series,
    Slice,
    frame_value,
    read_frames,
    require_geometry,
    series_grid,
)
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.polygons import fill_nested, rasterise

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_UNDAMAGED = "an undamaged DICOM structure set or segmentation"
# How far contours may lie from a slice, and frames from the regular line, as a share of the distance between slices.
_BETWEEN = 0.2
# How far contours may reach beyond the image, in voxels.
_OUTSIDE = 1.5
# The largest distance between slices, in thicknesses of a slice.
_GAP = 2.05


@dataclasses.dataclass(frozen=True)
class DicomStructures:
    """Structures of a DICOM structure set or segmentation, as one mask.

    Args:
        path: The file.
        series: The image series that it was drawn on, if it is there; it is read on its grid.
        pattern: Regular expression that the structures' whole names must match, ignoring case. `None`: the only
            structure of the file.
        names: The names of all structures in the file that are not empty.
        frame_of_reference: UID of the coordinates that they are given in.
    """

    path: Path
    series: Series | None
    pattern: str | None = None
    names: tuple[str, ...] = ()
    frame_of_reference: str = ""

    def __str__(self):
        return f"{self.path} ({', '.join(map(repr, self.names)) or 'no structure'})"


def drawn_mask(
    objects: Mapping[str, Sequence[Path]],
    series: Sequence[Series],
    named: Mapping[str, str],
    patient: str,
    allow_empty: bool = False,
) -> DicomStructures | StructureFiles | None:
    """The mask in the structure sets and segmentations among a patient's DICOM objects, or `None`.

    Of several files, the one with structures for the most patterns is used; empty structures are used only if no
    file has others. Its series is the one with the images that it refers to, or else with the UID or frame of
    reference; where several are in question, the only one in whose slices the structures lie.

    Args:
        objects: Files by SOP class, as `find_objects` gives them.
        series: The patient's image series.
        named: `DataRecipe.named_structures`; if empty, the only structure counts.
        patient: The patient's name, for messages.
        allow_empty: Whether structures may be missing, which then have no file; one of them must be there.

    Returns:
        The only structure, or a file for each that is named.

    Raises:
        CaseError: A file is damaged, several are left, or no structure or several match.
    """
    found = []
    for path in (path for kind in (STRUCTURE_SET, *SEGMENTATIONS) for path in objects.get(kind, ())):
        refuse = refuser(path, patient)
        with pydicom_errors(refuse, _UNDAMAGED):
            read_header(path, patient)  # which refuses a file that breaks off
            file, structures = _open(path, refuse)
            matches = {name: _matching(pattern, structures) for name, pattern in named.items()}
            chosen = [one for match in matches.values() for one in match] or structures
            own = _own_series(path, file, chosen, series, patient)
        frames = sorted({one.frame_of_reference for one in chosen} - {""})
        frame = ", ".join(frames) or (own.frame_of_reference if own else "")
        names = tuple(one.name for one in structures if not one.empty)
        found.append((DicomStructures(path, own, None, names, frame), structures, matches))
    if not found:
        return None
    ranks = [_rank(matches.values()) for *_, matches in found]
    found = [one for one, rank in zip(found, ranks, strict=True) if rank == max(ranks)]
    if len(found) > 1:
        raise CaseError(
            f"{patient}: must hold one file with the structures; move the others elsewhere, or let --structure match "
            f"those of one. Received: {'; '.join(str(one) for one, *_ in found)}"
        )
    [(source, structures, matches)] = found
    if not (allow_empty and any(matches.values())):
        for pattern in [*named.values()] or [None]:
            _choose(structures, pattern, refuser(source.path, patient))
    files = {name: dataclasses.replace(source, pattern=named[name]) for name, match in matches.items() if match}
    return StructureFiles(files) if named else source


def read_structures(source: DicomStructures, patient: str) -> sitk.Image:
    """Reads structures as one mask.

    A contour within another of its slice is a hole, and one within a hole is an island. Contours that cross, or that
    are nearly the same, count together. Those of type CLOSEDPLANAR_XOR count by the even-odd rule. Fractions of
    a segmentation count from one half on.

    A contour that encloses no pixel's centre leaves nothing, see `lost_contours`; a structure of such contours alone is
    refused.

    Contours are missing where a lesion has some on both sides of one slice, at overlapping places, and none in it.
    Wider gaps are between lesions, unless a lesion has several of them and they are half of its steps from one slice to
    the next or more. Lesions are the parts of a structure that are apart when all slices are seen as one.

    Args:
        source: The `DicomStructures`.
        patient: The patient's name, for messages.

    Returns:
        A uint8 image {0, 1} on the grid of its series; of a segmentation that does not fit that, on the grid of its
        frames.

    Raises:
        CaseError: The file is damaged; no structure or several match; the series is unknown; contours do not lie in
            its slices, are missing in some, are not closed or leave nothing of a structure; or it is not known how far
            a segmentation's slices are apart.
    """
    refuse = refuser(source.path, patient)
    with pydicom_errors(refuse, _UNDAMAGED):
        file, found = _open(source.path, refuse)
        chosen = _choose(found, source.pattern, refuse)
        if file.SOPClassUID != STRUCTURE_SET:
            grid, frames = _frames(source, file, patient, refuse)
            array = np.zeros(grid.shape, np.uint8)
            for segment in chosen:
                for number, pixels in frames:
                    array[number][pixels(segment.number)] = 1
            return grid.image(array)
        if source.series is None:
            raise refuse(
                "a structure set that refers to a series in the patient's folder",
                "one of another series, or of several that cannot be told apart",
            )
        grid, slices = series_grid(source.series, patient)
        array = np.zeros(grid.shape, np.uint8)
        for structure in chosen:
            masks = _masks(structure, grid, slices, refuse)
            if masks and not any(mask.any() for mask in masks.values()):
                received = f"{structure.name!r} of {len(structure.contours)} contours that are too small"
                raise refuse("structures that enclose the centre of a pixel", received)
            for number, mask in masks.items():
                array[number][mask] = 1
        return grid.image(array)


def lost_contours(source: DicomStructures, patient: str) -> list[str]:
    """Notes on the contours of a structure set that enclose no pixel's centre, one for each structure that has some.

    Args:
        source: The `DicomStructures`.
        patient: The patient's name, for messages.

    Raises:
        CaseError: As `read_structures`, as far as it concerns the file and the choice of structures.
    """
    refuse, notes = refuser(source.path, patient), []
    with pydicom_errors(refuse, _UNDAMAGED):
        file, found = _open(source.path, refuse)
        if file.SOPClassUID != STRUCTURE_SET or source.series is None:
            return []
        grid = series_grid(source.series, patient)[0]
        for structure in _choose(found, source.pattern, refuse):
            drawn = [grid.indices(contour) for contour, _ in structure.contours]
            lost = [points for points in drawn if not rasterise([points[:, :2]], grid.shape[1:]).any()]
            if lost:
                numbers = sorted({round(points[:, 2].mean()) for points in lost})
                notes.append(
                    f"{structure.name!r} in {source.path}: nothing is left of {len(lost)} of {len(drawn)} contours, "
                    f"which enclose no pixel's centre, in slices, from 0: {listed([*map(str, numbers)])}"
                )
    return notes


class _Structure(NamedTuple):
    """A structure of a file: its closed contours, each `((points, 3) in mm, whether it is XOR)`, or its segment number.

    `others` are its contours of other kinds, with their number; `fragments` its closed ones of one or two points, which
    enclose nothing; `instances` the images that it refers to.
    """

    name: str
    number: int
    contours: Sequence[tuple[np.ndarray, bool]] | None = None
    others: Mapping[str, int] = MappingProxyType({})
    fragments: Sequence[np.ndarray] = ()
    instances: frozenset[str] = frozenset()
    frame_of_reference: str = ""

    @property
    def empty(self):
        return self.contours is not None and not self.contours


def _matching(pattern, structures):
    """The structures of some name; empty ones only where there are no others."""
    pattern = unicodedata.normalize("NFC", pattern)
    found = [one for one in structures if re.fullmatch(pattern, one.name, re.IGNORECASE)]
    return [one for one in found if not one.empty] or found


def _rank(matches):
    """How well the structures of a file, by pattern, are those wanted: all of them, some, or only empty ones."""
    there, full = [bool(some) for some in matches], [bool(some) and not some[0].empty for some in matches]
    return all(full), all(there) and any(full), any(full), all(there), any(there)


def _choose(structures, pattern, refuse):
    """The structures that count."""
    found, listed = _matching(pattern or ".*", structures), ", ".join(repr(one.name) for one in structures) or "none"
    if pattern is None and len(found) != 1:
        raise refuse("a file of one structure, unless --structure (`data.structures`) says which ones count", listed)
    if not found:
        raise refuse(f"a file with a structure whose name matches {pattern!r}", listed)
    return found


def _open(path, refuse):
    """The pydicom dataset and its structures, without those that have no closed contours but others, as points do."""
    import pydicom

    file = pydicom.dcmread(path)
    if file.SOPClassUID in SEGMENTATIONS:
        about = frozenset(_values(file, "ReferencedSOPInstanceUID")), str(file.get("FrameOfReferenceUID") or "")
        found = [(_name(one.SegmentLabel), int(one.SegmentNumber)) for one in file.SegmentSequence]
        if file.get("SegmentationType") == "LABELMAP":  # whose background may be a segment
            found = [one for one in found if one[1] not in (0, file.get("PixelPaddingValue"))]
        return file, [_Structure(*one, None, {}, (), *about) for one in found]
    if file.SOPClassUID != STRUCTURE_SET:
        raise refuse("a DICOM structure set or segmentation", file.SOPClassUID.name)
    contours = {}
    for roi in file.get("ROIContourSequence") or []:
        # A structure may have several items.
        contours.setdefault(int(roi.ReferencedROINumber), []).extend(roi.get("ContourSequence") or [])
    found = []
    for roi in file.StructureSetROISequence:
        closed, others, fragments, instances = {}, Counter(), [], set()
        for contour in contours.get(int(roi.ROINumber), []):
            kind, data = str(contour.get("ContourGeometricType") or "no type"), tuple(contour.get("ContourData") or ())
            if kind in _CLOSED and len(data) >= 9:
                closed[data] = np.reshape(np.array(data, float), (-1, 3)), kind == "CLOSEDPLANAR_XOR"
            elif kind in _CLOSED and len(data) in (3, 6):
                fragments.append(np.reshape(np.array(data, float), (-1, 3)))
            else:
                others[kind] += 1
            instances.update(one.ReferencedSOPInstanceUID for one in contour.get("ContourImageSequence") or [])
        if closed or not (others or fragments):
            about = frozenset(instances), str(roi.get("ReferencedFrameOfReferenceUID") or "")
            name = _name(roi.get("ROIName") or "")
            found.append(_Structure(name, int(roi.ROINumber), list(closed.values()), others, fragments, *about))
    return file, found


def _name(text):
    return unicodedata.normalize("NFC", str(text))


def _values(file, keyword):
    return {element.value for element in file.iterall() if element.keyword == keyword}


# --- the series


def _own_series(path, file, chosen, series, patient):
    """The one series that structures were drawn on: by its images, its UID or its frame of reference, or `None`."""
    uids = _values(file, "SeriesInstanceUID")  # that of the file itself is none of an image
    found = [one for one in series if one.uid in uids]
    instances = frozenset().union(*(one.instances for one in chosen))
    for some in (found, series) if instances else ():
        if holding := [one for one in some if not instances.isdisjoint(_instances(one, patient))]:
            found = holding
            break
    frames = {one.frame_of_reference for one in chosen} - {""}
    found = found or [one for one in series if one.frame_of_reference in frames]
    if len(found) > 1:
        found = [one for one in found if _fits(path, file, chosen, one, patient)]
    return found[0] if len(found) == 1 else None


def _instances(series, patient):
    """The SOPInstanceUIDs of a series' files."""
    for path in series.files:
        with contextlib.suppress(CaseError):
            yield read_header(path, patient).get(0x00080018)


def _fits(path, file, chosen, series, patient):
    """Whether structures lie in the slices of a series."""
    try:
        grid, slices = series_grid(series, patient)
        if file.SOPClassUID != STRUCTURE_SET:
            return _numbers_in(read_frames(path, file), grid, slices) is not None
        return all(_masks(one, grid, slices, refuser(path, patient)) is not None for one in chosen)
    except CaseError:
        return False


# --- contours


def _masks(structure: _Structure, grid: Grid, slices: Sequence[Slice], refuse) -> dict[int, np.ndarray]:
    """The pixels of a structure by the number of the slice."""
    name, found = structure.name, {}
    if structure.others:
        listed = ", ".join(f"{count} {kind}" for kind, count in structure.others.items())
        raise refuse("structures of closed contours of 3 or more points", f"{name!r} that also has others: {listed}")
    for contour, xor in structure.contours:
        points = grid.indices(contour)
        number = int(np.rint(points[:, 2].mean()))
        if np.abs(points[:, 2] - number).max() > _BETWEEN:
            raise refuse("contours in the slices of the series", f"one of {name!r} between them or across them")
        if not 0 <= number < grid.size[2]:
            raise refuse("contours in the slices of the series", f"one of {name!r} outside all {grid.size[2]} slices")
        if (points[:, :2] < -_OUTSIDE).any() or (points[:, :2] > np.subtract(grid.size[:2], 1) + _OUTSIDE).any():
            raise refuse("contours in the images of the series", f"one of {name!r} outside, in slice {number}, from 0")
        found.setdefault(number, []).append((points[:, :2], xor))
    for fragment in structure.fragments:
        if int(np.rint(grid.indices(fragment)[:, 2].mean())) not in found:
            received = f"one of {name!r} of {len(fragment)}, alone in its slice"
            raise refuse("structures of closed contours of 3 or more points", received)
    masks = {}
    for number, contours in sorted(found.items()):
        polygons, xor = zip(*contours, strict=True)
        masks[number] = rasterise(polygons, grid.shape[1:]) if any(xor) else fill_nested(polygons, grid.shape[1:])
        if masks[number] is None:
            raise refuse("contours of which none crosses a hole", f"{name!r} in {slices[number].path.name}")
    if missing := _missing(masks):
        listed = ", ".join(f"{number} ({slices[number].path.name})" for number in missing)
        received = f"{name!r} without a pixel in slices, from 0: {listed}"
        raise refuse("contours on each slice of the structure", received)
    return masks


def _missing(masks):
    """The slices in which a structure lacks contours, as `read_structures` says."""
    missing = set()
    if len(masks) < 2:
        return []
    projected = sitk.GetImageFromArray(np.any(list(masks.values()), axis=0).astype(np.uint8))
    lesions = sitk.GetArrayFromImage(sitk.ConnectedComponent(projected, True))
    for lesion in range(1, lesions.max() + 1):
        parts = [(number, part) for number, mask in masks.items() if (part := mask & (lesions == lesion)).any()]
        pairs = [(a, b) for (a, one), (b, other) in itertools.pairwise(parts) if (one & other).any()]
        gaps = [(a, b) for a, b in pairs if b - a > 1]
        if not 1 < len(gaps) >= len(pairs) / 2:
            gaps = [(a, b) for a, b in gaps if b - a == 2]
        missing.update(number for a, b in gaps for number in range(a + 1, b))
    return sorted(missing)


# --- segments


def _frames(source, file, patient, refuse):
    """The `Grid` of a segmentation; and for each frame its slice and a function that gives the pixels of a segment."""
    frames = read_frames(source.path, file)
    for one in frames:
        require_geometry(one, patient)
        if not np.allclose(one.orientation, frames[0].orientation, atol=1e-3):
            raise refuse("a segmentation of one orientation", "frames of several")
    numbers = None
    if source.series is not None:
        grid, slices = series_grid(source.series, patient)
        numbers = _numbers_in(frames, grid, slices)
    if numbers is None:
        between = frame_value(file, 0, "PixelMeasures", "SpacingBetweenSlices")
        grid, numbers = _own_grid(frames, abs(float(between or 0)), refuse)

    def chosen(frame, values):
        if file.SegmentationType == "LABELMAP":
            return lambda segment: values == segment
        own = frame_value(file, frame, "SegmentIdentification", "ReferencedSegmentNumber")
        half = file.MaximumFractionalValue / 2 if file.SegmentationType == "FRACTIONAL" else 1
        return lambda segment: (values >= half) & (segment == own)

    pixels = np.reshape(file.pixel_array, (-1, *grid.shape[1:]))
    return grid, [(number, chosen(frame, pixels[frame])) for frame, number in enumerate(numbers)]


def _numbers_in(frames, grid, slices):
    """The number of each frame's slice in a series, or `None` if they are not slices of it."""
    first, positions = slices[0], np.array([one.position for one in slices])
    numbers = []
    for one in frames:
        away = np.linalg.norm(positions - one.position, axis=1)
        same = np.allclose(one.orientation, first.orientation, atol=1e-3)
        same &= np.allclose(one.spacing, first.spacing, rtol=1e-3)
        if not (same and one.size == first.size and away.min() < _BETWEEN * min(grid.spacing)):
            return None
        numbers.append(int(away.argmin()))
    return numbers


def _own_grid(frames, between, refuse):
    """The `Grid` of frames alone, some of which may be missing, and the number of each frame's slice."""
    positions, first = np.array([one.position for one in frames]), frames[0]
    row, column = np.reshape(first.orientation, (2, 3))
    normal = np.cross(row, column)
    along = positions @ normal
    origin, along = positions[along.argmin()], along - along.min()
    gaps = np.diff(np.unique(np.round(along, 3)))
    [thickness] = first.thickness or (0.0,)
    smallest = float(gaps.min()) if len(gaps) else thickness
    # Between lesions there may be no frames: the smallest gap is then no distance between slices.
    smallest = 0 if smallest > _GAP * thickness > 0 else smallest
    for step in (between, smallest):
        numbers = np.rint(along / step).astype(int) if step > 0 else None
        if numbers is not None and np.abs(along / step - numbers).max() <= _BETWEEN:
            break
    else:
        raise refuse(
            "a segmentation whose series is in the patient's folder, or one of evenly spaced frames",
            f"frames at {', '.join(f'{value:.3g}' for value in np.unique(np.round(along, 3)))} mm",
        )
    step = float(along.max() / numbers.max()) if numbers.max() else step
    line = origin + np.outer(numbers * step, normal)
    if (aside := np.linalg.norm(positions - line, axis=1).max()) > _BETWEEN * step:
        raise refuse("a segmentation of evenly spaced frames", f"one {aside:.3g} mm off the line of the others")
    size, direction = (*first.size, int(numbers.max()) + 1), np.stack([row, column, normal], 1)
    grid = Grid(size, (*first.spacing[::-1], step), tuple(origin.tolist()), tuple(direction.ravel().tolist()))
    return grid, numbers
