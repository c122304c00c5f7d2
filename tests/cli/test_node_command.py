"""`mmfnet node` beside a real archive: Orthanc."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import filled, find_series, write_series

from keras_mmfnet._files import hold
from keras_mmfnet.data import Grid
from keras_mmfnet.node.network import WebArchive
from keras_mmfnet.node.queue import StudyQueue
from keras_mmfnet.node.service import Node
from keras_mmfnet.node.storage import Header

GRID = Grid((24, 20, 5), (2.0, 2.0, 4.0), (-24.0, -20.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
STUDY = "1.2.826.0.1.3680043.2.1125.1"
ORTHANC = shutil.which("Orthanc")
needs_orthanc = pytest.mark.skipif(
    not (ORTHANC and shutil.which("storescu")), reason="needs Orthanc and storescu, of Debian's orthanc and dcmtk"
)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, about, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, about
        time.sleep(0.2)
    return found


class Orthanc:
    """An archive with a folder of its own, which knows a node."""

    def __init__(self, folder, node):
        self.web, self.dicom, folder = free_port(), free_port(), Path(folder)
        folder.mkdir()
        settings = {
            "StorageDirectory": str(folder / "files"),
            "HttpPort": self.web,
            "RemoteAccessAllowed": False,
            "DicomPort": self.dicom,
            "DicomAet": "ORTHANC",
            "DicomModalities": {"node": ["MMFNET", "127.0.0.1", node]},
            "StableAge": 1,
            "Plugins": ["/usr/share/orthanc/plugins"],
            "AuthenticationEnabled": True,
            "RegisteredUsers": {"orthanc": "orthanc"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))
        command = [ORTHANC, str(folder / "orthanc.json")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self._is_up, "Orthanc starts")

    authorization = f"Basic {base64.b64encode(b'orthanc:orthanc').decode()}"

    def _is_up(self):
        with contextlib.suppress(OSError):
            return self.ask("system")

    def ask(self, path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.web}/{path}", body)
        request.add_header("Authorization", self.authorization)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def objects(self, kind):
        """The instances whose class has a name with this word, as pydicom reads them."""
        found = []
        for name in json.loads(self.ask("instances")):
            one = pydicom.dcmread(pydicom.filebase.DicomBytesIO(self.ask(f"instances/{name}/file")))
            if kind in one.SOPClassUID.name:
                found.append(one)
        return found

    def send_all(self):
        """Sends all studies to the node."""
        studies = json.loads(self.ask("studies"))
        self.ask("modalities/node/store", json.dumps({"Resources": studies, "Synchronous": True}).encode())


@contextlib.contextmanager
def orthanc(folder, node):
    archive = Orthanc(folder, node)
    try:
        yield archive
    finally:
        archive.process.kill()
        archive.process.wait()


@contextlib.contextmanager
def started_node(run, folder, port, archive, *options):
    command = [sys.executable, "-m", "keras_mmfnet.cli", "node", "start", run, "--folder", folder, "--port", port]
    command += [
        "--allow",
        "ORTHANC",
        "--to",
        f"ORTHANC@127.0.0.1:{archive}",
        "--complete-after",
        2,
        "--health-port",
        0,
        *options,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with open(Path(folder).with_suffix(".log"), "a") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


# The network of these tests finds tumour everywhere in its windows.
NOTE = "what was found reaches the edge of the windows and may go on beyond"


def is_done(folder, images):
    [(state_of, count, reason)] = state(folder)
    return (state_of, count) == ("done", images) and NOTE in reason


def state(folder):
    return [(study.state, study.images, study.reason) for study in StudyQueue(folder / "queue.sqlite").studies()]


@needs_orthanc
@pytest.mark.slow
def test_from_an_archive_and_back(mmfnet, trained, tmp_path):
    """The node is killed at several moments; what arrives is what `mmfnet segment` writes."""
    for name, seed in (("T1", 0), ("T2", 1), ("T1 C+", 2)):
        write_series(tmp_path / "images" / name, GRID, name, patient="PID4711", uid=f"1.2.3.{seed}", seed=seed)
    folder, port = tmp_path / "node", free_port()
    with orthanc(tmp_path / "archive", port) as archive:
        images = sorted((tmp_path / "images").rglob("*.dcm"))
        subprocess.run(["storescu", "-aec", "ORTHANC", "127.0.0.1", str(archive.dicom), *images], check=True)
        moments = [
            lambda: (folder / "studies").exists() and state(folder)[0][1] == 15,  # received
            lambda: state(folder)[0][0] == "segmenting",
            lambda: list((folder / "results").rglob("*_rtstruct.dcm")),
        ]
        options = ("--rtstruct", "--seg", "--structure", "GTV")
        for number, moment in enumerate(moments):
            with started_node(trained, folder, port, archive.dicom, *options):
                if not number:
                    wait_for(lambda: listens(port), "the node listens")
                    archive.send_all()
                wait_for(moment, f"moment {number}")
        with started_node(trained, folder, port, archive.dicom, *options) as node:
            wait_for(lambda: is_done(folder, 15), "the study is done")
            node.send_signal(signal.SIGINT)
            assert node.wait(60) == 0
        status = mmfnet("node", "status", "--folder", folder)
        assert status.stdout.splitlines()[3].split()[:3] == [STUDY, "done", "15"]
        [structures], [segmentation] = archive.objects("RT Structure Set"), archive.objects("Segmentation")
    log = Path(folder).with_suffix(".log").read_text()
    assert "PID4711" not in log
    # Each line of the log is a JSON object, but for the address and the reason of the end.
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert [line["message"] for line in lines if line.get("study") == STUDY][-3:] == ["segmenting", "segmented", "sent"]
    assert all(line["time"].endswith("+00:00") and line["level"] for line in lines)
    mmfnet("segment", trained, tmp_path / "images", "--out", tmp_path / "own", "--seg", "--structure", "GTV")
    mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "own" / "images.nii.gz")))
    assert mask.any()
    found = np.zeros_like(mask)
    for frame, plane in zip(segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True):
        found[round(plane.PlanePositionSequence[0].ImagePositionPatient[2] / 4)] = frame
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(filled(structures, GRID), mask)
    [roi] = structures.StructureSetROISequence
    assert roi.ROIName == "GTV"
    [frame] = structures.ReferencedFrameOfReferenceSequence
    [referred] = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert referred.SeriesInstanceUID == "1.2.3.0"
    assert structures.StudyInstanceUID == segmentation.StudyInstanceUID == STUDY


@needs_orthanc
@pytest.mark.slow
def test_a_real_head_from_an_archive_and_back(mmfnet, of_brainix, test_data, tmp_path):
    folder, port = tmp_path / "node", free_port()
    with orthanc(tmp_path / "archive", port) as archive:
        for name in ("T1", "T2", "FLAIR"):
            images = sorted((test_data / "brainix" / name).iterdir())
            subprocess.run(["storescu", "-aec", "ORTHANC", "127.0.0.1", str(archive.dicom), *images], check=True)
        with started_node(of_brainix, folder, port, archive.dicom, "--rtstruct"):
            wait_for(lambda: listens(port), "the node listens")
            archive.send_all()
            wait_for(lambda: is_done(folder, 66), "the study is done")
        [structures] = archive.objects("RT Structure Set")
    for name in ("T1", "T2", "FLAIR"):
        shutil.copytree(test_data / "brainix" / name, tmp_path / "head" / name)
    mmfnet("segment", of_brainix, tmp_path / "head", "--out", tmp_path / "own")
    mask = sitk.ReadImage(str(tmp_path / "own" / "head.nii.gz"))
    [series] = [one for one in find_series(tmp_path / "head", "head") if one.folder.name == "T1"]
    image = pydicom.dcmread(series.files[0])
    [frame] = structures.ReferencedFrameOfReferenceSequence
    [referred] = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence
    assert (referred.SeriesInstanceUID, structures.PatientID) == (image.SeriesInstanceUID, image.PatientID)
    found = filled(structures, Grid.from_image(mask))
    assert found.any()
    np.testing.assert_array_equal(found, sitk.GetArrayFromImage(mask) > 0)


@needs_orthanc
def test_archives_that_speak_dicomweb_and_are_asked(mmfnet, trained, tmp_path, monkeypatch):
    write_series(tmp_path / "images", GRID, "T1", uid="1.2.3.0")
    images, node = sorted((tmp_path / "images").iterdir()), Node(tmp_path / "node", trained, [], ["seg"], ["ORTHANC"])
    server = node.listen("127.0.0.1", 0)
    try:
        with orthanc(tmp_path / "archive", server.server_address[1]) as archive:
            web, about = WebArchive(f"http://127.0.0.1:{archive.web}/dicom-web/"), f"ORTHANC@127.0.0.1:{archive.dicom}"
            with pytest.raises(OSError, match=r"must store all objects. Received: status 401"):
                web.store(images, "MMFNET")
            monkeypatch.setenv("MMFNET_NODE_AUTHORIZATION", archive.authorization)
            web.store(images, "MMFNET")
            assert len(archive.objects("MR Image")) == 5
            assert f"{STUDY}: 5 objects sent to MMFNET" in mmfnet("node", "fetch", about, "--study", STUDY).stdout
            none = mmfnet("node", "fetch", about, "--accession", "4711", code=1)
            assert "a study that is there is expected. Received: accession number 4711" in none.stderr
            unknown = mmfnet("node", "fetch", about, "--study", STUDY, "--title", "NOBODY", code=1)
            assert "must answer the request. Received: " in unknown.stderr
    finally:
        server.shutdown()
    assert state(node.folder) == [("receiving", 5, "")]
    assert "one of them is expected" in mmfnet("node", "fetch", about, code=1).stderr
    assert "one study, without" in mmfnet("node", "fetch", about, "--accession", "*", code=1).stderr


@pytest.mark.parametrize("fault", ["a sequence is missing", "an object is truncated"])
def test_a_study_that_cannot_be_segmented_is_set_aside(trained, tmp_path, mmfnet, fault):
    names = ["T1", "T2", "T1 C+"] if fault == "an object is truncated" else ["T1"]
    for number, name in enumerate(names):
        write_series(tmp_path / "images" / name, GRID, name, uid=f"1.2.3.{number}")
    node = Node(tmp_path / "node", trained, [], ["seg"], ["SCANNER"], complete_after=0)
    for path in sorted((tmp_path / "images").rglob("*.dcm")):
        content = path.read_bytes()
        content = content[:-200] if path.name == "slice_02.dcm" and len(names) > 1 else content
        node.store.keep(content, Header.read(content))
    assert node.work()
    [study] = node.queue.studies()
    assert study.state == "refused"
    assert ("t2" if len(names) == 1 else "must be an undamaged DICOM file") in study.reason, study.reason
    assert not node.work()
    printed = mmfnet("node", "status", "--folder", tmp_path / "node").stdout
    assert "refused" in printed
    assert "1 in all" in printed
    mmfnet("node", "retry", study.uid, "--folder", tmp_path / "node")
    assert state(tmp_path / "node") == [("receiving", study.images, "")]
    again = mmfnet("node", "retry", study.uid, "--folder", tmp_path / "node", code=1)
    assert "a study of" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--allow", "A", "--to", "B@localhost:1"], "--rtstruct, --seg: one or both are expected"),
        (
            ["--allow", "A" * 17, "--to", "B@localhost:1", "--seg"],
            "an AE title of 1 to 16 ASCII characters without a backslash",
        ),
        (["--allow", "A", "--to", "B", "--seg"], "TITLE@HOST:PORT is expected. Received: B"),
        (["--allow", "A", "--to", "B@localhost:1", "--seg", "--free", "much"], "--free: a number with one of GB, MB"),
        (["--allow", "A", "--to", "B@localhost:1", "--seg", "--tls-key", "key.pem"], "all three are expected"),
    ],
)
def test_what_is_refused(mmfnet, trained, tmp_path, options, message):
    refused = mmfnet("node", "start", trained, "--folder", tmp_path / "node", *options, code=1)
    assert message in refused.stderr


def test_what_is_refused_at_the_start(mmfnet, trained, tmp_path):
    options = ("--folder", tmp_path / "node", "--allow", "A", "--to", "B@localhost:1", "--seg")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = mmfnet("node", "start", trained, *options, "--port", port, "--health-port", 0, code=1)
        assert "--host, --port: an address that is free is expected" in refused.stderr
        refused = mmfnet("node", "start", trained, *options, "--health-port", port, code=1)
        assert f"an address that is free is expected, Address already in use. Received: {port}" in refused.stderr
    with hold(tmp_path / "node" / ".node.lock"):
        refused = mmfnet("node", "start", trained, *options, code=1)
        assert "one node at a time is expected. Received: another one" in refused.stderr
    # A segmentation that a killed node left is waited for.
    with contextlib.ExitStack() as left, socket.create_server(("127.0.0.1", 0)) as taken:
        left.enter_context(hold(tmp_path / "node" / ".segment.lock"))
        threading.Timer(2, left.close).start()
        refused = mmfnet("node", "start", trained, *options, "--health-port", taken.getsockname()[1], code=1)
        assert "waiting for the segmentation of a node that was killed" in refused.stderr
        assert "an address that is free is expected" in refused.stderr
    wrong = mmfnet("node", "start", trained, *options, "--structure", "A\\B", code=1)
    assert "--structure: 1 to 64 characters without a backslash" in wrong.stderr
    for fold in trained.glob("fold_*"):
        shutil.rmtree(fold)
    assert "a run with trained folds is expected" in mmfnet("node", "start", trained, *options, code=1).stderr
    missing = mmfnet("node", "status", "--folder", tmp_path, code=1)
    assert "--folder: the folder of a node, with a queue.sqlite, is expected" in missing.stderr
