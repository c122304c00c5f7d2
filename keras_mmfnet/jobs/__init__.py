"""Runs the trainings of a run as jobs, which Snakemake starts on this machine or on a cluster.

A job calls what the command would call itself: `preprocess_case`, `Run.start`, `train_donor`, `run_fold` or the report.
These do nothing twice, resume what was interrupted, and wait for a process that computes the same. So a job may be
killed, repeated, or started by two schedulers at once.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import logging
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import pydantic

from keras_mmfnet._backend import configured_backend
from keras_mmfnet._files import write
from keras_mmfnet._log import log_to_file, progress
from keras_mmfnet._machine import available_cores
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.recipe import Recipe

if TYPE_CHECKING:
    from keras_mmfnet.methods import Method

_log = logging.getLogger(__name__)
# How often a job is repeated that failed or whose machine was taken away.
_RETRIES = 2
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

    @classmethod
    def load(cls, folder: Path) -> "Request":
        """The request whose jobs are in a folder."""
        return cls.model_validate_json((folder / _REQUEST).read_bytes())

    @property
    def compared(self) -> "list[Method]":
        """The `Method`s."""
        from keras_mmfnet.methods import METHODS, method_of

        return [METHODS[name] for name in self.methods] or [method_of(self.recipe)]

    @property
    def on_error(self) -> Callable | None:
        """The argument of that name of `Run.start`."""
        return functools.partial(_log.warning, "Left out: %s") if self.skip_bad else None

    @property
    def start(self) -> dict:
        """The arguments of `Run.start` besides the folder, the patients and the recipe."""
        return {"groups": self.groups, "splits": self.splits, "donor": self.donor, "methods": self.compared}


def plan_jobs(request: Request) -> dict[str, list[str]]:
    """The jobs of a request that are not done yet.

    Args:
        request: The `Request`.

    Returns:
        The names of the jobs that each job needs, by its name: `patients_<block>`, `cohort_all`,
        `network_<fold>_<name>`, `method_<fold>_<name>` and `report_all`.
    """
    from keras_mmfnet.run import Run

    run = Run(request.run)
    jobs = {f"patients_{number}": [] for number in range(len(request.patients))}
    jobs["cohort_all"] = list(jobs)
    for fold in request.folds:
        for method in request.compared:
            if run.result(fold, method.name).exists():
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


def run_job(folder: Path, name: str) -> None:
    """Does a job.

    Args:
        folder: The folder that `schedule` made.
        name: The job's name.

    Raises:
        CaseError: A patient cannot be used.
        ValueError: As from `Run.start` and `run_fold`.
    """
    from keras_mmfnet.run import Run, run_fold, train_donor

    request = Request.load(folder)
    kind, _, rest = name.partition("_")
    fold, _, what = rest.partition("_")
    run = Run(request.run)
    with log_to_file(run.log_file), _refusal(folder / "refused" / name):
        _log.info("Job %s", name)
        if kind == "patients":
            _preprocess(request, request.patients[int(fold)])
        elif kind == "cohort":
            Run.start(run.folder, request.data, request.recipe, resume=True, on_error=request.on_error, **request.start)
            for number in request.folds:  # --resume resumes the folds that have a folder
                run.fold_folder(number).mkdir(exist_ok=True)
        elif kind == "network":
            # A donor's encoder may be there instead.
            if any(what in run.borrowed(method).values() for method in request.compared):
                train_donor(run, int(fold), what)
        elif kind == "method":
            [method] = (one for one in request.compared if one.name == what)
            run_fold(run, method, int(fold), wait=True)
        else:
            _report(run, request)


@contextlib.contextmanager
def _refusal(path):
    """Keeps the message of a mistake of the user's: such a job is not repeated."""
    try:
        yield
    except ValueError as error:
        path.parent.mkdir(exist_ok=True)
        write(path, str(error))
        raise


def _preprocess(request, names):
    """Preprocesses some of the patients."""
    from keras_mmfnet.data import find_cases, preprocess_case
    from keras_mmfnet.data.case import CaseError
    from keras_mmfnet.run import Run

    bad = []
    # Who else cannot be used is said by the job that divides the patients into folds.
    for case in find_cases(request.data, request.recipe.data, on_error=lambda error: None):
        if case.name in names:
            try:
                preprocess_case(case, request.recipe.data, Run(request.run).cache)
            except CaseError as error:
                bad.append(error)
    if bad and not request.skip_bad:
        raise CaseError.of_several(bad, len(names))


def _report(run, request):
    """Writes what `mmfnet train` or `mmfnet compare` leaves in the end."""
    from keras_mmfnet.report import write_comparison, write_report
    from keras_mmfnet.run import cross_validate

    if request.methods:
        write_comparison(run, request.baseline)
    else:
        cross_validate(run, *request.compared, request.folds)
        write_report(run)


def schedule(request: Request, number: int, profile: Path | None = None, dry_run: bool = False) -> dict[str, list[str]]:
    """Starts the jobs of a request, and returns when all are done.

    The jobs, their logs and that of Snakemake are in a new folder of `RUN/jobs`. The call may be interrupted and
    repeated.

    Args:
        request: The `Request`.
        number: Jobs at a time. On this machine each has its share of the cores.
        profile: A profile of Snakemake, which says where jobs run and what they may use; `None` for this machine.
        dry_run: Only let Snakemake check the jobs and the profile; nothing is written.

    Returns:
        The jobs, as from `plan_jobs`.

    Raises:
        ImportError: Snakemake is not installed.
        RunLocked: Another process schedules jobs of this run.
        RuntimeError: Jobs failed. The message says why each did.
    """
    from keras_mmfnet.run import Run, RunLocked

    if importlib.util.find_spec("snakemake") is None:
        raise ImportError("--jobs needs Snakemake: pip install 'keras-mmfnet[cluster]'. Received: no module snakemake")
    if dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            names = _prepare(Path(temporary), request)
            command = [*_snakemake(Path(temporary), number, profile), "--dry-run", "--quiet", "all"]
            checked = subprocess.run(command, capture_output=True, text=True)
        if checked.returncode:
            raise RuntimeError(f"Snakemake must accept the jobs. Received: {checked.stderr.strip()}")
        return names
    jobs = Run(request.run).jobs
    jobs.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(jobs / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        expected = "no other process may schedule jobs of this run"
        raise RunLocked(f"{request.run}: {expected}. Received: {lock.lock_file}, which is held") from None
    try:
        folder = jobs / time.strftime("%Y-%m-%d_%H-%M-%S")
        folder.mkdir()
        names = _prepare(folder, request)
        _run_snakemake(_snakemake(folder, number, profile), folder, names)
    finally:
        lock.release()
    return names


def _run_snakemake(command, folder, names):
    """Runs Snakemake, and reports the jobs that are done until it ends."""
    with open(folder / "snakemake.log", "wb") as log:
        # Ctrl-C is for this process, which passes it on.
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    done = set()
    try:
        while process.poll() is None:
            time.sleep(_SECONDS)
            for path in sorted((folder / "done").glob("*")):
                if path.name not in done:
                    done.add(path.name)
                    _log.info("Job %s is done", path.name)
            progress("jobs", len(done), len(names))
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
    if process.returncode:
        raise RuntimeError(_failures(folder, names))


@contextlib.contextmanager
def own_gpu(folder: Path) -> Iterator[str | None]:
    """Holds one of the GPUs of this machine, which no other job of the run holds; waits for one.

    Args:
        folder: The folder of the run's jobs.

    Yields:
        The GPU, as for `mmfnet train --device`; `None` if there are not several to choose from.
    """
    count = _visible_gpus()
    if count < 2:
        yield None
        return
    for number in itertools.cycle(range(count)):
        lock = filelock.FileLock(folder / f".{platform.node()}_gpu_{number}.lock", timeout=_SECONDS)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire()
            break
    try:
        yield f"gpu:{number}"
    finally:
        lock.release()


def _visible_gpus():
    """How many GPUs of NVIDIA this process may use."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in named.split(",") if name not in ("", "-1")])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return len(listed.splitlines())


def _prepare(folder, request):
    """Writes what the jobs read."""
    jobs = plan_jobs(request)
    if request.donor:  # It may be in a temporary folder of this machine.
        donor = folder / "donor.keras"
        donor.write_bytes(request.donor.read_bytes())
        request = request.model_copy(update={"donor": donor})
    (folder / _REQUEST).write_text(request.model_dump_json(indent=2))
    command = [f"KERAS_BACKEND={configured_backend()}", sys.executable, "-m", "keras_mmfnet.cli._job", str(folder)]
    entries = {name: {"needs": needs, "command": shlex.join([*command, name])} for name, needs in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps(entries, indent=2))
    return jobs


def _snakemake(folder, number, profile):
    """The command of Snakemake."""
    threads = 1 if profile else max(1, available_cores() // number)
    where = ["--profile", str(profile), "--jobs", str(number)] if profile else ["--cores", str(number * threads)]
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(Path(__file__).with_name("Snakefile"))),
        *("--directory", str(folder), "--config", f"threads={threads}", *where),
        *("--keep-going", "--rerun-incomplete", "--retries", str(_RETRIES), "--scheduler", "greedy", "--nocolor"),
    ]


def _failures(folder, jobs):
    """What is said of the jobs that failed."""
    done = {path.name for path in (folder / "done").glob("*")}
    failed = [name for name, needs in jobs.items() if name not in done and done.issuperset(needs)]
    lines = [f"{name}: {_last_words(folder, name)}" for name in failed]
    lines = lines or [f"Snakemake: see {folder / 'snakemake.log'}"]
    return f"all jobs must succeed. Received: {len(failed)} that failed\n" + "\n".join(lines)


def _last_words(folder, name):
    """Why a job failed."""
    if (refusal := folder / "refused" / name).exists():
        return refusal.read_text()
    log = folder / "logs" / f"{name}.log"
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    return f"{next((line for line in reversed(said) if line.strip()), 'no word')} (see {log})"
