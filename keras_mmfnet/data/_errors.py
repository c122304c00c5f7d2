"""Errors about a patient's files."""

from keras_mmfnet.data.case import CaseError


def refuser(source, patient):
    """Returns a function `refuse(expected, received)` that creates the error for a file or series of a patient."""
    return lambda expected, received: CaseError(f"{patient}: {source}: must be {expected}. Received: {received}")


def reason(error):
    """The last line of SimpleITK's error message, which has the reason."""
    return str(error).strip().splitlines()[-1]
