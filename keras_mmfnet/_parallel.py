"""Maps a function over patients, in the number of processes that `joblib.parallel_config` sets; by default in one."""

import contextlib
import os
import re
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

# The fewest patients for each process; to start one takes a second.
_LEAST = 4


def map_patients(function: Callable, patients: Sequence[Any], names: Sequence[str], what: str) -> Iterator[Any]:
    """Applies a function to each patient, and reports the progress.

    Args:
        function: A function of one patient. It, its argument and its result must be picklable. Results that are
            finished wait in memory for those before them, and should be small.
        patients: The patients.
        names: Their names.
        what: What is done, such as `"preprocessing"`.

    Yields:
        The results in the order of the patients.

    Raises:
        RuntimeError: A process crashed or was killed. The message names the patients that were being processed.
    """
    processes = min(joblib.effective_n_jobs(None), len(patients) // _LEAST)
    if processes <= 1:
        yield from _with_progress(map(function, patients), len(names), what)
        return
    threads = max(1, available_cores() // processes)
    with tempfile.TemporaryDirectory() as folder:
        marks = [Path(folder) / str(number) for number in range(len(patients))]
        work = joblib.delayed(_in_process)
        calls = (
            work(function, patient, mark, threads, os.getpid()) for patient, mark in zip(patients, marks, strict=True)
        )
        results = joblib.Parallel(processes, backend="loky", return_as="generator")(calls)
        try:
            with contextlib.closing(results):
                yield from _with_progress(results, len(names), what)
        except BrokenProcessPool as error:
            begun = " or ".join(name for name, mark in zip(names, marks, strict=True) if mark.exists())
            begun = begun or f"{len(patients)} patients"  # killed before the first one
            raise RuntimeError(
                f"{what} {begun}: a process was killed, perhaps because the memory was full; fewer processes take less "
                f"(--workers, or `n_jobs` of `joblib.parallel_config`). Received: {_exit_codes(error)}"
            ) from None


def attempt(function: Callable, patient: Any) -> Any:
    """The result of a function of a patient, or the `CaseError` that it raised."""
    try:
        return function(patient)
    except CaseError as error:
        return error


def _with_progress(results, total, what):
    for number, result in enumerate(results, start=1):
        progress(what, number, total)
        yield result


def _in_process(function, patient, mark, threads, parent):
    """Applies the function. The mark stays if the process crashes."""
    if os.getppid() != parent:  # Nobody waits for the result.
        raise RuntimeError("the process that started this one must still run. Received: it was killed")
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    mark.touch()
    try:
        return function(patient)
    finally:
        mark.unlink()


def _exit_codes(error):
    """How the processes ended, such as `{SIGKILL(-9)}`, if joblib's message tells."""
    found = re.search(r"\{.*?\}", str(error))
    return found[0] if found else type(error).__name__
