"""What a run says while it works."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_progress = logging.getLogger("keras_mmfnet.progress")


def progress(what: str | os.PathLike, done: int, total: int) -> None:
    """Reports how far a piece of work is, to whoever listens to the logger `keras_mmfnet.progress`.

    Args:
        what: Path of the network that is trained, or the name of another work.
        done: Updates or patients that are done.
        total: How many there are.
    """
    _progress.debug("%s: %d of %d", what, done, total, extra={"what": what, "done": done, "total": total})


class _File(logging.FileHandler):
    """Waits with the file until its folder is there, so that a run that does not start leaves nothing behind."""

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
    """Adds all messages, and the error that ends the block, to the end of a file, as soon as its folder is there."""
    file = _File(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    file.setLevel(logging.INFO)
    root = logging.getLogger()
    root.addHandler(file)
    # Where others have set up logging before, it may let only warnings through.
    level = root.level
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    except BaseException as error:
        # In the file alone: the terminal has it from Python.
        file.handle(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        root.setLevel(level)
        root.removeHandler(file)
        file.close()
