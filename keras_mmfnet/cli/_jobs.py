"""Commands that run their trainings as jobs."""

import dataclasses
import logging
import os
import re
from pathlib import Path

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import Terminal, counted

_log = logging.getLogger(__name__)
# Jobs that preprocess patients: at most this many for each that runs at a time, and at most so many in all.
_BLOCKS, _ALL_BLOCKS = 4, 100


@dataclasses.dataclass
class Jobs:
    """The options of `--jobs`, and those that each job has."""

    number: int
    profile: Path | None
    dry_run: bool
    for_each: dict
    environment: dict = dataclasses.field(default_factory=lambda: dict(os.environ))

    def request(self, out: Path, data, recipe, folds, **arguments):
        """The `Request`, and the patients that are to be preprocessed; refuses what can be refused before the work."""
        from keras_mmfnet._start import check_start
        from keras_mmfnet.data import CaseError
        from keras_mmfnet.jobs import Request
        from keras_mmfnet.run import Run

        request = Request(
            run=out.absolute(), data=Path(data).absolute(), recipe=recipe, folds=folds, **arguments, **self.for_each
        )
        for name in (method.name for method in request.compared):
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"--jobs: a method named by letters, digits and _.+- is expected. Received: {name}")
        for method in request.compared:
            size, devices = method.adapt(recipe).training.batch_size, request.devices or "1"
            if devices.isdecimal() and size % int(devices):
                raise ValueError(f"`training.batch_size` must be a multiple of {devices} devices. Received: {size}")
        run = Run(out)
        start = check_start(run, data, recipe, run.recipe_file.exists(), **request.start_arguments)
        if start.bad and not request.skip_bad:
            raise CaseError.of_several(start.bad, len(start.cases) + len(start.bad))
        for error in start.bad:
            _log.warning("Left out: %s", error)
        if not run.recipe_file.exists():
            names = [case.name for case in start.cases]
            size = -(-len(names) // min(_BLOCKS * self.number, _ALL_BLOCKS))
            blocks = tuple(tuple(names[first : first + size]) for first in range(0, len(names), size))
            request = request.model_copy(update={"patients": blocks})
        return request, start.cases

    def run(self, terminal: Terminal, request) -> None:
        """Runs the jobs."""
        from keras_mmfnet.jobs import schedule
        from keras_mmfnet.run import Run

        try:
            schedule(request, self.number, self.profile, self.environment)
        finally:
            terminal.begun = Run(request.run).recipe_file.exists()

    def show(self, terminal: Terminal, request) -> None:
        """Prints the jobs, which Snakemake checks; nothing is written."""
        from keras_mmfnet.jobs import check_jobs

        jobs = check_jobs(request, self.number, self.profile, self.environment)
        terminal.table(["job", "after"], [[name, ", ".join(needs)] for name, needs in jobs.items()], left=2)
        terminal.say(f"{counted(len(jobs), 'job')}; nothing was started")


def choose_jobs(
    number: int | None, profile: Path | None, dry_run: bool, workers: int | None, **for_each
) -> Jobs | None:
    """The options of `--jobs`; `None` without it. `for_each` are those of each job.

    The environment of the jobs is that before the backend is started.
    """
    if number is None:
        if profile or dry_run:
            option = "--profile" if profile else "--dry-run"
            raise ValueError(f"{option}: a number of jobs, --jobs N, is expected with it. Received: no --jobs")
        return None
    if profile is not None:
        options.require_folder(profile, "--profile")
    options.check_devices(for_each["devices"])
    if workers:
        raise ValueError(f"--workers: no --jobs is expected with it, as each job is a process. Received: {workers}")
    if for_each["track"] == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ:
        expected = "the address of a server in the environment variable MLFLOW_TRACKING_URI is expected with --jobs"
        raise ValueError(f"--track mlflow: {expected}. Received: none")
    for_each["modules"] = tuple(path.absolute() for path in for_each["modules"] or ())
    return Jobs(number, profile and profile.absolute(), dry_run, for_each)
