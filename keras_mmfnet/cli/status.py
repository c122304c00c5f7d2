import contextlib
import time
from typing import Annotated

import rich.console
import rich.live
import rich.text
import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import silenced
from keras_mmfnet.cli._terminal import make_table, roughly, session

_SECONDS = 5


def status(
    run: options.RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every 5 seconds, until all is done.")] = False,
):
    """Shows how far each network of a run is: what runs where, its epoch and loss, the time left, and what failed."""
    with session() as terminal:
        if not (run / "jobs").is_dir():  # until jobs have preprocessed the patients, a run has no recipe
            options.recipe_of_run(run)
        with silenced():
            from keras_mmfnet.run import Run
            from keras_mmfnet.status import jobs_state, network_states, processes_of

        def shown():
            """What to print, and whether nothing more will happen."""
            opened, parts, states = Run(run), [], []
            processes = processes_of(opened)  # read first: if they end meanwhile, their last results are still shown
            if about := jobs_state(opened):
                parts.append(rich.text.Text(about))
            if opened.recipe_file.exists() or not about:
                options.recipe_of_run(run)
                states = network_states(opened)
                parts.append(make_table(_HEADER, _lines(states), left=3))
            # A run without any network is just being started.
            return rich.console.Group(*parts), not processes and bool(states or about)

        if not watch:
            return terminal.show(shown()[0])
        terminal.bar.stop()
        with rich.live.Live(refresh_per_second=1) as live, contextlib.suppress(KeyboardInterrupt):
            while True:
                text, done = shown()
                live.update(text)
                if done:
                    return
                time.sleep(_SECONDS)


_HEADER = ("fold", "network", "state", "epoch", "val. loss", "val. DSC", "left", "last epoch", "")


def _lines(states):
    """A line of the table for each `NetworkState`."""
    for state in states:
        yield (
            str(state.fold),
            state.name,
            state.state,
            f"{state.epochs} of {state.total}",
            *("" if number is None else f"{number:.4f}" for number in (state.val_loss, state.val_dice)),
            "" if state.seconds_left is None else roughly(state.seconds_left),
            "" if state.updated is None else f"{roughly(max(0.0, time.time() - state.updated))} ago",
            state.about,
        )
