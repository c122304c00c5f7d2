"""Does one job of `--jobs`; the scheduler calls `python -m keras_mmfnet.cli._job FOLDER NAME`."""

import contextlib
import sys
from pathlib import Path

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import session


def do_job(folder: Path, name: str) -> None:
    """Does a job of a folder in `RUN/jobs`."""
    with session():
        from keras_mmfnet.jobs import Request, own_gpu, run_job

        request = Request.load(folder)
        trains = name.startswith(("network", "method")) and not (request.device or request.devices)
        with own_gpu(folder.parent) if trains else contextlib.nullcontext(request.device) as device:
            start_backend(device)
            options.import_files(request.modules)
            with options.use_devices(request.devices, request.sync_batch_norm):
                run_job(folder, name)


if __name__ == "__main__":
    try:
        do_job(Path(sys.argv[1]), sys.argv[2])
    except typer.Exit as end:
        sys.exit(end.exit_code)
