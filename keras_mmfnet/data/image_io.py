import contextlib
import dataclasses
import gzip
import itertools
import math
import os
import re
import struct
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._dicom_header import PACKED
from keras_mmfnet.data._errors import reason, refuser
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import Series, read_series, series_grid
from keras_mmfnet.data.geometry import Grid, nearest_rotation
from keras_mmfnet.data.structures import DicomStructures, read_structures

# The formats SimpleITK reads that hold an image's position and orientation, without which modalities cannot be
# brought together. Not MINC: whether it gets the signs of its axes right depends on the version of ITK.
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".seg.nrrd", ".nhdr")
_TEXT_HEADERS = (".mha", ".mhd", ".nrrd", ".nhdr")
# In mm: how far the corners may move where axes are not quite at right angles, and how large an image may be.
_TOLERANCE, _LARGEST = 0.5, (1, 3000)
# In mm: how far a corner's positions in one header may differ, as those of a rounded quaternion do.
_ROUNDING = 0.1
_NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
# The fields of the headers, by version: how many of which kind, and where.
_FIELDS = "dim datatype pixdim offset scale units codes quaternion shift rows".split()
_PLACES = {
    1: "8h@40 h@70 8f@76 f@108 2f@112 B@123 2h@252 3f@256 3f@268 12f@280".split(),
    2: "8q@16 h@12 8d@104 q@168 2d@176 i@500 2i@344 3d@352 3d@376 12d@400".split(),
}


@dataclasses.dataclass(frozen=True)
class Volume:
    """One 3D volume of a file with four axes.

    Args:
        path: The file.
        index: Number of the volume, from 0.
    """

    path: Path
    index: int

    def __str__(self):
        return f"{self.path} (volume {self.index})"


def image_suffix(path: str | os.PathLike) -> str | None:
    """The ending of an image file's name in one of the formats that can be read, or `None`."""
    name = Path(path).name.lower()
    return next((suffix for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)


def image_stem(path: str | os.PathLike) -> str | None:
    """An image file's name without its ending, or `None` where `image_suffix` is."""
    suffix = image_suffix(path)
    return suffix and Path(path).name[: -len(suffix)]


def read_image(
    source: Path | Volume | Series | DicomStructures, patient: str, pixel_type: int = sitk.sitkUnknown
) -> sitk.Image:
    """Reads one 3D image and refuses what is damaged or cannot be worked with.

    Args:
        source: The file's path, a `Volume` of a file, a DICOM `Series` or its `DicomStructures`.
        patient: The patient's name, for messages.
        pixel_type: SimpleITK's pixel type of the result; the default keeps the file's.

    Returns:
        A 3D SimpleITK image of finite numbers. An image of four dimensions with one volume comes as that volume.

    Raises:
        CaseError: The file is unreadable, truncated or damaged; is not one 3D volume of one number per voxel; has a
            spacing that is not positive; or holds NaN or infinity; or a series is not one stack of slices.
    """
    refuse = refuser(source, patient)
    if isinstance(source, DicomStructures):
        return read_structures(source, patient)
    if isinstance(source, Series):
        image = read_series(source, patient, pixel_type)
    else:
        image = _read_file(source, refuse, pixel_type)
    values = sitk.GetArrayViewFromImage(image)
    # NaN and infinity spread to the minimum or the maximum, which needs no array of its own as isfinite does.
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        not_finite = np.count_nonzero(~np.isfinite(values))
        raise refuse("an image of finite numbers", f"{not_finite} voxels with NaN or infinity")
    return image


def read_grid(source: Path | Volume | Series | DicomStructures, patient: str) -> Grid:
    """The grid of a 3D image, from its header alone.

    Args:
        source: The file's path, a `Volume` of a file, a DICOM `Series` or its `DicomStructures`.
        patient: The patient's name, for messages.

    Returns:
        The `Grid` of the image that `read_image` reads.

    Raises:
        CaseError: As `read_image`, as far as the header shows it.
    """
    if isinstance(source, Series):
        return series_grid(source, patient)[0]
    if isinstance(source, DicomStructures):
        return Grid.from_image(read_structures(source, patient))
    refuse = refuser(source, patient)
    path, _ = _path_and_index(source)
    return _read_nifti(source, refuse).grid if _is_nifti(path) else _read_header(source, refuse)[1]


def position_problems(source: Path | Volume | Series, patient: str) -> tuple[bool, str]:
    """Checks the position in an image's header.

    If a NIfTI file has both a sform and a qform, the sform is used, with its own voxel size, as in nibabel. ITK takes
    the voxel size from pixdim, and the rest from the qform if the sform is not that of the scanner.

    Args:
        source: The file's path, a `Volume` of a file, or a DICOM `Series`.
        patient: The patient's name, for messages.

    Returns:
        Whether the header has a position; and `"sform and qform differ by 13 mm"` or the like where the sform and what
        else gives a position differ by more than 0.1 mm in a corner, or an empty text.

    Raises:
        CaseError: As `read_grid`.
    """
    if isinstance(source, (Series, DicomStructures)):
        return True, ""
    refuse, (path, _) = refuser(source, patient), _path_and_index(source)
    if _is_nifti(path):
        nifti = _read_nifti(source, refuse)
        what, off = nifti.other
        return nifti.has_position, "" if off <= _ROUNDING else f"sform and {what} differ by {off:.3g} mm"
    names = rb"offset|position|origin" if path.suffix.lower() in (".mha", ".mhd") else rb"space origin"
    return bool(re.search(rb"(?im)^\s*(" + names + rb")\s*[=:]", _text_header(path, refuse)[0])), ""


def write_image(image: sitk.Image, path: str | os.PathLike) -> None:
    """Writes a 3D image atomically, compressed: the file is complete or absent.

    SimpleITK says nothing when it could write only half of a NIfTI file: what was written is read again.

    Args:
        image: A SimpleITK image of finite numbers.
        path: The file, in one of the formats of `IMAGE_SUFFIXES`.

    Raises:
        OSError: The file cannot be written completely, as on a full disk.
    """
    path = Path(path)
    # Some formats have a second file for the voxels.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        try:
            sitk.WriteImage(image, str(partial), useCompression=True)
            if sitk.Hash(read_image(partial, path.name)) != sitk.Hash(image):
                raise RuntimeError("other values when read again")
        except (RuntimeError, CaseError) as error:
            raise OSError(
                f"{path}: the file must be complete when read again; the disk may be full. Received: {reason(error)}"
            ) from error
        for file in sorted(Path(folder).iterdir(), key=partial.__eq__):
            os.replace(file, path.with_name(file.name))


def _read_file(source, refuse, pixel_type):
    path, index = _path_and_index(source)
    if _is_nifti(path):
        return _nifti_image(_read_nifti(source, refuse), path, index or 0, refuse, pixel_type)
    reader, grid = _read_header(source, refuse)
    size = reader.GetSize()
    reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
    reader.SetExtractIndex([0] * 3 + [index or 0] * (len(size) - 3))
    reader.SetOutputPixelType(pixel_type)
    if _has_text_header(path):
        _require_whole_stream(path, refuse)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise refuse("a whole, undamaged image file", reason(error)) from error
    image.SetOrigin(grid.origin)
    image.SetDirection(grid.direction)
    return image


def _path_and_index(source):
    """The path, and which volume of it is wanted, `None` for the only one."""
    return (source.path, source.index) if isinstance(source, Volume) else (Path(source), None)


def _read_header(source, refuse):
    """SimpleITK's reader of one 3D image after it has read the header, and the grid."""
    path, index = _path_and_index(source)
    available = _inspect_text_header(path, refuse) if _has_text_header(path) else math.inf
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise refuse("an undamaged image file", reason(error)) from error
    size, axes = reader.GetSize(), len(reader.GetSize())
    _require_3d(size, reader.GetNumberOfComponents(), index, refuse)
    if math.prod(size) > PACKED * available:
        raise refuse("a whole file", f"{_by(size)} voxels in {available} bytes")
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
    return reader, _regular_grid(size[:3], direction, reader.GetSpacing()[:3], reader.GetOrigin()[:3], refuse)


def _require_3d(size, components, index, refuse):
    if components != 1:
        raise refuse("an image with one number per voxel", f"{components} numbers per voxel")
    if len(size) < 3 or (math.prod(size[3:]) != 1 if index is None else len(size) != 4 or index >= size[3]):
        expected = "a 3D image" if index is None else f"an image of {index + 1} or more volumes"
        raise refuse(expected, f"an image of {_by(size)} voxels")


def _by(numbers):
    return " x ".join(map(str, numbers))


def _regular_grid(size, direction, spacing, origin, refuse):
    """The grid of an image whose axes are at right angles; those that nearly are, are made so about its centre."""
    _require_positive(spacing, refuse)
    extent = np.multiply(size, spacing)
    if not _LARGEST[0] <= extent.max() <= _LARGEST[1]:
        expected = f"an image of {_LARGEST[0]} to {_LARGEST[1]} mm, as the unit of its header says"
        raise refuse(expected, f"{_by(np.round(extent, 3).tolist())} mm")
    if not (np.isfinite(direction).all() and np.isfinite(origin).all() and abs(np.linalg.det(direction)) > 1e-6):
        raise refuse("an image with three directions", ", ".join(f"{value:g}" for value in np.ravel(direction)))
    straight = nearest_rotation(direction)
    moved = (direction - straight) * spacing @ np.diag(np.subtract(size, 1) / 2)
    off = max(float(np.linalg.norm(moved @ signs)) for signs in itertools.product((1, -1), repeat=3))
    if off > _TOLERANCE:
        raise refuse(
            f"an image of axes at right angles, to within {_TOLERANCE} mm at its corners; resample a sheared one",
            f"axes that are {off:.3g} mm off",
        )
    origin = np.asarray(origin) + moved.sum(axis=1)
    return Grid(tuple(size), tuple(map(float, spacing)), tuple(origin.tolist()), tuple(straight.ravel().tolist()))


def _inspect_text_header(path, refuse):
    """Refuses a MetaImage or NRRD header at which SimpleITK would crash or wait.

    Returns:
        How many bytes there are in the files of the image.
    """
    header = _text_header(path, refuse)[0]
    for axes in re.findall(rb"NDims\s*[=:](.*)", header):
        if not (axes.strip().isdigit() and 1 <= int(axes[:9]) <= 10):
            raise refuse("an image of 1 to 10 axes", f"NDims = {os.fsdecode(axes.strip())}")
    # What a line says, or what follows its name, may be a file with the voxels, or the pattern of some.
    values = [os.fsdecode(re.split(rb"[=:]", line, maxsplit=1)[-1].strip()) for line in header.splitlines()]
    files = {path, *(path.parent / value for value in values)}
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file) and not os.path.isdir(file):
            raise refuse("an image whose voxels lie in files", f"{file}, which is none")
    for value in values:
        if "%" in value:
            # SimpleITK gives it to printf as it is.
            if not re.fullmatch(r"[^%]*%\d{0,4}d[^%]*", value):
                raise refuse("an image with files numbered as by %03d", value)
            files.update(path.parent.iterdir())
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _text_header(path, refuse):
    """The header of a MetaImage or NRRD, and where what follows it begins: the voxels, if they are in this file."""
    try:
        with open(path, "rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise refuse("a readable file", error.strerror) from error
    is_meta = path.suffix.lower() in (".mha", ".mhd")
    end = re.search(rb"ElementDataFile\s*[=:]\s*(?i:local)[^\n]*\n" if is_meta else rb"\r?\n\r?\n", start)
    return (start[: end.start()], end.end()) if end else (start, len(start))


def _require_whole_stream(path, refuse):
    """Refuses compressed voxels that are damaged, of which SimpleITK fills the rest with zeros."""
    header, offset = _text_header(path, refuse)
    fields = {
        key.strip().lower(): os.fsdecode(value.strip())
        for key, _, value in (re.sub(rb":=?|=", b"=", line, count=1).partition(b"=") for line in header.splitlines())
    }
    packed = fields.get(b"compresseddata", "").lower() == "true"
    packed = packed or fields.get(b"encoding", "").lower() in ("gz", "gzip")
    name = next((fields[key] for key in (b"elementdatafile", b"data file", b"datafile") if key in fields), None)
    file = path if name is None else path.parent / name
    # Other files than one, and bytes to pass over, are SimpleITK's business.
    if not packed or not file.is_file() or fields.keys() & {b"byte skip", b"byteskip", b"line skip", b"lineskip"}:
        return
    stream = zlib.decompressobj(wbits=47)  # of zlib or gzip
    try:
        with open(file, "rb") as opened:
            opened.seek(offset if name is None else 0)
            while not stream.eof and (chunk := stream.unconsumed_tail or opened.read(1 << 20)):
                stream.decompress(chunk, 1 << 24)
    except (OSError, zlib.error) as error:
        raise refuse("a whole, undamaged file", f"compressed voxels that are damaged ({error})") from error
    if not stream.eof:
        raise refuse("a whole, undamaged file", "compressed voxels that break off")


def voxels_lie_apart(path: Path, patient: str) -> bool:
    """Whether the voxels of an image file, a MetaImage or NRRD, lie in another file."""
    if not _has_text_header(path):
        return False
    header, _ = _text_header(path, refuser(path, patient))
    return bool(re.search(rb"(?im)^\s*(ElementDataFile\s*[=:]|data ?file\s*:)", header))


def _has_text_header(path):
    return path.suffix.lower() in _TEXT_HEADERS


def _is_nifti(path):
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _require_positive(spacing, refuse):
    if not all(0 < step < math.inf for step in spacing):
        raise refuse("an image with a positive spacing", f"{', '.join(f'{step:g}' for step in spacing)} mm")


class _Nifti(NamedTuple):
    """What counts of a NIfTI file's header; `other` is what else gives a position, and how many mm a corner differs."""

    size: tuple[int, ...]
    dtype: np.dtype
    offset: int
    scale: tuple[float, float]
    grid: Grid
    has_position: bool
    other: tuple[str, float]


@contextlib.contextmanager
def _open_nifti(path, refuse):
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if gzipped else open)(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise refuse("an undamaged image file", error.strerror) from error
    except (OSError, EOFError, zlib.error) as error:
        raise refuse("a whole, undamaged file", f"a file that breaks off or is damaged ({error})") from error


def _read_nifti(source, refuse):
    """The header of a NIfTI file. SimpleITK would read truncated ones and guess where they are contradictory."""
    path, index = _path_and_index(source)
    with _open_nifti(path, refuse) as file:
        header = file.read(540).ljust(540, b"\0")
    order = ">" if header[0] == 0 else "<"
    version = {348: 1, 540: 2}.get(struct.unpack_from(f"{order}i", header)[0])
    magic = {1: header[344:347] == b"n+1", 2: header[4:7] == b"n+2"}
    if not magic.get(version):
        raise refuse("an undamaged image file", f"no header of NIfTI, but {header[:9]}")
    places = [place.split("@") for place in _PLACES[version]]
    read = {
        name: struct.unpack_from(order + kind, header, int(place))
        for name, (kind, place) in zip(_FIELDS, places, strict=True)
    }
    axes, *size = read["dim"]
    if not (1 <= axes <= 7 and all(length > 0 for length in size[:axes])):
        raise refuse("an undamaged image file", f"an image of {axes} axes, {_by(size)} voxels")
    size = tuple(size[:axes])
    # The fifth axis is that of the numbers of a voxel.
    _require_3d(size, size[4] if axes == 5 and size[3] == 1 else 1, index, refuse)
    if read["datatype"][0] not in _NIFTI_TYPES:
        raise refuse("an image with one number per voxel", f"the NIfTI data type {read['datatype'][0]}")
    dtype, offset = np.dtype(order + _NIFTI_TYPES[read["datatype"][0]]), read["offset"][0]
    available = path.stat().st_size * PACKED
    # Voxels come after the header, whatever some writers say.
    offset = max(offset, 352 if version == 1 else 544)
    if not offset <= available or math.prod(size) * dtype.itemsize > available:
        raise refuse("a whole file", f"{_by(size)} voxels in {path.stat().st_size} bytes")
    unit = {1: 1000.0, 3: 0.001}.get(read["units"][0] & 7, 1.0)
    has_qform, has_sform = (code > 0 for code in read["codes"])
    if not has_sform:  # which has steps of its own
        _require_positive(read["pixdim"][1:4], refuse)
    with np.errstate(all="ignore"):  # what is not finite is refused after
        matrices = (_qform(read), np.reshape(read["rows"], (3, 4)), _base(read, size))
        # In mm, to the patient's left, posterior and superior, as in DICOM.
        qform, sform, base = (matrix * unit * np.array([[-1], [-1], [1]]) for matrix in matrices)
        best = sform if has_sform else qform if has_qform else base
        spacing = np.linalg.norm(best[:, :3], axis=0)
        direction = best[:, :3] / spacing
        resized = np.column_stack([direction * np.array(read["pixdim"][1:4]) * unit, best[:, 3]])
        corners = np.array([(*corner, 1) for corner in itertools.product(*((0, n - 1) for n in size[:3]))])
        what, other = ("qform", qform) if has_qform else ("pixdim", resized)
        off = float(np.linalg.norm(corners @ (best - other).T, axis=1).max()) if has_sform else 0.0
    grid = _regular_grid(size[:3], direction, spacing, best[:, 3], refuse)
    return _Nifti(size, dtype, int(offset), read["scale"], grid, has_qform or has_sform, (what, off))


def _qform(read):
    """The 3x4 matrix of a quaternion, as the standard has it."""
    b, c, d = read["quaternion"]
    a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
    a, b, c, d = np.array([a, b, c, d]) / (np.linalg.norm([a, b, c, d]) or 1)
    rotation = [
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
    ]
    steps = np.array(read["pixdim"][1:4]) * (1, 1, -1 if read["pixdim"][0] < 0 else 1)
    return np.column_stack([np.array(rotation) * steps, read["shift"]])


def _base(read, size):
    """The 3x4 matrix that nibabel takes where a header has none: x runs to the left, the centre is at 0."""
    axes = np.diag(read["pixdim"][1:4]) * (-1, 1, 1)
    return np.column_stack([axes, -axes @ (np.subtract(size[:3], 1) / 2)])


def _nifti_image(nifti, path, index, refuse, pixel_type):
    """The voxels, from one pass over the file's content, decompressed to its very end."""
    volume = math.prod(nifti.size[:3]) * nifti.dtype.itemsize
    first = nifti.offset + index * volume
    place, voxels, last = 0, bytearray(), nifti.offset + math.prod(nifti.size) * nifti.dtype.itemsize
    with _open_nifti(path, refuse) as file:
        while chunk := file.read(1 << 20):
            voxels += chunk[max(first - place, 0) : max(first + volume - place, 0)]
            place += len(chunk)
    if place < last:
        raise refuse("a whole file", f"a truncated file, {last - place} bytes too short")
    array = np.frombuffer(voxels, nifti.dtype).reshape(nifti.grid.shape).astype(nifti.dtype.newbyteorder("="))
    slope, intercept = nifti.scale
    if slope and math.isfinite(slope) and (slope, intercept) != (1, 0):
        array = array * np.float64(slope) + (intercept if math.isfinite(intercept) else 0.0)
    image = nifti.grid.image(array)
    return image if pixel_type == sitk.sitkUnknown else sitk.Cast(image, pixel_type)
