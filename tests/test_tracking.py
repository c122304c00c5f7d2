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


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")
def test_each_epoch_is_in_one_run_of_mlflow(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
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
def test_a_training_goes_on_without_mlflow(train, tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())  # which MLflow refuses
    with tracked_with("mlflow"):
        assert len(train()) == 3
    assert "fold_0/unet3d_t1: is trained without MLflow: " in caplog.text


def test_tools_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"one of tensorboard, mlflow. Received: wandb"), tracked_with("wandb"):
        pass
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'keras-mmfnet\[mlflow\]'"), tracked_with("mlflow"):
        pass
