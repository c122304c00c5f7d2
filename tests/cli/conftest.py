import pytest
from checks import fill
from typer.testing import CliRunner

from keras_mmfnet.cli import app, memory
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe

# Voxels of 4 mm and a few updates: the whole way, not a good network.
TINY = """data.spacing=4 patches.shape=16,16,16 network.filters=2 network.reduction=2 training.batch_size=2
training.steps_per_epoch=2 training.epochs=2 training.warmup_epochs=1 training.folds=3 training.self_transfer=false"""


@pytest.fixture(scope="session")
def tiny():
    """The options of a training of a few seconds, of MMFNet alone."""
    return [part for change in TINY.split() for part in ("--set", change)]


@pytest.fixture(scope="session")
def mmfnet():
    """Runs the command in this process; what it writes, and the exit code that is expected."""

    def call(*arguments, code=0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "keep_freed_memory", lambda: False)
            result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture
def trained(tmp_path):
    """The folder of a run with two folds, as far as segmenting needs it."""
    return write_run(tmp_path / "run")


@pytest.fixture
def regions(tmp_path):
    """Such a folder of one fold, of three regions that overlap."""
    return write_run(tmp_path / "regions", {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}, folds=1)


@pytest.fixture
def of_brainix(tmp_path):
    """Such a folder of one fold, for T1, T2 and FLAIR."""
    return write_run(tmp_path / "of_brainix", folds=1, modalities=("t1", "t2", "flair"))


def write_run(folder, structures=None, folds=2, modalities=("t1", "t2", "cet1")):
    recipe = Recipe.small().replace(
        {
            "data.modalities": modalities,
            "patches.shape": (4, 16, 16),
            "network.filters": (2, 3),
            "network.reduction": 2,
            "data.spacing": None,
            "data.structures": structures or {"tumour": None},
        }
    )
    outputs = {"structures": recipe.data.structure_names, "exclusive": recipe.data.exclusive}
    for fold in range(folds):
        model = MMFNet(recipe.data.modalities, recipe.patches.shape, recipe.network.filters, reduction=2, **outputs)
        fill(model, seed=fold)
        (folder / f"fold_{fold}").mkdir(parents=True)
        model.save(folder / f"fold_{fold}" / "mmfnet.keras")
    (folder / "recipe.json").write_text(recipe.to_json())
    return folder
