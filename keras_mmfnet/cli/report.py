from pathlib import Path

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced, start_backend
from keras_mmfnet.cli._terminal import session


def report(run: options.RunFolder, device: options.Device = None, quiet: options.Quiet = False):
    """Writes the report of a run, report.html in its folder, as far as the run has come."""
    with session(quiet):
        start_backend(device)
        with silenced():
            from keras_mmfnet.run import Run
        print(write_report(Run(run)))


def write_report(run) -> Path:
    """Writes the report of a run and returns its path."""
    from keras_mmfnet.report import write_run_report

    return write_run_report(run.folder, run.cases.values())
