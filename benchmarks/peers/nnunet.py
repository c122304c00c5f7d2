"""Trains nnU-Net v2 on folds of a run by its own commands, for given minutes, and evaluates the test patients.

    pip install -e ".[tensorflow,peers]"
    python benchmarks/peers/nnunet.py --run RUN --folds 0,1 --minutes 40 --settings planned,scaled

Each fold is a data set of its own for nnU-Net, so that it plans without the test patients. `planned` is as it plans
itself; `scaled` has the same plan with fewer features, about as many parameters as MMFNet; and `zeroed` is `scaled`
with 30% of the channels of the training patches set to zero, for patients who lack sequences. The learning rate falls
over the time as nnU-Net's falls over its epochs; 10 updates are an epoch. It may be stopped at any moment, and a second
call resumes after the last epoch. The results lie beside the run's own, as `fold_<number>/nnunet_<setting>.json`, and
are part of its tables and report.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from handover import rows_of, write_mask, write_patients, write_result

from keras_mmfnet._files import read_json, write
from keras_mmfnet.methods import build_mmfnet
from keras_mmfnet.run import Run

# The title of each setting, and the names of its plans and trainer.
SETTINGS = {
    "planned": ("nnU-Net", "nnUNetPlans", "MinutesTrainer"),
    "scaled": ("nnU-Net, scaled", "nnUNetPlans_scaled", "MinutesTrainer"),
    "zeroed": ("nnU-Net, scaled, channels zeroed", "nnUNetPlans_scaled", "ZeroedTrainer"),
}
_CONFIGURATION = "3d_fullres"


@dataclasses.dataclass(frozen=True)
class Workspace:
    """nnU-Net's folders for a fold, and its commands in them.

    Args:
        folder: Folder of all folds.
        fold: Number of the fold.
        minutes: How long a training takes; of no use for predictions.
    """

    folder: Path
    fold: int
    minutes: float = 0.0

    @property
    def name(self):
        return f"Dataset{100 + self.fold}_fold{self.fold}"

    @property
    def raw(self):
        return self.folder / "raw" / self.name

    @property
    def preprocessed(self):
        return self.folder / "preprocessed" / self.name

    def trained(self, setting):
        """Folder of the network of a setting."""
        _, plans, trainer = SETTINGS[setting]
        return self.folder / "results" / self.name / f"{trainer}__{plans}__{_CONFIGURATION}" / "fold_0"

    def call(self, command, *arguments):
        """Runs a command of nnU-Net; its output goes to a file."""
        folders = {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        options = {"nnUNet_extTrainer": str(Path(__file__).with_name("trainers")), "nnUNet_n_proc_DA": "1"}
        environment = os.environ | folders | options | {"PEER_MINUTES": str(self.minutes)}
        program = Path(sys.executable).with_name(f"nnUNetv2_{command}")
        with open(self.folder / f"{self.name}_{command}.log", "a") as log:
            subprocess.run([program, *map(str, arguments)], env=environment, stdout=log, stderr=log, check=True)


def convert(run, space):
    """Writes the patients of a fold as nnU-Net's data set."""
    recipe, fold = run.recipe.data, run.folds[space.fold]
    if (space.raw / "dataset.json").exists():
        return
    for part, names in (("Tr", (*fold.train, *fold.validation)), ("Ts", fold.test)):
        write_patients(run, names, space.raw / f"images{part}", space.raw / f"labels{part}")
    names = list(recipe.structures)
    values = range(1, len(names) + 1)
    about = {
        "channel_names": dict(enumerate(recipe.modalities)),
        "labels": {"background": 0}
        | (
            dict(zip(names, values, strict=True))
            if recipe.exclusive
            else {name: list(range(value, len(names) + 1)) for name, value in zip(names, values, strict=True)}
        ),
        "numTraining": len(fold.train) + len(fold.validation),
        "file_ending": ".nii.gz",
        **({} if recipe.exclusive else {"regions_class_order": list(values)}),
    }
    write(space.raw / "dataset.json", json.dumps(about, indent=1))


def plan(run, space, setting):
    """Lets nnU-Net plan and preprocess; returns the number of weights."""
    if not (space.preprocessed / "splits_final.json").exists():
        number = 100 + space.fold
        space.call("plan_and_preprocess", "-d", number, "-c", _CONFIGURATION, "-npfp", 2, "-np", 2)
        fold = run.folds[space.fold]
        splits = [{"train": list(fold.train), "val": list(fold.validation)}]
        write(space.preprocessed / "splits_final.json", json.dumps(splits))
    (_, all_features, _), (_, plans, _) = SETTINGS["planned"], SETTINGS[setting]
    made = read_json(space.preprocessed / f"{all_features}.json")
    if plans != all_features:
        # With as many weights as the recipe's MMFNet; they grow with the square of the features.
        wanted = build_mmfnet(run.recipe, "float32").count_params()
        architecture = made["configurations"][_CONFIGURATION]["architecture"]["arch_kwargs"]
        features, share = architecture["features_per_stage"], (wanted / parameters_of(made, run)) ** 0.5
        architecture["features_per_stage"] = [max(4, round(share * number)) for number in features]
        made["plans_name"] = plans
        write(space.preprocessed / f"{plans}.json", json.dumps(made, indent=1))
    return parameters_of(made, run)


def parameters_of(plans, run):
    """The number of weights of a plan's network."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture, recipe = plans["configurations"][_CONFIGURATION]["architecture"], run.recipe.data
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        len(recipe.modalities),
        len(recipe.structures) + recipe.exclusive,
        deep_supervision=False,
    )
    return sum(weight.numel() for weight in network.parameters())


def segment(space, setting, images, out, *options):
    """Lets nnU-Net segment the images of a folder with the network of a setting, by its command."""
    common = ("-c", _CONFIGURATION, "-f", 0, "-npp", 1, "-nps", 1, *_common(setting))
    space.call("predict", "-i", images, "-o", out, "-d", 100 + space.fold, *common, *options)


def predict(run, space, setting, images, out):
    """Predicts patients with the network of a setting.

    Args:
        run: The run.
        space: The fold's `Workspace`.
        setting: A key of `SETTINGS`.
        images: Folder of the patients' images, as from `write_images`.
        out: Folder for what nnU-Net writes, which is emptied.

    Returns:
        `{patient: (label values, probabilities of the structures, seconds)}`.
    """
    begun, found = time.monotonic(), {}
    shutil.rmtree(out, ignore_errors=True)
    segment(space, setting, images, out, "--save_probabilities")
    masks = sorted(out.glob("*.nii.gz"))
    seconds = (time.monotonic() - begun) / len(masks)
    for path in masks:
        name = path.name.removesuffix(".nii.gz")
        with np.load(out / f"{name}.npz") as file:
            # Without the background's.
            probabilities = file["probabilities"][int(run.recipe.data.exclusive) :]
        found[name] = sitk.GetArrayFromImage(sitk.ReadImage(str(path))), probabilities, seconds
    return found


def train(run, space, setting):
    """Trains and tests nnU-Net on a fold; what is done is not done again."""
    method = f"nnunet_{setting}"
    if run.result(space.fold, method).exists():
        return read_json(run.result(space.fold, method))
    convert(run, space)
    parameters = plan(run, space, setting)
    network = space.trained(setting)
    if not (network / "checkpoint_final.pth").exists():
        resume = ["--c"] * (network / "checkpoint_latest.pth").exists()
        space.call("train", 100 + space.fold, _CONFIGURATION, 0, *_common(setting), *resume)
    rows = []
    out = space.folder / "predicted" / space.name / setting
    for name, (values, probabilities, seconds) in predict(run, space, setting, space.raw / "imagesTs", out).items():
        rows += rows_of(run, name, values, probabilities, seconds)
        write_mask(run, space.fold, method, name, values)
    updates = sum(map(int, (network / "updates.txt").read_text().split()))
    title = SETTINGS[setting][0]
    return write_result(run, space.fold, method, title, rows, parameters, updates, history(network), "nnunetv2")


def _common(setting):
    _, plans, trainer = SETTINGS[setting]
    return "-p", plans, "-tr", trainer, "-device", "cpu"


def history(network):
    """The losses and seconds of each epoch, from the checkpoint."""
    import torch

    logged = torch.load(network / "checkpoint_final.pth", map_location="cpu", weights_only=False)["logging"]
    keys = ("train_losses", "val_losses", "epoch_start_timestamps", "epoch_end_timestamps")
    return [
        {"epoch": epoch, "loss": float(loss), "val_loss": float(validation), "seconds": end - start}
        for epoch, (loss, validation, start, end) in enumerate(zip(*(logged[key] for key in keys), strict=True))
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, whose folds and results are used")
    parser.add_argument("--minutes", type=float, required=True, help="of each training")
    parser.add_argument("--folds", default="0", metavar="N,..", help="folds (%(default)s)")
    parser.add_argument("--settings", default=",".join(SETTINGS), metavar="NAMES", help="some of %(default)s")
    parsed = parser.parse_args()
    run = Run(parsed.run)
    for fold in map(int, parsed.folds.split(",")):
        space = Workspace((parsed.run / "nnunet").absolute(), fold, parsed.minutes)
        space.folder.mkdir(exist_ok=True)
        for setting in parsed.settings.split(","):
            rows = train(run, space, setting)["patients"]
            print(f"{setting}, fold {fold}: mean DSC {np.nanmean([row['dsc'] for row in rows]):.3f}", flush=True)


if __name__ == "__main__":
    main()
