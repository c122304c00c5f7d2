"""Trains MONAI's networks on folds of a run with MONAI's usual recipe, for given minutes, and evaluates the patients.

    pip install -e ".[tensorflow,peers]"
    python benchmarks/peers/monai_networks.py --run RUN --folds 0,1 --minutes 40 --networks segresnet,dynunet,swinunetr

The networks have the sizes of MONAI's tutorials. Patches are of the run's shape, half of them centred on a structure;
the loss is Dice with cross-entropy (of regions, Dice), the optimiser AdamW from 0.0001 to 0 along a cosine over the
time. It learns from the training patients of the fold and keeps the last weights. It may be
stopped at any moment, and a second call resumes after the last epoch of 20 updates. The results lie beside the run's
own, as `fold_<number>/monai_<network>.json`, and are part of its tables and report.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from handover import rows_of, write_mask, write_patients, write_result
from monai.data import CacheDataset, DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss, DiceLoss
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Invertd,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

from keras_mmfnet._files import read_json
from keras_mmfnet.run import Run

UPDATES = 20


def segresnet(channels, outputs, spacing):
    """The network of MONAI's tutorial on brain tumours, and the multiples of voxels that it takes, along x, y and z."""
    sizes = {"blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "init_filters": 16, "dropout_prob": 0.2}
    return SegResNet(3, in_channels=channels, out_channels=outputs, **sizes), (8, 8, 8)


def dynunet(channels, outputs, spacing):
    """DynUNet with kernels and strides by the spacing, as in MONAI's tutorial on it, down to a sixteenth."""
    kernels, strides = [], [[1, 1, 1]]
    for _ in range(4):
        fine = spacing / spacing.min() <= 2
        kernels.append([3 if one else 1 for one in fine])
        strides.append([2 if one else 1 for one in fine])
        spacing = spacing * strides[-1]
    kernels.append([3, 3, 3])
    network = DynUNet(3, channels, outputs, kernels, strides, strides[1:], norm_name="instance", res_block=True)
    return network, tuple(np.prod(strides, axis=0))


def swinunetr(channels, outputs, spacing):
    """The network of MONAI's tutorial."""
    return SwinUNETR(in_channels=channels, out_channels=outputs, feature_size=48), (32, 32, 32)


NETWORKS = {"segresnet": segresnet, "dynunet": dynunet, "swinunetr": swinunetr}
TITLES = {"segresnet": "MONAI SegResNet", "dynunet": "MONAI DynUNet", "swinunetr": "MONAI SwinUNETR"}


def read_transforms(recipe):
    """Reads a patient as `(channel, x, y, z)`, with the run's spacing and normalised where it is not 0."""
    both = ("image", "label")
    steps = [
        LoadImaged(both, reader="NibabelReader"),
        EnsureChannelFirstd(both),
        Orientationd(both, "RAS", labels=None),
    ]
    if recipe.data.spacing is not None:
        # Slices stay as they are, as in the run.
        steps.append(Spacingd(both, (recipe.data.spacing, recipe.data.spacing, -1), mode=("bilinear", "nearest")))
    return [*steps, NormalizeIntensityd("image", nonzero=True, channel_wise=True)]


def random_transforms(shape, patches):
    """Patches of a patient, changed at random."""
    both = ("image", "label")
    return [
        SpatialPadd(both, shape),
        RandCropByPosNegLabeld(both, "label", shape, pos=1, neg=1, num_samples=patches),
        *(RandFlipd(both, 0.5, axis) for axis in range(3)),
        RandScaleIntensityd("image", 0.1, 1.0),
        RandShiftIntensityd("image", 0.1, 1.0),
    ]


def loss_of(logits, labels, exclusive):
    """The loss of MONAI's tutorials: Dice with cross-entropy of exclusive structures, Dice of each region.

    Args:
        logits: Of the network, with a channel for the background if the structures are exclusive.
        labels: Label values `(batch, 1, x, y, z)`, as `write_patients` writes them.
        exclusive: Whether the structures exclude each other.
    """
    if exclusive:
        return DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)(logits, labels)
    regions = torch.cat([labels >= number for number in range(1, logits.shape[1] + 1)], dim=1)
    return DiceLoss(sigmoid=True, squared_pred=True)(logits, regions.float())


def train(run, fold, name, minutes):
    """Trains and tests a network on a fold; what is done is not done again."""
    method, recipe = f"monai_{name}", run.recipe
    if run.result(fold, method).exists():
        return read_json(run.result(fold, method))
    exclusive, structures = recipe.data.exclusive, len(recipe.data.structures)
    folder = run.folder / "monai"
    path = folder / f"fold_{fold}_{name}.pt"
    state = torch.load(path) if path.exists() else {}
    history = state.get("history", [])
    # Other patches after each interruption.
    set_determinism(recipe.training.seed + len(history))
    spacing = np.median([patient.grid.spacing for patient in run.patients(run.folds[fold].train)], axis=0)
    network, multiples = NETWORKS[name](len(recipe.data.modalities), structures + exclusive, spacing)
    # The run's patches in the order x, y, z, in the multiples that the network takes.
    shape = [math.ceil(size / n) * n for size, n in zip(recipe.patches.shape[::-1], multiples, strict=True)]
    files = patient_files(run, folder, run.folds[fold].train)
    steps = read_transforms(recipe) + random_transforms(shape, recipe.training.batch_size)
    loader = DataLoader(CacheDataset(files, Compose(steps), progress=False), batch_size=1, shuffle=True)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4, weight_decay=1e-5)
    if state:
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
    batches = endless(loader)
    network.train()
    spent = sum(row["seconds"] for row in history)
    while spent < 60 * minutes:
        begun, losses = time.monotonic(), []
        while len(losses) < UPDATES and (share := (spent + time.monotonic() - begun) / (60 * minutes)) < 1:
            optimiser.param_groups[0]["lr"] = 1e-4 * (1 + math.cos(math.pi * share)) / 2
            batch = next(batches)
            optimiser.zero_grad()
            loss = loss_of(network(batch["image"].as_tensor()), batch["label"].as_tensor(), exclusive)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        seconds = time.monotonic() - begun
        spent += seconds
        row = {"epoch": len(history), "loss": float(np.mean(losses)), "updates": len(losses), "seconds": seconds}
        history.append(row)
        print(f"{method}, fold {fold}: {spent / 60:.1f} of {minutes:g} minutes, loss {row['loss']:.3f}", flush=True)
        kept = {"history": history, "network": network.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save(kept, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    rows = []
    for patient in run.folds[fold].test:
        begun = time.monotonic()
        values, probabilities = predict(network, patient_files(run, folder, [patient]), recipe, shape)
        rows += rows_of(run, patient, values, probabilities, time.monotonic() - begun)
        write_mask(run, fold, method, patient, values)
    parameters, updates = sum(one.numel() for one in network.parameters()), sum(row["updates"] for row in history)
    return write_result(run, fold, method, TITLES[name], rows, parameters, updates, history, "monai")


def patient_files(run, folder, names):
    """The files of patients, which are written if they are missing."""
    write_patients(
        run, [n for n in names if not (folder / f"labels/{n}.nii.gz").exists()], folder / "images", folder / "labels"
    )
    channels = range(len(run.recipe.data.modalities))
    return [
        {
            "image": [str(folder / f"images/{name}_{channel:04d}.nii.gz") for channel in channels],
            "label": str(folder / f"labels/{name}.nii.gz"),
        }
        for name in names
    ]


def endless(loader):
    """The batches of a loader, again and again."""
    while True:
        yield from loader


def predict(network, files, recipe, shape):
    """Label values and probabilities of a patient on the grid of the files, `(z, y, x)` and `(structures, z, y, x)`."""
    read = Compose(read_transforms(recipe))
    [patient] = CacheDataset(files, read, progress=False)
    network.eval()
    with torch.inference_mode():
        logits = sliding_window_inference(
            patient["image"][None], shape, 1, network, overlap=0.5, mode="gaussian", padding_mode="constant"
        )
        found = torch.softmax(logits, 1) if recipe.data.exclusive else torch.sigmoid(logits)
    back = Invertd("found", read, orig_keys="image", nearest_interp=False, to_tensor=True)
    found = back({**patient, "found": found[0]})["found"].numpy().transpose(0, 3, 2, 1)
    if recipe.data.exclusive:
        return found.argmax(0).astype(np.uint8), found[1:]
    # A region that does not lie in the one before is cut off by it.
    inside = np.cumprod(found > 0.5, axis=0)
    return inside.sum(0).astype(np.uint8), found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, whose folds and results are used")
    parser.add_argument("--minutes", type=float, required=True, help="of each training")
    parser.add_argument("--folds", default="0", metavar="N,..", help="folds (%(default)s)")
    parser.add_argument("--networks", default=",".join(NETWORKS), metavar="NAMES", help="some of %(default)s")
    parsed = parser.parse_args()
    run = Run(parsed.run)
    for fold in map(int, parsed.folds.split(",")):
        for name in parsed.networks.split(","):
            rows = train(run, fold, name, parsed.minutes)["patients"]
            print(f"{TITLES[name]}, fold {fold}: mean DSC {np.nanmean([row['dsc'] for row in rows]):.3f}", flush=True)


if __name__ == "__main__":
    main()
