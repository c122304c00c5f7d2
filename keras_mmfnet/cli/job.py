"""Runs one job of `--jobs`: Snakemake calls `python -m keras_mmfnet.cli.job FOLDER NAME`."""

import contextlib
import itertools
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session

# Seconds to wait for a GPU before the next one is tried.
_SECONDS = 0.5


def do_job(folder: Path, name: str) -> None:
    """Runs a job of a folder in `RUN/jobs`."""
    with session():
        from keras_mmfnet.jobs import Request, refusal, run_job
        from keras_mmfnet.tracking import tracked_with

        request = Request.load(folder)
        trains = name.startswith(("network", "method"))
        chooses = trains and request.device in (None, "gpu") and not request.devices
        with refusal(folder, name), own_gpu(folder.parent) if chooses else contextlib.nullcontext():
            start_backend(request.device)
            options.import_files(request.modules)
            devices = request.devices if trains else None
            with options.use_devices(devices, request.sync_batch_norm), tracked_with(request.track):
                run_job(request, name)


@contextlib.contextmanager
def own_gpu(folder: Path) -> Iterator[None]:
    """Lets this process see one GPU of several, which no other job of the run uses; waits for one."""
    names = _visible_gpus()
    if len(names) < 2:
        yield
        return
    for name in itertools.cycle(names):
        lock = filelock.FileLock(folder / f".{platform.node()}_gpu_{name.replace('/', '_')}.lock", timeout=_SECONDS)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            break
    os.environ["CUDA_VISIBLE_DEVICES"] = name
    try:
        yield
    finally:
        lock.release()


def _visible_gpus():
    """The GPUs of NVIDIA that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return []
    return [str(number) for number in range(len(listed.splitlines()))]


if __name__ == "__main__":
    try:
        do_job(Path(sys.argv[1]), sys.argv[2])
    except typer.Exit as end:
        sys.exit(end.exit_code)
