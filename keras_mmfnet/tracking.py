"""Follows trainings in TensorBoard or MLflow, by the callbacks of Keras and of MLflow.

Each stage of a network's training is a run of its own there: the epochs with frozen encoders, and all others. If a tool
fails, the training goes on without it.
"""

import contextlib
import functools
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
# Of MLflow, unless the user has set them: it would otherwise try for minutes to reach a server, and print addresses.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


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
        ImportError: It is not installed, or MLflow lacks what its database needs.
    """
    global _tool
    if tool not in (None, *TOOLS):
        raise ValueError(f"`tool` must be one of {', '.join(TOOLS)}. Received: {tool}")
    if tool and importlib.util.find_spec(tool) is None:
        raise ImportError(f"tracking with {tool} needs pip install 'keras-mmfnet[{tool}]'. Received: no module {tool}")
    added = {name: value for name, value in _SETTINGS.items() if tool == "mlflow" and name not in os.environ}
    os.environ.update(added)
    before, _tool = _tool, tool
    try:
        if tool == "mlflow":
            _require_store()
        yield
    finally:
        _tool = before
        for name in added:
            os.environ.pop(name, None)


def _require_store():
    """Refuses MLflow without the packages of its database."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        with contextlib.suppress(MlflowException):  # `trackers` warns of it
            mlflow.MlflowClient()
    except ImportError as error:
        raise ImportError(
            "tracking with mlflow needs a server in MLFLOW_TRACKING_URI, or all of MLflow: pip install "
            f"'keras-mmfnet[mlflow]'. Received: {error}"
        ) from error


@contextlib.contextmanager
def trackers(network: Path, stage: Path, recipe: Recipe) -> "Iterator[list[keras.callbacks.Callback]]":
    """Yields the callbacks that follow one stage of a network's training, while it is trained in the block.

    Args:
        network: The file that the network will be saved as, in the folder of its fold.
        stage: The folder of the stage, where what is needed to resume is kept.
        recipe: The `Recipe`.

    Yields:
        A list of callbacks; empty outside of `tracked_with`, or if the tool cannot be used, with a warning.
    """
    network = network.absolute()

    @contextlib.contextmanager
    def safely():
        try:
            yield
        except Exception as error:  # whatever fails in a tool
            _log.warning("%s: is trained without %s: %s", network.with_suffix(""), _tool, error)

    callbacks, begun = [], False
    with safely():
        if _tool == "tensorboard":
            import keras

            folder = network.parent / "tensorboard" / network.stem / stage.name
            callbacks = [keras.callbacks.TensorBoard(folder, write_graph=False)]
        elif _tool == "mlflow":
            import mlflow.keras

            run = _mlflow_run(network, stage)
            begun = mlflow.start_run(run.info.run_id, nested=True)
            parts = recipe.model_dump(exclude={"reasons"})
            mlflow.log_params({f"{part}.{name}": value for part in parts for name, value in parts[part].items()})
            callbacks = [mlflow.keras.MlflowCallback()]
    status = "FAILED"
    try:
        yield [_guarded(callback, safely) for callback in callbacks]
        status = "FINISHED"
    finally:
        if begun:
            with safely():
                mlflow.end_run(status)


def _guarded(callback, safely):
    """A callback that does nothing more once one of its methods has failed."""
    failed = False

    def guard(method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            nonlocal failed
            if not failed:
                with safely():
                    return method(*args, **kwargs)
                failed = True
            return None

        return call

    for name in dir(callback):
        if name.startswith("on_"):
            setattr(callback, name, guard(getattr(callback, name)))
    callback.set_model = guard(callback.set_model)
    return callback


def _mlflow_run(network, stage):
    """The MLflow run of a stage: the one that was begun, if it is still there, or a new one."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client, kept = mlflow.MlflowClient(), stage / "mlflow_run"
    if kept.exists():
        try:
            return client.get_run(kept.read_text(encoding="utf-8"))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            _log.warning("%s: goes on in a new run of MLflow: %s", network.with_suffix(""), error)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if experiment is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", network.parent.parent.name)
        experiment = _experiment_id(client, name)
    run = client.create_run(experiment, run_name=f"{network.parent.name}/{network.stem}/{stage.name}")
    write(kept, run.info.run_id)
    return run


def _experiment_id(client, name):
    """The experiment of MLflow that has a name; a new one if there is none."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return client.create_experiment(name)
        except MlflowException:
            # Another process may have created it.
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return found.experiment_id
