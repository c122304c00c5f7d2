"""Reads and writes small files. A file is never left half-written."""

import contextlib
import csv
import io
import json
import os
import tempfile
import uuid
import zipfile
from pathlib import Path


def write(path, content, replace=True):
    """Writes text or bytes atomically: the file is complete or absent.

    Args:
        path: The file's path.
        content: Text or bytes.
        replace: Whether an existing file is replaced.

    Raises:
        FileExistsError: The file exists and `replace` is false.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_disk(path):
    """Waits until a file and its name are on the disk, where they survive a loss of power."""
    for one in (path, path.parent):
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def hold(path):
    """Locks a file; yields its descriptor. A child process that inherits it holds the lock, too.

    Args:
        path: The file, which is made if it does not exist.

    Raises:
        BlockingIOError: Another process holds it.
    """
    import fcntl  # not on Windows

    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file.fileno()


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill, which appears as `path` when the block ends: complete, or not at all.

    Args:
        path: Path of the folder, or of a zip archive of its files if it ends with `.zip`.

    Raises:
        FileExistsError: There is something already.
    """
    if path.exists():
        raise FileExistsError(f"{path}: a new one is expected. Received: one that exists")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as hidden:
        folder = Path(hidden, "folder")
        folder.mkdir()
        yield folder
        if path.suffix == ".zip":
            with zipfile.ZipFile(Path(hidden, "archive"), "w") as archive:
                for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                    archive.write(file, file.relative_to(folder))
            os.link(Path(hidden, "archive"), path)
        else:
            os.rename(folder, path)


def read_json(path):
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: The file is damaged; the message names it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: must be undamaged JSON. Received: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object. Received: {str(found)[:99]}")
    return found


def csv_text(rows):
    """Dicts as CSV text, one row each. The columns are the keys of all rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_once(path, text, other, free=()):
    """Writes a JSON file; if it exists already, checks that it has the same values.

    Args:
        path: The file's path.
        text: A JSON object.
        other: What a file with other values belongs to, for the error message.
        free: Top-level keys whose values may differ; the file is then replaced.

    Raises:
        ValueError: The file exists with other values. The message lists them.
    """
    try:
        return write(path, text, replace=False)
    except FileExistsError:
        before, now = _flat(read_json(path)), _flat(json.loads(text))
    differing = {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}
    fixed = {key: values for key, values in differing.items() if key.partition(".")[0] not in free}
    if fixed:
        listed = "; ".join(
            f"{key}: {str(old)[:99]} before, {str(new)[:99]} now" for key, (old, new) in list(fixed.items())[:5]
        )
        listed += f"; and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        raise ValueError(f"{path}: must be of this run to resume it, but is of {other}. Received: {listed}")
    if differing:
        write(path, text)


def _flat(values, above=""):
    """Flattens nested dicts; the keys are dotted paths."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
