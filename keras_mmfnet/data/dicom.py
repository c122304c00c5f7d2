import contextlib
import dataclasses
import filecmp
import functools
import logging
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._dicom_header import PIXELS, is_unread, not_dicom, pydicom_errors, read_header, walk_files
from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.case import CaseError, listed
from keras_mmfnet.data.geometry import Grid, nearest_rotation

_log = logging.getLogger(__name__)

_MEDIA_CLASS, _CLASS, _INSTANCE = 0x00020002, 0x00080016, 0x00080018
_PATIENT, _NAME, _UID, _FRAME_OF_REFERENCE = 0x00100020, 0x00100010, 0x0020000E, 0x00200052
_STUDY = 0x0020000D
_DESCRIPTION, _NUMBER, _TIME = 0x0008103E, 0x00200011, 0x00080031
_SERIES_DATE, _STUDY_DATE = 0x00080021, 0x00080020
_POSITION, _FRAMES, _ROWS, _PER_FRAME = 0x00200032, 0x00280008, 0x00280010, 0x52009230
# Position, orientation, spacing, thickness, columns and rows, slope and intercept: the tags, and how many numbers.
_GEOMETRY = (
    *(((_POSITION,), 3), ((0x00200037,), 6), ((0x00280030,), 2), ((0x00180050,), 1)),
    *(((0x00280011, _ROWS), 2), ((0x00281053,), 1), ((0x00281052,), 1)),
)
# What tells the images of one series apart: echoes and b-values always, the others where slices lie at the same place.
_FIRST = {"echo": 0x00180081, "b-value": 0x00189087, "phase": 0x00200100}
_AT_ONE_PLACE = {
    **{"type": 0x00080008, "acquisition": 0x00200012, "trigger": 0x00181060, "inversion": 0x00180082},
    **{"flip angle": 0x00181314, "echo number": 0x00180086, "sequence": 0x00180024, "time": 0x00080032, "index": 0},
}
# The SOP classes of images with a position: CT, MR (no spectroscopy), secondary captures, NM, PET, 3D X-ray.
_IMAGE = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(2|4(?!\.2$)|7|20|128|130|13\.1)(\.\d+)*")
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# SOP classes of what may be a mask: RT Structure Set, Segmentation, Label Map Segmentation.
STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
SEGMENTATIONS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_MASKS = (STRUCTURE_SET, *SEGMENTATIONS)
# What the objects of this package say of themselves in SeriesDescription until an expert has reviewed them.
DRAFT = "MMFNet (AI, not reviewed)"
# What anonymisation leaves of the IDs and names of all patients, in lower case without punctuation.
_ANONYMOUS = re.compile(
    r"((patient|name|id)?(anon|anonym(ous|i[sz]ed)?|unknown|none|removed)(patient|name|id)?)?|x+|0+|na"
)
# The last two bytes of JPEG, JPEG-LS and JPEG 2000, which do not occur among the voxels.
_END = b"\xff\xd9"
# In mm: how far a slice may lie from its place in the regular stack. Positions are often rounded.
TOLERANCE = 0.5
# In ms: how much the times of one echo may differ from slice to slice.
_SAME_ECHO = 1.0


@dataclasses.dataclass(frozen=True)
class Series:
    """The DICOM files of one image, in no particular order.

    Args:
        folder: The folder they lie in, or the one above where they lie in several.
        files: Their paths.
        description: What the scanner calls the series.
        label: Its number, time, echo and what else tells it from others, as text. Date and UID only where no other
            part does.
        uid: Its SeriesInstanceUID.
        frame_of_reference: UID of the coordinates that its positions are given in.
        frames: Of files with several frames each: by file, the numbers of the frames that belong to the image, from 0.
        fault: Why it cannot be read, if that is known.
        study: Its StudyInstanceUID, if nothing else tells whose it is: neither a PatientID nor a PatientName.
    """

    folder: Path
    files: tuple[Path, ...]
    description: str = ""
    label: str = ""
    uid: str = ""
    frame_of_reference: str = ""
    frames: tuple[tuple[int, ...], ...] = ()
    fault: str = ""
    study: str = ""

    def __str__(self):
        count = f"{sum(map(len, self.frames))} frames" if self.frames else f"{len(self.files)} files"
        about = ", ".join(filter(None, (repr(self.description), self.label, count)))
        return f"{self.folder} (DICOM series {about})"


class Slice(NamedTuple):
    """The header of one slice: of a file, or of a frame of it, from 0. `None`: the header lacks it."""

    path: Path
    frame: int | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing: tuple[float, ...] | None = None
    thickness: tuple[float, ...] | None = None
    rescale: tuple[float, float] = (1.0, 0.0)
    size: tuple[int, int] | None = None
    apart: Mapping[str, str] = MappingProxyType({})

    @property
    def place(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Position and orientation, rounded."""
        return tuple(np.round(self.position, 2)), tuple(np.round(self.orientation, 2))


def find_objects(folder: str | os.PathLike, patient: str) -> tuple[list[Series], dict[str, list[Path]]]:
    """Finds the DICOM series in a folder and the folders in it, and other DICOM objects; no voxel is read.

    Echoes, phases, b-values and acquisitions in one series come as a `Series` each. An object that occurs twice counts
    once. A file that cannot be read, or is not DICOM although it is named like the slices beside it, is a fault of its
    series or, if that is unknown, of all series in its folder. It is raised when such a series is read. Structure sets
    and segmentations that are damaged are among the other objects.

    Args:
        folder: The folder of one patient.
        patient: The patient's name, for messages.

    Returns:
        A list of `Series`, sorted by folder, description and label; and by SOP class the files without an image.

    Raises:
        CaseError: The files are those of several patients, or none of them can be read.
    """
    folder = Path(folder)
    found, others, faults, unknown, patients, instances = {}, {}, [], [], {}, {}
    owners, studies, dates = {}, set(), {}
    for path in walk_files(folder):
        refuse, header = refuser(path, patient), {}
        if received := not_dicom(path):
            if path.suffix.lower() == ".dcm" or path.is_dir():
                faults.append((path, header, refuse("a DICOM file", received)))
            else:
                unknown.append((path, header, refuse("a slice, as the files beside it", received)))
            continue
        try:
            read_header(path, patient, header)
            kind = _kind(header)
            if not kind and _ROWS not in header:
                raise refuse("a DICOM object of some class", "one without SOPClassUID")
            if (kind and not _IMAGE.fullmatch(kind)) or (
                kind.startswith(_CAPTURE) and not header.get(_POSITION) and _PER_FRAME not in header
            ):
                paths = others.setdefault(kind, [])
                if kind not in _MASKS or not any(filecmp.cmp(path, one, shallow=False) for one in paths):
                    paths.append(path)
                if kind in _MASKS and (identity := _owner(header)[0]):
                    owners[path] = identity
                continue
            slices = _slices(path, header, patient)
        except CaseError as error:
            if (kind := _kind(header)) in _MASKS:
                others.setdefault(kind, []).append(path)
            else:
                faults.append((path, header, error))
            continue
        studies.add(header.get(_STUDY, ""))
        if any(owner := _owner(header)):
            patients.setdefault(owner, path)
        instance = header.get(_INSTANCE)
        if not (instance and any(_same(one, slices) for one in instances.get(instance, []))):
            instances.setdefault(instance, []).append(slices)
            found.setdefault(_key(path, header), []).append((header, slices))
    _require_one_patient(patients, folder, patient)
    ids = {identity for identity, _ in patients if identity}
    if len(studies) > 1 and not patients:
        _log.warning(
            "%s: %d studies without a PatientID or PatientName are taken for one patient's", patient, len(studies)
        )
    for path, identity in owners.items():
        if ids and identity not in ids:
            _log.warning("%s: %s has another PatientID than the images", patient, path.relative_to(folder))
    for path, header, _ in faults:
        if header.get(_UID) and not any(header[_UID] == key[0] for key in found):
            found[_key(path, header)] = [(header, [Slice(path)])]
    series, used = [], set()
    for key, members in found.items():
        slices = [one for _, part in members for one in part]
        headers = {one.path: header for header, part in members for one in part}
        dates[key[0]] = members[0][0].get(_SERIES_DATE) or members[0][0].get(_STUDY_DATE, "")
        names = set().union(*(_names(one.path) for one in slices))
        folders = {one.path.parent for one in slices}
        mine = [f for f in faults if (f[0].parent in folders if not f[1].get(_UID) else f[1].get(_UID) == key[0])]
        # A file named like the slices may be a damaged one. Nothing else would tell that the last slice is missing.
        mine += [one for one in unknown if not names.isdisjoint(_names(one[0]))]
        mine += [one for one in unknown if one[0].parent in folders and is_unread(one[0])]
        used.update(path for path, _, _ in mine)
        fault = str(mine[0][2]) if mine else ""
        series += [_series(part, headers[part[0].path], detail, fault) for detail, part in _volumes(slices)]
    noted = [error for path, _, error in faults if path not in used]
    if noted and not series:
        raise noted[0]
    for error in noted:
        _log.warning("%s; passed over", error)
    left = {}
    for path, *_ in unknown:
        slice_like = (ending := _names(path)[1][1]) in (".dcm", ".ima") or "#" in ending
        if path not in used and (slice_like or is_unread(path)):
            left.setdefault(path.parent, []).append(path)
    for place, [first, *more] in left.items():
        count, received = len(more) + 1, not_dicom(first)
        _log.warning("%s: %s: not read, passed over: %d files (%s is %s)", patient, place, count, first.name, received)
    if passed := {kind: paths for kind, paths in others.items() if kind not in _MASKS}:
        _log.info("%s: DICOM objects without an image are passed over: %s", patient, describe_objects(passed))
    series = _with_dates(series, dates)
    return sorted(series, key=lambda one: (str(one.folder), one.description, one.label)), others


def patient_id(series: Series) -> str:
    """The PatientID of a series; `""` if there is none, or one that anonymisation leaves for all patients."""
    return _owner(read_header(series.files[0], str(series.folder)))[0]


def is_draft(path: Path, patient: str) -> bool:
    """Whether a DICOM object was made by this package, and not reviewed by an expert, as far as it can be read."""
    header = {}
    with contextlib.suppress(CaseError):
        read_header(path, patient, header)
    return header.get(_DESCRIPTION) == DRAFT


def describe_unread(folder: str | os.PathLike) -> str:
    """The DICOM files in a folder in a form that is not read, as the end of a list; an empty text if there are none."""
    unread = [path for path in walk_files(folder) if is_unread(path)]
    return f"; and {len(unread)} files of {not_dicom(unread[0])} ({unread[0].name})" if unread else ""


def describe_objects(objects: Mapping[str, Sequence[Path]]) -> str:
    """DICOM objects by SOP class as text, such as `1 RT Structure Set Storage (rs.dcm)`."""
    from pydicom.uid import UID_dictionary

    return ", ".join(
        f"{len(paths)} {UID_dictionary.get(kind, [kind])[0]} ({paths[0].name}{', ...' if len(paths) > 1 else ''})"
        for kind, paths in objects.items()
    )


def _owner(header):
    """PatientID and PatientName, the latter however it is punctuated; `""` for one that tells no patients apart."""
    identity, name = header.get(_PATIENT, ""), _letters(header.get(_NAME, ""))
    return "" if _ANONYMOUS.fullmatch(_letters(identity)) else identity, "" if _ANONYMOUS.fullmatch(name) else name


def _require_one_patient(patients, folder, patient):
    """Refuses the files of several patients, given one file of each PatientID and PatientName.

    Those without a PatientID must have the name of one with it.
    """
    identified = {identity: path for (identity, _), path in patients.items() if identity}
    known = {name: path for (identity, name), path in patients.items() if identity}
    strange = {name: path for (identity, name), path in patients.items() if not identity and name not in known}
    without = ", some without a PatientID" if known else ""
    named = [*[*known.values()][:1], *strange.values()] if strange else []
    for what, different in (("PatientIDs", [*identified.values()]), (f"PatientNames{without}", named)):
        if len(different) > 1:
            paths = ", ".join(str(path.relative_to(folder)) for path in different)
            raise CaseError(
                f"{patient}: {folder}: must hold the DICOM files of one patient. "
                f"Received: {len(different)} different {what} ({paths})"
            )


def _letters(text):
    return "".join(filter(str.isalnum, text.casefold()))


def _kind(header):
    return header.get(_CLASS) or header.get(_MEDIA_CLASS, "")


def _key(path, header):
    """What the files of one series have in common."""
    key = tuple(header.get(tag, "") for tag in (_UID, _NUMBER, _DESCRIPTION))
    return key if key[0] else (*key, path.parent)


def _names(path):
    """What the names of files that belong together have in common: all but digits, hashes and UUIDs, or the ending."""
    name = re.sub(r"[\da-f]{8,}(-[\da-f]{4,})*|\d+", "#", path.name.lower().removesuffix(".gz"))
    suffix = Path(name).suffix
    return (path.parent, name), (path.parent, name if "#" in suffix else suffix or name)


def _same(one, other):
    """Whether two files of one SOP instance, given as their slices, have equal headers and voxels."""
    if [s._replace(path=None) for s in one] != [s._replace(path=None) for s in other]:
        return False
    paths = [slices[0].path for slices in (one, other)]
    try:
        return filecmp.cmp(*paths, shallow=False) or np.array_equal(*(_stored(path, "") for path in paths))
    except (OSError, CaseError):
        return False


def _series(slices, header, detail, fault):
    """The `Series` of some slices; `header` is of any of them."""
    files = tuple(dict.fromkeys(one.path for one in slices))
    frames = ()
    if slices[0].frame is not None:
        frames = tuple(tuple(one.frame for one in slices if one.path == path) for path in files)
    number, time = header.get(_NUMBER, ""), re.sub(r"^(\d\d)(\d\d)(\d\d).*", r"\1:\2:\3", header.get(_TIME, ""))
    label = ", ".join(filter(None, (number and f"number {number}", time, *detail)))
    folder = Path(os.path.commonpath([path.parent for path in files]))
    about = (header.get(_DESCRIPTION, ""), label, header.get(_UID, ""), header.get(_FRAME_OF_REFERENCE, ""))
    study = "" if any(_owner(header)) else header.get(_STUDY, "")
    return Series(folder, files, *about, frames, fault, study)


def _with_dates(series, dates):
    """The series; those that look alike get their date into the label, and the UID where that is not enough."""

    def look(one):
        return one.folder, one.description, one.label

    for extra in (lambda uid: re.sub(r"^(\d{4})(\d\d)(\d\d)$", r"\1-\2-\3", dates[uid]), str):
        alike = Counter(map(look, series))
        labels = [
            ", ".join(filter(None, (one.label, extra(one.uid) if alike[look(one)] > 1 else ""))) for one in series
        ]
        series = [dataclasses.replace(one, label=label) for one, label in zip(series, labels, strict=True)]
    return series


def _volumes(slices):
    """The images in a series: `[(what tells it apart, slices), ...]`."""
    echoes, divided = _echoes(slices), []
    parts = _split(slices, lambda one: (echoes[_echo(one)], one.apart.get("b-value")))
    for key in ("echo", "phase"):
        split = [(part, _split_by(part, (key,))) for part in parts]
        parts = [one for part, some in split for one in (some if len(some) <= _at_one_place(part) else [part])]
    for part in parts:
        keys, found, times = (), [part], _at_one_place(part)
        for tried in [*((key,) for key in _AT_ONE_PLACE), tuple(_AT_ONE_PLACE)] if times > 1 else []:
            split = _split_by(part, tried)
            if len(split) == times and all(_at_one_place(some) == 1 for some in split):
                keys, found = tried, split
                break
        divided += [(keys, one) for one in found]

    def values(key, slices):
        return {one.apart.get(key) for one in slices}

    def labels(keys, part):
        own = [key for key in (*_FIRST, *keys) if len(values(key, part)) == 1 != len(values(key, slices))]
        own = own if "echo" in own else ["echo", *own]
        return [f"{key} {value}" for key in own if (value := part[0].apart.get(key))]

    return [(labels(keys, part), part) for keys, part in divided]


def _echo(one):
    return _numbers([one.apart.get("echo")], 1) or (0.0,)


def _echoes(slices):
    """By the time of each echo the first of those that are the same."""
    same = {}
    for time in sorted(set(map(_echo, slices))):
        last = next(reversed(same), None)
        same[time] = same[last] if last and time[0] - last[0] <= _SAME_ECHO else time
    return same


def _at_one_place(slices):
    """How many slices lie at the same place at most, 0 if that is unknown."""
    known = all(one.position and one.orientation for one in slices)
    return max(Counter(one.place for one in slices).values()) if known else 0


def _split_by(slices, keys):
    return _split(slices, lambda one: tuple(one.apart.get(key) for key in keys))


def _split(slices, key):
    parts = {}
    for one in slices:
        parts.setdefault(key(one), []).append(one)
    return list(parts.values())


# --- slices


def _slices(path, header, patient):
    """The slices in a file, from its header: one, or those of its frames."""
    if _PER_FRAME in header:
        import pydicom

        with pydicom_errors(refuser(path, patient)):
            return read_frames(path, pydicom.dcmread(path, force=True, stop_before_pixels=True))
    if "MOSAIC" in header.get(_AT_ONE_PLACE["type"], "").split("\\"):
        raise refuser(path, patient)("one slice, or frames with positions of their own", "a mosaic of all slices")
    if PIXELS not in header:
        raise refuser(path, patient)("an undamaged DICOM file", "an image without voxels, or one that breaks off")
    if header.get(_FRAMES, "1") not in ("", "1"):
        raise refuser(path, patient)("one slice, or frames with positions of their own", f"{header[_FRAMES]} frames")
    position, orientation, spacing, thickness, size, slope, intercept = (
        _numbers(" ".join(header.get(tag, "") for tag in tags).replace("\\", " ").split(), count)
        for tags, count in _GEOMETRY
    )
    for tag, value in zip((0x00281053, 0x00281052), (slope, intercept), strict=True):
        if header.get(tag) and not value:
            raise refuser(path, patient)("a rescale slope and intercept that are numbers", repr(header[tag]))
    rescale = ((slope or (1.0,))[0] or 1.0, (intercept or (0.0,))[0])
    apart = {key: _value(header.get(tag, "")) for key, tag in {**_FIRST, **_AT_ONE_PLACE}.items()}
    apart["time"] = header.get(_AT_ONE_PLACE["time"], "")
    size = size and (int(size[0]), int(size[1]))
    return [Slice(path, None, position, orientation, spacing, thickness, rescale, size, apart)]


def frame_value(image: Any, frame: int, group: str, keyword: str) -> Any:
    """An element of a frame's functional group, such as `("PlanePosition", "ImagePositionPatient")`, or `None`."""
    own, [shared] = image.PerFrameFunctionalGroupsSequence[frame], image.get("SharedFunctionalGroupsSequence") or [{}]
    [item] = own.get(f"{group}Sequence") or shared.get(f"{group}Sequence") or [{}]
    return item.get(keyword)


def read_frames(path: Path, image: Any) -> list[Slice]:
    """The slices of a pydicom dataset whose frames have headers of their own."""
    count, dimensions = len(image.PerFrameFunctionalGroupsSequence), image.get("DimensionIndexSequence") or []
    if count != int(image.NumberOfFrames):
        raise ValueError(f"the headers of {count} frames for {image.NumberOfFrames}")
    dimensions, slices = [int(one.DimensionIndexPointer) for one in dimensions], []
    for number in range(count):
        value = functools.partial(frame_value, image, number)
        index = np.atleast_1d(value("FrameContent", "DimensionIndexValues") or [])
        apart = {
            "echo": value("MREcho", "EffectiveEchoTime"),
            "b-value": value("MRDiffusion", "DiffusionBValue"),
            "phase": value("FrameContent", "TemporalPositionIndex"),
            "type": value("MRImageFrameType", "FrameType") or value("CTImageFrameType", "FrameType"),
            "acquisition": value("FrameContent", "FrameAcquisitionNumber"),
            "trigger": value("CardiacSynchronization", "NominalCardiacTriggerDelayTime"),
            # Of the dimensions other than the place.
            "index": [int(i) for i, tag in zip(index, dimensions, strict=False) if tag not in (0x00209057, _POSITION)],
        }
        # Some writers have them once, for all frames.
        slope, intercept = (
            image.get(name) if (own := value("PixelValueTransformation", name)) is None else own
            for name in ("RescaleSlope", "RescaleIntercept")
        )
        slices.append(
            Slice(
                path,
                number,
                _numbers(value("PlanePosition", "ImagePositionPatient"), 3),
                _numbers(value("PlaneOrientation", "ImageOrientationPatient"), 6),
                _numbers(value("PixelMeasures", "PixelSpacing"), 2),
                _numbers([value("PixelMeasures", "SliceThickness")], 1),
                (1.0 if slope is None else float(slope), float(intercept or 0)),
                (int(image.Columns), int(image.Rows)),
                {key: _value(found) for key, found in apart.items()},
            )
        )
    return slices


def _numbers(values, count):
    """So many finite numbers, or `None`."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _value(value):
    """An element's value as a short text; numbers are rounded, as scanners do not always write the same one."""
    try:
        return f"{float(value):.5g}"
    except (TypeError, ValueError):
        return "/".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value or ""


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file starts as DICOM files do, with or without a preamble."""
    return not not_dicom(path)


# --- a stack


def read_series(series: Series, patient: str, pixel_type: int = sitk.sitkUnknown) -> sitk.Image:
    """Reads the slices of a series as one 3D image, and refuses what is not one stack of slices.

    Args:
        series: A `Series`.
        patient: The patient's name, for messages.
        pixel_type: SimpleITK's pixel type of the result; the default keeps the file's.

    Returns:
        A 3D SimpleITK image; its slices are in the order of their positions.

    Raises:
        CaseError: As `series_grid` does, or the voxels are damaged or not one number each.
    """
    grid, slices = series_grid(series, patient)
    stored, rescaled = {}, any(one.rescale != (1.0, 0.0) for one in slices)
    frames, dtype = [], np.float32 if pixel_type == sitk.sitkFloat32 else np.float64
    for one in slices:
        if one.path not in stored:
            stored[one.path] = _stored(one.path, patient)
        frame = stored[one.path][one.frame or 0]
        frames.append((frame * one.rescale[0] + one.rescale[1]).astype(dtype) if rescaled else frame)
    voxels = np.ma.stack(frames) if any(map(np.ma.is_masked, frames)) else np.stack(frames)
    image = grid.image(voxels.filled(voxels.min()) if np.ma.count_masked(voxels) else voxels)
    return image if pixel_type == sitk.sitkUnknown else sitk.Cast(image, pixel_type)


def series_grid(series: Series, patient: str) -> tuple[Grid, list[Slice]]:
    """The grid of a series from the headers of its slices; no voxel is read.

    Args:
        series: A `Series`.
        patient: The patient's name, for messages.

    Returns:
        The `Grid`, and its slices in order.

    Raises:
        CaseError: A file is damaged, or has no position, orientation or pixel size; the slices differ in size, spacing
            or orientation, or are of several frames of reference; two are at the same place, one is missing between
            others, or some lie more than `TOLERANCE` from their place in a regular stack, which rounding to whole mm
            does not explain.
    """
    if series.fault:
        raise CaseError(series.fault)
    slices, frames, refuse = [], {}, refuser(series, patient)
    for number, path in enumerate(series.files):
        header = read_header(path, patient)
        frames.setdefault(header.get(_FRAME_OF_REFERENCE, ""), path.name)
        found = _slices(path, header, patient)
        slices += [one for one in found if not series.frames or one.frame in series.frames[number]]
    frames.pop("", None)
    if len(frames) > 1:
        received = f"{len(frames)} FrameOfReferenceUIDs ({listed([*frames.values()])})"
        raise refuse("slices of one frame of reference; positions in several do not fit together", received)
    for one in slices:
        require_geometry(one, patient)
    return _stack(slices, refuse)


def _stored(path, patient):
    """The voxels of a file as it stores them, `(frames, rows, columns)`; a masked array if some are padding."""
    import pydicom
    from pydicom import uid

    refuse = refuser(path, patient)
    with pydicom_errors(refuse):
        image = pydicom.dcmread(path, force=True)
        if image.SamplesPerPixel != 1:
            raise refuse("an image with one number per voxel", f"{image.SamplesPerPixel} numbers per voxel")
        if (colours := image.PhotometricInterpretation) not in ("MONOCHROME1", "MONOCHROME2"):
            raise refuse("an image in shades of grey", f"PhotometricInterpretation {colours}")
        if image.get("ModalityLUTSequence"):
            raise refuse("an image with a rescale slope and intercept, if any", "a ModalityLUTSequence")
        bits, high = image.get("BitsStored"), image.get("HighBit")
        if None not in (bits, high) and high != bits - 1:
            raise refuse("an image whose HighBit is BitsStored - 1", f"HighBit {high} and BitsStored {bits}")
        if "TransferSyntaxUID" not in image.file_meta:
            implicit, little = image.original_encoding
            syntaxes = (uid.ExplicitVRBigEndian, uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian)
            image.file_meta.TransferSyntaxUID = syntaxes[little + implicit]
        shape, inverted = (-1, image.Rows, image.Columns), colours == "MONOCHROME1"
        syntax = image.file_meta.TransferSyntaxUID
        if syntax.is_encapsulated and syntax != uid.RLELossless:  # of which GDCM crashes where it breaks off
            if syntax in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes, *uid.JPEG2000TransferSyntaxes):
                _require_ends(image, refuse)
            array = np.reshape(_decoded(image), shape)  # GDCM inverts, too
            return _without_padding(image, array, ~array if inverted else array)
        stored = np.reshape(image.pixel_array, shape)
        # The unused bits of a voxel may hold other data.
        unused = image.BitsAllocated - image.BitsStored
        array = ~stored if inverted else stored
        return _without_padding(image, array << unused >> unused if unused else array, stored)


def _without_padding(image, array, stored):
    """The array with the voxels masked that PixelPaddingValue excludes; `stored` are the numbers in the file."""
    value = image.get("PixelPaddingValue")
    # 0 is the background of most images anyway.
    if not (isinstance(value, int) and value):
        return array
    # Both are written as signed or unsigned, whatever the voxels are.
    limits = [np.int64(one).astype(stored.dtype) for one in (value, image.get("PixelPaddingRangeLimit") or value)]
    padding = (stored >= min(limits)) & (stored <= max(limits))
    return np.ma.masked_where(padding, array) if 0 < padding.sum() < padding.size else array


def _require_ends(image, refuse):
    """Refuses JPEG streams of which one breaks off, as GDCM does not always: each ends with a marker."""
    from pydicom.encaps import generate_fragments

    frames = int(image.get("NumberOfFrames") or 1)
    ends = b"".join(generate_fragments(image.PixelData)).count(_END)
    if ends < frames:
        received = f"compressed voxels that break off: {ends} of {frames} images end with a marker"
        raise refuse("an undamaged DICOM file", received)


def _decoded(image):
    """The voxels of a compressed file, decoded by GDCM. It gets no other part of the file."""
    import pydicom

    plain = pydicom.Dataset()
    plain.update(image.group_dataset(0x0028))
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        plain.pop(keyword, None)
    plain.SOPClassUID, plain.SOPInstanceUID = f"{_CAPTURE}.3", pydicom.uid.generate_uid()
    plain.file_meta = pydicom.dataset.FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = image.file_meta.TransferSyntaxUID
    plain["PixelData"] = image["PixelData"]
    with tempfile.TemporaryDirectory() as folder:
        plain.save_as(copy := Path(folder, "image.dcm"), enforce_file_format=True)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(copy), imageIO="GDCMImageIO"))


def require_geometry(one: Slice, patient: str) -> None:
    """Refuses a slice whose header lacks its geometry, which is never guessed."""
    refuse = refuser(one.path, patient)
    for name, value in (
        ("ImagePositionPatient", one.position),
        ("ImageOrientationPatient", one.orientation),
        ("PixelSpacing", one.spacing),
    ):
        if value is None:
            raise refuse(f"an image with {name}", "a header in which it is missing, empty or no number")
    if one.size is None or not min(one.size) > 0:
        raise refuse("an image with Rows and Columns", f"{one.size} voxels")
    if not min(one.spacing) > 0:
        raise refuse("an image with a positive pixel size", f"{one.spacing} mm")
    row, column = np.reshape(one.orientation, (2, 3))
    if not (abs(row @ column) < 0.02 and all(0.9 < np.linalg.norm(axis) < 1.1 for axis in (row, column))):
        raise refuse("an image with two directions at right angles", f"ImageOrientationPatient {one.orientation}")


def _stack(slices, refuse):
    """The regular grid of slices, and the slices in its order."""
    first = slices[0]
    for one in slices:
        if one.size != first.size:
            raise refuse("slices of one size", f"{first.size} and {one.size} pixels ({one.path.name})")
        if not np.allclose(one.orientation, first.orientation, atol=1e-3):
            raise refuse("slices of one orientation", f"another one in {one.path.name}")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            pixels = f"{first.spacing[::-1]} and {one.spacing[::-1]} mm ({one.path.name})"
            raise refuse("slices of one pixel size", pixels)
    row, column = np.reshape(first.orientation, (2, 3))
    direction = nearest_rotation(np.stack([row, column, np.cross(row, column)], axis=1))
    normal, positions = direction[:, 2], np.array([one.position for one in slices])
    order = np.argsort(positions @ normal, kind="stable")
    slices, positions = [slices[index] for index in order], positions[order]
    middle, count = positions.mean(axis=0), len(slices)
    if count == 1:
        [step] = first.thickness or (0.0,)
        if not step > 0:
            raise refuse("several slices, or one with a SliceThickness", "a single slice without")
    else:
        step = _step(slices, positions, normal, refuse)
    origin = middle - normal * step * (count - 1) / 2
    spacing = (first.spacing[1], first.spacing[0], float(step))
    return Grid((*first.size, count), spacing, tuple(origin.tolist()), tuple(direction.ravel().tolist())), slices


def _step(slices, positions, normal, refuse):
    """The distance between neighbours of a stack, which is refused where it is not regular."""
    names, along = [one.path.name for one in slices], (positions - positions.mean(axis=0)) @ normal
    steps = np.diff(along)
    usual, twice = float(np.median(steps)), int(np.argmin(steps))
    if steps[twice] < max(1e-3, usual / 20):
        raise refuse(
            "one slice at each place; images of one series that cannot be told apart are not read",
            f"{names[twice]} and {names[twice + 1]} at the same place",
        )
    # Straight through all positions: rounded ones lie on both sides of it.
    step = float(np.polyfit(np.arange(len(along)), along, 1)[0])
    off = np.abs(along - step * (np.arange(len(along)) - (len(along) - 1) / 2)).max()
    interleaved = len(steps) > 2 and max(np.ptp(steps[::2]), np.ptp(steps[1::2])) < 1e-3 < usual / 20 < np.ptp(steps)
    odd = int(np.argmax(np.abs(steps - usual)))
    between = f"{steps[odd]:.3g} mm from {names[odd]} to {names[odd + 1]}, and {usual:.3g} mm between others"
    if steps.max() > 1.5 * usual:
        raise refuse("a stack without a gap", between)
    # Of thinner slices, whole mm do not tell whether one is missing.
    rounded = step >= 2 and _rounded(positions, normal)
    if (off > TOLERANCE and not rounded) or interleaved or steps.min() < 0.5 * usual:
        raise refuse(f"slices at equal distances, to within {TOLERANCE} mm", between)
    line = positions.mean(axis=0) + np.outer(along, normal)
    aside = float(np.linalg.norm(positions - line, axis=1).max())
    if aside > TOLERANCE and not rounded:
        raise refuse("slices one behind the other, as a tilted gantry's are not", f"some {aside:.3g} mm aside")
    return step


def _rounded(positions, normal):
    """Whether positions are whole mm, as rounding leaves them of equal steps along the normal."""
    if not np.array_equal(positions, np.rint(positions)):
        return False
    first, second = np.triu_indices(len(positions), 1)
    rise = (positions[second] - positions[first]) * np.copysign(1, normal)
    run = np.outer(second - first, np.maximum(np.abs(normal), 1e-6))
    # Rounding changes a difference by 1 mm at most, and by less where the ends are not both at halves of a mm, as those
    # of one step hardly are. So each difference bounds the step, and some step must be within all bounds.
    most = np.where(second - first > 1, 1.001, 0.999)[:, None]
    return ((rise - most) / run).max() < ((rise + most) / run).min()
