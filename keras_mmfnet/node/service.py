"""Receives studies, segments those that are complete, and sends the contours on."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
from pynetdicom.association import Association
from pynetdicom.pdu import A_ASSOCIATE_RJ
from pynetdicom.sop_class import Verification
from pynetdicom.transport import ThreadedAssociationServer

from keras_mmfnet._backend import configured_backend
from keras_mmfnet._files import read_json
from keras_mmfnet.node.faults import Faults, describe_error
from keras_mmfnet.node.network import Archive, Certificates, WebArchive
from keras_mmfnet.node.queue import Study, StudyQueue
from keras_mmfnet.node.storage import NOT_UNDERSTOOD, SUCCESS, Header, ImageStore
from keras_mmfnet.node.watched import WatchedFolder

_log = logging.getLogger(__name__)
# How often a study is tried whose segmentation was killed, and how many seconds a segmentation may take.
_MOST_ATTEMPTS, _LONGEST = 3, 3600
# Seconds between two looks at the queue, and the difference that counts as a clock that was set.
_POLL, _JUMP = 0.5, 30.0


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
        self.title, self.allowed, self.complete_after = title, list(allowed), complete_after
        if not self.allowed:
            raise ValueError("`allowed` must name who may send. Received: nobody")
        self.certificates, self.keep_days = certificates, keep_days
        self.options, self.lock = list(options), lock
        self.folder.mkdir(parents=True, exist_ok=True)
        self.queue = StudyQueue(self.folder / "queue.sqlite")
        self.faults = Faults()
        self.store = ImageStore(self.folder, self.queue, min_free, self.faults)
        self.watched = WatchedFolder(watched, self.store, self.faults) if watched else None
        # How many images of each study the associations that are open have sent.
        self._receiving: dict[Association, Counter[str]] = {}
        self._clock, self._passed = time.time(), time.monotonic()

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
            (evt.EVT_PDU_SENT, _report_rejection),
        ]
        secure = self.certificates.context(server=True) if self.certificates else None
        return entity.start_server((host, port), block=False, ssl_context=secure, evt_handlers=handlers)

    def _receive(self, event):
        """Answers C-STORE, after the image is on the disk and in the queue."""
        content = event.encoded_dataset()
        try:
            header = Header.read(content)
        except ValueError as error:
            _log.warning("not kept: %s", error)
            return NOT_UNDERSTOOD
        if not header.is_image:
            return self.store.keep(content, header)
        # The study is not complete before the association ends.
        received = self._receiving.setdefault(event.assoc, Counter())
        received[header.study] += 0
        status = self.store.keep(content, header)
        received[header.study] += status == SUCCESS
        return status

    def _log_received(self):
        """Writes to the log what was received by associations that have ended."""
        for association in [one for one in list(self._receiving) if not one.is_established]:
            for study, images in list(self._receiving.pop(association).items()):
                _log.info("received", extra={"study": study, "images": images})

    def _being_received(self):
        """The studies that are being sent to the node."""
        return {study for received in list(self._receiving.values()) for study in list(received)}

    def work(self) -> bool:
        """Sends a study that is segmented, and segments one that is complete. Returns whether there was any."""
        self._heed_clock()
        self.queue.recover()
        self._log_received()
        if self.watched:
            self._attempt("watching", self.watched.take)
        self._attempt("removing", self._remove_old)
        if study := self.queue.next_to_send():
            self._send(study)
        complete = None
        # What waits in the watched folder may belong to any study.
        if not (self.watched and self.watched.waits):
            complete = self.queue.next_to_segment(self.complete_after, self._being_received())
        if complete:
            self._segment(complete)
        return bool(study or complete)

    def serve(self) -> None:
        """Works until it is interrupted."""
        while True:
            try:
                busy = self.work()
            except Exception as error:  # of the disk or the database; the next look may find them well
                self.faults.report("working", describe_error(error))
                busy = False
            else:
                self.faults.report("working")
            if not busy:
                time.sleep(_POLL)

    def _attempt(self, what, do):
        """Does something whose failure does not keep the node from the rest of its work."""
        try:
            do()
        except Exception as error:
            self.faults.report(what, describe_error(error))

    def _heed_clock(self):
        """Moves the times in the queue along with a clock that was put forward; see `StudyQueue.recover` for back."""
        clock, passed = time.time(), time.monotonic()
        jump = (clock - self._clock) - (passed - self._passed)
        if jump > _JUMP:
            self.queue.shift(jump)
        self._clock, self._passed = clock, passed

    def _remove_old(self):
        """Removes studies that were done or refused `keep_days` ago, but for those that an expert has corrected."""
        if self.keep_days is None:
            return
        received = self._being_received()
        for study in self.queue.finished(time.time() - self.keep_days * 86400):
            corrected = any((self.folder / "results" / study.uid).glob("*/corrections"))
            if study.uid not in received and not corrected and self.store.remove(study):
                _log.info("removed after %g days", self.keep_days, extra={"study": study.uid})
        self.faults.report("removing")

    def results(self, study: Study) -> Path:
        """The folder with what was segmented of a study; with later images it has another one."""
        return self.folder / "results" / study.uid / str(study.version)

    def _segment(self, study):
        """Segments a study by `mmfnet segment`, which resumes."""
        begun, out, images = time.monotonic(), self.results(study), self.store.images(study.uid)
        number = sum(1 for _ in images.glob("*.dcm"))
        reasons = self.queue.lacking(study.uid)
        if number != study.images:
            reasons.append(f"{images}: {study.images} images are expected. Received: {number}")
        if reasons:
            self._refuse(study, "; ".join(dict.fromkeys(reasons)))
            return
        # Results that an earlier attempt left, perhaps with another run, may be refused.
        left = out.exists()
        _log.info("segmenting", extra={"study": study.uid, "images": study.images})
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
            notes = self._notes(study) + ([] if files else ["no structure was found"])
            self.queue.advance(study, "sending" if files else "done", "; ".join(notes))
            return
        shutil.rmtree(out, ignore_errors=True)
        last = (ended.stderr.strip() or "nothing was printed").splitlines()[-1]
        reason = ended.stderr.partition("error: ")[2].strip() or f"mmfnet segment ended with {ended.returncode}: {last}"
        if not left and reason.startswith(("not segmented:", f"{study.uid}:")):  # because of its images
            self._refuse(study, reason)
        elif ended.returncode < 0 or ended.returncode >= 128:
            self._try_again(study, reason)
        else:  # because of the run or the machine
            self._postpone(study, reason)

    def _try_again(self, study, reason):
        """Lets a segmentation that was killed be tried again, but not for ever: the study may be the cause."""
        if study.attempts + 1 < _MOST_ATTEMPTS:
            self._postpone(study, reason)
        else:
            self._refuse(study, reason)

    def _postpone(self, study, reason):
        """Lets a study be segmented later. The reason, which may have names, is not in the log."""
        _log.warning("not segmented, which is tried again; mmfnet node status says why", extra={"study": study.uid})
        self.queue.postpone(study, reason)

    def _refuse(self, study, reason):
        """Sets a study aside. The reason, which may have names, is not in the log."""
        _log.error("refused; mmfnet node status says why", extra={"study": study.uid})
        self.queue.advance(study, "refused", reason)

    def _send(self, study):
        """Sends the files of a study to the archives that do not have them yet."""
        files, faults = sorted(self.results(study).glob("*.dcm")), []
        if not files:
            expected = f"{self.results(study)}: must hold what was segmented"
            self._refuse(study, f"{expected}. Received: a folder without DICOM files")
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
            self.queue.advance(study, "done", "; ".join(self._notes(study)))

    def _notes(self, study):
        """What `mmfnet segment` noted on the images of a study, such as positions that may not fit."""
        records = (read_json(path) for path in sorted(self.results(study).glob("*.json")))
        # A version that kept none may have segmented it.
        return [note for record in records for note in record["about"].get("notes", ())]


def _report_rejection(event):
    if isinstance(event.pdu, A_ASSOCIATE_RJ):
        asked, where = event.assoc.requestor.primitive, event.assoc.requestor.address
        titles = f"{asked.calling_ae_title} to {asked.called_ae_title}"
        _log.warning("refused a connection from %s, %s: a title is wrong, or too many are open", where, titles)
