"""The errors about a patient's files."""

from keras_mmfnet.data.case import CaseError


def refuser(source, patient):
    """A function `refuse(expected, received)` that makes the error for a patient's file or series."""
    return lambda expected, received: CaseError(f"{patient}: {source}: must be {expected}. Received: {received}")


def reason(error):
    """The last line of SimpleITK's message, which says what went wrong."""
    return str(error).strip().splitlines()[-1]
