"""What a run says while it works: on the terminal and in a file."""

import contextlib
import logging
import sys

import keras


def log_to_terminal(form="%(message)s", quiet=False):
    """Shows messages on the terminal; only errors, and no bar of Keras, when `quiet`."""
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setLevel(logging.ERROR if quiet else logging.INFO)
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", handlers=[terminal])
    if quiet:
        keras.config.disable_interactive_logging()


@contextlib.contextmanager
def log_to_file(path):
    """Adds all messages, and the error that ends the block, to the end of a file, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
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


def time_left(seconds, done, total):
    """How long the rest will take, if it goes on as before, such as `, about 2 min left`; nothing at the end."""
    rest = seconds / done * (total - done)
    if done == total:
        return ""
    if rest < 60:
        return ", less than a minute left"
    return f", about {rest / 60:.0f} min left" if rest < 5400 else f", about {rest / 3600:.1f} h left"
