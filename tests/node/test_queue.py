import dataclasses

import pytest

from keras_mmfnet.node import queue as module
from keras_mmfnet.node.queue import StudyQueue


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "time", lambda: Clock.now)
    return Clock


@pytest.fixture
def queue(tmp_path):
    return StudyQueue(tmp_path / "queue.sqlite")


def states(queue):
    return {study.uid: (study.state, study.images) for study in queue.studies()}


def test_a_study_from_the_first_image_to_the_end(queue, clock):
    queue.add("1.1", "1.1.1")
    clock.now += 30
    queue.add("1.1", "1.1.2")
    clock.now += 59
    assert queue.next_to_segment(60) is None
    clock.now += 1
    study = queue.next_to_segment(60)
    assert (study.uid, study.state, study.images) == ("1.1", "segmenting", 2)
    assert queue.next_to_segment(60) is None  # it is taken
    assert queue.next_to_send() is None
    queue.advance(study, "sending")
    study = queue.next_to_send()
    queue.advance(study, "done", "sent")
    assert queue.next_to_send() is None
    [study] = queue.studies()
    assert (study.state, study.reason, study.changed) == ("done", "sent", 1090.0)


def test_an_image_again_changes_nothing(queue, clock):
    queue.add("1.1", "1.1.1")
    clock.now += 60
    queue.advance(queue.next_to_segment(60), "refused", "why")
    queue.add("1.1", "1.1.1")
    assert states(queue) == {"1.1": ("refused", 1)}


@pytest.mark.parametrize("state", ["sending", "done", "refused"])
def test_an_image_that_is_late_begins_the_study_anew(queue, clock, state):
    queue.add("1.1", "1.1.1")
    clock.now += 60
    study = queue.next_to_segment(60)
    if state != "sending":
        queue.advance(study, state)
    queue.add("1.1", "1.1.2")
    assert states(queue) == {"1.1": ("receiving", 2)}
    # What was begun before the image came is not taken for a result of both.
    queue.advance(study, "sending")
    queue.postpone(study, "why")
    clock.now += 60
    again = queue.next_to_segment(60)
    queue.advance(dataclasses.replace(again, version=1), "sending")
    assert states(queue) == {"1.1": ("segmenting", 2)}
    queue.advance(again, "sending")
    assert states(queue) == {"1.1": ("sending", 2)}


def test_pauses_grow_and_others_go_on_meanwhile(queue, clock):
    for uid in ("1.1", "1.2"):
        queue.add(uid, f"{uid}.1")
        clock.now += 100
        queue.advance(queue.next_to_segment(60), "sending")
    pauses = []
    for _ in range(12):
        study = queue.next_to_send()
        assert study.uid == "1.1"
        queue.postpone(study, "away")
        [found] = [one for one in queue.studies() if one.uid == "1.1"]
        pauses.append(found.due - clock.now)
        assert (queue.next_to_send().uid, found.reason) == ("1.2", "away")
        clock.now = found.due
    assert pauses[:4] == [10, 20, 40, 80]
    assert pauses[-2:] == [3600, 3600]


def test_several_complete_studies_one_after_the_other(queue, clock):
    for uid in ("1.1", "1.2", "1.3"):
        queue.add(uid, "9.9")  # two studies may have an image of the same UID
        clock.now += 1
    clock.now += 60
    assert [queue.next_to_segment(60).uid for _ in range(3)] == ["1.1", "1.2", "1.3"]
    assert queue.next_to_segment(60) is None


def test_what_a_killed_process_left_comes_after_the_others(queue, clock, tmp_path):
    for uid in ("1.1", "1.2"):
        queue.add(uid, f"{uid}.1")
    clock.now += 60
    assert queue.next_to_segment(60).uid == "1.1"
    other = StudyQueue(tmp_path / "queue.sqlite")
    other.recover()
    assert other.next_to_segment(60).uid == "1.2"
    assert other.next_to_segment(60) is None
    clock.now += 10
    assert other.next_to_segment(60).attempts == 1


def test_a_refused_study_is_tried_again_on_request(queue, clock):
    queue.add("1.1", "1.1.1")
    assert not queue.retry("1.1", ["1.1.1"])
    queue.advance(queue.next_to_segment(0), "refused", "why")
    assert queue.retry("1.1", ["1.1.1"])
    assert queue.next_to_segment(0).uid == "1.1"
    assert not queue.retry("1.2", [])
