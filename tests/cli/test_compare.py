import json

import numpy as np
import pytest

from keras_mmfnet import run as runner
from keras_mmfnet.cli import compare as command
from keras_mmfnet.cli._options import choose_recipe
from keras_mmfnet.methods import METHODS
from keras_mmfnet.recipe import Recipe

MINE = """
from keras_mmfnet.methods import Method, register_method
from keras_mmfnet.models import UNet3D


def build(recipe, dtype, encoders=None):
    return UNet3D(recipe.data.modalities[0], recipe.patches.shape, (3,), dtype=dtype)


register_method(Method("mine", "My U-net", build, {"data.modalities": ("t2",)}))
"""


@pytest.fixture
def registry():
    """Forgets the methods that a test registers."""
    known = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(known)


@pytest.mark.slow
def test_from_patients_to_a_table(mmfnet, tiny, tiny_cohort, tmp_path, registry, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    out, names = tmp_path / "out", ["mmfnet_t1_t2", "unet3d_t1", "multi_encoder", "mine"]
    arguments = ["compare", tiny_cohort, "--out", out, *tiny, "--fold", 0, "--methods", ",".join(names)]
    done = mmfnet(*arguments, "--import", tmp_path / "mine.py", "--track", "tensorboard")
    assert "| My U-net |" in done.stdout
    assert f"Report: {out / 'report.html'}" in done.stdout
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (out / "fold_0").glob("*.json")}
    assert set(results) == set(names)
    fold = json.loads((out / "cohort.json").read_text(encoding="utf-8"))["folds"][0]
    for name, result in results.items():
        assert result["method"] == name
        assert [row["patient"] for row in result["patients"]] == fold["test"]
        for row in result["patients"]:
            assert {"patient", "dsc", "ap", "dice_loss", "hd95", "assd", "seconds"} <= set(row)
            assert row["seconds"] > 0
        assert result["updates"] == 4
        assert len(result["history"]) == 2
        assert result["training_seconds"] == pytest.approx(sum(row["seconds"] for row in result["history"]))
        assert result["parameters"] > 0
        for share in result["shares"].values():
            np.testing.assert_allclose(np.add(share["t1"], share["t2"]), np.ones(len(fold["test"])), rtol=1e-5)
    assert [name for name, result in results.items() if result["shares"]] == ["mmfnet_t1_t2"]
    # The single-modality networks are trained once, for the row of their own and for the one that borrows them.
    assert (out / "fold_0" / "unet3d_t2.keras").exists()
    followed = sorted(path.name for path in (out / "fold_0" / "tensorboard").iterdir())
    assert followed == sorted([*names, "unet3d_t2"])
    assert "| **Multi-encoder multi-modality network** | 0.7005 |" in (out / "table.md").read_text(encoding="utf-8")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert "<td>My U-net</td>" in page
    for name in ("table.csv", "methods.png", "run.log"):
        assert (out / name).stat().st_size > 100

    # What is finished is not done again, even where only its numbers are left.
    for path in (out / "fold_0").glob("*.keras"):
        path.unlink()
    monkeypatch.setattr(runner, "train_method", lambda *_: pytest.fail("a finished method was trained again"))
    assert mmfnet(*arguments, "--quiet").stdout == f"{out / 'table.md'}\n"
    assert "another recipe" in mmfnet(*arguments, "--set", "training.seed=1", code=1).stderr


def test_every_update_is_made_and_none_stops_early():
    changes = ["training.epochs=7", "training.pretrain_learning_rate=0.002"]
    chosen = choose_recipe(None, False, changes, default=command.default_recipe())
    recipe = command.recipe_of(chosen, ["unet3d_t1"], False)
    assert (recipe.training.epochs, recipe.training.patience, recipe.training.schedule) == (7, 7, "cosine")
    rates = recipe.training.pretrain_learning_rate, recipe.training.warmup_learning_rate, recipe.training.learning_rate
    assert rates == (0.002, 1e-3, 1e-3)
    assert command.recipe_of(Recipe(), list(METHODS), True) == Recipe()


def test_list_of_the_methods(mmfnet, registry, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    lines = mmfnet("compare", "--methods", "list", "--import", tmp_path / "mine.py").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert lines[-1].split(maxsplit=1) == ["mine", "My U-net"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "unet3d_t1,unet4d"],
            "--methods, --baseline: names from --methods list are expected. Received: unet4d",
        ),
        (["--baseline", "unet4d"], "--baseline: names from --methods list are expected. Received: unet4d"),
        (["--import", "nowhere.py"], "--import: a Python file is expected. Received: nowhere.py"),
        (
            ["--set", "training.folds=3", "--fold", "3"],
            "--fold: numbers from 0 to 2, or all, are expected. Received: 3",
        ),
    ],
)
def test_bad_arguments(mmfnet, tiny_cohort, tmp_path, arguments, message):
    assert message in mmfnet("compare", tiny_cohort, "--out", tmp_path / "out", *arguments, code=1).stderr
    assert not (tmp_path / "out").exists()
    assert "DATA and --out are expected" in mmfnet("compare", tiny_cohort, code=1).stderr
