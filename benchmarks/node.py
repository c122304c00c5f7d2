"""Sends copies of a study to `mmfnet node` from several senders at once, and kills the node meanwhile.

    python benchmarks/node.py --study DATA/brainix --copies 20 --senders 4 --kills 10

Each copy has UIDs of its own; the images of different copies arrive interleaved. The network has random weights. Every
study must arrive at the archive, with the same contours. The numbers are written to results/node.json.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import psutil
import pydicom
from machine import machine, report
from pynetdicom import AE, evt

from keras_mmfnet.data.dicom import is_dicom
from keras_mmfnet.models import MMFNet
from keras_mmfnet.node.network import Archive
from keras_mmfnet.node.queue import StudyQueue
from keras_mmfnet.recipe import Recipe

RESULT = Path(__file__).parent / "results" / "node.json"


def make_run(folder):
    """A run of one fold with random weights, for T1, T2 and FLAIR."""
    keras.utils.set_random_seed(0)
    recipe = Recipe.small().replace({"data.modalities": ("t1", "t2", "flair")})
    (folder / "fold_0").mkdir(parents=True)
    model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, recipe.network.reduction)
    model.save(folder / "fold_0" / "mmfnet.keras")
    (folder / "recipe.json").write_text(recipe.to_json())


def make_copies(study, number):
    """Lists of the datasets of each copy."""
    files = [path for path in sorted(study.rglob("*")) if is_dicom(path)]
    copies = []
    for copy in range(number):
        images = [pydicom.dcmread(path) for path in files]
        for one in images:
            for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
                one[name].value = pydicom.uid.generate_uid(entropy_srcs=[one[name].value, str(copy)])
            one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        copies.append(images)
    return copies


def deliver(images, address):
    """Sends images one by one, again and again until the node has each."""
    for one in images:
        while True:
            entity = AE(ae_title="SENDER")
            entity.add_requested_context(one.SOPClassUID, one.file_meta.TransferSyntaxUID)
            association = entity.associate(address.host, address.port, ae_title=address.title)
            if association.is_established:
                with contextlib.suppress(ValueError, RuntimeError):
                    if association.send_c_store(one).get("Status") == 0:
                        association.release()
                        break
                association.abort()
            time.sleep(0.2)


def contours_of(one):
    """The points of all contours."""
    return [np.array(c.ContourData, float) for roi in one.ROIContourSequence for c in roi.ContourSequence]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True, help="folder of a DICOM study with T1, T2 and FLAIR")
    parser.add_argument("--copies", type=int, default=20, help="studies (%(default)s)")
    parser.add_argument("--senders", type=int, default=4, help="%(default)s")
    parser.add_argument("--kills", type=int, default=10, help="%(default)s")
    parsed = parser.parse_args()
    got = []
    entity = AE(ae_title="ARCHIVE")
    entity.add_supported_context(pydicom.uid.RTStructureSetStorage)
    handlers = [(evt.EVT_C_STORE, lambda event: got.append(event.dataset) or 0)]
    archive = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    copies = make_copies(parsed.study, parsed.copies)
    with tempfile.TemporaryDirectory() as made:
        run, folder, port = Path(made, "run"), Path(made, "node"), free_port()
        make_run(run)
        command = [sys.executable, "-m", "keras_mmfnet.cli", "node", "start", run, "--folder", folder, "--port", port]
        command += ["--health-port", 0, "--allow", "SENDER", "--rtstruct", "--complete-after", 5]
        command += ["--to", f"ARCHIVE@127.0.0.1:{archive.server_address[1]}"]

        def start():
            return subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        # Each sender has its studies interleaved.
        shares = [
            [one for group in zip(*copies[n :: parsed.senders], strict=True) for one in group]
            for n in range(parsed.senders)
        ]
        address = Archive("MMFNET", "127.0.0.1", port)
        senders = [threading.Thread(target=deliver, args=(share, address), daemon=True) for share in shares]
        begun, node, drawn, killed, memory = time.monotonic(), start(), random.Random(0), 0, 0
        next_kill = begun + drawn.uniform(5, 30)
        for sender in senders:
            sender.start()
        while True:
            time.sleep(0.5)
            queue = StudyQueue(folder / "queue.sqlite") if (folder / "queue.sqlite").exists() else None
            states = Counter(study.state for study in queue.studies()) if queue else {}
            if states.get("done") == parsed.copies or states.get("refused"):
                break
            with contextlib.suppress(psutil.NoSuchProcess):
                tree = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
                memory = max(memory, sum(one.memory_info().rss for one in tree))
            if killed < parsed.kills and time.monotonic() > next_kill:
                node.send_signal(signal.SIGKILL)
                node.wait()
                killed, node, next_kill = killed + 1, start(), time.monotonic() + drawn.uniform(5, 30)
        minutes = (time.monotonic() - begun) / 60
        for study in queue.studies():
            if study.state != "done":
                print(study)
        node.send_signal(signal.SIGINT)
        node.wait()
    archive.shutdown()
    first = contours_of(got[0])
    for one in got[1:]:
        for points, expected in zip(contours_of(one), first, strict=True):
            np.testing.assert_array_equal(points, expected)
    sent = Counter(one.StudyInstanceUID for one in got)
    result = {
        "images_per_study": len(copies[0]),
        "studies": parsed.copies,
        "delivered": len(sent),
        "delivered_twice": sum(count > 1 for count in sent.values()),
        "segmented_twice": len({one.SOPInstanceUID for one in got}) - len(sent),
        "senders": parsed.senders,
        "kills": killed,
        "minutes": round(minutes, 1),
        "studies_per_hour": round(60 * parsed.copies / minutes),
        "peak_memory_mb": round(memory / 1e6),
        "machine": machine("keras-mmfnet", "keras", "pynetdicom", os.environ.get("KERAS_BACKEND", "tensorflow")),
    }
    report(result, RESULT)


if __name__ == "__main__":
    main()
