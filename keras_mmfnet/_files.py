"""Files that are there whole or not at all."""

import json
import os
import uuid


def write(path, content, replace=True):
    """Writes text or bytes so that the file is there whole or not at all.

    Args:
        path: The file's path.
        content: Text or bytes.
        replace: Whether a file that is there is replaced.

    Raises:
        FileExistsError: The file is there and is not to be replaced.
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


def read_json(path):
    """The object in a JSON file.

    Raises:
        ValueError: The file is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be undamaged JSON. Received: {error}") from error


def write_once(path, text, other, free=()):
    """Writes a JSON file that a resumed run must find with the same values.

    Args:
        path: The file's path.
        text: A JSON object.
        other: What a file with other values is of, for the message.
        free: Names at the top of the object that may change.

    Raises:
        ValueError: The file is there with other values, which the message lists.
    """
    try:
        return write(path, text, replace=False)
    except FileExistsError:
        before, now = _flat(read_json(path)), _flat(json.loads(text))
    differing = {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}
    fixed = {key: values for key, values in differing.items() if key.partition(".")[0] not in free}
    if fixed:
        listed = "; ".join(f"{key}: {old} before, {new} now" for key, (old, new) in list(fixed.items())[:5])
        listed += f"; and {len(fixed) - 5} more" if len(fixed) > 5 else ""
        raise ValueError(f"{path}: must be of this run to resume it, but is of {other}. Received: {listed}")
    if differing:
        write(path, text)


def _flat(values, above=""):
    """Nested dicts as one, by the path of each value."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
