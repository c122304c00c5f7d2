"""Preprocessed patients on disk. Each is a folder, which appears only when it is complete.

A file is taken for unchanged while its size and time are the same; `verify` compares contents.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data._errors import refuser
from keras_mmfnet.data.case import Case, PreprocessedCase, StructureFiles
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import Volume, read_image, voxels_lie_apart
from keras_mmfnet.data.registration import RigidTransform
from keras_mmfnet.data.structures import DicomStructures
from keras_mmfnet.recipe import DataRecipe

_log = logging.getLogger(__name__)
# A cache entry depends on these fields of a `DataRecipe`, on the content of the files and on `_VERSION`. Increase the
# version whenever preprocessing or the format of an entry changes.
_FIELDS = ("modalities", "mask_from", "allow_empty", "align", "spacing", "normalised_scale", "clip")
_VERSION = 12
# Folder of what is known of the patients' own files, in a cache.
_KNOWN = ".known"
# A file may change again within a step of the file system's clock, in nanoseconds.
_RECENT = 2_000_000_000


def key(case: Case, recipe: DataRecipe, cache: str | os.PathLike | None = None) -> str:
    """The name of a cache entry: a hash of all that preprocessing depends on. The patient's name is not part of it.

    Args:
        case: A `Case`.
        recipe: A `DataRecipe`.
        cache: A folder in which the hashes of the patient's files are kept, with their sizes and times.
    """
    masks = case.mask if isinstance(case.mask, Mapping) else {None: case.mask}
    sources = [*(case.images[modality] for modality in recipe.modalities), *masks.values()]

    hashes = _Hashes(Path(cache) / _KNOWN / f"{case.name}.json" if cache else None)

    @functools.cache  # the structures of one file share it and its series
    def digest(source):
        return _digest(source, case.name, digest, hashes)

    settings = {name: getattr(recipe, name) for name in _FIELDS}
    settings["structures"] = list(recipe.structures.items())  # whose order is that of the masks
    content = json.dumps(
        [_VERSION, settings, [*masks], [digest(source) for source in sources if source]],
        sort_keys=True,
    )
    hashes.keep()
    return hashlib.sha256(content.encode()).hexdigest()


def image_hashes(case: Case, cache: str | os.PathLike | None = None) -> list[str]:
    """A hash of each image of a patient, of its content alone, whatever it is called and whatever the recipe.

    Args:
        case: A `Case`.
        cache: As for `key`.
    """
    hashes = _Hashes(Path(cache) / _KNOWN / f"{case.name}.json" if cache else None)

    def digest(source):
        return _digest(source, case.name, digest, hashes)

    found = [hashlib.sha256(json.dumps(digest(source)).encode()).hexdigest() for source in case.images.values()]
    hashes.keep()
    return sorted(found)


class _Hashes:
    """The hashes of files, kept in a JSON file with their sizes and times: `{path: [size, time, hash]}`."""

    def __init__(self, path):
        self.path, self.known, self.changed = path, {}, False
        if path:
            with contextlib.suppress(OSError, ValueError):
                self.known = dict(json.loads(path.read_text(encoding="utf-8")))

    def of(self, file):
        size, changed = _state(file)
        before = self.known.get(str(file.absolute()))
        if isinstance(before, list) and before[:2] == [size, changed]:
            return before[2]
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if time.time_ns() - changed > _RECENT:
            self.known[str(file.absolute())], self.changed = [size, changed, found], True
        return found

    def keep(self):
        if self.path and self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.path, json.dumps(self.known))


def _state(file):
    """The size and the time of a file, by which a change is noticed."""
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns


def verify(cache: str | os.PathLike) -> list[str]:
    """Removes the entries whose contents are not those that were written, so that they are preprocessed again.

    The patients' own files are read again when they are needed next: a file may have changed, or be damaged, although
    its size and time are the same.

    Args:
        cache: The folder of the cache, which may be missing.

    Returns:
        The names of the entries that were removed.
    """
    shutil.rmtree(Path(cache) / _KNOWN, ignore_errors=True)
    entries = [path.parent for path in sorted(Path(cache).glob("*/case.json"))]
    damaged = [entry for entry in entries if _read(entry, by_time=False) is None]
    for entry in damaged:
        _log.warning("%s: is damaged and was removed; the patient is preprocessed again", entry)
        shutil.rmtree(entry)
    return [entry.name for entry in damaged]


def _digest(source, patient, digest, hashes):
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
        found = hashes.of(source)
    except OSError as error:
        raise refuser(source, patient)("a readable file", error.strerror) from error
    return found + sitk.Hash(read_image(source, patient)) if voxels_lie_apart(source, patient) else found


def store(preprocessed: PreprocessedCase, entry: Path) -> None:
    """Writes a case to a folder, which appears only when it is complete.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
    """
    temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    arrays = {f"image_{modality}.npy": (image, np.float32) for modality, image in preprocessed.images.items()}
    arrays |= {f"mask_{structure}.npy": (mask, np.uint8) for structure, mask in (preprocessed.masks or {}).items()}
    try:
        temporary.mkdir(parents=True)
        for file, (array, dtype) in arrays.items():
            np.save(temporary / file, np.ascontiguousarray(array, dtype))
        description = {
            "modalities": list(preprocessed.images),
            "structures": preprocessed.masks and list(preprocessed.masks),
            "grid": preprocessed.grid.to_dict(),
            "source": preprocessed.source.to_dict(),
            "centre": preprocessed.centre,
            "notes": preprocessed.notes,
            "volumes_ml": preprocessed.masks and [preprocessed.tumour_ml, *preprocessed.structures_ml.values()],
            "transforms": {modality: dataclasses.astuple(rigid) for modality, rigid in preprocessed.transforms.items()},
            "files": {file: [*_state(temporary / file), _checksum(temporary / file)] for file in arrays},
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
    except OSError as error:
        expected = "must be a folder that can be written, on a disk with room for the preprocessed patients"
        raise OSError(f"{entry.parent}: {expected}. Received: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


class _Arrays(Mapping):
    """Arrays in files by name, memory-mapped when they are looked up: a cohort has more files than may be open.

    The headers of the files are not read: `np.load` parses them as Python, which Python 3.11 cannot do in several
    threads.
    """

    def __init__(self, files, shape, dtype):
        self.files, self.shape, self.dtype = files, shape, np.dtype(dtype)

    def __getitem__(self, name):
        path = self.files[name]
        header = path.stat().st_size - math.prod(self.shape) * self.dtype.itemsize
        return np.memmap(path, self.dtype, "r", header, self.shape)

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


def load(entry: Path, name: str) -> PreprocessedCase | None:
    """Reads a case, whose arrays are memory-mapped; `None` if the folder is missing or damaged."""
    if (description := _read(entry)) is None:
        return None
    try:
        names, grid = description["structures"], Grid.from_dict(description["grid"])
        images = {modality: entry / f"image_{modality}.npy" for modality in description["modalities"]}
        masks = names and {one: entry / f"mask_{one}.npy" for one in names}
        return PreprocessedCase(
            name=name,
            images=_Arrays(images, grid.shape, np.float32),
            masks=masks and _Arrays(masks, grid.shape, np.uint8),
            grid=grid,
            source=Grid.from_dict(description["source"]),
            centre=tuple(description["centre"]),
            notes=tuple(description["notes"]),
            transforms={m: RigidTransform(*map(tuple, numbers)) for m, numbers in description["transforms"].items()},
            volumes_ml=description["volumes_ml"] and tuple(description["volumes_ml"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _read(entry, by_time=True):
    """The description of an entry; `None` if it or one of its files is missing or damaged.

    A file of the size and time at which it was written is taken for undamaged, unless not `by_time`.
    """
    try:
        description = json.loads((entry / "case.json").read_text(encoding="utf-8"))
        for name, (size, changed, checksum) in description["files"].items():
            now = _state(entry / name)
            same = by_time and now == (size, changed)
            if not same and (now[0] != size or _checksum(entry / name) != checksum):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return description


def _checksum(path):
    return zlib.crc32(path.read_bytes())
