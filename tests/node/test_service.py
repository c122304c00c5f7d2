"""A node and those it talks to, by the DICOM protocol."""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import write_object, write_series
from nodes import STUDY, archive, keep, listening, states
from pynetdicom import AE

from keras_mmfnet.node.health import serve_health
from keras_mmfnet.node.network import Archive


def test_images_are_kept_as_they_were_sent(make_node, images):
    node = make_node()
    with listening(node) as address:
        address.store(images[:3], "SCANNER")
        address.store(images[2:], "SCANNER")
    assert states(node) == [(STUDY, "receiving", 5)]
    kept = sorted((node.folder / "studies" / STUDY).iterdir())
    assert [path.stem for path in kept] == sorted(pydicom.dcmread(path).SOPInstanceUID for path in images)
    sent = {one.SOPInstanceUID: one for one in map(pydicom.dcmread, images)}
    for path in kept:
        one = pydicom.dcmread(path)
        assert one.PatientID == "1"
        np.testing.assert_array_equal(one.pixel_array, sent[path.stem].pixel_array)


def test_senders_at_once(make_node, tmp_path):
    node = make_node()
    studies = [f"1.2.{number}" for number in range(1, 5)]
    for number, study in enumerate(studies):
        write_series(tmp_path / study, uid=f"1.3.{number}")
        for path in (tmp_path / study).iterdir():
            one = pydicom.dcmread(path)
            one.StudyInstanceUID = study
            one.save_as(path)
    with listening(node) as address:
        senders = [
            threading.Thread(target=address.store, args=(sorted((tmp_path / study).iterdir()), "SCANNER"))
            for study in studies
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
    assert sorted(states(node)) == [(study, "receiving", 5) for study in studies]


def test_a_study_is_not_complete_while_it_is_being_sent(make_node, images, monkeypatch):
    node = make_node(complete_after=0)
    taken = []
    monkeypatch.setattr(node, "_segment", taken.append)
    with listening(node) as address:
        entity = AE(ae_title="SCANNER")
        entity.add_requested_context(pydicom.uid.MRImageStorage)
        association = entity.associate(address.host, address.port, ae_title="MMFNET")
        association.send_c_store(pydicom.dcmread(images[0]))
        assert not node.work()
        association.release()
        end = time.monotonic() + 10
        while not node.work():
            assert time.monotonic() < end
            time.sleep(0.1)
    assert [study.uid for study in taken] == [STUDY]


def test_a_run_that_is_away_for_a_while(make_node, images, tmp_path):
    """It is no fault of the study, which is tried again."""
    node = make_node(complete_after=0)
    keep(node, images[0].read_bytes())
    assert node.work()
    [study] = node.queue.studies()
    assert (study.state, study.attempts) == ("receiving", 1)
    assert f"Received: {tmp_path / 'run'}" in study.reason
    assert not node.work()


@pytest.mark.parametrize("left", [False, True])
def test_what_a_failed_segmentation_leaves(make_node, images, monkeypatch, left):
    """The study is refused, unless an earlier attempt had left results, which may be the cause."""
    node = make_node(complete_after=0)
    keep(node, images[0].read_bytes())
    out = node.folder / "results" / STUDY / "1"

    def segment(command, **options):
        out.mkdir(parents=True, exist_ok=True)
        (out / "mask.nii.gz").touch()
        return subprocess.CompletedProcess(command, 1, "", "error: not segmented: why")

    monkeypatch.setattr(subprocess, "run", segment)
    if left:
        out.mkdir(parents=True)
    assert node.work()
    assert states(node) == [(STUDY, "receiving" if left else "refused", 1)]
    assert not out.exists()


def test_notes_on_the_images_are_shown_with_the_study(make_node, images, monkeypatch):
    note = "t2: in another frame of reference than t1, so positions may not fit"

    def segment(command, **options):
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        (out / f"{STUDY}.json").write_text(json.dumps({"about": {"notes": [note]}}))
        write_object(out / f"{STUDY}_rtstruct.dcm", pydicom.uid.RTStructureSetStorage)
        return subprocess.CompletedProcess(command, 0, "", "")

    with archive() as (receiver, received):
        node = make_node([receiver], complete_after=0)
        keep(node, images[0].read_bytes())
        monkeypatch.setattr(subprocess, "run", segment)
        for state in ("sending", "done"):
            assert node.work()
            [study] = node.queue.studies()
            assert (study.state, study.reason) == (state, note)
    assert len(received) == 1


def test_a_database_that_cannot_be_used_for_a_while(make_node, monkeypatch):
    node, looks = make_node(), []

    def work():
        looks.append(None)
        if len(looks) == 1:
            raise sqlite3.OperationalError("database is locked")
        raise KeyboardInterrupt

    monkeypatch.setattr(node, "work", work)
    with pytest.raises(KeyboardInterrupt):
        node.serve()
    assert len(looks) == 2


def test_a_sender_that_is_not_allowed(make_node, images, caplog):
    node = make_node()
    with listening(node) as address:
        with pytest.raises(ConnectionError, match=r"must accept an association from STRANGER. Received: a rejection"):
            address.store(images, "STRANGER")
        with pytest.raises(ConnectionError, match="a rejection"):
            Archive("OTHER", address.host, address.port).store(images, "SCANNER")
    assert states(node) == []
    assert caplog.text.count("refused a connection from 127.0.0.1") == 2


def test_an_archive_that_is_away_for_a_while(make_node, contours, monkeypatch):
    with archive() as (receiver, _):
        pass
    node = make_node([receiver])
    contours(node)
    assert node.work()
    [study] = node.queue.studies()
    assert (study.state, study.attempts) == ("sending", 1)
    assert "must accept an association from MMFNET. Received: no connection" in study.reason
    assert not node.work()  # not yet
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 11)
    with archive(port=receiver.port) as (_, got):
        assert node.work()
    assert [one.SOPClassUID for one in got] == [pydicom.uid.RTStructureSetStorage]
    assert states(node) == [("1.2.3", "done", 1)]


def test_one_of_two_archives_is_away(make_node, contours, monkeypatch):
    """The other one gets the contours, and gets them once."""
    with archive("AWAY") as (away, _):
        pass
    with archive() as (there, got):
        node = make_node([away, there])
        contours(node)
        node.work()
        monkeypatch.setattr("time.time", lambda now=time.time: now() + 11)
        with archive("AWAY", port=away.port) as (_, late):
            node.work()
        assert len(got) == len(late) == 1
    assert states(node) == [("1.2.3", "done", 1)]


def test_results_that_were_removed(make_node, contours):
    with archive() as (receiver, got):
        node = make_node([receiver])
        contours(node)
        shutil.rmtree(node.folder / "results")
        node.work()
    [study] = node.queue.studies()
    assert (study.state, got) == ("refused", [])
    assert "must hold what was segmented" in study.reason


@pytest.mark.parametrize(("status", "state"), [(0xA700, "sending"), (0xC123, "sending"), (0xB000, "done")])
def test_an_archive_that_refuses(make_node, contours, status, state):
    with archive(status=status) as (receiver, got):
        node = make_node([receiver])
        contours(node)
        node.work()
    assert len(got) == 1
    [study] = node.queue.studies()
    assert study.state == state
    assert (f"status {status:04X}" in study.reason) == (state == "sending")


def test_a_clock_that_is_put_back(make_node, images, contours, monkeypatch):
    node = make_node(complete_after=60)
    with archive() as (away, _):
        pass
    node.archives = [away]
    with monkeypatch.context() as patched:
        patched.setattr("time.time", lambda now=time.time: now() + 1e6)
        contours(node)
        node.work()
        keep(node, images[0].read_bytes())

    def latest():
        return {study.state: max(study.changed, study.due) - time.time() for study in node.queue.studies()}

    assert latest()["sending"] > 9e5
    node.work()
    assert 3540 < latest()["sending"] <= 3600
    assert -60 < latest()["receiving"] <= 0


def test_what_a_monitor_is_told(make_node, contours):
    node = make_node()
    contours(node)
    server = serve_health(node, 0)

    def ask(path, status=200):
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}{path}")
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert answer.status == status
            return answer.read().decode()

    try:
        assert ask("/health") == "ok\n"
        values = dict(line.rsplit(" ", 1) for line in ask("/metrics").splitlines() if not line.startswith("#"))
        assert values['mmfnet_node_studies{state="sending"}'] == values["mmfnet_node_images"] == "1"
        assert 0 <= float(values["mmfnet_node_oldest_seconds"]) < 60
        ask("/", status=404)
        assert ask("/health?of=node") == "ok\n"
        request = urllib.request.Request(f"http://127.0.0.1:{server.server_port}/health", method="HEAD")
        with urllib.request.urlopen(request) as answer:
            assert answer.read() == b""
        node.store.min_free = 1e18
        assert "GB must remain" in ask("/health", status=503)
    finally:
        server.shutdown()
        server.server_close()


def test_a_clock_that_is_put_forward(make_node, images, delivered, monkeypatch):
    """Nothing is removed or complete because of it."""
    node = make_node(complete_after=60, keep_days=1)
    delivered(node)
    keep(node, images[0].read_bytes())
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 1e6)
    assert not node.work()
    assert sorted(states(node)) == [("1.2.3", "done", 1), (STUDY, "receiving", 1)]


def test_an_association_that_breaks(make_node, images, monkeypatch):
    """Its study is complete all the same, also if it breaks while an image is being kept."""
    node = make_node(complete_after=0)
    kept = node.store.keep

    def slowly(*arguments):
        time.sleep(1)
        return kept(*arguments)

    monkeypatch.setattr(node.store, "keep", slowly)
    with listening(node) as address:
        entity = AE(ae_title="SCANNER")
        entity.dimse_timeout = 2
        entity.add_requested_context(pydicom.uid.MRImageStorage)
        association = entity.associate(address.host, address.port, ae_title="MMFNET")

        def send():
            with contextlib.suppress(Exception):  # the connection breaks
                association.send_c_store(pydicom.dcmread(images[0]))

        sender = threading.Thread(target=send)
        sender.start()
        time.sleep(0.3)
        association.abort()
        sender.join()
        end = time.monotonic() + 20
        while not node.work():
            assert time.monotonic() < end
            time.sleep(0.1)
