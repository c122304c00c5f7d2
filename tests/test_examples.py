"""The examples: each a screenful over the functions that the command calls."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet import run as runner
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run
from keras_mmfnet.synthetic import make_synthetic_cohort

ROOT = Path(__file__).parents[1]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture(scope="module")
def trained(tiny_cohort, tmp_path_factory):
    """What train_npc.py leaves, of a network of a few weights."""
    folder, small = tmp_path_factory.mktemp("example") / "run", Recipe.small
    tiny = {
        "data.spacing": 4.0,
        "patches.shape": (16, 16, 16),
        "network.filters": (2,),
        "network.reduction": 2,
        "training.batch_size": 2,
        "training.steps_per_epoch": 2,
        "training.epochs": 2,
        "training.warmup_epochs": 1,
        "training.self_transfer": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "small", lambda: small().replace(tiny))
        patch.syspath_prepend(ROOT / "examples")
        importlib.import_module("train_npc").main([str(tiny_cohort), str(folder)])
    return folder


def test_train_segment_explain(example, trained, tiny_cohort, tmp_path, capsys):
    run = Run(trained)
    assert run.trained_folds() == [0]
    assert run.report_file.stat().st_size > 1000
    patient = run.folds[0].test[0]
    example("segment_patient").main(trained, tiny_cohort / patient, tmp_path / "mask.nii.gz")
    assert re.search(r"mask.nii.gz: \d+ voxels of tumour, \d+\.\d ml", capsys.readouterr().out)
    # The folder is enough to segment a patient as the run did.
    masks = [sitk.ReadImage(str(path)) for path in (tmp_path / "mask.nii.gz", run.masks(0, "mmfnet", patient)[None])]
    np.testing.assert_array_equal(*map(sitk.GetArrayFromImage, masks))
    example("explain_patient").main(trained, tiny_cohort / patient, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 1000
    assert re.search(r"fusion1 t1 \d+% t2 \d+% cet1 \d+%", capsys.readouterr().out)


def test_the_demonstration_is_of_synthetic_patients(example, tmp_path, monkeypatch):
    module, asked = example("train_npc"), []

    def start(folder, data, recipe):
        asked.append((data, recipe))
        raise ValueError("this is enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "make_synthetic_cohort", lambda data: make_synthetic_cohort(data, patients=1))
    monkeypatch.setattr(runner.Run, "start", start)
    with pytest.raises(ValueError, match="this is enough"):
        module.main([])
    [(data, recipe)] = asked
    assert data.parent.parent == Path("runs")
    assert len(list(data.iterdir())) == 1
    assert recipe.training.epochs == 4


def test_a_layer_in_a_classifier_of_ones_own_learns(example, capsys):
    example("reuse_layers").main()
    before, after = map(float, re.findall(r"(\d\.\d\d) (?:before|after)", capsys.readouterr().out))
    assert after > max(before, 0.9)


def test_each_example_is_a_screenful():
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 70, path
