"""Divides work among processes by patients, as many as `joblib.parallel_config` says; without it, one does all."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import joblib
import SimpleITK as sitk

from keras_mmfnet._log import progress
from keras_mmfnet._machine import available_cores
from keras_mmfnet.data.case import CaseError

# Patients for each process at least: it takes a second to start.
_LEAST = 4


def map_patients(function: Callable, patients: Sequence[Any], names: Sequence[str], what: str) -> Iterator[Any]:
    """Applies a function to each patient, and reports the progress. Few patients are in memory at a time.

    Args:
        function: A function of one patient that can be pickled, as its argument and its result can.
        patients: The patients.
        names: Their names.
        what: What is done, such as `"preprocessing"`.

    Yields:
        The results in the order of the patients, or the `CaseError` that was raised instead.

    Raises:
        RuntimeError: A process crashed or was killed. The message names the patients that were in work.
    """
    processes = min(joblib.effective_n_jobs(None), len(patients) // _LEAST)
    if processes <= 1:
        results = (_attempt(function, patient) for patient in patients)
        yield from _with_progress(results, len(names), what)
        return
    threads = max(1, available_cores() // processes)
    with tempfile.TemporaryDirectory() as folder:
        marks = [Path(folder) / str(number) for number in range(len(patients))]
        work = joblib.delayed(_in_process)
        calls = (work(function, patient, mark, threads) for patient, mark in zip(patients, marks, strict=True))
        try:
            results = joblib.Parallel(processes, return_as="generator")(calls)
            yield from _with_progress(results, len(names), what)
        except BrokenProcessPool as error:
            begun = " or ".join(name for name, mark in zip(names, marks, strict=True) if mark.exists())
            raise RuntimeError(
                f"{what} {begun}: a process must end by itself; if the memory was full, use fewer --workers. "
                f"Received: {type(error).__name__}"
            ) from None


def _with_progress(results, total, what):
    for number, result in enumerate(results, start=1):
        progress(what, number, total)
        yield result


def _in_process(function, patient, mark, threads):
    """Applies the function. The mark stays if the process crashes."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    mark.touch()
    result = _attempt(function, patient)
    mark.unlink()
    return result


def _attempt(function, patient):
    try:
        return function(patient)
    except CaseError as error:
        return error
