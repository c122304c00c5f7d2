"""What a command shows while it works, and how it ends."""

import contextlib
import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import rich.box
import rich.console
import rich.markup
import rich.progress
import rich.table
import typer

from keras_mmfnet.cli._process import without_chatter

_MISTAKES = (ValueError, OSError, RuntimeError, ImportError, FloatingPointError)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOWN = ("dsc", "hd95", "assd", "sensitivity", "precision")
# With patients without tumour.
_DETECTION = ("false_positive_ml", "detection_sensitivity", "detection_specificity")


class TrainingProgress:
    """How much of the training of several networks is done, and how long the rest will take.

    Args:
        weights: By the path of each network without its ending, how long it takes relative to the others.
        steps: Updates per epoch.
        done: Those of them that are trained already.
    """

    def __init__(self, weights: Mapping[Path, float], steps: int, done: Iterable[Path] = ()):
        self.weights, self.steps, self.current = dict(weights), steps, None
        self.shares = {path: float(path in set(done)) for path in weights}
        self.worked, self.begin = 0.0, None

    def advance(self, path: Path, done: int, total: int) -> None:
        """Records that `done` of `total` updates of a network are made."""
        if path != self.current:
            if self.current:  # It may have ended early.
                self.shares[self.current] = 1.0
            # The time of the first update of all is not known.
            self.current, self.shares[path] = path, (done - (self.begin is not None)) / total
        self.begin = time.monotonic() if self.begin is None else self.begin
        self.worked += self.weights[path] * (done / total - self.shares[path])
        self.shares[path] = done / total
        self.position = f"{path.parent.name.replace('_', ' ')}, {path.name}"
        # The last whole epoch: the state after an epoch is there once the next one begins.
        self.epochs, self.epoch = total // self.steps, (done - 1) // self.steps

    @property
    def done(self) -> float:
        """Work that is done, of `total`."""
        return sum(weight * self.shares[path] for path, weight in self.weights.items())

    @property
    def total(self) -> float:
        """All the work."""
        return sum(self.weights.values())

    @property
    def left(self) -> str:
        """The time that the rest takes, such as `about 2 min left`; nothing before an update was made."""
        if not self.worked:
            return ""
        return f"{roughly((time.monotonic() - self.begin) / self.worked * (self.total - self.done))} left"


def roughly(seconds: float) -> str:
    """A time such as `about 2 min`."""
    if seconds < 60:
        return "less than a minute"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def make_table(header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> rich.table.Table:
    """A table, the first columns to the left."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold", no_wrap=not number)
    for row in rows:
        table.add_row(*map(rich.markup.escape, row))
    return table


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as `1 patient` and `2 patients`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Terminal(logging.Handler):
    """Shows the messages of the log and, on a terminal, one bar below them for the whole of the work.

    With a formatter, `setFormatter`, messages are written as it formats them.

    Args:
        quiet: Show errors only.
    """

    def __init__(self, quiet: bool = False):
        super().__init__(logging.ERROR if quiet else logging.DEBUG)
        self.quiet, self.training, self.stopped, self.begun = quiet, None, None, False
        self.console = rich.console.Console(stderr=True, highlight=False)
        columns = ("{task.description}", rich.progress.BarColumn(), "{task.fields[left]}")
        self.bar = rich.progress.Progress(*columns, console=self.console, transient=True, redirect_stdout=False)
        self.bar.disable = quiet or not self.console.is_terminal
        self.task = self.bar.add_task("", total=None, left="", visible=False)

    def follow(self, training: TrainingProgress) -> None:
        """Shows from now on how far the training of these networks is."""
        self.training, self.begun = training, True
        self._show("Training", training.done, training.total)

    def say(self, text: object, always: bool = False) -> None:
        """Prints a result, in place of the bar; if quiet only with `always`."""
        self.bar.stop()
        if always or not self.quiet:
            print(text)

    def table(self, header: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> None:
        """Prints a table in place of the bar, the first columns to the left; not if quiet."""
        self.show(make_table(header, rows, left))

    def show(self, what: rich.console.RenderableType) -> None:
        """Prints a table or another renderable in place of the bar; not if quiet."""
        self.bar.stop()
        if not self.quiet:
            console = rich.console.Console(highlight=False)
            console.width = console.width if console.is_terminal else 200
            console.print(what)

    def metrics(self, rows: Sequence[Mapping]) -> None:
        """Prints the numbers of each patient, their mean and its 95% interval; not if quiet.

        Of several structures there is a line for each structure of a patient, and means for each and for all.
        """
        from keras_mmfnet.evaluation import (
            METRICS,
            defined_metrics,
            mean_over_structures,
            rows_by_structure,
            summarise,
        )

        structures = rows_by_structure(rows)
        several = len(structures) > 1
        without = "detection_specificity" in defined_metrics(rows)
        shown = {key: METRICS[key] for key in (*_SHOWN, *(_DETECTION if without else ()))}

        def line(label, structure, texts):
            return [label, *([structure] if several else []), *texts]

        lines = [
            line(row["patient"], row["structure"], (metric.text(row.get(key)) for key, metric in shown.items()))
            for row in rows
        ]
        means = [*structures.items(), *([("all", mean_over_structures(rows))] if several else [])]
        for structure, some in means:
            summary = summarise(some)
            # One patient has no interval.
            names = (("mean", f"mean of {len(some)}"), ("low", "95% from"), ("high", "to"))
            for name, label in names if len(some) > 1 else ():
                texts = (metric.text(summary[key][name]) for key, metric in shown.items())
                lines.append(line(label, structure, texts))
            if without:
                lines.append(line("patients", structure, (str(summary[key]["patients"]) for key in shown)))
        header = ["patient", *["structure"] * several, *(metric.title for metric in shown.values())]
        self.table(header, lines, 1 + several)

    def stop(self, number: int, frame: object = None) -> None:
        """Takes a signal: ends the work here or, if Python swallows that in a callback, at the next message."""
        self.stopped = number
        for one in _SIGNALS:
            signal.signal(one, signal.SIG_DFL)  # A second time is at once.
        raise KeyboardInterrupt

    def emit(self, record: logging.LogRecord) -> None:
        if self.stopped and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        if record.name == "keras_mmfnet.progress":
            self._advance(record.what, record.done, record.total)
        elif record.levelno >= logging.ERROR or record.name.partition(".")[0] in ("keras_mmfnet", "py"):
            self.console.print(self._line(record), markup=False, soft_wrap=True)

    def _line(self, record):
        if self.formatter:
            return self.format(record)
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        now = self.training if hasattr(record, "epoch") and not self.console.is_terminal else None
        left = now.left if now else ""
        return f"{level}{record.getMessage().strip()}{left and f', {left}'}"

    def _advance(self, what, done, total):
        about, now = f"{what}: {done} of {total}", self.training
        if not now:
            return self._show(about, done, total)
        if what in now.weights:
            now.advance(what, done, total)
            about = f"{now.position}: epoch {min(now.epoch + 1, now.epochs)} of {now.epochs}"
        self._show(about, now.done, now.total, now.left)

    def _show(self, text, done, total, left=""):
        text = rich.markup.escape(text[:1].upper() + text[1:])
        self.bar.update(self.task, description=text, completed=done, total=total, left=left, visible=True)


@contextlib.contextmanager
def session(quiet: bool = False, resume_with: str | None = None, start_with: str | None = None) -> Iterator[Terminal]:
    """Runs a command: messages to the terminal, one line for a mistake of the user's and for Ctrl-C or SIGTERM.

    Args:
        quiet: Show errors only.
        resume_with: The command that resumes this one once it has begun to train; `None`: the same command.
        start_with: The command that resumes it before; `None`: the same command.
    """
    terminal, root = Terminal(quiet), logging.getLogger()
    progress, levels = logging.getLogger("keras_mmfnet.progress"), (root.level, logging.NOTSET)

    def unraisable(info):
        if info.exc_type is not KeyboardInterrupt:
            hook(info)

    signals = {number: signal.signal(number, terminal.stop) for number in _SIGNALS}
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    form, warnings.formatwarning = warnings.formatwarning, lambda message, *_: str(message)
    logging.captureWarnings(True)
    root.addHandler(terminal)
    root.setLevel(min(root.level, logging.INFO) if root.level else logging.INFO)
    progress.setLevel(logging.DEBUG)
    try:
        with without_chatter(), terminal.bar:
            yield terminal
    except KeyboardInterrupt:
        now, where = terminal.training, ""
        if now and now.current:
            where = f": {now.position}, after epoch {now.epoch} of {now.epochs}"
        other = resume_with if terminal.begun else start_with
        how = f"resume with: {other}" if other else "run the same command again to resume"
        terminal.console.print(f"stopped{where}; {how}", soft_wrap=True)
        raise typer.Exit(128 + (terminal.stopped or signal.SIGINT)) from None
    except (BrokenPipeError, typer.Exit):  # `mmfnet check DATA | head`, which Typer takes care of; an end as planned
        raise
    except _MISTAKES as error:
        terminal.console.print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    finally:
        progress.setLevel(levels[1])
        root.setLevel(levels[0])
        root.removeHandler(terminal)
        logging.captureWarnings(False)
        warnings.formatwarning, sys.unraisablehook = form, hook
        for number, handler in signals.items():
            signal.signal(number, handler)
