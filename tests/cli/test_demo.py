import json
import signal

import numpy as np
import pytest

from keras_mmfnet import synthetic


@pytest.mark.slow
def test_the_demonstration_learns_to_segment(mmfnet, tmp_path):
    """With a third of the updates, to be shorter."""
    done = mmfnet("demo", "--out", tmp_path / "run", "--set", "training.steps_per_epoch=13")
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["summary"]
    assert summary["dsc"]["mean"] >= 0.7
    assert "mean of" in done.stdout
    assert "Try it: mmfnet segment" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert "Epoch 4 of 4" in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert np.isfinite(summary["hd95"]["mean"])
    again = mmfnet("demo", "--out", tmp_path / "run", code=1)
    assert "resume with mmfnet train" in again.stderr


def test_a_demonstration_stopped_before_the_training_goes_on(mmfnet, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "make_synthetic_cohort", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = mmfnet("demo", "--out", tmp_path / "run", code=130)
    assert done.stderr.splitlines()[-1] == f"stopped; resume with: mmfnet demo --out {tmp_path / 'run'}"
