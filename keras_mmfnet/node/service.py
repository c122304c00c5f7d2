"""Receives studies, segments those that are complete, and sends the contours on."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from keras_mmfnet._backend import configured_backend
from keras_mmfnet._files import write
from keras_mmfnet.data.dicom import is_dicom
from keras_mmfnet.node.network import Archive, Certificates, WebArchive
from keras_mmfnet.node.queue import Study, StudyQueue

_log = logging.getLogger(__name__)
# Status of an answer to C-STORE, DICOM PS3.4, B.2.3.
_SUCCESS, _OUT_OF_RESOURCES, _NOT_UNDERSTOOD = 0x0000, 0xA700, 0xC000
# Objects of these classes are kept; others are of no use here.
_IMAGES = {
    pydicom.uid.MRImageStorage,
    pydicom.uid.EnhancedMRImageStorage,
    pydicom.uid.LegacyConvertedEnhancedMRImageStorage,
    pydicom.uid.CTImageStorage,
    pydicom.uid.PositronEmissionTomographyImageStorage,
}
# Images of a study at most, and how often a study is tried whose segmentation was killed.
_MOST_IMAGES, _MOST_ATTEMPTS = 20_000, 3
# Seconds between two looks at the queue, and since the last change of a file that is read.
_POLL, _SETTLED = 0.5, 2.0


class Node:
    """A DICOM node over a folder: `queue.sqlite`, the images in `studies`, what was segmented in `results`.

    Args:
        folder: The folder, of this node alone.
        run: Folder of a run, or a bundle.
        archives: Who gets the contours.
        kinds: `"rtstruct"`, `"seg"` or both.
        allowed: Titles of those that may send.
        title: Application entity title.
        complete_after: After how many seconds without a new image a study is complete.
        min_free: Bytes that must remain free on the disk.
        certificates: For TLS in both directions; `None` for none.
        watched: A folder of exports, whose images are taken like those that are sent.
        options: Further options for `mmfnet segment`.
        lock: Descriptor of a locked file. The segmentation inherits it, so a new node waits until it ends.
    """

    def __init__(
        self,
        folder: Path,
        run: Path,
        archives: Sequence[Archive | WebArchive],
        kinds: Sequence[str],
        allowed: Sequence[str],
        title: str = "MMFNET",
        complete_after: float = 60.0,
        min_free: float = 5e9,
        certificates: Certificates | None = None,
        watched: Path | None = None,
        options: Sequence[str] = (),
        lock: int | None = None,
    ):
        self.folder, self.run, self.archives, self.kinds = Path(folder), Path(run), list(archives), list(kinds)
        self.title, self.allowed, self.complete_after, self.min_free = title, list(allowed), complete_after, min_free
        self.certificates, self.watched, self._taken = certificates, watched, set()
        self.options, self.lock = list(options), lock
        self.folder.mkdir(parents=True, exist_ok=True)
        self.queue = StudyQueue(self.folder / "queue.sqlite")
        self.queue.recover()

    def listen(self, host: str, port: int) -> ThreadedAssociationServer:
        """Starts to receive, in threads of its own.

        Args:
            host: Address to listen at.
            port: Port; 0 for a free one.

        Returns:
            The server, with its address in `server_address`, to be ended by `shutdown()`.

        Raises:
            OSError: The address cannot be used.
        """
        entity = AE(ae_title=self.title)
        entity.require_called_aet, entity.require_calling_aet = True, self.allowed
        entity.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        handlers = [(evt.EVT_C_STORE, self._receive), (evt.EVT_REJECTED, _report_rejection)]
        secure = self.certificates.context(server=True) if self.certificates else None
        return entity.start_server((host, port), block=False, ssl_context=secure, evt_handlers=handlers)

    def _receive(self, event):
        """Answers C-STORE, after the image is on the disk and in the queue."""
        return self.keep(event.encoded_dataset())

    def keep(self, content: bytes) -> int:
        """Keeps an image and puts it into the queue. What is no image is not kept.

        Args:
            content: A DICOM object, as in a file.

        Returns:
            The status of an answer to C-STORE.
        """
        tags = ["SOPClassUID", "StudyInstanceUID", "SOPInstanceUID"]
        try:
            header = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=tags)
            kind, study, image = (str(header.get(tag, "")) for tag in tags)
        except Exception as error:  # whatever pydicom raises on what was sent
            _log.warning("Not kept: an object that cannot be read, %s", error)
            return _NOT_UNDERSTOOD
        if kind not in _IMAGES:
            return _SUCCESS
        if not all(re.fullmatch(r"[0-9][0-9.]{0,63}", uid) for uid in (study, image)):
            _log.warning("Not kept: an image with the UIDs %r and %r", study, image)
            return _NOT_UNDERSTOOD
        place = self.folder / "studies" / study
        path = place / f"{image}.dcm"
        there = path.exists()
        if not there or path.read_bytes() != content:
            if shutil.disk_usage(self.folder).free < self.min_free + len(content):
                _log.error("Not kept: the disk must have %.1f GB left", self.min_free / 1e9)
                return _OUT_OF_RESOURCES
            place.mkdir(parents=True, exist_ok=True)
            if not there and sum(1 for _ in os.scandir(place)) >= _MOST_IMAGES:
                _log.error("Study %s: an image was not kept, it has %d already", study, _MOST_IMAGES)
                return _OUT_OF_RESOURCES
            if there:  # if it ends here, the sender, who gets no answer, sends the image again
                self.queue.add(study, image, replaced=True)
            write(path, content)
        self.queue.add(study, image)
        return _SUCCESS

    def take_watched(self) -> None:
        """Takes the images in the watched folder that have come since, and are not being written any more."""
        for path in sorted(self.watched.rglob("*")):
            try:
                about = path.stat()
                key = path, about.st_mtime, about.st_size
                if key in self._taken or not path.is_file() or time.time() - about.st_mtime < _SETTLED:
                    continue
                content = path.read_bytes() if is_dicom(path) else None
            except OSError:  # it is gone, or cannot be read yet
                continue
            if content is None or self.keep(content) != _OUT_OF_RESOURCES:
                self._taken.add(key)

    def work(self) -> bool:
        """Segments a study that is complete, and sends one that is segmented. Returns whether there was any."""
        if self.watched:
            self.take_watched()
        if study := self.queue.next_to_send():
            self._send(study)
        if complete := self.queue.next_to_segment(self.complete_after):
            self._segment(complete)
        return bool(study or complete)

    def serve(self) -> None:
        """Works until it is interrupted."""
        while True:
            if not self.work():
                time.sleep(_POLL)

    def results(self, study: Study) -> Path:
        """The folder with what was segmented of a study; with later images it has another one."""
        return self.folder / "results" / study.uid / str(study.version)

    def _segment(self, study):
        """Segments a study by `mmfnet segment`, which resumes."""
        _log.info("Study %s: segmenting, %d images", study.uid, study.images)
        begun, out = time.monotonic(), self.results(study)
        images = self.folder / "studies" / study.uid
        kinds = [f"--{kind}" for kind in self.kinds]
        command = [sys.executable, "-m", "keras_mmfnet.cli", "segment", self.run, images, "--out", out, "--quiet"]
        ended = subprocess.run(
            [*map(str, command), *kinds, *self.options],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"KERAS_BACKEND": configured_backend()},
            pass_fds=[] if self.lock is None else [self.lock],
        )
        if ended.returncode == 0:
            files = sorted(out.glob("*.dcm"))
            _log.info("Study %s: segmented in %.0f s", study.uid, time.monotonic() - begun)
            self.queue.advance(study, "sending" if files else "done", "" if files else "no structure was found")
            return
        last = (ended.stderr.strip() or "nothing was printed").splitlines()[-1]
        reason = ended.stderr.partition("error: ")[2].strip() or f"mmfnet segment ended with {ended.returncode}: {last}"
        # A killed process may have lacked memory, which another time there may be.
        if (ended.returncode < 0 or ended.returncode >= 128) and study.attempts + 1 < _MOST_ATTEMPTS:
            _log.warning("Study %s: %s; it is tried again", study.uid, reason)
            self.queue.postpone(study, reason)
        else:
            _log.error("Study %s: refused: %s", study.uid, reason)
            self.queue.advance(study, "refused", reason)

    def _send(self, study):
        """Sends the files of a study to the archives that do not have them yet."""
        files, faults = sorted(self.results(study).glob("*.dcm")), []
        if not files:
            expected = f"{self.results(study)}: must hold what was segmented"
            self.queue.advance(study, "refused", f"{expected}. Received: a folder without DICOM files")
            return
        there = self.queue.sent_to(study)
        for archive in self.archives:
            if str(archive) not in there:
                try:
                    archive.store(files, self.title, self.certificates)
                except OSError as error:
                    faults.append(str(error))
                else:
                    self.queue.sent(study, str(archive))
                    _log.info("Study %s: sent to %s", study.uid, archive)
        if faults:
            _log.warning("Study %s: not sent: %s", study.uid, "; ".join(faults))
            self.queue.postpone(study, "; ".join(faults))
        else:
            self.queue.advance(study, "done")


def _report_rejection(event):
    _log.warning("Refused a connection from %s: its title or ours is wrong, or too many are open", event.address[0])
