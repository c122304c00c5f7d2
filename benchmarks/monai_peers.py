"""MONAI's networks on the stacked modalities, trained with this package's patches, loss, optimiser and updates.

For `mmfnet compare --import`; needs `pip install monai`. Each has about as many parameters as MMFNet (1.6 million).
"""

import logging
import math
import os
import time

import keras
import numpy as np
import torch
from monai.networks.nets import BasicUNet, DynUNet, SegResNet

from keras_mmfnet._log import progress
from keras_mmfnet.data.patches import patch_dataset
from keras_mmfnet.losses import make_loss
from keras_mmfnet.methods import METHODS, Method, register_method

_log = logging.getLogger("keras_mmfnet.monai_peers")


def _dyn_unet(channels, structures):
    strides = [1, 2, 2, 2, 2]
    return DynUNet(
        3,
        channels,
        structures,
        [3] * 5,
        strides,
        strides[1:],
        filters=[16, 32, 48, 64, 96],
        norm_name="INSTANCE",
        res_block=False,
    )


def _seg_res_net(channels, structures):
    # The default of 8 groups does not divide 9 filters.
    norm = ("GROUP", {"num_groups": 3})
    return SegResNet(3, init_filters=9, in_channels=channels, out_channels=structures, norm=norm)


def _basic_unet(channels, structures):
    return BasicUNet(3, channels, structures, features=(16, 16, 32, 64, 132, 16))


class Probability(torch.nn.Module):
    """Converts logits to probabilities, as the heads of this package do; see `exclusive_softmax`."""

    def __init__(self, network, exclusive):
        super().__init__()
        self.network, self.exclusive = network, exclusive

    def forward(self, x):
        logits = self.network(x)
        if not self.exclusive or logits.shape[1] == 1:
            return torch.sigmoid(logits)
        return torch.softmax(torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1), dim=1)[:, 1:]


def stacked(images):
    """A batch `{modality: (batch, depth, height, width, 1)}` as a torch tensor `(batch, modalities, ...)`."""
    return torch.from_numpy(np.concatenate([np.asarray(image) for image in images.values()], axis=-1)).movedim(-1, 1)


def dice_loss(prediction, truth):
    """The package's `DiceLoss` in torch, of `(batch, structures, depth, height, width)`."""
    axes = (0, *range(2, prediction.ndim))
    intersection = (prediction * truth).sum(axes)
    return (1 - (2 * intersection + 1) / (prediction.sum(axes) + truth.sum(axes) + 1)).mean()


def loss_of(recipe):
    """The recipe's loss; other losses than Dice are Keras', which takes torch's tensors on its backend only."""
    name = recipe.training.loss
    if name == "dice":
        return dice_loss
    if keras.backend.backend() != "torch":
        raise ValueError(
            f"MONAI's networks are trained with another `training.loss` than dice on KERAS_BACKEND=torch only. "
            f"Received: {name} on {keras.backend.backend()}"
        )
    loss = make_loss(name, recipe.data.exclusive)
    return lambda prediction, truth: loss(truth.movedim(1, -1), prediction.movedim(1, -1))


def train_peer(method, training, validation, recipe, directory):
    """Trains a network as `keras_mmfnet.training.train_method` does; resumes after the last complete epoch.

    Returns:
        `(predict, parameters, history)`: a callable for `predict_volume`, the number of weights, and a dict of metrics
        per epoch.
    """
    path = directory / f"{method.name}.pt"
    torch.manual_seed(recipe.training.seed)
    network = method.build(len(recipe.data.modalities), len(recipe.data.structures))
    model, loss_between = Probability(network, recipe.data.exclusive), loss_of(recipe)
    optimiser = torch.optim.Adam(model.parameters(), recipe.training.pretrain_learning_rate, eps=1e-7)
    state = torch.load(path) if path.exists() else {"history": [], "best": None}
    if state["history"]:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    history, best, steps = state["history"], state["best"], recipe.training.steps_per_epoch
    batches = iter(
        patch_dataset(
            training,
            recipe.patches,
            modalities=recipe.data.modalities,
            first_batch=len(history) * steps,
            batch_size=recipe.training.batch_size,
            seed=recipe.training.seed,
        )
    )
    held_back = patch_dataset(
        validation,
        recipe.patches,
        modalities=recipe.data.modalities,
        training=False,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
    )
    for epoch in range(len(history), recipe.training.epochs):
        start, losses = time.perf_counter(), []
        model.train()
        for step in range(steps):
            if recipe.training.schedule == "cosine":
                done = (epoch * steps + step) / (recipe.training.epochs * steps)
                optimiser.param_groups[0]["lr"] = (
                    recipe.training.pretrain_learning_rate * (1 + math.cos(math.pi * done)) / 2
                )
            images, truth = next(batches)
            optimiser.zero_grad()
            loss = loss_between(model(stacked(images)), stacked({"mask": truth}).float())
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            progress(directory / method.name, epoch * steps + step + 1, recipe.training.epochs * steps)
        model.eval()
        with torch.no_grad():
            # Batches are weighted by their number of patches, as in Keras.
            pairs = [
                (len(t), loss_between(model(stacked(x)), stacked({"mask": t}).float()).item()) for x, t in held_back
            ]
        val_loss = sum(n * value for n, value in pairs) / sum(n for n, _ in pairs)
        row = {"epoch": epoch, "loss": float(np.mean(losses)), "val_loss": val_loss}
        history.append({**row, "seconds": time.perf_counter() - start})
        if val_loss == min(row["val_loss"] for row in history):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        line, extra = "Epoch %d of %d: loss %.4f, validation loss %.4f", {"epoch": epoch + 1}
        _log.info(line, epoch + 1, recipe.training.epochs, row["loss"], val_loss, extra=extra)
        kept = {"history": history, "best": best, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save(kept, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    model.load_state_dict(best)
    model.eval()

    def predict(images):
        with torch.no_grad():
            return model(stacked(images)).movedim(1, -1).numpy()

    return predict, sum(weight.numel() for weight in model.parameters()), history


for _method in (
    Method("monai_dynunet", "MONAI DynUNet", _dyn_unet, train=train_peer, library="torch"),
    Method("monai_segresnet", "MONAI SegResNet", _seg_res_net, train=train_peer, library="torch"),
    Method("monai_basicunet", "MONAI BasicUNet", _basic_unet, train=train_peer, library="torch"),
):
    if _method.name not in METHODS:
        register_method(_method)
