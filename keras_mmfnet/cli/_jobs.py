"""Commands that hand their trainings to Snakemake as jobs."""

import dataclasses
from pathlib import Path

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._terminal import Terminal, counted

# Patients are preprocessed by this many jobs at most.
_BLOCKS = 100


@dataclasses.dataclass
class Jobs:
    """The options `--jobs`, `--profile` and `--dry-run`, and those that each job has."""

    number: int
    profile: Path | None
    dry_run: bool
    modules: list[Path] | None
    device: str | None
    devices: str | None
    sync_batch_norm: bool

    def run(self, terminal: Terminal, out: Path, data, recipe, folds, resume, **request) -> bool:
        """Does the jobs; `False` if they were only shown. What can be refused is refused before."""
        from keras_mmfnet.jobs import Request, schedule
        from keras_mmfnet.run import Run

        request = Request(
            run=out.absolute(),
            data=Path(data).absolute(),
            recipe=recipe,
            folds=folds,
            modules=[path.absolute() for path in self.modules or ()],
            device=self.device,
            devices=self.devices,
            sync_batch_norm=self.sync_batch_norm,
            **request,
        )
        run = Run(request.run)
        cases = Run.check_start(run.folder, data, recipe, resume, request.on_error, **request.start)
        if not run.recipe_file.exists():
            names = [case.name for case in cases]
            size = -(-len(names) // _BLOCKS)
            blocks = tuple(tuple(names[start : start + size]) for start in range(0, len(names), size))
            request = request.model_copy(update={"patients": blocks})
        try:
            jobs = schedule(request, self.number, self.profile, self.dry_run)
        finally:
            terminal.begun = run.recipe_file.exists()
        if self.dry_run:
            terminal.table(["job", "after"], [[name, ", ".join(needs)] for name, needs in jobs.items()], left=2)
            terminal.say(f"{counted(len(jobs), 'job')}; nothing was started")
        return not self.dry_run


def choose_jobs(
    number: int | None, profile: Path | None, dry_run: bool, modules, device, devices, sync_batch_norm
) -> Jobs | None:
    """The jobs that are wanted; `None` without `--jobs`."""
    if number is None:
        if profile or dry_run:
            option = "--profile" if profile else "--dry-run"
            raise ValueError(f"{option}: a number of jobs, --jobs N, is expected with it. Received: no --jobs")
        return None
    if profile is not None:
        options.require_folder(profile, "--profile")
    return Jobs(number, profile and profile.absolute(), dry_run, modules, device, devices, sync_batch_norm)
