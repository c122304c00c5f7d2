"""Corrected masks on disk: every stroke at once, and numbered versions beside the predicted masks."""

import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import read_json, to_disk, write
from keras_mmfnet.data.geometry import Grid
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.data.labels import join_masks
from keras_mmfnet.inference import mask_file, read_segmentation
from keras_mmfnet.review.edits import Classes, difference
from keras_mmfnet.review.patients import ReviewPatient
from keras_mmfnet.review.strokes import StrokeFile, pack, unpack

# What a review can come to.
STATES = ("accepted", "corrected")
_VERSION = re.compile(r"(\d{3,})\.json")
_NUMBERED = re.compile(r"(\d{3,})[._]")


@dataclasses.dataclass(frozen=True)
class Version:
    """Saved masks of a patient.

    Args:
        record: The JSON file: `state`, `by`, `at`, `from` (the file that was corrected), `base` (a hash of the drawing
            that it began from) and `changes`, the voxels and ml that each structure gained and lost.
        masks: The files of the masks: by structure, or one for all under `None`.
    """

    record: Path
    masks: dict[str | None, Path]

    @property
    def about(self) -> dict:
        """What the record holds."""
        return read_json(self.record)


class StrokesChanged(RuntimeError):
    """The drawing was changed by somebody else, such as in another window."""


class Correction:
    """The masks of a patient as they are being corrected.

    | file | holds |
    |---|---|
    | `<patient>/001.nii.gz` | the masks of the first version; `001_<structure>.nii.gz` if each structure has a file |
    | `<patient>/001.json` | who saved it, when, and what changed |
    | `<patient>/strokes` | the strokes since the last version |

    Args:
        patient: The `ReviewPatient`.
        folder: Folder of all corrections.
    """

    def __init__(self, patient: ReviewPatient, folder: Path):
        self.patient, self.folder = patient, folder / patient.name
        self.classes = Classes(patient.recipe.structures)
        self._load()

    def _load(self):
        """Reads the last version, or the prediction, and the strokes since."""
        patient = self.patient
        patient.require_same_images()
        last = self.versions()[-1:]
        files = last[0].masks if last else patient.masks
        found = read_version(last[0], patient) if last else read_segmentation(files, patient.recipe.structures)
        masks = [patient.grid.resample(found[name]) > 0 for name in self.classes.structures]
        self._before = self.classes.join(masks)
        self._origin = next(iter(files.values()))
        self._base = hashlib.sha256(self._before.tobytes()).hexdigest()
        self._file = StrokeFile(self.folder / "strokes", self._base)
        self.drawing = self._before.copy()
        strokes = self._file.read(saved=last[0].about.get("base") if last else None)
        for stroke in strokes:
            self._apply(stroke)
        self.strokes, self._last = len(strokes), None

    @property
    def state(self) -> str:
        """Text that identifies the drawing: what it began from, and the number of strokes since."""
        return f"{self._base[:16]}-{self.strokes}"

    def versions(self) -> list[Version]:
        """The saved versions, the last one at the end."""
        return versions_in(self.folder.parent, self.patient)

    def _apply(self, stroke):
        indices, values = unpack(stroke, self.drawing.size, len(self.classes.members) - 1)
        self.drawing.reshape(-1)[indices] = values

    def draw(self, stroke: bytes, after: str) -> None:
        """Changes voxels; it is on the disk when this returns. A stroke that is sent twice in a row is drawn once.

        Args:
            stroke: The voxels, as from `strokes.pack`.
            after: The `state` of the drawing that the sender knows.

        Raises:
            StrokesChanged: The drawing is another one.
            ValueError: The stroke does not fit the drawing.
        """
        if self._last == (after, stroke):  # The answer did not arrive.
            return
        self._require(after)
        before = self.drawing.copy()
        self._apply(stroke)
        try:
            self._file.append(stroke)
        except OSError:
            self.drawing = before
            raise
        self.strokes += 1
        self._last = after, stroke

    def _require(self, state):
        if state != self.state:
            raise StrokesChanged(
                f"{self.patient.name}: the drawing {self.state} is expected; it was changed in another window. "
                f"Received: {state}"
            )

    def replacing(self, number: int, mask: np.ndarray) -> bytes:
        """The stroke that gives a structure another mask; it is not drawn.

        Args:
            number: Number of the structure, from 0.
            mask: Its voxels.
        """
        return pack(*difference(self.drawing, self.classes.replace(self.drawing, number, mask)))

    def save(self, by: str, state: str, voxels: Sequence[int] | None = None) -> Version:
        """Writes a new version: `accepted` if nothing differs from the last one, else `corrected`.

        Args:
            by: Who saves it.
            state: The `state` of the drawing that the sender knows.
            voxels: How many voxels of each class the sender has, to be compared.

        Raises:
            StrokesChanged: The drawing is another one.
        """
        self._require(state)
        count = np.bincount(self.drawing.ravel(), minlength=len(self.classes.members)).tolist()
        if voxels is not None and list(voxels) != count:
            raise StrokesChanged(f"{self.patient.name}: {count} voxels of each class are expected. Received: {voxels}")
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(match[1]) for path in self.folder.iterdir() if (match := _NUMBERED.match(path.name))]
        stem = f"{max(numbers, default=0) + 1:03d}"
        masks = self.classes.split(self.drawing)
        images = dict(zip(self.classes.structures, map(self.patient.to_source, masks), strict=True))
        if None in self.patient.masks:
            arrays = {name: sitk.GetArrayViewFromImage(image) for name, image in images.items()}
            images = {None: self.patient.source.image(join_masks(arrays, self.patient.recipe.structures))}
        files = _files(self.folder, stem, self.patient)
        for structure, path in files.items():
            write_image(images[structure], path)
            to_disk(path)
        changes = self._changes(masks)
        changed = any(change["added_voxels"] or change["removed_voxels"] for change in changes.values())
        before = self.versions()[-1:]
        about = {
            # What was corrected once stays so.
            "state": STATES[changed or bool(before and before[0].about["state"] == STATES[1])],
            "by": by,
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "structures": self.patient.recipe.model_dump(mode="json")["structures"],
            "from": str(self._origin),
            "base": self._base,
            "changes": changes,
        }
        record = self.folder / f"{stem}.json"
        write(record, json.dumps(about, indent=2) + "\n", replace=False)
        to_disk(record)
        self._file.remove()
        self._load()
        return Version(record, files)

    def _changes(self, masks: Sequence[np.ndarray]):
        ml = math.prod(self.patient.source.spacing) / 1000
        before = self.classes.split(self._before)
        found = {}
        for name, old, new in zip(self.classes.structures, before, masks, strict=True):
            added, removed = (int(np.count_nonzero(a & ~b)) for a, b in ((new, old), (old, new)))
            found[name] = {
                "added_voxels": added,
                "removed_voxels": removed,
                "added_ml": round(added * ml, 4),
                "removed_ml": round(removed * ml, 4),
                "volume_ml": round(int(np.count_nonzero(new)) * ml, 4),
            }
        return found


def read_version(version: Version, patient: ReviewPatient) -> dict[str, sitk.Image]:
    """The masks of a version by structure.

    Raises:
        ValueError: They are of other structures or on another grid than the patient's masks now.
    """
    structures = patient.recipe.model_dump(mode="json")["structures"]
    if (before := version.about.get("structures", structures)) != structures:
        raise ValueError(
            f"{version.record}: a correction of the structures {structures} is expected; move the corrections "
            f"elsewhere. Received: one of {before}"
        )
    found = read_segmentation(version.masks, patient.recipe.structures)
    if not all(Grid.from_image(image).matches(patient.source) for image in found.values()):
        raise ValueError(
            f"{version.record}: a correction on the grid of the patient's masks is expected; move the corrections "
            "elsewhere. Received: one on another grid"
        )
    return found


def versions_in(corrections: str | os.PathLike, patient: ReviewPatient) -> list[Version]:
    """The saved versions of a patient, the last one at the end.

    Args:
        corrections: Folder of all corrections.
        patient: The patient.
    """
    folder = Path(corrections, patient.name)
    stems = sorted((match[1] for path in folder.glob("*.json") if (match := _VERSION.fullmatch(path.name))), key=int)
    return [Version(folder / f"{stem}.json", _files(folder, stem, patient)) for stem in stems]


def _files(folder, stem, patient):
    """The files of the masks of a version."""
    return {one: folder / mask_file(stem, one) for one in patient.masks}
