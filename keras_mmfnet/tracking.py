"""Follows trainings in TensorBoard or MLflow, by the callbacks of Keras and of MLflow.

Each stage of a network's training is a run of its own there: the epochs with frozen encoders, and all others.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import keras

from keras_mmfnet._files import write
from keras_mmfnet.recipe import Recipe

TOOLS = ("tensorboard", "mlflow")
_tool = None


@contextlib.contextmanager
def tracked_with(tool: str | None) -> Iterator[None]:
    """Sends the losses and metrics of each epoch to a tool, for all trainings in the block.

    Args:
        tool: `"tensorboard"`: files in `tensorboard/<network>/<stage>` beside the networks; `"mlflow"`: the server or
            database of the environment variable `MLFLOW_TRACKING_URI`, in the experiment `MLFLOW_EXPERIMENT_NAME` or
            else that of the run folder's name, with the recipe as parameters; `None`: nothing is sent.

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
def trackers(network: Path, stage: Path, recipe: Recipe) -> Iterator[list[keras.callbacks.Callback]]:
    """Yields the callbacks that follow one stage of a network's training, while it is trained in the block.

    Args:
        network: The file that the network will be saved as.
        stage: The folder of the stage, where what is needed to resume is kept.
        recipe: The `Recipe`.

    Yields:
        A list of callbacks; empty outside of `tracked_with`.
    """
    folder = network.absolute().parent
    if _tool == "tensorboard":
        yield [keras.callbacks.TensorBoard(folder / "tensorboard" / network.stem / stage.name, write_graph=False)]
    elif _tool == "mlflow":
        import mlflow.keras

        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            mlflow.set_experiment(folder.parent.name)
        kept = stage / "mlflow_run"
        known = kept.read_text(encoding="utf-8") if kept.exists() else None
        with mlflow.start_run(known, run_name=f"{folder.name}/{network.stem}/{stage.name}", nested=True) as run:
            write(kept, run.info.run_id)
            parts = recipe.model_dump(exclude={"reasons"})
            mlflow.log_params({f"{part}.{name}": value for part in parts for name, value in parts[part].items()})
            yield [mlflow.keras.MlflowCallback()]
    else:
        yield []
