"""nnU-Net's data set and results, with its commands replaced by what they would write."""

import importlib
import itertools
import json
import shutil
import sys
import types

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture
def nnunet(benchmarks, monkeypatch):
    monkeypatch.syspath_prepend(benchmarks / "peers")
    import nnunet

    yield nnunet
    del sys.modules["nnunet"]


def test_a_fold_is_converted_trained_and_evaluated(nnunet, tiny_cohort, tmp_path, monkeypatch):
    recipe = Recipe.small().replace({"data.modalities": ("t1", "t2"), "training.folds": 3})
    run = Run.start(tmp_path / "run", tiny_cohort, recipe)
    fold, called = run.folds[0], []

    def call(space, command, *arguments):
        called.append(command)
        if command == "plan_and_preprocess":
            space.preprocessed.mkdir(parents=True)
            (space.preprocessed / "nnUNetPlans.json").write_text("{}")
        elif command == "train":
            network = space.trained("planned")
            network.mkdir(parents=True)
            (network / "updates.txt").write_text("10\n3\n")
            names = ("train_losses", "val_losses", "epoch_start_timestamps", "epoch_end_timestamps")
            torch.save(
                {"logging": {name: [n, n + 2] for n, name in enumerate(names)}}, network / "checkpoint_final.pth"
            )
        else:
            out = shutil.copytree(space.raw / "labelsTs", arguments[arguments.index("-o") + 1])
            for path in sorted(out.iterdir()):
                mask = sitk.GetArrayFromImage(sitk.ReadImage(str(path))).astype(np.float32)
                np.savez(out / path.name.replace(".nii.gz", ".npz"), probabilities=np.stack([1 - mask, mask]))

    monkeypatch.setattr(nnunet.Workspace, "call", call)
    monkeypatch.setattr(nnunet, "parameters_of", lambda plans, run: 1_000_000)
    space = nnunet.Workspace(tmp_path / "nnunet", 0, minutes=1.0)
    found = nnunet.train(run, space, "planned")
    nnunet.train(run, space, "planned")
    assert called == ["plan_and_preprocess", "train", "predict"]

    assert {row["patient"] for row in found["patients"]} == set(fold.test)
    assert all(row["dsc"] == 1 for row in found["patients"])
    assert (found["updates"], found["training_seconds"]) == (13, 2)
    assert all(row["ap"] == 1 for row in found["patients"])
    assert run.results()["nnunet_planned"][0]["patients"][0]["dsc"] == 1
    for name in fold.test:
        own = sitk.ReadImage(str(tiny_cohort / name / "mask.nii.gz"))
        mask = run.read_masks(0, "nnunet_planned", name)["tumour"]
        np.testing.assert_array_equal(sitk.GetArrayFromImage(mask) > 0, sitk.GetArrayFromImage(own) > 0)
    about = json.loads((space.raw / "dataset.json").read_text())
    assert (about["labels"], about["numTraining"]) == (
        {"background": 0, "tumour": 1},
        len(fold.train) + len(fold.validation),
    )
    [splits] = json.loads((space.preprocessed / "splits_final.json").read_text())
    assert splits == {"train": list(fold.train), "val": list(fold.validation)}
    images = {path.name for path in (space.raw / "imagesTr").iterdir()}
    assert images == {f"{name}_{n:04d}.nii.gz" for name in (*fold.train, *fold.validation) for n in range(2)}
    first = sitk.ReadImage(str(space.raw / "imagesTr" / f"{fold.train[0]}_0001.nii.gz"))
    t1 = sitk.ReadImage(str(tiny_cohort / fold.train[0] / "t1.nii.gz"))
    assert (first.GetSize(), first.GetOrigin()) == (t1.GetSize(), t1.GetOrigin())


def test_features_are_scaled_to_the_parameters_of_mmfnet(nnunet, tiny_cohort, tmp_path, monkeypatch):
    recipe = Recipe.small().replace({"data.modalities": ("t1", "t2"), "training.folds": 3})
    run = Run.start(tmp_path / "run", tiny_cohort, recipe)
    space = nnunet.Workspace(tmp_path / "nnunet", 0)
    space.preprocessed.mkdir(parents=True)
    (space.preprocessed / "splits_final.json").write_text("[]")
    architecture = {"arch_kwargs": {"features_per_stage": [32, 64, 128, 256, 320, 320]}}
    plans = {"plans_name": "nnUNetPlans", "configurations": {"3d_fullres": {"architecture": architecture}}}
    (space.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))

    def parameters_of(made, run):
        features = made["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"]
        return sum(27 * a * b for a, b in itertools.pairwise(features))

    monkeypatch.setattr(nnunet, "parameters_of", parameters_of)
    assert nnunet.plan(run, space, "planned") == parameters_of(plans, run) > 5e6
    found = nnunet.plan(run, space, "scaled")
    assert found == pytest.approx(nnunet.build_mmfnet(recipe, "float32").count_params(), rel=0.1)
    assert (
        json.loads((space.preprocessed / "nnUNetPlans_scaled.json").read_text())["plans_name"] == "nnUNetPlans_scaled"
    )
    assert json.loads((space.preprocessed / "nnUNetPlans.json").read_text()) == plans


def test_channels_are_zeroed(benchmarks, monkeypatch):
    """Of nnU-Net's trainer only what is called is there."""

    class Trainer:
        def train_step(self, batch):
            return batch

    module = types.ModuleType("nnUNetTrainer")
    module.nnUNetTrainer = Trainer
    monkeypatch.setitem(sys.modules, "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", module)
    monkeypatch.syspath_prepend(benchmarks / "peers" / "trainers")
    monkeypatch.delitem(sys.modules, "minutes", raising=False)
    trainer = object.__new__(importlib.import_module("minutes").ZeroedTrainer)
    monkeypatch.delitem(sys.modules, "minutes")
    torch.manual_seed(0)
    batch = trainer.train_step({"data": torch.ones(4000, 2, 1, 1, 1), "target": 1})
    assert batch["target"] == 1
    left = batch["data"][:, :, 0, 0, 0]
    assert left.any(1).all()
    # Both are drawn in 9% of the patches; one of them is then kept.
    torch.testing.assert_close(left.mean(0), torch.full((2,), 1 - 0.3 + 0.09 / 2), atol=0.03, rtol=0)
