"""What the tests of a node share: archives, and what they ask a node."""

import contextlib
import functools
import time

import pydicom
from pynetdicom import AE, evt

from keras_mmfnet.node.network import Archive
from keras_mmfnet.node.storage import Header

STUDY = "1.2.826.0.1.3680043.2.1125.1"


@contextlib.contextmanager
def archive(title="ARCHIVE", status=0x0000, port=0):
    """An archive that answers with a status; yields it as an `Archive`, and what it got."""
    got = []

    def store(event):
        got.append(event.dataset)
        return status

    entity = AE(ae_title=title)
    for kind in (pydicom.uid.RTStructureSetStorage, pydicom.uid.SegmentationStorage):
        entity.add_supported_context(kind)
    server = entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    try:
        yield Archive(title, "127.0.0.1", server.server_address[1]), got
    finally:
        server.shutdown()


@contextlib.contextmanager
def listening(node):
    server = node.listen("127.0.0.1", 0)
    try:
        yield Archive("MMFNET", "127.0.0.1", server.server_address[1])
    finally:
        server.shutdown()


def keep(node, content):
    return node.store.keep(content, Header.read(content))


def states(node):
    return [(study.uid, study.state, study.images) for study in node.queue.studies()]


def pass_time(monkeypatch, seconds):
    for clock in ("time", "monotonic"):
        now = getattr(time, clock)
        monkeypatch.setattr(time, clock, functools.partial(lambda now: now() + seconds, now))


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")
