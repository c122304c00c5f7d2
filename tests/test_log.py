import contextlib
import logging
from unittest import mock

import pytest

from keras_mmfnet._log import log_to_file, log_to_terminal, time_left


@contextlib.contextmanager
def bare_root():
    """The root logger as it is outside of pytest, which adds handlers of its own."""
    root = logging.getLogger()
    with mock.patch.multiple(root, handlers=[], level=logging.WARNING):
        yield root


def test_messages_go_to_the_terminal_and_to_the_end_of_a_file(tmp_path, capsys):
    with bare_root() as root:
        path = tmp_path / "out" / "run.log"
        log_to_terminal()
        for text in ("first", "sécond"):
            with log_to_file(path):
                root.info(text)
        root.info("third")
        assert capsys.readouterr().out == "first\nsécond\nthird\n"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [line.split(" ", 2)[2] for line in lines] == ["first", "sécond"]


def test_a_quiet_run_shows_errors_only(tmp_path, capsys, monkeypatch):
    with bare_root() as root:
        disabled = []
        monkeypatch.setattr("keras.config.disable_interactive_logging", lambda: disabled.append(True))
        log_to_terminal(quiet=True)
        with log_to_file(tmp_path / "run.log"):
            root.info("on the way")
            root.error("a mishap")
        assert capsys.readouterr().out == "a mishap\n"
        assert "on the way" in (tmp_path / "run.log").read_text()
        assert disabled


def test_the_file_has_all_messages_where_logging_was_set_up_before(tmp_path):
    with bare_root() as root:
        root.addHandler(logging.NullHandler())
        log_to_terminal()
        with log_to_file(tmp_path / "run.log"):
            root.info("on the way")
        assert root.level == logging.WARNING
        assert "on the way" in (tmp_path / "run.log").read_text()


def test_the_file_tells_what_ended_the_run(tmp_path, capsys):
    with bare_root() as root:
        log_to_terminal()
        with pytest.raises(KeyboardInterrupt), log_to_file(tmp_path / "run.log"):
            raise KeyboardInterrupt("stopped")
        assert "KeyboardInterrupt: stopped" in (tmp_path / "run.log").read_text()
        assert capsys.readouterr().out == ""
        assert not [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]


@pytest.mark.parametrize(
    ("seconds", "done", "total", "expected"),
    [
        (60, 3, 9, ", about 2 min left"),
        (5, 1, 2, ", less than a minute left"),
        (3600, 1, 3, ", about 2.0 h left"),
        (60, 9, 9, ""),
    ],
)
def test_how_long_the_rest_takes(seconds, done, total, expected):
    assert time_left(seconds, done, total) == expected
