"""What keeps a node from its work."""

import logging
import sqlite3

_log = logging.getLogger(__name__)


class Faults:
    """The faults that are there now. Each is in the log when it begins and when it ends."""

    def __init__(self):
        self._there: dict[str, str] = {}

    def report(self, what: str, fault: str = "") -> None:
        """Reports how something stands.

        Args:
            what: What it is that may be at fault.
            fault: The fault; empty if there is none.
        """
        before = self._there.pop(what, "")
        if fault:
            self._there[what] = fault
        if fault != before:
            _log.log(logging.ERROR if fault else logging.INFO, "%s: %s", what, fault or "works again")

    def __str__(self):
        return "; ".join(f"{what}: {fault}" for what, fault in list(self._there.items()))


def describe_error(error: Exception) -> str:
    """An error without the names of files, which may be patients'."""
    if isinstance(error, sqlite3.Error):
        return str(error)
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
