"""Keeps images on the disk and in the queue; an image is acknowledged when it is in both."""

import dataclasses
import io
import logging
import os
import re
import shutil
import threading
import uuid
from pathlib import Path

import pydicom

from keras_mmfnet._files import to_disk, write
from keras_mmfnet.node.faults import Faults, describe_error
from keras_mmfnet.node.queue import Study, StudyQueue

_log = logging.getLogger(__name__)
# Status of an answer to C-STORE, DICOM PS3.4, B.2.3: kept, try again, over a limit, and not understood.
SUCCESS, OUT_OF_RESOURCES, OVER_LIMIT, NOT_UNDERSTOOD = 0x0000, 0xA700, 0xA702, 0xC000
# Only these classes are kept.
_IMAGES = {
    pydicom.uid.MRImageStorage,
    pydicom.uid.EnhancedMRImageStorage,
    pydicom.uid.LegacyConvertedEnhancedMRImageStorage,
    pydicom.uid.CTImageStorage,
    pydicom.uid.PositronEmissionTomographyImageStorage,
}
# Images of a study and bytes of an object at most.
MOST_IMAGES, MOST_BYTES = 20_000, 10**9


@dataclasses.dataclass(frozen=True)
class Header:
    """The UIDs of a DICOM object.

    Args:
        kind: SOP Class UID.
        study: Study Instance UID.
        image: SOP Instance UID.
        series: Series Instance UID.
    """

    kind: str
    study: str
    image: str
    series: str

    @classmethod
    def read(cls, content: bytes | Path) -> "Header":
        """Reads an object, or its file.

        Raises:
            ValueError: It cannot be read, or is an image without proper UIDs.
        """
        tags = ["SOPClassUID", "StudyInstanceUID", "SOPInstanceUID", "SeriesInstanceUID"]
        try:
            file = io.BytesIO(content) if isinstance(content, bytes) else content
            found = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
            header = cls(*(str(found.get(tag, "")) for tag in tags))
        except Exception as error:  # whatever pydicom raises on what was sent
            raise ValueError(f"a DICOM object is expected. Received: {describe_error(error)}") from error
        # They name folders and files. An object without a class is refused, too.
        uids = (header.kind, header.study, header.image) if header.is_image or not header.kind else ()
        if not all(re.fullmatch(r"[0-9][0-9.]{0,63}", uid) for uid in uids):
            raise ValueError("an object with UIDs of its class, study and instance is expected. Received: others")
        return header

    @property
    def is_image(self) -> bool:
        """Whether it is an image of a class that can be segmented."""
        return self.kind in _IMAGES


class ImageStore:
    """The images of the studies of a queue, as `studies/<study>/<image>.dcm`.

    Args:
        folder: The node's folder.
        queue: Its queue.
        min_free: Bytes that must remain free on the disk.
        faults: Where faults are reported.
    """

    def __init__(self, folder: Path, queue: StudyQueue, min_free: float, faults: Faults):
        self.folder, self.queue, self.min_free, self.faults = Path(folder), queue, min_free, faults
        # Held while an image is put into a study, and while a study is removed.
        self._changing = threading.Lock()
        shutil.rmtree(self._trash, ignore_errors=True)

    @property
    def _trash(self):
        return self.folder / "removed"

    def images(self, study: str) -> Path:
        """The folder with the images of a study."""
        return self.folder / "studies" / study

    def why_full(self, size: int = 0) -> str:
        """Why `size` bytes more cannot be kept; empty if they can."""
        free = shutil.disk_usage(self.folder).free
        if free >= self.min_free + size:
            return ""
        return f"{free / 1e9:.1f} GB are free, {self.min_free / 1e9:.1f} GB must remain"

    def keep(self, content: bytes, header: Header) -> int:
        """Keeps an image and puts it into the queue. Objects that are not images are acknowledged and dropped.

        A study whose image was not kept is not segmented without it.

        Args:
            content: A DICOM object, as in a file.
            header: Its UIDs.

        Returns:
            The status of an answer to C-STORE.
        """
        if not header.is_image:
            return SUCCESS
        try:
            with self._changing:
                status, reason = self._keep(content, header)
                if reason:
                    self.refuse(header, reason)
        except Exception as error:  # of the disk or the database
            self.faults.report("keeping images", describe_error(error))
            return OUT_OF_RESOURCES
        return status

    def refuse(self, header: Header, reason: str) -> None:
        """Records that an image is not kept, without which its study is not segmented.

        Args:
            header: Its UIDs.
            reason: Why it is not kept.
        """
        _log.error("an image was not kept", extra={"study": header.study, "reason": reason})
        self.queue.lack(header.study, header.series, header.image, reason)

    def _keep(self, content, header):
        """Keeps an image; returns a status, and the reason if the study must wait for it."""
        place = self.images(header.study)
        path = place / f"{header.image}.dcm"
        there = path.exists()
        if there and _is_same(content, path):
            self.queue.add(header.study, header.image, series=header.series)
            return SUCCESS, ""
        if there and Header.read(path).series != header.series:
            return NOT_UNDERSTOOD, f"image {header.image} is in two series"
        if there and _is_whole(path.read_bytes()) and not _is_whole(content):
            _log.warning("not kept: a damaged copy of an image", extra={"study": header.study})
            return NOT_UNDERSTOOD, ""
        if full := self.why_full(len(content)):
            return OUT_OF_RESOURCES, f"an image was refused: {full}"
        images = sum(1 for _ in os.scandir(place)) if place.exists() else 0
        if len(content) > MOST_BYTES or (not there and images >= MOST_IMAGES):
            limits = f"{MOST_IMAGES} images of up to {MOST_BYTES / 1e9:g} GB"
            return OVER_LIMIT, f"an image was refused: a study may have {limits}"
        # A replaced image is recorded first: after a kill, the one that is sent again would be the same as the file.
        if there:
            self.queue.add(header.study, header.image, changed=True, series=header.series)
        try:
            place.mkdir(parents=True, exist_ok=True)
            write(path, content)
            to_disk(path)
        except OSError as error:
            self.faults.report("keeping images", describe_error(error))
            return OUT_OF_RESOURCES, f"an image was not written: {describe_error(error)}"
        if not there:
            self.queue.add(header.study, header.image, changed=True, series=header.series)
        self.faults.report("keeping images")
        return SUCCESS, ""

    def remove(self, study: Study) -> bool:
        """Removes the images, results and records of a study, unless it has changed since it was taken.

        Returns:
            Whether it did.
        """
        target = self._trash / uuid.uuid4().hex

        def move():
            # Renamed, so that no part of a study is left if the process is killed.
            target.mkdir(parents=True)
            for name in ("studies", "results"):
                if (place := self.folder / name / study.uid).exists():
                    place.rename(target / name)

        with self._changing:
            removed = self.queue.forget(study, move)
        if removed:
            shutil.rmtree(target)
        return removed


def _is_same(content, path):
    """Whether an object is that of a file, whatever their file meta information says."""
    if path.read_bytes() == content:
        return True
    try:
        return pydicom.dcmread(io.BytesIO(content)) == pydicom.dcmread(path)
    except Exception:  # whatever pydicom raises on a damaged one
        return False


def _is_whole(content):
    """Whether an object has all its voxels, as far as its header says how many there are."""
    try:
        found = pydicom.dcmread(io.BytesIO(content))
        if found.file_meta.TransferSyntaxUID.is_compressed:
            return len(found.PixelData) > 0
        bits = found.Rows * found.Columns * found.get("SamplesPerPixel", 1) * found.BitsAllocated
        return len(found.PixelData) >= bits * int(found.get("NumberOfFrames", 1)) // 8
    except Exception:  # whatever pydicom raises on a damaged one
        return False
