"""How far the networks of a run are, from its files alone: the run may be computed by other processes and machines."""

import dataclasses

from keras_mmfnet._files import read_json
from keras_mmfnet._machine import process_of
from keras_mmfnet.methods import METHODS, method_of
from keras_mmfnet.run import Run
from keras_mmfnet.training import last_epoch_end, read_epochs

STATES = ("done", "running", "stopped", "waiting", "failed")


@dataclasses.dataclass(frozen=True)
class NetworkState:
    """How far a network of a fold is.

    Args:
        fold: Number of the fold.
        name: Name of the network.
        state: `"done"`: trained and, unless it only lends its encoder, evaluated; `"running"`; `"waiting"`: not begun,
            or begun and waiting for networks to borrow from; `"stopped"`: begun, but its process has ended; or
            `"failed"`: its job failed.
        epochs: Epochs that are done.
        total: Epochs of the recipe; fewer are trained if the training stops early.
        val_loss: Validation loss of the last epoch, `None` before the first one.
        val_dice: Soft DSC of the validation patches at the last epoch, `None` before the first one.
        updated: When the last epoch ended, in seconds since 1970 by the clock of the disk; `None` if it is not training
            or before the first epoch.
        seconds_left: Seconds that the epochs left will take if they take as long as the last one; `None` if it is not
            running or before the first epoch.
        about: The process that computes it, the networks it waits for, or why it failed.
    """

    fold: int
    name: str
    state: str
    epochs: int
    total: int
    val_loss: float | None = None
    val_dice: float | None = None
    updated: float | None = None
    seconds_left: float | None = None
    about: str = ""


def network_states(run: Run) -> list[NetworkState]:
    """How far the networks of a run are that were begun, or that begun ones need, or that have a job.

    Args:
        run: The `Run`.

    Returns:
        A `NetworkState` for each, by fold; the networks from which others borrow come first.

    Raises:
        ValueError: A file of the run is damaged.
    """
    _, jobs, failed = _last_jobs(run)
    states = []
    for fold in run.begun_folds:
        folder = run.fold_folder(fold)
        begun = [path.name[1 : -len(".lock")] for path in sorted(folder.glob(".*.lock"))]
        planned = [name.split("_", 2)[2] for name in jobs if name.startswith(f"method_{fold}_")]
        known = (name for name in dict.fromkeys([*begun, *planned]) if name in METHODS or name == "mmfnet")
        methods = [METHODS.get(name) or method_of(run.recipe) for name in known]
        needed = {method.name: dict.fromkeys(run.borrowed(method).values()) for method in methods}
        borrowed = dict.fromkeys(name for names in needed.values() for name in names)
        for name in dict.fromkeys([*borrowed, *begun, *planned]):
            reason = failed.get(f"method_{fold}_{name}") or failed.get(f"network_{fold}_{name}")
            missing = [one for one in needed.get(name, ()) if not run.network(fold, one).exists()]
            states.append(_state(run, fold, name, name in begun, name in borrowed, missing, reason))
    return states


def jobs_state(run: Run) -> str:
    """How far the jobs are that were started last.

    Args:
        run: The `Run`.

    Returns:
        A line, and one for each job that failed and is not a network's; empty if no jobs were started.

    Raises:
        ValueError: A file of the jobs is damaged.
    """
    folder, jobs, failed = _last_jobs(run)
    methods = [name.split("_", 2)[1:] for name in jobs if name.startswith("method")]
    # What they had to do was done later without jobs.
    later = methods and all(run.result(int(fold), name).exists() for fold, name in methods)
    if not jobs or (failed and later and not processes_of(run)):
        return ""
    done = sum((folder / "done" / name).exists() for name in jobs)
    scheduler = process_of(run.scheduler) or "the command that scheduled them has ended"
    others = [name for name in failed if not name.startswith(("network", "method"))]
    lines = [
        f"{done} of {len(jobs)} jobs are done: {scheduler}",
        *(f"{name} failed: {failed[name]}" for name in others),
    ]
    return "\n".join(lines)


def processes_of(run: Run) -> list[str]:
    """The processes that schedule the jobs of a run or compute its networks.

    Args:
        run: The `Run`.

    Returns:
        What each is and where, such as `"process 12 on node7 since 2026-01-01 00:00:00"`.
    """
    files = [run.scheduler, *sorted(run.folder.glob("fold_*/.*.owner"))]
    return [text for text in map(process_of, files) if text]


def _state(run, fold, name, begun, borrowed, missing, reason):
    """The state of a network; one that others borrow from need not be tested."""
    network, rows = run.network(fold, name), read_epochs(run.network(fold, name))
    holder = process_of(run.owner(fold, name))
    if run.result(fold, name).exists() or (borrowed and network.exists() and not holder):
        state = "done"
    elif holder:
        state = "waiting" if missing and not rows and not network.exists() else "running"
    elif reason:
        state = "failed"
    else:
        state = "stopped" if begun or rows or network.exists() else "waiting"
    total, last = run.recipe.training.epochs, rows[-1] if rows else {}
    training = state == "running" and last and not network.exists()
    waits = f"waits for {', '.join(missing)}" if missing else ""
    return NetworkState(
        fold=fold,
        name=name,
        state=state,
        epochs=len(rows),
        total=total,
        val_loss=last.get("val_loss"),
        val_dice=last.get("val_dice_score"),
        updated=last_epoch_end(network) if training else None,
        seconds_left=(total - len(rows)) * last["seconds"] if training else None,
        about={"running": holder, "waiting": waits, "failed": reason}.get(state, ""),
    )


def _last_jobs(run):
    """The jobs that were started last: their folder, their names, and why those failed that did."""
    folder = max((path.parent for path in run.jobs.glob("*/jobs.json")), default=None)
    if not folder:
        return None, [], {}
    refused = (folder / "refused").glob("[!.]*")
    return folder, list(read_json(folder / "jobs.json")), {path.name: path.read_text("utf-8") for path in refused}
