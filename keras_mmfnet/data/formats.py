import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.case import Case, CaseError

# The formats SimpleITK reads that hold an image's position and orientation, without which modalities cannot be
# brought together.
IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".mnc")


def find_cases(directory, recipe, require_mask=True, on_error=None):
    """Finds the patients in a folder; no image is read.

    There is one folder per patient, and in it one file per modality and one for the mask, named as the recipe's
    `modalities` and `mask` say, in any of the formats NIfTI, MetaImage, NRRD and MINC:

    ```
    directory/
      patient_1/
        t1.nii.gz  t2.nii.gz  cet1.nii.gz  mask.nii.gz
      patient_2/
        t1.mha  t2.mha  cet1.mha  mask.nrrd
    ```

    Other files, and those whose name starts with a dot, are passed over.

    Args:
        directory: The folder.
        recipe: A `Recipe`.
        require_mask: Whether a patient without a mask is an error.
        on_error: Called with the `CaseError` of each patient that lacks something; that patient is then left out.
            `None`: the first such error is raised.

    Returns:
        A list of `Case`, sorted by name.

    Raises:
        CaseError: A patient lacks a file, or has two for the same name.
        ValueError: The directory is missing, or there is no patient in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise ValueError(f"the patients' directory {problem}. Received: {directory}")
    folders = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    cases = []
    for folder in folders:
        try:
            cases.append(read_case_folder(folder, recipe, require_mask))
        except CaseError as error:
            if on_error is None:
                raise
            on_error(error)
    if not cases:
        files = ", ".join([*recipe.modalities, *([recipe.mask] if require_mask else [])])
        raise ValueError(
            f"the patients' directory must hold one folder per patient with the files {files} "
            f"({', '.join(IMAGE_SUFFIXES)}). Received: {directory}, with {len(folders)} folders and no such patient"
        )
    return cases


def read_case_folder(folder, recipe, require_mask=True):
    """Finds the files of the one patient in a folder; no image is read.

    Args:
        folder: The patient's folder; its name is the patient's name.
        recipe: A `Recipe`, which says what the files are called.
        require_mask: Whether a missing mask is an error.

    Returns:
        A `Case`.

    Raises:
        CaseError: The folder, an image or a required mask is missing, or there are two files for the same name.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise CaseError(f"{folder.name}: must be a folder with one patient's files. Received: {folder}")
    names = {path.name for path in folder.iterdir() if path.is_file()}

    def find(stem, required=True):
        found = sorted(n for n in names if n.startswith(stem) and n[len(stem) :].lower() in IMAGE_SUFFIXES)
        if len(found) > 1:
            raise CaseError(f"{folder.name}: {folder / stem}: must be one file. Received: {', '.join(found)}")
        if found:
            return folder / found[0]
        if required:
            raise CaseError(
                f"{folder.name}: {folder / stem}: is missing; a file of that name with one of the endings "
                f"{', '.join(IMAGE_SUFFIXES)} is expected. Received: {', '.join(sorted(names)) or 'an empty folder'}"
            )
        return None

    images = {modality: find(modality) for modality in recipe.modalities}
    return Case(folder.name, images, find(recipe.mask, require_mask))


def read_image(path, patient, pixel_type=sitk.sitkUnknown):
    """Reads one 3D image and refuses what is damaged or cannot be worked with.

    Args:
        path: The file.
        patient: The patient's name, for messages.
        pixel_type: SimpleITK's pixel type of the result; the default keeps the file's.

    Returns:
        A 3D SimpleITK image of finite numbers. An image of four dimensions with one volume comes as that volume.

    Raises:
        CaseError: The file is unreadable, truncated or damaged; is not one 3D volume of one number per voxel; has a
            spacing that is not positive; or holds NaN or infinity.
    """
    path = Path(path)

    def refuse(expected, received):
        return CaseError(f"{patient}: {path}: must be {expected}. Received: {received}")

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise refuse("an undamaged image file", _reason(error)) from error
    components, size, spacing = reader.GetNumberOfComponents(), reader.GetSize(), reader.GetSpacing()
    if components != 1:
        raise refuse("an image with one number per voxel", f"{components} numbers per voxel")
    if len(size) < 3 or math.prod(size[3:]) != 1:
        raise refuse("a 3D image", f"an image of {' x '.join(map(str, size))} voxels")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        # SimpleITK reads a truncated NIfTI file without an error, takes a spacing of 0 for 1 mm and NaN for 0.
        try:
            lacking, not_finite, spacing = _inspect_nifti(path, reader)
        except (OSError, EOFError, zlib.error) as error:
            raise refuse("a whole, undamaged file", f"a file that breaks off or is damaged ({error})") from error
        if lacking > 0:
            raise refuse("a whole file", f"a truncated file, {lacking} bytes too short")
        if not_finite:
            raise refuse("an image of finite numbers", f"{not_finite} voxels with NaN or infinity")
    if not all(0 < step < math.inf for step in spacing[:3]):
        raise refuse("an image with a positive spacing", f"{', '.join(f'{step:g}' for step in spacing[:3])} mm")
    reader.SetExtractSize([*size[:3], *[0] * (len(size) - 3)])
    reader.SetOutputPixelType(pixel_type)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise refuse("a whole, undamaged image file", _reason(error)) from error
    values = sitk.GetArrayViewFromImage(image)
    # NaN and infinity spread to the minimum or the maximum, which needs no array of its own as isfinite does.
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        not_finite = np.count_nonzero(~np.isfinite(values))
        raise refuse("an image of finite numbers", f"{not_finite} voxels with NaN or infinity")
    return image


def _inspect_nifti(path, reader):
    """What SimpleITK does not say about a NIfTI file, from one pass over its content, decompressed to its very end.

    Args:
        path: The file.
        reader: SimpleITK's reader, which has read the header.

    Returns:
        How many bytes the content lacks, how many voxels are NaN or infinite, and the spacing (x, y, z) in mm.
    """
    header_length = max(int(float(reader.GetMetaData("vox_offset"))), 348)
    dimensions = [int(reader.GetMetaData(f"dim[{i + 1}]")) for i in range(int(reader.GetMetaData("dim[0]")))]
    lacking = math.prod(dimensions) * int(reader.GetMetaData("bitpix")) // 8
    not_finite = 0
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    with (gzip.open if gzipped else open)(path, "rb") as file:
        header = file.read(header_length)
        order = ">" if header[0] == 0 else "<"
        number = {16: np.dtype(f"{order}f4"), 64: np.dtype(f"{order}f8")}.get(int(reader.GetMetaData("datatype")))
        while chunk := file.read(1 << 20):
            voxels = chunk[: max(lacking, 0)]
            lacking -= len(chunk)
            if number:
                values = np.frombuffer(voxels, number, len(voxels) // number.itemsize)
                not_finite += np.count_nonzero(~np.isfinite(values))
    # NIfTI-1 and NIfTI-2 are told apart by the length of their header.
    version_1 = struct.unpack_from(f"{order}i", header)[0] == 348
    spacing = struct.unpack_from(f"{order}3f" if version_1 else f"{order}3d", header, 80 if version_1 else 112)
    return lacking, not_finite, spacing


def _reason(error):
    """The last line of SimpleITK's message, which says what went wrong."""
    return str(error).strip().splitlines()[-1]
