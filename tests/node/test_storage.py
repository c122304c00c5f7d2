"""What a node keeps of what it gets, and what it removes."""

import shutil
from pathlib import Path

import pydicom
import pytest
from dicom_files import write_object
from nodes import STUDY, full_disk, keep, listening, pass_time, states

from keras_mmfnet.node import storage
from keras_mmfnet.node.health import find_fault


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


def test_what_is_no_image_is_not_kept(make_node, tmp_path):
    node = make_node()
    path = tmp_path / "report.dcm"
    write_object(path, pydicom.uid.BasicTextSRStorage)
    with listening(node) as address:
        address.store([path], "SCANNER")
    assert states(node) == []
    assert not (node.folder / "studies").exists()


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


def test_old_studies_are_removed(make_node, images, delivered, monkeypatch):
    node = make_node(keep_days=2, complete_after=1e9)
    delivered(node)
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
