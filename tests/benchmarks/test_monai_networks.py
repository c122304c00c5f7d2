"""MONAI's networks on folds of a run: a network that knows the tumour, and one that learns it."""

import copy
import itertools
import sys

import numpy as np
import pytest
import torch

from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run


@pytest.fixture
def networks(benchmarks, monkeypatch):
    pytest.importorskip("monai")
    monkeypatch.syspath_prepend(benchmarks / "peers")
    import monai_networks

    yield monai_networks
    del sys.modules["monai_networks"], sys.modules["handover"]


class Bright(torch.nn.Module):
    """Tumour is where t1 is bright; the weight is where it begins. The first channel is `sign` times the second."""

    def __init__(self, begin, sign=-1):
        super().__init__()
        self.begin, self.sign = torch.nn.Parameter(torch.tensor(begin)), sign

    def forward(self, x):
        tumour = 40 * (x[:, :1] - self.begin)
        return torch.cat([self.sign * tumour, tumour], dim=1)


@pytest.mark.parametrize("spacing", [None, 2.0])
def test_masks_lie_where_the_network_sees_the_tumour(networks, tiny_cohort, tmp_path, monkeypatch, spacing):
    small = {"data.modalities": ("t1", "t2"), "data.spacing": spacing, "training.folds": 3}
    run = Run.start(tmp_path / "run", tiny_cohort, Recipe.small().replace(small))
    monkeypatch.setitem(networks.NETWORKS, "bright", lambda *_: (Bright(1.3), (8, 8, 8)))
    monkeypatch.setitem(networks.TITLES, "bright", "Bright")
    found = networks.train(run, 0, "bright", minutes=0)
    assert (found["updates"], found["parameters"]) == (0, 1)
    assert {row["patient"] for row in found["patients"]} == set(run.folds[0].test)
    assert min(row["dsc"] for row in found["patients"]) > (0.99 if spacing is None else 0.85)
    kept = run.results()["monai_bright"][0]["patients"]
    assert [row["dsc"] for row in kept] == [row["dsc"] for row in found["patients"]]


def test_regions(networks, tiny_cohort, tmp_path, monkeypatch):
    regions = {"data.structures": {"whole": (1,), "core": (1,)}, "data.modalities": ("t1", "t2"), "training.folds": 3}
    run = Run.start(tmp_path / "run", tiny_cohort, Recipe.small().replace({**regions, "data.spacing": None}))
    assert not run.recipe.data.exclusive
    monkeypatch.setitem(networks.NETWORKS, "bright", lambda *_: (Bright(1.3, sign=1), (8, 8, 8)))
    monkeypatch.setitem(networks.TITLES, "bright", "Bright")
    rows = networks.train(run, 0, "bright", minutes=0)["patients"]
    assert {row["structure"] for row in rows} == {"whole", "core"}
    assert min(row["dsc"] for row in rows) > 0.99

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(1, 2, 4, 5, 6)), rng.integers(3, size=(1, 1, 4, 5, 6))
    given, truth = 1 / (1 + np.exp(-logits)), np.concatenate([labels >= 1, labels >= 2], axis=1)
    over = (2, 3, 4)
    dice = 2 * (given * truth).sum(over) / ((given**2).sum(over) + truth.sum(over))
    found = networks.loss_of(torch.from_numpy(logits), torch.from_numpy(labels), exclusive=False)
    assert float(found) == pytest.approx(1 - dice.mean(), abs=1e-5)


def test_a_network_learns_for_the_minutes_and_is_resumed(networks, tiny_cohort, tmp_path, monkeypatch):
    small = {"data.modalities": ("t1", "t2"), "data.spacing": None, "training.folds": 3, "patches.shape": (16, 16, 16)}
    run = Run.start(tmp_path / "run", tiny_cohort, Recipe.small().replace(small))
    monkeypatch.setitem(networks.NETWORKS, "bright", lambda *_: (Bright(0.0), (8, 8, 8)))
    monkeypatch.setattr(networks, "UPDATES", 2)
    clock = itertools.count(0.0)
    # A second passes at each look at the clock, and the training is stopped in the middle.
    monkeypatch.setattr(networks.time, "monotonic", lambda: next(clock))
    kept, save = [], torch.save

    def stop_after_three(state, path):
        save(state, path)
        kept.append(copy.deepcopy(state))
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(networks.torch, "save", stop_after_three)
    monkeypatch.setitem(networks.TITLES, "bright", "Bright")
    with pytest.raises(KeyboardInterrupt):
        networks.train(run, 0, "bright", minutes=0.5)
    networks.train(run, 0, "bright", minutes=0.5)
    history = kept[-1]["history"]
    assert len(history) > 5
    assert [row["epoch"] for row in history] == list(range(len(history)))
    assert history[:2] == kept[1]["history"]
    assert sum(row["seconds"] for row in history) == pytest.approx(30, abs=4)
    # Two updates after the last that was saved.
    saved, resumed, last = (kept[number]["network"]["begin"] for number in (1, 3, -1))
    assert last > resumed > saved > 0


def test_the_networks_take_their_patches(networks):
    for make in networks.NETWORKS.values():
        network, multiples = make(2, 2, np.array([1.0, 1.0, 5.0]))
        shape = [2 * n for n in multiples]
        with torch.inference_mode():
            assert network.eval()(torch.zeros(1, 2, *shape)).shape == (1, 2, *shape)
    # Slices that are far apart are not pooled before pixels reach their distance.
    assert networks.dynunet(2, 2, np.array([1.0, 1.0, 5.0]))[1] == (16, 16, 4)
