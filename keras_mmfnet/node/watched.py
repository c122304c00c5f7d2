"""Takes images from a folder to which studies are exported."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from keras_mmfnet.data.dicom import is_dicom
from keras_mmfnet.node.faults import Faults, describe_error
from keras_mmfnet.node.storage import MOST_BYTES, OUT_OF_RESOURCES, Header, ImageStore

_log = logging.getLogger(__name__)
# Seconds that a file must stay as it is before it is taken, and that studies wait for one that cannot be read.
_SETTLED, _PATIENCE = 2.0, 60.0
# How many files are taken at a time.
_AT_A_TIME = 200


class WatchedFolder:
    """A folder whose images are copied once; the files are left in place. Hidden files and folders are ignored.

    Args:
        path: The folder.
        store: Where the images are kept.
        faults: Where faults are reported.
    """

    def __init__(self, path: Path, store: ImageStore, faults: Faults):
        self.path, self.store, self.faults = Path(path), store, faults
        self._taken, self._seen = store.queue.taken(), {}
        # Whether files wait, which may be of any study.
        self.waits = True

    def fault(self) -> str:
        """Why no images can be taken; empty if they can."""
        return "" if self.path.is_dir() else f"{self.path} is not there"

    def take(self) -> None:
        """Takes up to 200 new files that have not changed for two seconds."""
        if fault := self.fault():
            self.faults.report("watching", fault)
            self.waits = False
            return
        found, now = dict(self._files()), time.monotonic()
        new = {key: path for key, path in found.items() if key not in self._taken}
        self._seen = {key: self._seen.get(key, now) for key in new}
        taken, unreadable, all_tried = set(), "", False
        for key in [key for key, since in self._seen.items() if now - since >= _SETTLED]:
            if len(taken) == _AT_A_TIME:
                break
            try:
                status = self._keep(new[key], size=key[1])
            except OSError as error:  # it is gone, or cannot be read yet
                unreadable = describe_error(error)
                continue
            if status == OUT_OF_RESOURCES:
                break
            taken.add(key)
        else:
            all_tried = True
        # A folder that is empty may be a disk that is away for a while.
        gone = self._taken - found.keys() if found else set()
        if taken or gone:
            self.store.queue.take(taken, gone)
            self._taken = (self._taken | taken) - gone
        recent = [key for key, since in self._seen.items() if key not in taken and now - since < _PATIENCE]
        self.waits = not all_tried or any(_may_be_image(new[key], size=key[1]) for key in recent)
        self.faults.report("reading watched files", unreadable)
        self.faults.report("watching")

    def _files(self) -> Iterator[tuple[tuple[bytes, int, int], Path]]:
        """The files by path in the folder, bytes, and time of the last change in ns."""
        for place, folders, names in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in names if not name.startswith(".")):
                path = Path(place, name)
                try:
                    about = path.stat()
                except OSError:  # it is gone
                    continue
                yield (os.fsencode(path.relative_to(self.path)), about.st_size, about.st_mtime_ns), path

    def _keep(self, path, size):
        """Keeps the image in a file, if it is one; returns the status of an answer to C-STORE, `None` if it is none."""
        if not is_dicom(path):
            return None
        try:
            if size > MOST_BYTES:
                reason = f"an image has {size / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:g} GB"
                self.store.refuse(Header.read(path), reason)
                return None
            content = path.read_bytes()
            return self.store.keep(content, Header.read(content))
        except ValueError as error:
            _log.warning("a file of the watched folder is ignored", extra={"reason": str(error)})
            return None


def _may_be_image(path, size):
    """Whether a file is an image, or too short or too little readable to tell."""
    try:
        return size < 132 or is_dicom(path)
    except OSError:
        return True
