import contextlib
import dataclasses
import gzip
import math
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._errors import reason, refuser
from keras_mmfnet.data.case import CaseError
from keras_mmfnet.data.dicom import Series, read_series, series_grid
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.structures import Structures, read_structures

# The formats SimpleITK reads that hold an image's position and orientation, without which modalities cannot be
# brought together.
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".mnc")
_TEXT_HEADERS = (".mha", ".mhd", ".nrrd", ".nhdr")
# Voxels that one byte of a file can hold at most: zlib packs 1032 bytes into one.
_PACKED = 1100


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


def read_image(
    source: Path | Volume | Series | Structures, patient: str, pixel_type: int = sitk.sitkUnknown
) -> sitk.Image:
    """Reads one 3D image and refuses what is damaged or cannot be worked with.

    Args:
        source: The file's path, a `Volume` of a file, a DICOM `Series` or its `Structures`.
        patient: The patient's name, for messages.
        pixel_type: SimpleITK's pixel type of the result; the default keeps the file's.

    Returns:
        A 3D SimpleITK image of finite numbers. An image of four dimensions with one volume comes as that volume.

    Raises:
        CaseError: The file is unreadable, truncated or damaged; is not one 3D volume of one number per voxel; has a
            spacing that is not positive; or holds NaN or infinity; or a series is not one stack of slices.
    """
    refuse = refuser(source, patient)
    if isinstance(source, Structures):
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


def read_grid(source: Path | Volume | Series | Structures, patient: str) -> Grid:
    """The grid of a 3D image, from its header alone.

    Args:
        source: The file's path, a `Volume` of a file, a DICOM `Series` or its `Structures`.
        patient: The patient's name, for messages.

    Returns:
        The `Grid` of the image that `read_image` reads.

    Raises:
        CaseError: As `read_image`, as far as the header shows it.
    """
    if isinstance(source, Series):
        return series_grid(source, patient)[0]
    if isinstance(source, Structures):
        return Grid.from_image(read_structures(source, patient))
    refuse = refuser(source, patient)
    reader, path, _ = _read_header(source, refuse)
    if _is_nifti(path):
        with _nifti_errors(refuse), _open_nifti(path) as file:
            spacing = _nifti_spacing(file.read(540))  # a header of NIfTI-2
    else:
        spacing = reader.GetSpacing()
    _require_positive(spacing, refuse)
    direction = tuple(_direction(reader).ravel().tolist())
    return Grid(reader.GetSize()[:3], reader.GetSpacing()[:3], reader.GetOrigin()[:3], direction)


def write_image(image: sitk.Image, path: str | os.PathLike) -> None:
    """Writes a 3D image, compressed, so that it is there whole or not at all.

    SimpleITK says nothing when it could write only half of a NIfTI file: what was written is read again.

    Args:
        image: A SimpleITK image of finite numbers.
        path: The file, in one of the formats of `IMAGE_SUFFIXES`.

    Raises:
        OSError: The file cannot be written, or not whole, as on a full disk.
    """
    path = Path(path)
    # Some formats have a second file for the voxels.
    folder = path.with_name(f".{path.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        partial = folder / path.name
        sitk.WriteImage(image, str(partial), useCompression=True)
        if sitk.Hash(read_image(partial, path.name)) != sitk.Hash(image):
            raise RuntimeError("other values when read again")
        for file in sorted(folder.iterdir(), key=partial.__eq__):
            os.replace(file, path.with_name(file.name))
    except (RuntimeError, CaseError) as error:
        raise OSError(
            f"{path}: must be written whole, as it is not on a full disk. Received: {reason(error)}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_file(source, refuse, pixel_type):
    reader, path, index = _read_header(source, refuse)
    size, spacing = reader.GetSize(), reader.GetSpacing()
    if _is_nifti(path):
        # SimpleITK reads a truncated NIfTI file without an error, takes a spacing of 0 for 1 mm and NaN for 0.
        with _nifti_errors(refuse):
            lacking, not_finite, spacing = _inspect_nifti(path, reader)
        if lacking > 0:
            raise refuse("a whole file", f"a truncated file, {lacking} bytes too short")
        if not_finite:
            raise refuse("an image of finite numbers", f"{not_finite} voxels with NaN or infinity")
    _require_positive(spacing, refuse)
    reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
    reader.SetExtractIndex([0] * 3 + [index or 0] * (len(size) - 3))
    reader.SetOutputPixelType(pixel_type)
    try:
        return reader.Execute()
    except RuntimeError as error:
        raise refuse("a whole, undamaged image file", reason(error)) from error


def _read_header(source, refuse):
    """SimpleITK's reader of one 3D image after it has read the header, the path, and which volume is wanted."""
    path, index = (source.path, source.index) if isinstance(source, Volume) else (Path(source), None)
    available = _inspect_text_header(path, refuse) if path.suffix.lower() in _TEXT_HEADERS else math.inf
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise refuse("an undamaged image file", reason(error)) from error
    components, size = reader.GetNumberOfComponents(), reader.GetSize()
    if components != 1:
        raise refuse("an image with one number per voxel", f"{components} numbers per voxel")
    if len(size) < 3 or (math.prod(size[3:]) != 1 if index is None else len(size) != 4 or index >= size[3]):
        expected = "a 3D image" if index is None else f"an image of {index + 1} or more volumes"
        raise refuse(expected, f"an image of {' x '.join(map(str, size))} voxels")
    if math.prod(size) > _PACKED * available:
        raise refuse("a whole file", f"{' x '.join(map(str, size))} voxels in {available} bytes")
    if not abs(np.linalg.det(_direction(reader))) > 1e-6:
        raise refuse("an image with three directions", ", ".join(f"{value:g}" for value in reader.GetDirection()))
    return reader, path, index


def _direction(reader):
    """The 3x3 matrix of the first three axes."""
    axes = len(reader.GetSize())
    return np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]


def _require_positive(spacing, refuse):
    if not all(0 < step < math.inf for step in spacing[:3]):
        raise refuse("an image with a positive spacing", f"{', '.join(f'{step:g}' for step in spacing[:3])} mm")


def _inspect_text_header(path, refuse):
    """Refuses a MetaImage or NRRD header at which SimpleITK would crash or wait.

    Returns:
        How many bytes there are in the files of the image.
    """
    try:
        with open(path, "rb") as file:
            end = rb"ElementDataFile\s*[=:]\s*(?i:local)" if path.suffix.lower() in (".mha", ".mhd") else rb"\r?\n\r?\n"
            header = re.split(end, file.read(1 << 16), maxsplit=1)[0]
    except OSError as error:
        raise refuse("a readable file", error.strerror) from error
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


def _is_nifti(path):
    return path.name.lower().endswith((".nii", ".nii.gz"))


@contextlib.contextmanager
def _nifti_errors(refuse):
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise refuse("a whole, undamaged file", f"a file that breaks off or is damaged ({error})") from error


def _open_nifti(path):
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return (gzip.open if gzipped else open)(path, "rb")


def _nifti_spacing(header):
    """The spacing (x, y, z) in mm that a NIfTI file's header says."""
    order = ">" if header[0] == 0 else "<"
    # NIfTI-1 and NIfTI-2 are told apart by the length of their header.
    version_1 = struct.unpack_from(f"{order}i", header)[0] == 348
    return struct.unpack_from(f"{order}3f" if version_1 else f"{order}3d", header, 80 if version_1 else 112)


def _inspect_nifti(path, reader):
    """What SimpleITK does not say about a NIfTI file, from one pass over its content, decompressed to its very end.

    Args:
        path: The file.
        reader: SimpleITK's reader, which has read the header.

    Returns:
        How many bytes the content lacks, how many voxels are NaN or infinite, and the spacing (x, y, z) in mm.
    """
    dimensions = [int(reader.GetMetaData(f"dim[{i + 1}]")) for i in range(int(reader.GetMetaData("dim[0]")))]
    lacking = math.prod(dimensions) * int(reader.GetMetaData("bitpix")) // 8
    not_finite = 0
    with _open_nifti(path) as file:
        header = file.read(max(int(float(reader.GetMetaData("vox_offset"))), 348))
        order = ">" if header[0] == 0 else "<"
        number = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}.get(int(reader.GetMetaData("datatype")))
        while chunk := file.read(1 << 20):
            voxels = chunk[: max(lacking, 0)]
            lacking -= len(chunk)
            if number:
                values = np.frombuffer(voxels, number, len(voxels) // number.itemsize)
                not_finite += np.count_nonzero(~np.isfinite(values))
    return lacking, not_finite, _nifti_spacing(header)
