import importlib
import json
import sys

import pytest

from keras_mmfnet.models import MMFNet


def test_the_model(benchmarks, monkeypatch, tmp_path):
    scaling = importlib.import_module("scaling")
    out = tmp_path / "scaling.json"
    arguments = (
        "--model-only --seconds-per-patch 0.1 --bandwidth 1 --latency 100 --patches-per-second 5 --shape 16 32 32"
    )
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments.split(), "--batch-size", "4", "--out", str(out)])
    scaling.main()
    found = json.loads(out.read_text())
    network = MMFNet(patch_shape=(16, 32, 32))
    averages = sum(weight.shape[0] for weight in network.non_trainable_weights)
    weights = network.count_params() - averages
    # A mean and a variance of each channel, forward and backward, for each pair of moving averages.
    assert found["bytes_per_update"] == 4 * (weights + 2 * averages)
    exchange = 2 * (1 / 2) * found["bytes_per_update"] / 1e9 + found["sums_per_update"] * 1e-4
    assert found["modelled"]["weak, 1"] == {"patches_per_second": 5, "efficiency": 0.5}  # the input limits it
    assert found["modelled"]["weak, 2"]["patches_per_second"] == pytest.approx(8 / (4 / 5 + exchange), abs=1e-3)
    strong = [found["modelled"][f"strong, {n}"]["efficiency"] for n in scaling.MODELLED]
    assert strong == sorted(strong, reverse=True)
