"""The headers of DICOM files, read without a library: see `_read_elements`."""

import contextlib
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import SimpleITK as sitk

from keras_mmfnet.data._errors import refuser

_SYNTAX, _FRAMES, _PIXELS = 0x00020010, 0x00280008, 0x7FE00010
_SAMPLES, _ROWS, _COLUMNS, _BITS = 0x00280002, 0x00280010, 0x00280011, 0x00280100
_IMPLICIT, _BIG, _DEFLATED = (b"1.2.840.10008.1.2" + end for end in (b"", b".2", b".1.99"))
# Value representations whose length has two bytes; and four bytes, after two without a meaning.
_SHORT = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
# Bytes that one byte of a compressed file can hold at most.
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


def first_element(path):
    """Where the first element of a DICOM file is, or `None`; and what the file is instead."""
    try:
        with open(path, "rb") as file:
            start = file.read(140)
    except OSError as error:
        return None, f"one that cannot be read ({error.strerror})"
    if start[128:132] == b"DICM":
        return 132, ""
    # Groups 2 or 8, of either byte order, with a value representation or a plausible length.
    group = start[:2] if start[2:4] != b"\0\0" or start[4:6] in (b"UL", b"\4\0") else b""
    if len(start) > 8 and group in (b"\2\0", b"\10\0", b"\0\10") and (start[4:6] in _SHORT or start[6:8] == b"\0\0"):
        return 0, ""
    return None, f"one that starts with {start[:9]}" if start else "an empty file"


def text(header, tag):
    """An element of a header as text, empty if there is none."""
    value = header.get(tag, b"").strip(b"\0 ")
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def gdcm_reader(path):
    """SimpleITK's reader of one DICOM file, after it has read the header; raises a `RuntimeError` if it cannot."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def read_header(path, patient, header=None):
    """The short elements of a DICOM file, but for those in sequences, by tag as bytes.

    `header` is filled with what there is, also where the file is damaged.
    """
    refuse, header = refuser(path, patient), {} if header is None else header
    try:
        damage, whole = _read_elements(path, header)
    except OSError as error:
        raise refuse("a readable file", error.strerror) from error
    except zlib.error as error:
        damage = str(error)
    if damage:
        raise refuse("an undamaged DICOM file", damage)
    if not whole:  # GDCM understands some headers that break the rules
        with contextlib.suppress(RuntimeError, ValueError):
            reader = gdcm_reader(path)
            for key in reader.GetMetaDataKeys():
                value = reader.GetMetaData(key).encode(errors="surrogateescape")
                header.setdefault(int(key.replace("|", ""), 16), value)
    return header


def _read_elements(path, header):
    """Reads the elements of a file one after the other, those in sequences too, up to one that is not understood.

    GDCM would take the memory that an element claims, up to 4 GiB, before it looks for the content. pydicom cannot
    tell: it understands damaged headers otherwise than GDCM, and it takes four times as long.

    Returns:
        What is wrong, or `None`; and whether the elements were understood up to the voxels.
    """
    size, syntax, implicit = path.stat().st_size, b"", None
    levels = []  # of sequences and items: where each ends, `None` for a mark; the encoding around it; whether fragments
    with open(path, "rb") as file:
        file.seek(first_element(path)[0] or 0)
        first = file.peek(2)[:2]
        if first not in (b"\2\0", b"\10\0", b"\0\10"):
            return "no element of group 2 or 8 at the start", False
        while len(head := file.read(8)) == 8:
            described = head[:2] != b"\2\0" or bool(levels)  # what comes before is always explicit and little endian
            if described and implicit is None:
                implicit = syntax == _IMPLICIT if syntax else head[4:6] not in _SHORT | _LONG
                if syntax == _DEFLATED:
                    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(head + file.read(), 1 << 20)
                    file, size = io.BufferedReader(io.BytesIO(content)), size * PACKED
                    continue
            order = ">" if described and (syntax == _BIG or first == b"\0\10") else "<"
            group, element = struct.unpack_from(f"{order}HH", head)
            tag, kind = group << 16 | element, head[4:6]
            if group == 0xFFFE or (described and implicit):
                [length] = struct.unpack_from(f"{order}I", head, 4)
            elif kind in _SHORT:
                [length] = struct.unpack_from(f"{order}H", head, 6)
            elif kind in _LONG:
                [length] = struct.unpack(f"{order}I", file.read(4).ljust(4, b"\0"))
            elif not described:  # GDCM takes it for implicit
                [length] = struct.unpack_from("<I", head, 4)
            elif levels and levels[0][0] is not None:
                file.seek(levels[0][0])
                implicit, levels = levels[0][1], []
                continue
            else:
                # GDCM tries other encodings in turn, and takes the memory that lengths in them seem to claim.
                unknown = f"an element {tag:08X} of no value representation"
                return (None if kind in (b"??", b"  ", b"--") else unknown), False
            open_end = length == 0xFFFFFFFF
            if not open_end and length > size:
                return f"an element of {length} bytes in a file of {size}", False
            if not levels:
                header.setdefault(tag, b"")
                if tag == _PIXELS and not open_end and length < (needed := _voxel_bytes(header, order)):
                    return f"voxels of {length} bytes, where the header tells of {needed}", False
            if tag in (0xFFFEE00D, 0xFFFEE0DD):
                if levels:
                    implicit = levels.pop()[1]
            elif open_end:
                levels.append((None, implicit, tag == _PIXELS))
                implicit = implicit or (kind == b"UN" and group != 0xFFFE)
            elif (tag == 0xFFFEE000 and not (levels and levels[-1][2])) or (
                group not in (0xFFFE, 0x7FE0) and file.peek(4)[:4] == struct.pack(f"{order}HH", 0xFFFE, 0xE000)
            ):
                levels.append((file.tell() + length, implicit, False))
            elif not levels and length <= 256:
                header[tag] = header[tag] or file.read(length)
                syntax = header[tag].rstrip(b"\0 ") if tag == _SYNTAX else syntax
            else:
                file.seek(length, 1)
            for depth, (end, around, _) in enumerate(levels):
                if end is not None and file.tell() >= end:
                    implicit, levels = around, levels[:depth]
                    break
    return None, True


def _voxel_bytes(header, order):
    """The size of the voxels that a header tells of, 0 where it does not; GDCM fills what is missing with 0."""
    samples = header.get(_SAMPLES) or struct.pack(f"{order}H", 1)
    sizes = [samples, *(header.get(tag, b"") for tag in (_ROWS, _COLUMNS, _BITS))]
    numbers = [struct.unpack(f"{order}H", size)[0] if len(size) == 2 else 0 for size in sizes]
    frames = text(header, _FRAMES)
    return math.prod(numbers) // 8 * (int(frames) if frames.isdecimal() else 1)
