"""Images from a folder of exports."""

import logging
import os
import time

import pydicom
from dicom_files import write_series
from nodes import STUDY, pass_time, states

from keras_mmfnet.node import watched
from keras_mmfnet.node.health import find_fault


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
