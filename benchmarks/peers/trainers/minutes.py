"""A trainer of nnU-Net that trains for a time instead of a number of epochs; found by `nnUNet_extTrainer`."""

import os
import time

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class _OfTime:
    """nnU-Net's polynomial learning rate, over the time that is spent instead of over the epochs."""

    def __init__(self, optimizer, rate, share):
        self.optimizer, self.rate, self.share = optimizer, rate, share

    def step(self, epoch=None):
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * (1 - min(1.0, self.share())) ** 0.9


class MinutesTrainer(nnUNetTrainer):
    """nnU-Net's trainer with short epochs, until the minutes of the environment variable PEER_MINUTES are spent.

    The number of updates of each epoch is in `updates.txt`.
    """

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch, self.save_every = 10, 2, 1

    def configure_optimizers(self):
        optimizer, _ = super().configure_optimizers()
        return optimizer, _OfTime(optimizer, self.initial_lr, self.share_spent)

    def share_spent(self):
        """The share of the time that is spent, also before the training was interrupted."""
        starts, ends = (self.logger.get_value(f"epoch_{which}_timestamps", None) for which in ("start", "end"))
        # The epoch that is not over yet ends now.
        ends = [*ends, time.time()][: len(starts)]
        seconds = sum(end - start for start, end in zip(starts, ends, strict=True))
        return seconds / 60 / float(os.environ["PEER_MINUTES"])

    def run_training(self):
        self.on_train_start()
        while self.share_spent() < 1:
            self.on_epoch_start()
            self.on_train_epoch_start()
            outputs = []
            while len(outputs) < self.num_iterations_per_epoch and self.share_spent() < 1:
                outputs.append(self.train_step(next(self.dataloader_train)))
            self.on_train_epoch_end(outputs)
            with torch.no_grad():
                self.on_validation_epoch_start()
                self.on_validation_epoch_end(
                    [self.validation_step(next(self.dataloader_val)) for _ in range(self.num_val_iterations_per_epoch)]
                )
            with open(os.path.join(self.output_folder, "updates.txt"), "a") as file:
                file.write(f"{len(outputs)}\n")
            self.on_epoch_end()
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities=False):
        """The test patients are predicted by nnU-Net's own command."""


class ZeroedTrainer(MinutesTrainer):
    """The same, with each channel of a training patch set to zero with a probability of 0.3, except one."""

    def train_step(self, batch):
        data = batch["data"]
        dropped = torch.rand(data.shape[:2]) < 0.3
        kept = torch.randint(data.shape[1], data.shape[:1])
        dropped[torch.arange(len(data)), kept] &= ~dropped.all(1)
        return super().train_step(batch | {"data": data.masked_fill(dropped[..., None, None, None], 0.0)})
