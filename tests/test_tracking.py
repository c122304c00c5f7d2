import os

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

from keras_mmfnet import training
from keras_mmfnet.methods import METHODS
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.tracking import tracked_with
from keras_mmfnet.training import train_method

RECIPE = Recipe().replace(
    {
        "data.modalities": ("t1",),
        "patches.shape": (8, 8, 8),
        "network.filters": (2,),
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 3,
    }
)


@pytest.fixture
def train(make_case, tmp_path, monkeypatch):
    """Trains a network in a fold, with an interruption after the second epoch; its validation losses."""
    cases = [make_case(f"patient {seed}", seed=seed, shape=(10, 12, 12)) for seed in range(4)]
    save = training._SaveState.on_epoch_end

    def interrupted(self, epoch, logs=None):
        save(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    def run():
        arguments = METHODS["unet3d_t1"], cases[:3], cases[3:], RECIPE, tmp_path / "run" / "fold_0"
        with monkeypatch.context() as patched:
            patched.setattr(training._SaveState, "on_epoch_end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_method(*arguments)
        train_method(*arguments)
        history = training.read_history(tmp_path / "run" / "fold_0" / "unet3d_t1_history.csv")
        return [row["val_loss"] for row in history]

    return run


def test_each_epoch_is_in_tensorboard(train, tmp_path):
    with tracked_with("tensorboard"):
        losses = train()
    shown = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "run" / "fold_0" / "tensorboard"))
    shown.Reload()
    found = {
        run: {event.step: float(make_ndarray(event.tensor_proto)) for event in shown.Tensors(run, "epoch_loss")}
        for run in shown.Runs()
    }
    assert sorted(found) == ["unet3d_t1/all/train", "unet3d_t1/all/validation"]
    # The interruption came before the second epoch was sent.
    assert found["unet3d_t1/all/validation"] == pytest.approx({0: losses[0], 2: losses[2]})


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a store in a folder."""
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    return pytest.importorskip("mlflow")


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_each_epoch_is_in_one_run_of_mlflow(train, mlflow):
    with tracked_with("mlflow"):
        losses = train()
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("run").experiment_id])
    assert run.info.run_name == "fold_0/unet3d_t1/all"
    assert run.info.status == "FINISHED"
    assert run.data.params["training.epochs"] == "3"
    found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "val_loss")}
    assert found == pytest.approx({0: losses[0], 2: losses[2]})


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_training_goes_on_without_mlflow(train, mlflow, monkeypatch, caplog):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")  # it then refuses the folder
    with tracked_with("mlflow"):
        assert len(train()) == 3
    assert "fold_0/unet3d_t1: is trained without mlflow: " in caplog.text


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_training_goes_on_when_mlflow_goes_away(train, mlflow, monkeypatch, caplog):
    from mlflow.keras import MlflowCallback

    def fail(what):
        def failing(*args, **kwargs):
            raise mlflow.exceptions.MlflowException(what)

        return failing

    monkeypatch.setattr(MlflowCallback, "on_epoch_end", fail("no epoch"))
    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", fail("no end"))
    before = dict(os.environ)
    with tracked_with("mlflow"):
        assert len(train()) == 3
    assert dict(os.environ) == before
    for what, count in (("no epoch", 2), ("no end", 2)):  # before and after the interruption
        assert caplog.text.count(f"fold_0/unet3d_t1: is trained without mlflow: {what}") == count


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_an_experiment_that_cannot_be_made(train, mlflow, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")
    with tracked_with("mlflow"):
        assert len(train()) == 3
    assert "is trained without mlflow: " in caplog.text
    assert "NoneType" not in caplog.text


@pytest.mark.once
def test_mlflow_without_its_database(mlflow, monkeypatch):
    def lacking(*args):
        raise ImportError("No module named 'alembic'")

    monkeypatch.setattr(mlflow, "MlflowClient", lacking)
    expected = r"a server in MLFLOW_TRACKING_URI, or all of MLflow.* Received: No module named 'alembic'"
    with pytest.raises(ImportError, match=expected), tracked_with("mlflow"):
        pass


def test_a_folder_that_tensorboard_cannot_write_to(train, tmp_path, caplog):
    (tmp_path / "run" / "fold_0").mkdir(parents=True)
    (tmp_path / "run" / "fold_0" / "tensorboard").write_text("a file")
    with tracked_with("tensorboard"):
        assert len(train()) == 3
    assert caplog.text.count("fold_0/unet3d_t1: is trained without tensorboard: ") == 2  # before and after Ctrl-C


def test_tools_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"one of tensorboard, mlflow. Received: wandb"), tracked_with("wandb"):
        pass
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mmfnet\[mlflow\]'"), tracked_with("mlflow"):
        pass
