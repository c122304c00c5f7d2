"""Runs the trainings of a run as jobs, which Snakemake starts on this machine or on a cluster.

A job calls what the command would call itself: `preprocess_case`, `Run.start`, `train_donor`, `run_fold` or the report.
These do nothing twice, resume what was interrupted, and wait for a process that computes the same. So a job may be
killed, repeated, or started by two schedulers at once.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic

from keras_mmfnet._backend import configured_backend
from keras_mmfnet._files import hold, write
from keras_mmfnet._log import log_to_file, progress
from keras_mmfnet._machine import available_cores, name_process, process_of
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.recipe import Recipe

if TYPE_CHECKING:
    from keras_mmfnet.methods import Method

_log = logging.getLogger(__name__)
# How often a job is repeated that failed or whose machine was taken away.
_RETRIES = 2
# Seconds between two looks at the jobs.
_SECONDS = 0.5
_REQUEST = "request.json"


class Request(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What is to be trained, as jobs read it from a file.

    Args:
        run: Folder of the run.
        data: Folder of patients.
        recipe: The `Recipe`.
        folds: Numbers of the folds.
        patients: Names of the patients that are to be preprocessed, those of one job together.
        methods: Names of registered methods that are to be compared; empty for the recipe's own.
        baseline: The method that others are compared with.
        groups: As for `Run.start`.
        splits: As for `Run.start`.
        donor: As for `Run.start`.
        skip_bad: Leave out patients that cannot be used.
        modules: Python files that register methods or losses.
        device: What a job computes on, as for `mmfnet train --device`.
        devices: How many devices a job trains on, as for `mmfnet train --devices`.
        sync_batch_norm: As for `mmfnet train --sync-batch-norm`.
        track: As for `mmfnet train --track`.
    """

    run: Path
    data: Path
    recipe: Recipe
    folds: tuple[int, ...]
    patients: tuple[tuple[str, ...], ...] = ()
    methods: tuple[str, ...] = ()
    baseline: str | None = None
    groups: dict[str, str] | None = None
    splits: tuple[Fold, ...] | None = None
    donor: Path | None = None
    skip_bad: bool = False
    modules: tuple[Path, ...] = ()
    device: str | None = None
    devices: str | None = None
    sync_batch_norm: bool = True
    track: str | None = None

    @classmethod
    def load(cls, folder: Path) -> "Request":
        """The request whose jobs are in a folder."""
        return cls.model_validate_json((folder / _REQUEST).read_bytes())

    @property
    def compared(self) -> "list[Method]":
        """The methods to train, from the registry or the recipe."""
        from keras_mmfnet.methods import METHODS, method_of

        return [METHODS[name] for name in self.methods] or [method_of(self.recipe)]

    @property
    def start_arguments(self) -> dict:
        """Arguments of `Run.start`: the groups, the divisions, the donor, the methods and the folds."""
        given = {"groups": self.groups, "splits": self.splits, "donor": self.donor}
        return given | {"methods": self.compared, "folds": self.folds}


def plan_jobs(request: Request) -> dict[str, list[str]]:
    """The jobs of a request that are not done yet.

    Args:
        request: The `Request`.

    Returns:
        The names of the jobs that each job needs, by its name: `patients_<number>`, `cohort_all`,
        `network_<fold>_<name>`, `method_<fold>_<name>` and `report_all`.
    """
    from keras_mmfnet.run import Run

    run = Run(request.run)
    jobs = {f"patients_{number}": [] for number in range(len(request.patients))}
    jobs["cohort_all"] = list(jobs)
    for fold in request.folds:
        for method in request.compared:
            if run.result(fold, method.name).exists() and not run.lost_masks(fold, method.name):
                continue
            trained = run.network(fold, method.name).exists()
            names = run.borrowed(method) if run.cohort_file.exists() else method.encoders
            borrowed = [] if trained else [f"network_{fold}_{name}" for name in names.values()]
            for name in borrowed:
                jobs.setdefault(name, ["cohort_all"])
            jobs[f"method_{fold}_{method.name}"] = ["cohort_all", *borrowed]
        for method in request.compared:
            # A network that others borrow from is trained by one job.
            name, network = f"method_{fold}_{method.name}", f"network_{fold}_{method.name}"
            if name in jobs and network in jobs:
                jobs[name].append(network)
    jobs["report_all"] = [name for name in jobs if name.startswith(("cohort", "method"))]
    return jobs


def run_job(request: Request, name: str) -> None:
    """Runs a job.

    Args:
        request: The `Request`.
        name: The job's name, as in `plan_jobs`.

    Raises:
        CaseError: A patient cannot be used.
        ValueError: As from `Run.start` and `run_fold`.
        FloatingPointError: A training diverged.
    """
    from keras_mmfnet.run import Run, run_fold, train_donor

    kind, _, rest = name.partition("_")
    number, _, what = rest.partition("_")
    run = Run(request.run)
    with log_to_file(run.log_file):
        _log.info("Job %s", name)
        if kind == "patients":
            _preprocess(request, request.patients[int(number)])
        elif kind == "cohort":
            left_out = functools.partial(_log.warning, "Left out: %s") if request.skip_bad else None
            arguments = request.start_arguments
            Run.start(run.folder, request.data, request.recipe, resume=True, on_error=left_out, **arguments)
            for fold in request.folds:  # --resume resumes the folds that have a folder
                run.fold_folder(fold).mkdir(exist_ok=True)
        elif kind == "network":
            # With a donor this network may not be needed.
            if any(what in run.borrowed(method).values() for method in request.compared):
                train_donor(run, int(number), what)
        elif kind == "method":
            [method] = (one for one in request.compared if one.name == what)
            run_fold(run, method, int(number), wait=True)
        else:
            _report(run, request)


@contextlib.contextmanager
def refusal(folder: Path, name: str) -> Iterator[None]:
    """Writes the message of an error that would come again to a file. The job is then not repeated.

    Args:
        folder: The folder that `schedule` made.
        name: The job's name.
    """
    try:
        yield
    except (ValueError, FloatingPointError, ImportError) as error:
        path = folder / "refused" / name
        path.parent.mkdir(exist_ok=True)
        write(path, str(error))
        raise


def _preprocess(request, names):
    """Preprocesses some of the patients."""
    from keras_mmfnet.data import find_cases, preprocess_case
    from keras_mmfnet.data.case import CaseError
    from keras_mmfnet.run import Run

    bad = []
    # Patients whose files are missing are reported by the cohort job.
    for case in find_cases(request.data, request.recipe.data, on_error=lambda error: None):
        if case.name in names:
            try:
                preprocess_case(case, request.recipe.data, Run(request.run).cache)
            except CaseError as error:
                bad.append(error)
    if bad and not request.skip_bad:
        raise CaseError.of_several(bad, sum(map(len, request.patients)))


def _report(run, request):
    """Writes what `mmfnet train` or `mmfnet compare` leaves in the end."""
    from keras_mmfnet.report import write_comparison, write_report
    from keras_mmfnet.run import cross_validate

    if request.methods:
        write_comparison(run, request.baseline)
    else:
        cross_validate(run, *request.compared, request.folds)
        write_report(run)


def check_jobs(
    request: Request, number: int, profile: Path | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
    """Lets Snakemake check the jobs and the profile. Nothing is started, and nothing is written.

    Args:
        request: As for `schedule`.
        number: As for `schedule`.
        profile: As for `schedule`.
        environment: As for `schedule`.

    Returns:
        The jobs, as from `plan_jobs`.

    Raises:
        ImportError: Snakemake is not installed.
        RuntimeError: Snakemake refuses the jobs or the profile.
    """
    _require_snakemake()
    with tempfile.TemporaryDirectory() as folder:
        jobs = _prepare(Path(folder), request)
        command = [*_snakemake(Path(folder), number, profile), "--dry-run", "--quiet", "all"]
        checked = subprocess.run(command, capture_output=True, text=True, env=environment)
    if checked.returncode:
        raise RuntimeError(f"Snakemake must accept the jobs. Received: {checked.stderr.strip()}")
    return jobs


def schedule(
    request: Request, number: int, profile: Path | None = None, environment: Mapping[str, str] | None = None
) -> None:
    """Starts the jobs of a request, and returns when all are done.

    The jobs, their logs and that of Snakemake are in a new folder of `RUN/jobs`. The call may be interrupted, which
    cancels the jobs, and repeated.

    Args:
        request: The `Request`.
        number: Jobs at a time. On this machine each has its share of the cores.
        profile: A profile of Snakemake, which says where jobs run and what they may use; `None` for this machine.
        environment: The environment variables of the jobs; `None` for those of this process.

    Raises:
        ImportError: Snakemake is not installed.
        RunLocked: Another process schedules jobs of this run.
        RuntimeError: Jobs failed. The message says why each did.
    """
    from keras_mmfnet.run import Run

    _require_snakemake()
    run = Run(request.run)
    jobs = run.jobs
    jobs.mkdir(parents=True, exist_ok=True)
    with _hold(run) as lock:
        folder = jobs / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}"
        folder.mkdir()
        names = _prepare(folder, request)
        try:
            _run_snakemake(_snakemake(folder, number, profile), environment, lock, folder, names, run.scheduler)
        finally:
            run.scheduler.unlink(missing_ok=True)


def _require_snakemake():
    if importlib.util.find_spec("snakemake") is None:
        raise ImportError("--jobs needs Snakemake: pip install 'keras-mmfnet[cluster]'. Received: no module snakemake")


@contextlib.contextmanager
def _hold(run):
    """Holds the lock of those who schedule jobs of a run, as `hold` does."""
    from keras_mmfnet.run import RunLocked

    path = run.jobs / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(hold(path))
        except BlockingIOError:
            other = process_of(run.scheduler)
            ends = f"{other}, which does; kill -INT ends it and its jobs" if other else f"{path}, which is locked"
            raise RunLocked(f"{run}: no other process may schedule jobs of this run. Received: {ends}") from None
        yield lock


def _run_snakemake(command, environment, lock, folder, names, scheduler):
    """Runs Snakemake, which holds the lock, and reports the jobs that are done until it ends.

    `scheduler` is the file that names it: it goes on if this process is killed.
    """
    with open(folder / "snakemake.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C is for this process, which passes it on
        )
    write(scheduler, name_process(process.pid))
    done = set()

    def look():
        for path in sorted((folder / "done").glob("*")):
            if path.name not in done:
                done.add(path.name)
                _log.info("Job %s is done", path.name)
        progress("jobs", len(done), len(names))

    try:
        while process.poll() is None:
            time.sleep(_SECONDS)
            look()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
    look()
    if process.returncode < 0:
        expected = "Snakemake must run until all jobs are done; trainings go on, and a new command waits for them"
        raise RuntimeError(f"{expected}. Received: it was ended by signal {-process.returncode}")
    if process.returncode:
        raise RuntimeError(_failures(folder, names))


def _prepare(folder, request):
    """Writes what the jobs read."""
    jobs = plan_jobs(request)
    if request.donor:  # It may be in a temporary folder of this machine.
        donor = folder / "donor.keras"
        donor.write_bytes(request.donor.read_bytes())
        request = request.model_copy(update={"donor": donor})
    write(folder / _REQUEST, request.model_dump_json(indent=2))
    command = [f"KERAS_BACKEND={configured_backend()}", sys.executable, "-m", "keras_mmfnet.cli.job", str(folder)]
    entries = {name: {"needs": needs, "command": shlex.join([*command, name])} for name, needs in jobs.items()}
    write(folder / "jobs.json", json.dumps(entries, indent=2))
    return jobs


def _snakemake(folder, number, profile):
    """The command of Snakemake."""
    threads = 1 if profile else max(1, available_cores() // number)
    where = ["--jobs", str(number)] if profile else ["--cores", str(number * threads)]
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))),
        *("--directory", str(folder), "--config", f"threads={threads}", *where),
        # No other profile is looked for.
        *("--profile", str(profile or "none"), "--workflow-profile", "none"),
        *("--keep-going", "--rerun-incomplete", "--retries", str(_RETRIES), "--scheduler", "greedy", "--nocolor"),
    ]


def _failures(folder, jobs):
    """The error message for failed jobs."""
    reasons = []
    for name in jobs:
        log, refused = folder / "logs" / f"{name}.log", folder / "refused" / name
        if refused.exists():
            reasons.append(f"{name}: {refused.read_text(encoding='utf-8')}")
        elif log.exists() and not (folder / "done" / name).exists():
            reasons.append(f"{name}: ended early; the last line of {log} is: {_last_line(log)}")
    log = folder / "snakemake.log"
    count = f"{len(reasons)} failed job{'s' * (len(reasons) != 1)}" if reasons else "a failure of Snakemake"
    reasons = reasons or [f"the last line of {log} is: {_last_line(log)}"]
    return "\n".join([f"all jobs must succeed. Received: {count}", *reasons])


def _last_line(file):
    """The last line of a file that is not empty."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")
