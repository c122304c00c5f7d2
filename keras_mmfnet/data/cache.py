"""Preprocessed patients on disk. Each is a folder, which appears only when it is complete."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.case import Case, PreprocessedCase, StructureFiles
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import Volume, read_image
from keras_mmfnet.data.registration import RigidTransform
from keras_mmfnet.data.structures import DicomStructures
from keras_mmfnet.recipe import DataRecipe

# A cache entry depends on these fields of a `DataRecipe`, on the content of the files and on `_VERSION`. Increase the
# version whenever preprocessing or the format of an entry changes.
_FIELDS = ("modalities", "mask_from", "allow_empty", "align", "spacing", "normalised_scale", "clip")
_VERSION = 9


def key(case: Case, recipe: DataRecipe) -> str:
    """The name of a cache entry: a hash of all that preprocessing depends on. The patient's name is not part of it."""
    masks = case.mask if isinstance(case.mask, Mapping) else {None: case.mask}
    sources = [*(case.images[modality] for modality in recipe.modalities), *masks.values()]

    @functools.cache  # the structures of one file share it and its series
    def digest(source):
        return _digest(source, case.name, digest)

    settings = {name: getattr(recipe, name) for name in _FIELDS}
    settings["structures"] = list(recipe.structures.items())  # whose order is that of the masks
    content = json.dumps(
        [_VERSION, settings, [*masks], [digest(source) for source in sources if source]],
        sort_keys=True,
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _digest(source, patient, digest):
    """A hash of the content of an image's files, including a separate file of voxels; `digest` gives that of a part."""
    if isinstance(source, Series):
        return [[*map(digest, source.files)], source.frames]
    if isinstance(source, Volume):
        return [digest(source.path), source.index]
    if isinstance(source, StructureFiles):
        return [[name, digest(file)] for name, file in source.files.items()]
    if isinstance(source, DicomStructures):
        return [digest(source.path), source.pattern, source.series and digest(source.series)]
    try:
        with open(source, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise refuser(source, patient)("a readable file", error.strerror) from error
    return found + sitk.Hash(read_image(source, patient)) if source.suffix.lower() in (".mhd", ".nhdr") else found


def store(preprocessed: PreprocessedCase, entry: Path) -> None:
    """Writes a case to a folder, which appears only when it is complete."""
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    arrays = {f"image_{modality}.npy": image for modality, image in preprocessed.images.items()}
    arrays |= {f"mask_{structure}.npy": mask for structure, mask in (preprocessed.masks or {}).items()}
    try:
        temporary.mkdir(parents=True)
        for file, array in arrays.items():
            np.save(temporary / file, array)
        description = {
            "modalities": list(preprocessed.images),
            "structures": preprocessed.masks and list(preprocessed.masks),
            "grid": preprocessed.grid.to_dict(),
            "source": preprocessed.source.to_dict(),
            "centre": preprocessed.centre,
            "notes": preprocessed.notes,
            "transforms": {modality: dataclasses.astuple(rigid) for modality, rigid in preprocessed.transforms.items()},
            "checksums": {file: _checksum(temporary / file) for file in arrays},
        }
        (temporary / "case.json").write_text(json.dumps(description, indent=2), encoding="utf-8")
        try:
            os.rename(temporary, entry)
        except OSError:
            # The entry exists: another process has written it, or it is damaged and is replaced.
            if load(entry, preprocessed.name) is None:
                with contextlib.suppress(OSError):
                    os.rename(entry, replaced)
                    os.rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def load(entry: Path, name: str) -> PreprocessedCase | None:
    """Reads a case as memory-mapped arrays; `None` if the folder is missing or damaged."""
    try:
        description = json.loads((entry / "case.json").read_text(encoding="utf-8"))
        checksums = description["checksums"]
        if any(_checksum(entry / file) != checksum for file, checksum in checksums.items()):
            return None
        images = {m: np.load(entry / f"image_{m}.npy", mmap_mode="r") for m in description["modalities"]}
        names = description["structures"]
        masks = names and {name: np.load(entry / f"mask_{name}.npy", mmap_mode="r") for name in names}
        return PreprocessedCase(
            name=name,
            images=images,
            masks=masks,
            grid=Grid.from_dict(description["grid"]),
            source=Grid.from_dict(description["source"]),
            centre=tuple(description["centre"]),
            notes=tuple(description["notes"]),
            transforms={m: RigidTransform(*map(tuple, numbers)) for m, numbers in description["transforms"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(path):
    return zlib.crc32(path.read_bytes())
