"""Errors about a patient's files."""

from pathlib import Path

from keras_mmfnet.data.case import CaseError


def refuser(source, patient):
    """Returns a function `refuse(expected, received)` that creates the error for a file or series of a patient."""

    def refuse(expected, received):
        empty = isinstance(source, Path) and source.is_file() and not source.stat().st_size
        received = "an empty file of 0 bytes" if empty else received
        return CaseError(f"{patient}: {source}: must be {expected}. Received: {received}")

    return refuse


def reason(error):
    """The last line of SimpleITK's error message, which has the reason."""
    return str(error).strip().splitlines()[-1]
