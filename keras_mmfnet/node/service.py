"""Receives studies, segments those that are complete, and sends the contours on."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pydicom
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from keras_mmfnet._backend import configured_backend
from keras_mmfnet._files import to_disk, write
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
# Images of a study and bytes of an object at most, and how often a study is tried whose segmentation was killed.
_MOST_IMAGES, _MOST_BYTES, _MOST_ATTEMPTS = 20_000, 10**9, 3
# Seconds that a segmentation may take.
_LONGEST = 3600
# Seconds between two looks at the queue, and that a file must stay as it is before it is taken.
_POLL, _SETTLED = 0.5, 2.0


class Node:
    """A DICOM node over a folder: `queue.sqlite`, the images in `studies`, what was segmented in `results`.

    Its messages to the log have the attributes `study`, `images`, `seconds`, `archive` and `reason` where they apply.

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
        keep_days: After how many days the images and results of studies that are done or refused are removed; `None`
            for never.
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
        keep_days: float | None = None,
        options: Sequence[str] = (),
        lock: int | None = None,
    ):
        self.folder, self.run, self.archives, self.kinds = Path(folder), Path(run), list(archives), list(kinds)
        self.title, self.allowed, self.complete_after, self.min_free = title, list(allowed), complete_after, min_free
        self.certificates, self.watched, self.keep_days = certificates, watched, keep_days
        self.options, self.lock = list(options), lock
        self.folder.mkdir(parents=True, exist_ok=True)
        self.queue = StudyQueue(self.folder / "queue.sqlite")
        self._open: dict[object, set[str]] = {}
        # Files of the watched folder: those that were taken, and when the others were first seen as they are.
        self._taken, self._seen = self.queue.taken(), {}
        self._faults: set[str] = set()
        # Held while an image is put into a study, and while a study is removed.
        self._changing = threading.Lock()

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
        handlers = [
            (evt.EVT_C_STORE, self._receive),
            (evt.EVT_CONN_CLOSE, lambda event: self._open.pop(event.assoc, None)),
            (evt.EVT_PDU_SENT, _report_rejection),
        ]
        secure = self.certificates.context(server=True) if self.certificates else None
        return entity.start_server((host, port), block=False, ssl_context=secure, evt_handlers=handlers)

    def _receive(self, event):
        """Answers C-STORE, after the image is on the disk and in the queue."""
        return self.keep(event.encoded_dataset(), event.assoc)

    def keep(self, content: bytes, connection: object = None) -> int:
        """Keeps an image and puts it into the queue. What is no image is not kept.

        Args:
            content: A DICOM object, as in a file.
            connection: The association that it came by; the study is not complete before it is closed.

        Returns:
            The status of an answer to C-STORE.
        """
        try:
            kind, study, image, series = _uids(io.BytesIO(content))
        except Exception as error:  # whatever pydicom raises on what was sent
            _log.warning("not kept: an object that cannot be read", extra={"reason": str(error)})
            return _NOT_UNDERSTOOD
        if kind and kind not in _IMAGES:
            return _SUCCESS
        if not all(re.fullmatch(r"[0-9][0-9.]{0,63}", uid) for uid in (kind, study, image)):
            _log.warning("not kept: an object with the UIDs %r, %r and %r", kind, study, image)
            return _NOT_UNDERSTOOD
        if connection is not None:
            self._open.setdefault(connection, set()).add(study)
        with self._changing:
            return self._keep(content, study, image, series)

    def _keep(self, content, study, image, series):
        place = self.folder / "studies" / study
        path = place / f"{image}.dcm"
        there = path.exists()
        if there and path.read_bytes() == content:
            self.queue.add(study, image)
            return _SUCCESS
        if there and _uids(path)[-1] != series:
            _log.error("not kept: image %s, as one of another series is there", image, extra={"study": study})
            return _NOT_UNDERSTOOD
        full = shutil.disk_usage(self.folder).free < self.min_free + len(content)
        if self._is_fault(full, f"images are refused: the disk must have {self.min_free / 1e9:.1f} GB left"):
            return _OUT_OF_RESOURCES
        place.mkdir(parents=True, exist_ok=True)
        if len(content) > _MOST_BYTES or (not there and sum(1 for _ in os.scandir(place)) >= _MOST_IMAGES):
            limits = f"a study may have {_MOST_IMAGES} images, each of {_MOST_BYTES / 1e9:g} GB"
            _log.error("not kept: an image more or larger, %s", limits, extra={"study": study})
            return _OUT_OF_RESOURCES
        # If the process is killed between the two, the sender, who gets no answer, sends the image again.
        if there:
            self.queue.add(study, image, changed=True)
        write(path, content)
        to_disk(path)
        if not there:
            self.queue.add(study, image, changed=True)
        return _SUCCESS

    def _is_fault(self, there, text):
        """Writes to the log when a fault begins and when it ends; returns whether it is there."""
        if there != (text in self._faults):
            _log.log(logging.ERROR if there else logging.INFO, "%s%s", "" if there else "over: ", text)
            (self._faults.add if there else self._faults.discard)(text)
        return there

    def take_watched(self) -> None:
        """Takes the images in the watched folder that have come since, and are not being written any more."""
        if self._is_fault(not self.watched.is_dir(), f"{self.watched}: the watched folder is not there"):
            return
        seen, now = {}, time.monotonic()
        for path in sorted(self.watched.rglob("*")):
            try:
                name, about = path.relative_to(self.watched), path.stat()
                key = str(name), about.st_size, about.st_mtime_ns
                if key in self._taken or any(part.startswith(".") for part in name.parts) or not path.is_file():
                    continue
                seen[key] = self._seen.get(key, now)
                if now - seen[key] < _SETTLED:
                    continue
                content = path.read_bytes() if is_dicom(path) else None
            except OSError:  # it is gone, or cannot be read yet
                continue
            if content is None or self.keep(content) != _OUT_OF_RESOURCES:
                self.queue.take(*key)
                self._taken.add(key)
        self._seen = seen

    def work(self) -> bool:
        """Segments a study that is complete, and sends one that is segmented. Returns whether there was any."""
        self.queue.recover()
        if self.watched:
            self.take_watched()
        if self.keep_days is not None:
            self.remove_old()
        if study := self.queue.next_to_send():
            self._send(study)
        being_sent = set().union(*list(self._open.values()))
        if complete := self.queue.next_to_segment(self.complete_after, being_sent):
            self._segment(complete)
        return bool(study or complete)

    def serve(self) -> None:
        """Works until it is interrupted."""
        while True:
            try:
                busy = self.work()
            except Exception as error:  # of the disk or the database; the next look may find them well
                _log.error("the node could not work", extra={"reason": str(error)})
                busy = False
            if not busy:
                time.sleep(_POLL)

    def remove_old(self) -> None:
        """Removes the images, results and records of studies that were done or refused `keep_days` ago."""
        for study in self.queue.finished(time.time() - self.keep_days * 86400):
            with self._changing:
                if study not in self.queue.studies():  # an image has come
                    continue
                for part in ("studies", "results"):
                    shutil.rmtree(self.folder / part / study.uid, ignore_errors=True)
                self.queue.forget(study)
            _log.info("removed after %g days", self.keep_days, extra={"study": study.uid})

    def results(self, study: Study) -> Path:
        """The folder with what was segmented of a study; with later images it has another one."""
        return self.folder / "results" / study.uid / str(study.version)

    def _segment(self, study):
        """Segments a study by `mmfnet segment`, which resumes."""
        _log.info("segmenting", extra={"study": study.uid, "images": study.images})
        begun, out = time.monotonic(), self.results(study)
        images = self.folder / "studies" / study.uid
        kinds = [f"--{kind}" for kind in self.kinds]
        command = [sys.executable, "-m", "keras_mmfnet.cli", "segment", self.run, images, "--out", out, "--quiet"]
        try:
            ended = subprocess.run(
                [*map(str, command), *kinds, *self.options],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LONGEST,
                env=os.environ | {"KERAS_BACKEND": configured_backend()},
                pass_fds=[] if self.lock is None else [self.lock],
            )
        except subprocess.TimeoutExpired:
            self._try_again(study, f"mmfnet segment must end within {_LONGEST / 60:.0f} minutes. Received: it did not")
            return
        if ended.returncode == 0:
            files = sorted(out.glob("*.dcm"))
            seconds = round(time.monotonic() - begun, 1)
            _log.info("segmented", extra={"study": study.uid, "seconds": seconds})
            self.queue.advance(study, "sending" if files else "done", "" if files else "no structure was found")
            return
        last = (ended.stderr.strip() or "nothing was printed").splitlines()[-1]
        reason = ended.stderr.partition("error: ")[2].strip() or f"mmfnet segment ended with {ended.returncode}: {last}"
        if reason.startswith(("not segmented:", f"{study.uid}:")):  # because of its images
            _log.error("refused; mmfnet node status says why", extra={"study": study.uid})
            self.queue.advance(study, "refused", reason)
        elif ended.returncode < 0 or ended.returncode >= 128:
            self._try_again(study, reason)
        else:  # because of the run or the machine
            _log.error("not segmented, which is tried again", extra={"study": study.uid, "reason": reason})
            # What another run wrote before this one was given would be refused again.
            shutil.rmtree(out, ignore_errors=True)
            self.queue.postpone(study, reason)

    def _try_again(self, study, reason):
        """Lets a segmentation that was killed be tried again, but not for ever: the study may be the cause."""
        if study.attempts + 1 < _MOST_ATTEMPTS:
            _log.warning("not segmented, which is tried again", extra={"study": study.uid, "reason": reason})
            self.queue.postpone(study, reason)
        else:
            _log.error("refused", extra={"study": study.uid, "reason": reason})
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
                except Exception as error:  # also of what is wrong with an address, a file or the answer
                    faults.append(str(error))
                else:
                    self.queue.sent(study, str(archive))
                    _log.info("sent", extra={"study": study.uid, "archive": str(archive)})
        if faults:
            _log.warning("not sent, which is tried again", extra={"study": study.uid, "reason": "; ".join(faults)})
            self.queue.postpone(study, "; ".join(faults))
        else:
            self.queue.advance(study, "done")


def _uids(file):
    """UIDs of the class, the study, the object and the series of a DICOM file."""
    tags = ["SOPClassUID", "StudyInstanceUID", "SOPInstanceUID", "SeriesInstanceUID"]
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
    return [str(header.get(tag, "")) for tag in tags]


def _report_rejection(event):
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        where = event.assoc.requestor.address
        _log.warning("refused a connection from %s: its title or ours is wrong, or too many are open", where)
