"""The strokes of a correction that is not saved yet, in a file that survives a crash."""

import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np

_log = logging.getLogger(__name__)
_MAGIC = b"mmfnet strokes 1\n"
# Length of a record in bytes, and the CRC of what follows.
_RECORD = struct.Struct("<II")


def pack(indices: np.ndarray, values: np.ndarray) -> bytes:
    """A stroke as bytes: the number of voxels as uint32, their flat indices as uint32 and their values as uint8."""
    count = np.uint32(len(indices))
    return count.tobytes() + indices.astype("<u4").tobytes() + values.astype("u1").tobytes()


def unpack(data: bytes, voxels: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`.

    Args:
        data: The bytes.
        voxels: Voxels of the drawing.
        highest: The highest value that a voxel may have.

    Returns:
        The flat indices and the values.

    Raises:
        ValueError: The bytes are no stroke of such a drawing.
    """
    count = int.from_bytes(data[:4], "little")
    if len(data) < 4 or len(data) != 4 + 5 * count:
        raise ValueError(f"a stroke must have 4 + 5 bytes for each voxel. Received: {len(data)} bytes")
    indices = np.frombuffer(data, "<u4", count, 4)
    values = np.frombuffer(data, "u1", count, 4 + 4 * count)
    if count and (indices.max() >= voxels or values.max() > highest):
        raise ValueError(
            f"a stroke must be of voxels below {voxels} and of values up to {highest}. Received: {indices.max()} and "
            f"{values.max()}"
        )
    return indices, values


class StrokeFile:
    """The file of a patient's strokes, to which one process writes.

    Args:
        path: The file. It is created with the first stroke.
        base: A hash of the mask that is corrected, as hexadecimal digits.
    """

    def __init__(self, path: Path, base: str):
        self.path, self._header = path, _header(base)
        self._end = 0  # of the last complete stroke that was read or written

    def read(self, saved: str | None = None) -> list[bytes]:
        """The strokes, as from `pack`, in their order.

        What a crash left incomplete at the end is not read; a copy of a file with such an end is kept as
        `strokes.damaged`.

        Args:
            saved: The hash of a mask whose strokes were saved already; strokes on it, which a crash left, are removed.

        Raises:
            ValueError: The strokes are of another mask.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if saved and content.startswith(_header(saved)) and _header(saved) != self._header:
            self.remove()
            return []
        strokes, self._end = [], 0
        if content.startswith(self._header):
            self._end = len(self._header)
            while self._end + _RECORD.size <= len(content):
                length, check = _RECORD.unpack_from(content, self._end)
                stroke = content[self._end + _RECORD.size :][:length]
                if len(stroke) < length or zlib.crc32(stroke) != check:
                    break
                strokes.append(stroke)
                self._end += _RECORD.size + length
        elif len(content) >= len(self._header):
            raise ValueError(
                f"{self.path}: must be unsaved strokes on the mask that is there now; rename the file to start again. "
                "Received: strokes on another mask"
            )
        if self._end < len(content):
            self.path.with_name(f"{self.path.name}.damaged").write_bytes(content)
            _log.warning("%s: the strokes after %d are incomplete and are left out", self.path, len(strokes))
        return strokes

    def append(self, stroke: bytes) -> None:
        """Adds a stroke after those that were read; it is on the disk when this returns.

        Raises:
            OSError: The file cannot be written, or another process changed it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = self.path.exists()
        if self._end > (self.path.stat().st_size if there else 0):
            raise OSError(f"{self.path}: the strokes that were written are expected. Received: a shorter file")
        with open(self.path, "r+b" if there else "wb") as file:
            file.seek(self._end)
            file.truncate()
            record = _RECORD.pack(len(stroke), zlib.crc32(stroke)) + stroke
            file.write(record if self._end else self._header + record)
            file.flush()
            os.fsync(file.fileno())
            self._end = file.tell()

    def remove(self) -> None:
        """Removes the file, after its strokes were saved as a mask."""
        self.path.unlink(missing_ok=True)
        self._end = 0


def _header(base):
    return _MAGIC + base.encode() + b"\n"
