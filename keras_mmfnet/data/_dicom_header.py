"""Finds DICOM files and reads their headers."""

import contextlib
import gzip
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.case import CaseError

_SYNTAX, PIXELS, _DEFLATED = 0x00020010, 0x7FE00010, "1.2.840.10008.1.2.1.99"
# What the size of the voxels is made of: samples, rows, columns and bits.
_SIZES = (0x00280002, 0x00280010, 0x00280011, 0x00280100)
_FRAMES, _B_VALUE = 0x00280008, 0x00189087
# Longer elements are passed over.
_LONGEST = 256
# What `not_dicom` says of DICOM that is not read as it is.
_GZIPPED, _NO_PREAMBLE = "gzipped DICOM, which must be unpacked", "DICOM that does not begin with 128 bytes and DICM"
# Bytes that one byte of a compressed file can hold at most: zlib packs 1032 into one.
PACKED = 1100


def walk_files(folder: str | os.PathLike, above: frozenset = frozenset()) -> Iterator[Path]:
    """The files in a folder and the folders in it, in order, also in those that are links; hidden ones are left out.

    A folder that cannot be read comes as if it were a file.
    """
    here = os.path.realpath(folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield Path(folder)
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if not entry.is_dir():
            yield Path(entry.path)
        elif os.path.realpath(entry.path) not in above | {here}:
            yield from walk_files(entry.path, above | {here})


def not_dicom(path: str | os.PathLike) -> str:
    """What a file is that does not start as DICOM files do, with or without a preamble; an empty text if it does."""
    try:
        with open(path, "rb") as file:
            start = file.read(140)
    except OSError as error:
        return f"one that cannot be read ({error.strerror})"
    if start[128:132] == b"DICM":
        return ""
    if start.startswith(b"\x1f\x8b"):
        inside = _unpacked(path, len(start))
        return _GZIPPED if inside[128:132] == b"DICM" or _is_dataset(inside) else "a gzipped file"
    if _is_dataset(start):
        return ""
    if start.startswith(b"DICM") or (not any(start[:128]) and _is_dataset(start[128:])):
        return _NO_PREAMBLE
    return f"one that starts with {start[:9]}" if start else "an empty file"


def is_unread(path: str | os.PathLike) -> bool:
    """Whether a file is DICOM in a form that is not read: gzipped, or with an incomplete preamble."""
    return not_dicom(path) in (_GZIPPED, _NO_PREAMBLE)


def _unpacked(path, length):
    """The first bytes in a gzipped file; none if it is damaged."""
    try:
        with gzip.open(path) as file:
            return file.read(length)
    except (OSError, EOFError, zlib.error):
        return b""


def _is_dataset(start):
    """Whether DICOM elements start here: of group 2 or 8 and either byte order, with a type or a plausible length."""
    group = start[:2] if start[2:4] != b"\0\0" or start[4:6] in (b"UL", b"\4\0") else b""
    plausible = start[4:6].isupper() or start[6:8] == b"\0\0"
    return len(start) > 8 and group in (b"\2\0", b"\10\0", b"\0\10") and plausible


@contextlib.contextmanager
def pydicom_errors(refuse, expected: str = "an undamaged DICOM file"):
    """Suppresses pydicom's warnings, and turns any exception that it raises on a damaged file into an error.

    Args:
        refuse: Creates the error, see `refuser`.
        expected: What the file must be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CaseError:
            raise
        except OSError as error:
            raise refuse("a readable file", error.strerror or error) from error
        except Exception as error:
            raise refuse(expected, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def read_header(path: Path, patient: str, header: dict[int, str] | None = None) -> dict[int, str]:
    """The elements of a DICOM file up to the voxels, but for those in sequences, as text by tag.

    Args:
        path: The file.
        patient: The patient's name, for messages.
        header: Is filled with what there is, also where the file is damaged. Elements that are long have empty text.

    Raises:
        CaseError: The file is damaged, or holds fewer voxels than its header tells of.
    """
    from pydicom.filereader import read_partial

    refuse, header, voxels = refuser(path, patient), {} if header is None else header, []

    def stop(tag, _, length):
        voxels.extend([length] * (tag == PIXELS))
        return tag == PIXELS

    with pydicom_errors(refuse), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        image = read_partial(file, stop, defer_size=_LONGEST, force=True)
        left = size - file.tell()
        elements = [
            part.get_item(tag, keep_deferred=True) for part in (image.file_meta, image) for tag in [*part.keys()]
        ]
    header.update((int(element.tag), _text(element)) for element in elements)
    whole = size if header.get(_SYNTAX) != _DEFLATED else size * PACKED
    for length in (getattr(element, "length", 0) for element in elements):
        if whole < length < 0xFFFFFFFF:
            raise refuse("an undamaged DICOM file", f"an element of {length} bytes in a file of {size}")
    if voxels:
        header[PIXELS] = ""
        numbers = {tag: int(text) for tag, text in header.items() if tag in (*_SIZES, _FRAMES) and text.isdecimal()}
        samples, *sizes = (numbers.get(tag, 0) for tag in _SIZES)
        needed = max(samples, 1) * math.prod(sizes) // 8 * numbers.get(_FRAMES, 1)
        held = size * PACKED if voxels[0] == 0xFFFFFFFF else voxels[0]
        if held < needed or (whole == size and left < voxels[0] < 0xFFFFFFFF):
            received = f"voxels of {min(held, left)} bytes, where the header tells of {max(needed, held)}"
            raise refuse("an undamaged DICOM file", received)
    return header


def _text(element):
    """The value of pydicom's element as text; empty if it is a sequence or was passed over."""
    value = element.value
    if not isinstance(value, bytes):
        return value if isinstance(value, str) else ""
    order = "<" if getattr(element, "is_little_endian", True) else ">"
    if element.tag in _SIZES and len(value) == 2:
        return str(*struct.unpack(f"{order}H", value))
    if element.tag == _B_VALUE and len(value) == 8:
        return str(*struct.unpack(f"{order}d", value))
    try:
        return value.strip(b"\0 ").decode()
    except UnicodeDecodeError:
        return value.strip(b"\0 ").decode("latin-1")
