import dataclasses
import math
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._errors import reason, refuser
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.geometry import Grid

_UID, _DESCRIPTION, _PATIENT = "0020|000e", "0008|103e", "0010|0020"
# What kind of object a file holds: structure sets, segmentations, reports, presentations and directories are no images.
_NO_IMAGE = re.compile(rb"1\.2\.840\.10008\.(5\.1\.4\.1\.1\.(481|66|88|11|104)\.|1\.3\.10)")
_IMPLICIT, _BIG, _DEFLATED = (b"1.2.840.10008.1.2" + end for end in (b"", b".2", b".1.99"))
# Value representations whose length has two bytes; and four bytes, after two without a meaning.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
# Of the distance between two slices; scanners round their positions.
_UNEVEN = 0.05
# Of a pixel: how far slices may lie beside each other.
_ASIDE = 0.5


@dataclasses.dataclass(frozen=True)
class Series:
    """The DICOM files of one image, in no particular order.

    Args:
        folder: The folder they lie in, or the one above where they lie in several.
        files: Their paths.
        description: What the scanner calls the series.
    """

    folder: Path
    files: tuple[Path, ...]
    description: str = ""

    def __str__(self):
        return f"{self.folder} (DICOM series {self.description!r}, {len(self.files)} files)"


def find_series(folder: str | os.PathLike, patient: str) -> list[Series]:
    """Finds the DICOM series in a folder and the folders in it; no voxel is read.

    DICOM files without an image are passed over, and other files, but for those that end in `.dcm` and empty ones
    beside slices.

    Args:
        folder: The folder of one patient.
        patient: The patient's name, for messages.

    Returns:
        A list of `Series`, sorted by folder and description.

    Raises:
        CaseError: A file that ends in `.dcm` is none, a file beside slices is empty, or the files are those of several
            patients.
    """
    folder = Path(folder)
    found, patients, empty = {}, set(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder)):
        start = _start(path)
        if not _is_dicom(start):
            if path.suffix.lower() == ".dcm":
                raise refuser(path, patient)("a DICOM file", f"one that starts with {start[:9]}")
            if not start:
                empty.append(path)
            continue
        if _NO_IMAGE.search(start):
            continue
        name, uid, description = read_tags(path, patient, (_PATIENT, _UID, _DESCRIPTION))
        patients.add(name)
        found.setdefault(uid, (description, []))[1].append(path)
    if len(patients) > 1:
        raise CaseError(
            f"{patient}: {folder}: must hold the DICOM files of one patient. "
            f"Received: {len(patients)} different PatientIDs"
        )
    # Slices often have no ending; one that lacks at the end of a stack would not be missed.
    folders = {path.parent for _, files in found.values() for path in files}
    for path in empty:
        if path.parent in folders:
            raise refuser(path, patient)("a slice, as the files beside it", "an empty file")
    series = [Series(_common_folder(files), tuple(files), description) for description, files in found.values()]
    return sorted(series, key=lambda one: (str(one.folder), one.description))


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a file starts as DICOM files do."""
    return _is_dicom(_start(path))


def _is_dicom(start):
    return start[128:132] == b"DICM"


def _start(path):
    """The first bytes of a file; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(1000)
    except OSError:
        return b""


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
    grid, paths = series_grid(series, patient)
    refuse = refuser(series, patient)
    try:
        image = sitk.ReadImage([str(path) for path in paths], pixel_type)
    except RuntimeError as error:
        raise refuse("undamaged DICOM files", reason(error)) from error
    if (components := image.GetNumberOfComponentsPerPixel()) != 1:
        raise refuse("an image with one number per voxel", f"{components} numbers per voxel")
    if len(paths) > 1:
        # From the headers, whatever the reader makes of slices whose numbers run against their positions.
        image.SetOrigin(grid.origin)
        image.SetSpacing(grid.spacing)
        image.SetDirection(grid.direction)
    return image


def series_grid(series: Series, patient: str) -> tuple[Grid, list[Path]]:
    """The grid of a series from the headers of its slices; no voxel is read.

    Args:
        series: A `Series`.
        patient: The patient's name, for messages.

    Returns:
        The `Grid` and the files in the order of its slices.

    Raises:
        CaseError: A file is damaged; the slices differ in size, spacing or orientation; two are at the same place, one
            is missing between others, or they do not lie one behind the other.
    """
    refuse, slices = refuser(series, patient), []
    for path in series.files:
        reader = _reader(path, patient)
        slices.append((Grid(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection()), path))
    first = slices[0][0]
    if len(first.size) != 3 or (len(slices) > 1 and first.size[2] != 1):
        raise refuse("slices of one image", f"images of {' x '.join(map(str, first.size))} voxels")
    if len(slices) == 1:
        return first, [slices[0][1]]
    for grid, path in slices:
        if grid.size != first.size:
            raise refuse("slices of one size", f"{first.size[:2]} and {grid.size[:2]} pixels ({path.name})")
        if not np.allclose(grid.direction, first.direction, atol=1e-3):
            raise refuse("slices of one orientation", f"another one in {path.name}")
        if not np.allclose(grid.spacing[:2], first.spacing[:2], rtol=1e-3):
            raise refuse("slices of one pixel size", f"{first.spacing[:2]} and {grid.spacing[:2]} mm ({path.name})")

    normal = np.reshape(first.direction, (3, 3))[:, 2]
    origins = np.array([grid.origin for grid, _ in slices])
    order = np.argsort(origins @ normal, kind="stable")
    origins, paths = origins[order], [slices[index][1] for index in order]
    steps = np.diff(origins @ normal)
    step = float(np.median(steps))
    twice = int(np.argmin(steps))
    if steps[twice] < 1e-3 or steps[twice] < _UNEVEN * step:
        raise refuse("one slice at each place", f"{paths[twice].name} and {paths[twice + 1].name} at the same place")
    if not np.allclose(steps, step, rtol=_UNEVEN, atol=1e-3):
        odd = int(np.argmax(np.abs(steps - step)))
        raise refuse(
            "a stack without a gap",
            f"{steps[odd]:.3g} mm from {paths[odd].name} to {paths[odd + 1].name}, and {step:.3g} mm between others",
        )
    line = origins[0] + np.outer(origins @ normal - origins[0] @ normal, normal)
    aside = float(np.linalg.norm(origins - line, axis=1).max())
    if aside > _ASIDE * min(first.spacing[:2]):
        raise refuse("slices one behind the other, as a tilted gantry's are not", f"some {aside:.3g} mm aside")

    size, spacing = (*first.size[:2], len(paths)), (*first.spacing[:2], float(steps.mean()))
    return Grid(size, spacing, tuple(origins[0].tolist()), first.direction), paths


def _reader(path, patient):
    """SimpleITK's reader after it has read the header."""
    refuse = refuser(path, patient)
    try:
        damage = _damage(path)
    except OSError as error:
        raise refuse("a readable file", error.strerror) from error
    if damage:
        raise refuse("an undamaged DICOM file", damage)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise refuse("an undamaged DICOM file", reason(error)) from error
    if not all(0 < step < math.inf for step in reader.GetSpacing()):
        raise refuse("an image with a positive pixel size", f"{reader.GetSpacing()} mm")
    return reader


def _damage(path):
    """An element that claims more bytes than the whole file has, or a file that starts with another than it must.

    GDCM would take the memory, up to 4 GiB, before it looks for the content. The elements are read one after the other,
    those in sequences too, up to the first that is not understood. pydicom cannot do this: it understands damaged
    headers otherwise than GDCM, so that some pass which cost GDCM 4 GiB, and it takes four times as long.

    Returns:
        What is wrong, or `None`.
    """
    size, syntax, fragments = path.stat().st_size, b"", False
    with open(path, "rb") as file:
        file.seek(132)
        if file.read(2) != b"\2\0":
            return "no element of group 2 at the start"
        file.seek(132)
        while len(head := file.read(8)) == 8:
            described = head[:2] != b"\2\0"  # what comes before is always explicit and little endian
            if described and syntax == _DEFLATED:
                return None
            order = ">" if described and syntax == _BIG else "<"
            tag = struct.unpack_from(f"{order}HH", head)
            kind = head[4:6]
            if tag[0] == 0xFFFE or (described and syntax == _IMPLICIT):
                [length] = struct.unpack_from(f"{order}I", head, 4)
            elif kind in _SHORT:
                [length] = struct.unpack_from(f"{order}H", head, 6)
            elif kind in _LONG:
                [length] = struct.unpack(f"{order}I", file.read(4).ljust(4, b"\0"))
            elif not described:  # GDCM takes it for implicit
                [length] = struct.unpack_from("<I", head, 4)
            else:
                return None
            if length == 0xFFFFFFFF:  # up to a mark at its end
                fragments = tag == (0x7FE0, 0x10)
            elif length > size:
                return f"an element of {length} bytes in a file of {size}"
            elif tag == (2, 0x10):
                syntax = file.read(length).rstrip(b"\0 ")
            elif fragments or not (tag[0] == 0xFFFE or file.peek(4)[:4] == struct.pack(f"{order}HH", 0xFFFE, 0xE000)):
                file.seek(length, 1)
            if tag == (0xFFFE, 0xE0DD):
                fragments = False
    return None


def read_tags(path: Path, patient: str, tags: Iterable[str]) -> list[str]:
    """The values of tags such as `"0010|0020"` in a DICOM file, empty where it has none; raises as `series_grid`."""
    reader = _reader(path, patient)
    return [reader.GetMetaData(tag).strip() if reader.HasMetaDataKey(tag) else "" for tag in tags]


def _hidden(path, folder):
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _common_folder(files):
    parents = {path.parent for path in files}
    return parents.pop() if len(parents) == 1 else files[0].parent.parent
