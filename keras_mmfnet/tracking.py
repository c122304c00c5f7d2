"""Follows trainings in TensorBoard or MLflow, by the callbacks of Keras and of MLflow.

Each stage of a network's training is a run of its own there: the epochs with frozen encoders, and all others.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from keras_mmfnet._files import write
from keras_mmfnet.recipe import Recipe

if TYPE_CHECKING:
    import keras

_log = logging.getLogger(__name__)
TOOLS = ("tensorboard", "mlflow")
_tool = None


@contextlib.contextmanager
def tracked_with(tool: str | None) -> Iterator[None]:
    """Sends the losses and metrics of each epoch to a tool, for all trainings in the block.

    Args:
        tool: `"tensorboard"`: files in `tensorboard/<network>/<stage>` beside the networks; `"mlflow"`: the server or
            database of the environment variable `MLFLOW_TRACKING_URI`, with the recipe as parameters, in the experiment
            of `MLFLOW_EXPERIMENT_ID` or `MLFLOW_EXPERIMENT_NAME` or else one named as the run folder; `None`: nothing
            is sent.

    Raises:
        ValueError: There is no such tool.
        ImportError: It is not installed.
    """
    global _tool
    if tool not in (None, *TOOLS):
        raise ValueError(f"`tool` must be one of {', '.join(TOOLS)}. Received: {tool}")
    if tool and importlib.util.find_spec(tool) is None:
        raise ImportError(f"tracking with {tool} needs pip install 'keras-mmfnet[{tool}]'. Received: no module {tool}")
    before, _tool = _tool, tool
    try:
        yield
    finally:
        _tool = before


@contextlib.contextmanager
def trackers(network: Path, stage: Path, recipe: Recipe) -> "Iterator[list[keras.callbacks.Callback]]":
    """Yields the callbacks that follow one stage of a network's training, while it is trained in the block.

    Args:
        network: The file that the network will be saved as, in the folder of its fold.
        stage: The folder of the stage, where what is needed to resume is kept.
        recipe: The `Recipe`.

    Yields:
        A list of callbacks; empty outside of `tracked_with`, or if MLflow cannot be used, of which a warning tells.
    """
    network = network.absolute()
    with contextlib.ExitStack() as stack:
        callbacks = []
        if _tool == "tensorboard":
            import keras

            folder = network.parent / "tensorboard" / network.stem / stage.name
            callbacks = [keras.callbacks.TensorBoard(folder, write_graph=False)]
        elif _tool == "mlflow":
            import mlflow.keras
            from mlflow.exceptions import MlflowException

            try:
                run = _mlflow_run(network, stage)
                stack.enter_context(mlflow.start_run(run.info.run_id, nested=True))
                parts = recipe.model_dump(exclude={"reasons"})
                mlflow.log_params({f"{part}.{name}": value for part in parts for name, value in parts[part].items()})
                callbacks = [mlflow.keras.MlflowCallback()]
            except MlflowException as error:
                _log.warning("%s: is trained without MLflow: %s", network.with_suffix(""), error)
        yield callbacks


def _mlflow_run(network, stage):
    """The MLflow run of a stage: the one that was begun, if it is still there, or a new one."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client, kept = mlflow.MlflowClient(), stage / "mlflow_run"
    if kept.exists():
        try:
            return client.get_run(kept.read_text(encoding="utf-8"))
        except MlflowException as error:
            _log.warning("%s: goes on in a new run of MLflow: %s", network.with_suffix(""), error)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if experiment is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", network.parent.parent.name)
        with contextlib.suppress(MlflowException):  # it exists
            client.create_experiment(name)
        experiment = client.get_experiment_by_name(name).experiment_id
    run = client.create_run(experiment, run_name=f"{network.parent.name}/{network.stem}/{stage.name}")
    write(kept, run.info.run_id)
    return run
