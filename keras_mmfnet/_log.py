"""Progress and log file of a run."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_progress = logging.getLogger("keras_mmfnet.progress")


def progress(what: str | os.PathLike, done: int, total: int) -> None:
    """Reports the progress of a task to the logger `keras_mmfnet.progress`.

    Args:
        what: Path of the network that is trained, or the name of another task.
        done: Number of updates or patients that are done.
        total: Number of all updates or patients.
    """
    _progress.debug("%s: %d of %d", what, done, total, extra={"what": what, "done": done, "total": total})


class _File(logging.FileHandler):
    """Creates the file when its folder exists, so that a run that fails to start leaves no files."""

    def __init__(self, path):
        super().__init__(path, encoding="utf-8", delay=True)
        self.early = []

    def emit(self, record):
        self.early.append(record)
        if Path(self.baseFilename).parent.is_dir():
            for one in self.early:
                super().emit(one)
            self.early.clear()


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Appends all log messages, and the error that ends the block, to a file once its folder exists."""
    file = _File(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(file)
    # The root logger may be set to pass only warnings.
    level = root.level
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    except BaseException as error:
        # Only in the file: Python prints it to the terminal.
        file.handle(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        root.setLevel(level)
        root.removeHandler(file)
        file.close()
