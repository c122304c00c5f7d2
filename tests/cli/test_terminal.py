import contextlib
import logging
import signal
import time
import warnings
import weakref
from pathlib import Path
from unittest import mock

import pytest
import typer

from keras_mmfnet._log import log_to_file, progress
from keras_mmfnet.cli._terminal import TrainingProgress, session

LOG = logging.getLogger("keras_mmfnet.training")


@contextlib.contextmanager
def bare_root():
    """The root logger as it is outside of pytest, which adds handlers of its own."""
    root = logging.getLogger()
    with mock.patch.multiple(root, handlers=[], level=logging.WARNING):
        yield root


def test_messages_go_to_the_terminal_and_to_the_end_of_a_file(tmp_path, capsys):
    with bare_root() as root, session() as terminal:
        path = tmp_path / "out" / "run.log"
        LOG.info("nothing, where the run does not start")
        with log_to_file(path):
            LOG.info("early")
            path.parent.mkdir()
            LOG.info("first [sic]")
        with log_to_file(path):
            LOG.info("sécond")
            logging.getLogger("tensorflow").warning("5 out of the last 5 calls triggered tf.function retracing")
        LOG.info("third")
        terminal.say("a result")
    said = capsys.readouterr()
    assert said.err.splitlines()[1:] == ["early", "first [sic]", "sécond", "third"]
    assert said.out == "a result\n"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines][:3] == ["early", "first [sic]", "sécond"]
    assert root.level == logging.WARNING
    with log_to_file(tmp_path / "nowhere" / "run.log"):
        logging.warning("lost")
    assert not (tmp_path / "nowhere").exists()


def test_a_quiet_run_shows_errors_only(tmp_path, capsys):
    with bare_root(), session(quiet=True) as terminal, log_to_file(tmp_path / "run.log"):
        LOG.info("on the way")
        LOG.error("a mishap")
        terminal.say("a result")
        terminal.table(["name"], [["ann"]])
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "error: a mishap\n")
    assert "on the way" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_the_file_has_all_messages_where_logging_was_set_up_before(tmp_path):
    with bare_root() as root:
        root.addHandler(logging.NullHandler())
        with log_to_file(tmp_path / "run.log"):
            LOG.info("on the way")
        assert root.level == logging.WARNING
        assert "on the way" in (tmp_path / "run.log").read_text(encoding="utf-8")


def test_the_file_tells_what_ended_the_run(tmp_path, capsys):
    with bare_root() as root:
        with pytest.raises(KeyboardInterrupt), log_to_file(tmp_path / "run.log"):
            raise KeyboardInterrupt("stopped")
        assert "KeyboardInterrupt: stopped" in (tmp_path / "run.log").read_text(encoding="utf-8")
        assert capsys.readouterr().out == ""
        assert not [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]


def test_warnings_are_in_the_words_of_the_log(capsys):
    with bare_root(), warnings.catch_warnings(), session():
        warnings.simplefilter("default")
        warnings.warn("part of the tumour lies outside all windows: ann", stacklevel=1)
    assert capsys.readouterr().err == "warning: part of the tumour lies outside all windows: ann\n"


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError, ImportError, FloatingPointError])
def test_a_mistake_is_one_line(error, capsys):
    with pytest.raises(typer.Exit) as end, session(quiet=True):
        raise error("must be 1. Received: [2]")
    assert end.value.exit_code == 1
    assert capsys.readouterr().err == "error: must be 1. Received: [2]\n"
    with pytest.raises(ZeroDivisionError), session():
        raise ZeroDivisionError


def test_a_signal_that_python_swallows_ends_the_run_at_the_next_message(capsys):
    class Thing:
        pass

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def work():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
        del thing  # Python prints what a callback raises, and goes on.
        assert reference() is None
        # A second signal would end the process at once.
        assert [signal.getsignal(number) for number in before] == [signal.SIG_DFL] * 2
        LOG.info("the next message")
        pytest.fail("the run went on")

    with pytest.raises(typer.Exit) as end, bare_root(), session():
        work()
    assert end.value.exit_code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_time_left_is_that_of_the_whole_run(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first, second, whole = (Path("fold_0") / name for name in ("unet3d_t1", "unet3d_t2", "mmfnet"))
    plan = TrainingProgress({first: 1, second: 1, whole: 2}, steps=2, done=[first])
    assert (plan.done, plan.total, plan.left) == (1, 4, "")
    with bare_root(), session() as terminal:
        terminal.follow(plan)
        progress(second, 5, 8)  # resumed after two epochs of four
        assert (plan.epoch, plan.epochs) == (2, 4)
        now[0] = 60
        progress(second, 6, 8)
        # An eighth of a network takes a minute; two eighths of this one and a network twice as large are left.
        assert plan.left == "about 18 min left"
        LOG.info("Epoch 3 of 4: loss 0.5", extra={"epoch": 3})
        progress(whole, 1, 8)  # The second network ended early.
        assert plan.done == pytest.approx(2 + 2 / 8)
        now[0] = 7000
        progress(whole, 2, 8)
        assert plan.left == "about 4.7 h left"
        now[0] = 7001
        progress(whole, 8, 8)
        assert (plan.epoch, plan.left) == (3, "less than a minute left")  # the state of the fourth is not saved yet
        progress("segmenting", 1, 2)
    assert "Epoch 3 of 4: loss 0.5, about 18 min left\n" in capsys.readouterr().err
