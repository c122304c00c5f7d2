"""A node and those it talks to, by the DICOM protocol."""

import contextlib
import functools
import http.server
import logging
import os
import shutil
import socket
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
from pynetdicom import AE, evt

from keras_mmfnet.node import storage, watched
from keras_mmfnet.node.health import find_fault, serve_health
from keras_mmfnet.node.network import Archive, Certificates, WebArchive, parse_archive
from keras_mmfnet.node.service import Node
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


@pytest.fixture
def make_node(tmp_path):
    def make(receivers=(), **options):
        return Node(tmp_path / "node", tmp_path / "run", receivers, ["rtstruct"], allowed=["SCANNER"], **options)

    return make


@pytest.fixture
def images(tmp_path):
    """The files of a study of one series."""
    write_series(tmp_path / "images")
    return sorted((tmp_path / "images").iterdir())


def keep(node, content):
    return node.store.keep(content, Header.read(content))


def states(node):
    return [(study.uid, study.state, study.images) for study in node.queue.studies()]


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


def test_an_image_that_is_sent_again_with_another_content(make_node, images):
    """It replaces the first one, which may have been damaged on the way."""
    node = make_node()
    content = [path.read_bytes() for path in images]
    for one in [content[0][:-100], *content[1:]]:
        keep(node, one)
    first = node.queue.next_to_segment(0)
    node.queue.advance(first, "refused", "damaged")
    for one in content[1:]:
        keep(node, one)
    assert states(node) == [(STUDY, "refused", 5)]
    keep(node, content[0])
    again = node.queue.next_to_segment(0)
    assert again.images == 5
    assert node.results(again) != node.results(first)
    kept = sorted(path.read_bytes() for path in (node.folder / "studies" / STUDY).iterdir())
    assert kept == sorted(content)


def test_one_uid_in_two_series(make_node, images, tmp_path):
    """The first image is not replaced: its series would lack a slice. The study is not segmented without the other."""
    node = make_node(complete_after=0)
    keep(node, images[0].read_bytes())
    one = pydicom.dcmread(images[0])
    one.SeriesInstanceUID = "1.2.3"
    one.save_as(tmp_path / "other.dcm")
    assert keep(node, (tmp_path / "other.dcm").read_bytes()) == 0xC000
    node.work()
    assert states(node) == [(STUDY, "refused", 1)]
    assert "is in two series" in node.queue.studies()[0].reason
    del one.SOPClassUID
    one.save_as(tmp_path / "other.dcm")
    with pytest.raises(ValueError, match="an object with UIDs of its class, study and instance is expected"):
        keep(node, (tmp_path / "other.dcm").read_bytes())
    [kept] = (node.folder / "studies" / STUDY).iterdir()
    assert kept.read_bytes() == images[0].read_bytes()


def test_a_study_whose_images_were_removed_and_are_sent_again(make_node, images):
    node = make_node()
    for _ in range(2):
        for path in images:
            keep(node, path.read_bytes())
        study = node.queue.next_to_segment(0)
        assert study.images == 5
        node.queue.advance(study, "done")
        shutil.rmtree(node.folder / "studies" / STUDY)


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


def test_what_is_no_image_is_not_kept(make_node, tmp_path):
    node = make_node()
    path = tmp_path / "report.dcm"
    write_object(path, pydicom.uid.BasicTextSRStorage)
    with listening(node) as address:
        address.store([path], "SCANNER")
    assert states(node) == []
    assert not (node.folder / "studies").exists()


def test_a_sender_that_is_not_allowed(make_node, images, caplog):
    node = make_node()
    with listening(node) as address:
        with pytest.raises(ConnectionError, match=r"must accept an association from STRANGER. Received: a rejection"):
            address.store(images, "STRANGER")
        with pytest.raises(ConnectionError, match="a rejection"):
            Archive("OTHER", address.host, address.port).store(images, "SCANNER")
    assert states(node) == []
    assert caplog.text.count("refused a connection from 127.0.0.1") == 2


def test_uids_that_lead_out_of_the_folder(make_node, images):
    """The UIDs of the dataset name the file, not those of the command."""
    node = make_node()
    one = pydicom.dcmread(images[0])
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        one.StudyInstanceUID = "../../1.2"
    one.save_as(images[0])
    with listening(node) as address, pytest.raises(OSError, match=r"Received: status C000"):
        address.store(images[:1], "SCANNER")
    assert states(node) == []


def test_a_full_disk(make_node, images):
    node = make_node(min_free=1e18)
    with listening(node) as address, pytest.raises(OSError, match=r"must store MR Image Storage. .* status A700"):
        address.store(images[:1], "SCANNER")
    assert states(node) == []


def test_a_study_of_too_many_or_too_large_images(make_node, images, monkeypatch):
    monkeypatch.setattr(storage, "MOST_IMAGES", 3)
    node = make_node()
    with listening(node) as address, pytest.raises(OSError, match=r"status A702"):
        address.store(images, "SCANNER")
    assert states(node) == [(STUDY, "receiving", 3)]
    monkeypatch.setattr(storage, "MOST_IMAGES", 20)
    assert keep(node, images[3].read_bytes()) == 0
    monkeypatch.setattr(storage, "MOST_BYTES", 100)
    assert keep(node, images[4].read_bytes()) == 0xA702
    assert len(node.queue.lacking(STUDY)) == 1


@pytest.fixture
def contours(tmp_path):
    """Puts a study that is segmented into the queue of a node."""

    def make(node):
        node.queue.add("1.2.3", "1.2.3.1")
        study = node.queue.next_to_segment(0)
        node.queue.advance(study, "sending")
        node.results(study).mkdir(parents=True)
        write_object(node.results(study) / "1.2.3_rtstruct.dcm", pydicom.uid.RTStructureSetStorage)

    return make


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


def test_a_web_archive_that_is_away_or_answers_nonsense(contours, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def nonsense():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=nonsense)
        thread.start()
        with pytest.raises(OSError, match=rf"{address}: must answer. Received: "):
            WebArchive(address).store([], "MMFNET")
        thread.join()
    with pytest.raises(OSError, match=rf"{address}: must answer. Received: .*refused"):
        WebArchive(address).store([], "MMFNET")


def test_a_web_archive_that_sends_on(monkeypatch):
    """Nothing would be stored, and the password would go to another server."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(301)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        archive = WebArchive(f"http://127.0.0.1:{server.server_port}/dicom-web")
        with pytest.raises(OSError, match=r"must store all objects. Received: status 301"):
            archive.store([], "MMFNET")
        for secret in ("Bearer SECRET\n", "Bearer SECRET\x01"):
            monkeypatch.setenv("MMFNET_NODE_AUTHORIZATION", secret)
            with pytest.raises(OSError, match=r"status 301|printable ASCII") as refused:
                archive.store([], "MMFNET")
            assert "SECRET" not in str(refused.value)
        server.shutdown()
    assert asked == ["/dicom-web/studies"] * 2


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


@pytest.fixture
def certificates(tmp_path):
    """Those of this machine, checked with themselves."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "own.pem"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return Certificates(tmp_path / "own.pem", tmp_path / "key.pem", tmp_path / "own.pem")


def test_connections_by_tls(make_node, images, certificates):
    node = make_node(certificates=certificates)
    with listening(node) as address:
        address.store(images, "SCANNER", certificates)
        with pytest.raises(ConnectionError, match="no connection"):
            address.store(images, "SCANNER")
    assert states(node) == [(STUDY, "receiving", 5)]
    with pytest.raises(ValueError, match=r"a certificate, its key and an authority in PEM are expected: .* Received: "):
        Certificates(images[0], images[0], images[0]).context(server=True)


def test_a_watched_folder(make_node, images, tmp_path, monkeypatch):
    (tmp_path / "images" / "notes.txt").write_text("no image")
    os.utime(images[0], (time.time() + 1e5,) * 2)  # the clock of another machine
    node = make_node(watched=tmp_path / "images")
    assert not node.work()
    assert states(node) == []  # they may still be written
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    node.work()
    assert states(node) == [(STUDY, "receiving", 5)]
    monkeypatch.setattr(watched, "_SETTLED", 1000.0)
    write_series(tmp_path / "images", uid="1.2.3", prefix="later")
    node.work()
    assert states(node) == [(STUDY, "receiving", 5)]
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    node.work()
    assert states(node) == [(STUDY, "receiving", 10)]


def test_two_files_of_a_watched_folder_with_one_uid(make_node, images, tmp_path, monkeypatch):
    """Each is taken once, also by a node that was started again."""
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    one = pydicom.dcmread(images[0])
    one.PatientComments = "another content"
    one.save_as(tmp_path / "images" / "again.dcm")
    for _ in range(2):
        node = make_node(watched=tmp_path / "images")
        node.work()
        [study] = node.queue.studies()
        assert (study.images, study.version) == (5, 6)


def test_a_watched_folder_that_is_away(make_node, images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    caplog.set_level(logging.INFO)
    node = make_node(watched=tmp_path / "images")
    (tmp_path / "images").rename(tmp_path / "away")
    for _ in range(3):
        node.work()
    assert f"{tmp_path / 'images'} is not there" in find_fault(node)
    assert caplog.text.count("is not there") == 1
    (tmp_path / "away").rename(tmp_path / "images")
    node.work()
    assert find_fault(node) == ""
    assert "watching: works again" in caplog.text
    assert states(node) == [(STUDY, "receiving", 5)]


def pass_time(monkeypatch, seconds):
    for clock in ("time", "monotonic"):
        now = getattr(time, clock)
        monkeypatch.setattr(time, clock, functools.partial(lambda now: now() + seconds, now))


def test_old_studies_are_removed(make_node, images, contours, monkeypatch):
    node = make_node(keep_days=2, complete_after=1e9)
    with archive() as (receiver, _):
        node.archives = [receiver]
        contours(node)
        node.work()
    for path in images:
        keep(node, path.read_bytes())
    own, another = node.folder / "studies" / "1.2.3", node.folder / "results" / "1.2.3" / "1" / "corrections"
    own.mkdir()
    another.mkdir()
    pass_time(monkeypatch, 86400)
    node.work()
    assert len(states(node)) == 2
    pass_time(monkeypatch, 86401)
    node.work()
    assert len(states(node)) == 2  # an expert has corrected it
    another.rmdir()
    node.work()
    assert states(node) == [(STUDY, "receiving", 5)]  # waits, and is not done
    assert not own.exists()
    assert not another.parent.parent.exists()
    assert not list((node.folder / "removed").iterdir())
    assert len(list((node.folder / "studies" / STUDY).iterdir())) == 5
    # What was being removed when the node was killed is removed at the next start.
    (node.folder / "removed" / "rest").mkdir()
    make_node()
    assert not (node.folder / "removed").exists()


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


def test_the_address_of_an_archive():
    assert parse_archive("ORTHANC@localhost:4242") == Archive("ORTHANC", "localhost", 4242)
    assert parse_archive("A B@[::1]:104") == Archive("A B", "::1", 104)
    assert parse_archive("https://archive/dicom-web") == WebArchive("https://archive/dicom-web")
    for text in ("ORTHANC", "ORTHANC@localhost", "@localhost:1", "ORTHANC@localhost:70000", "A@h:x", "ÄRCHIV@h:104"):
        with pytest.raises(ValueError, match=r"TITLE@HOST:PORT is expected. Received: "):
            parse_archive(text)
    for text in (" @h:1", "A\n@h:1", "A\\B@h:1", f"{'A' * 17}@h:1", " A@h:1"):
        with pytest.raises(ValueError, match=r"an AE title of 1 to 16 ASCII characters"):
            parse_archive(text)
    for text in ("http://", "http://archive:port/web", "http://archive/a b"):
        with pytest.raises(ValueError, match=r"the address of a DICOMweb server is expected. Received: "):
            parse_archive(text)
    with pytest.raises(ValueError, match=r"a password is expected in MMFNET_NODE_AUTHORIZATION") as refused:
        parse_archive("https://me:secret@archive/web")
    assert "secret" not in str(refused.value)


def test_a_clock_that_is_put_forward(make_node, images, contours, monkeypatch):
    """Nothing is removed or complete because of it."""
    node = make_node(complete_after=60, keep_days=1)
    with archive() as (receiver, _):
        node.archives = [receiver]
        contours(node)
        node.work()
    keep(node, images[0].read_bytes())
    monkeypatch.setattr("time.time", lambda now=time.time: now() + 1e6)
    assert not node.work()
    assert sorted(states(node)) == [("1.2.3", "done", 1), (STUDY, "receiving", 1)]


def test_a_study_whose_image_was_refused(make_node, images):
    """It is not segmented without it, until the image comes or somebody decides so."""
    node = make_node(complete_after=0)
    for path in images[:4]:
        keep(node, path.read_bytes())
    node.store.min_free = 1e18
    assert keep(node, images[4].read_bytes()) == 0xA700
    assert "GB must remain" in find_fault(node)
    node.work()
    assert states(node) == [(STUDY, "refused", 4)]
    assert "an image was refused: " in node.queue.studies()[0].reason
    node.store.min_free = 0
    assert keep(node, images[4].read_bytes()) == 0
    assert find_fault(node) == ""
    assert states(node) == [(STUDY, "receiving", 5)]
    assert node.queue.lacking(STUDY) == []


def test_images_that_are_gone_from_the_disk(make_node, images):
    node = make_node(complete_after=0)
    for path in images:
        keep(node, path.read_bytes())
    next((node.folder / "studies" / STUDY).iterdir()).unlink()
    node.work()
    assert states(node) == [(STUDY, "refused", 5)]
    assert "5 images are expected. Received: 4" in node.queue.studies()[0].reason


def test_copies_of_an_image(make_node, images):
    """A file with other meta information is the same image; a damaged copy does not replace a good one."""
    node = make_node()
    content = images[0].read_bytes()
    keep(node, content)
    one = pydicom.dcmread(images[0])
    one.file_meta.ImplementationVersionName = "ANOTHER"
    one.save_as(images[0])
    assert images[0].read_bytes() != content
    assert keep(node, images[0].read_bytes()) == 0
    assert keep(node, content[:-100]) == 0xC000
    [study] = node.queue.studies()
    assert (study.version, node.queue.lacking(STUDY)) == (1, [])
    [kept] = (node.folder / "studies" / STUDY).iterdir()
    assert kept.read_bytes() == content


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


def test_a_study_that_changed_is_not_removed(make_node, images, monkeypatch):
    node = make_node(keep_days=1, complete_after=1e9)
    for path in images:
        keep(node, path.read_bytes())
    node.queue.advance(node.queue.next_to_segment(-1e9), "done")
    pass_time(monkeypatch, 1e5)
    keep(node, images[0].read_bytes())
    node.work()
    assert states(node) == [(STUDY, "done", 5)]
    [study] = node.queue.studies()
    node.queue.advance(study, "refused")
    [study] = node.queue.studies()
    assert node.queue.retry(STUDY, [path.stem for path in (node.folder / "studies" / STUDY).iterdir()])
    assert not node.store.remove(study)
    # A study whose files cannot be moved keeps its records.
    node.queue.advance(node.queue.next_to_segment(-1e9), "refused")
    monkeypatch.setattr(Path, "rename", full_disk)
    [study] = node.queue.studies()
    with pytest.raises(OSError, match="No space left"):
        node.store.remove(study)
    assert states(node) == [(STUDY, "refused", 5)]
    assert len(list((node.folder / "studies" / STUDY).iterdir())) == 5


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_an_image_that_cannot_be_written(make_node, images, monkeypatch):
    """Its study waits for it, also if it is being segmented already."""
    node = make_node(complete_after=0)
    for path in images[:4]:
        keep(node, path.read_bytes())
    study = node.queue.next_to_segment(0)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", full_disk)
        assert keep(node, images[4].read_bytes()) == 0xA700
    node.queue.advance(study, "sending")
    assert states(node) == [(STUDY, "receiving", 4)]
    assert find_fault(node) == "keeping images: No space left on device"
    node.work()
    assert states(node) == [(STUDY, "refused", 4)]
    assert node.queue.retry(STUDY, [path.stem for path in (node.folder / "studies" / STUDY).iterdir()])
    assert node.queue.lacking(STUDY) == []
    assert keep(node, images[4].read_bytes()) == 0
    assert find_fault(node) == ""


def test_names_of_watched_files(make_node, images, tmp_path, monkeypatch):
    """A file that cannot be written as text, or cannot be read, does not keep the node from its work."""
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    folder = os.fsencode(tmp_path / "images")
    with open(folder + b"/M\xfcller.dcm", "wb") as file:
        file.write(b"no image")
    (tmp_path / "images" / "damaged.dcm").write_bytes(images[0].read_bytes()[:200])
    read = watched.is_dicom

    def broken(path):
        if path.name == images[0].name:
            raise PermissionError(13, "Permission denied")
        return read(path)

    node = make_node(watched=tmp_path / "images")
    monkeypatch.setattr(watched, "is_dicom", broken)
    node.work()
    assert find_fault(node) == "reading watched files: Permission denied"
    assert states(node) == [(STUDY, "receiving", 4)]
    monkeypatch.setattr(watched, "is_dicom", read)
    node.work()
    assert find_fault(node) == ""
    assert states(node) == [(STUDY, "receiving", 5)]


def test_a_watched_file_that_is_there_again(make_node, images, tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    node = make_node(watched=tmp_path / "images")
    node.work()
    images[0].rename(tmp_path / "away.dcm")
    node.work()
    assert len(node.queue.taken()) == 4
    (tmp_path / "away.dcm").rename(images[0])
    node.work()
    assert len(node.queue.taken()) == 5


def test_studies_wait_for_watched_files(make_node, images, tmp_path, monkeypatch):
    """Some are taken at a time, and none is too large; a file that cannot be read is waited for for a minute."""
    monkeypatch.setattr(watched, "_SETTLED", 0.0)
    monkeypatch.setattr(watched, "_AT_A_TIME", 3)
    monkeypatch.setattr(watched, "MOST_BYTES", images[4].stat().st_size)
    with open(images[4], "ab") as file:
        file.write(b"0")
    node = make_node(watched=tmp_path / "images", complete_after=0)
    taken = []
    monkeypatch.setattr(node, "_segment", taken.append)
    node.work()
    assert node.watched.waits
    node.work()
    assert [study.images for study in taken] == [4]
    assert "more than" in node.queue.lacking(STUDY)[0]

    def broken(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(watched, "is_dicom", broken)
    os.utime(images[0])
    node.watched.take()
    assert node.watched.waits
    pass_time(monkeypatch, 61)
    node.watched.take()
    assert not node.watched.waits
    (tmp_path / "images").rename(tmp_path / "away")
    node = make_node(watched=tmp_path / "images")
    node.work()
    assert not node.watched.waits
