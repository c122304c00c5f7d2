"""Files that are there whole or not at all."""

import json
import os


def write(path, content):
    """Writes text or bytes so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


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
    if not path.exists():
        return write(path, text)
    before, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(text))
    differing = {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}
    fixed = {key: values for key, values in differing.items() if key.partition(".")[0] not in free}
    if fixed:
        listed = "; ".join(f"{key}: {old} before, {new} now" for key, (old, new) in fixed.items())
        raise ValueError(f"{path}: must be of this run to resume it, but is of {other}. Received: {listed}")
    if differing:
        write(path, text)


def _flat(values, above=""):
    """Nested dicts as one, by the path of each value."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
