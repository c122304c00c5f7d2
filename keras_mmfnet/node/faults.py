"""What keeps a node from its work."""

import logging
import sqlite3
import threading

_log = logging.getLogger(__name__)


class Faults:
    """The faults that are there now. Each is in the log when it begins and when it ends."""

    def __init__(self):
        self._there: dict[str, str] = {}
        self._lock = threading.Lock()

    def report(self, what: str, fault: str = "") -> None:
        """Sets or clears a fault.

        Args:
            what: Name of the activity, such as `watching`.
            fault: The fault; empty if there is none.
        """
        with self._lock:
            before = self._there.get(what, "")
            self._there[what] = fault
        if fault != before:
            _log.log(logging.ERROR if fault else logging.INFO, "%s: %s", what, fault or "works again")

    def __str__(self):
        return "; ".join(f"{what}: {fault}" for what, fault in list(self._there.items()) if fault)


def describe_error(error: Exception) -> str:
    """An error without file names, which may contain patients' names."""
    if isinstance(error, sqlite3.Error):
        return str(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
