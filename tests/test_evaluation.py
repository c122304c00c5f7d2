import csv
import io
import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from keras_mmfnet.evaluation import evaluate_case, metrics_csv, metrics_json, metrics_table, summarise

# Four voxels of truth.
TRUTH = np.array([1, 1, 1, 1, 0, 0, 0, 0]).reshape(2, 2, 2)
NOTHING = np.zeros_like(TRUTH)
ROWS = [
    {"patient": "anna", "fold": 0, "dsc": 0.5, "ap": 0.25, "dice_loss": 0.5, "seconds": 1.0},
    {"patient": "bert", "fold": 1, "dsc": 1.0, "ap": math.nan, "dice_loss": 0.0, "seconds": 3.0},
]


@pytest.mark.parametrize(
    ("probability", "truth", "dsc", "ap", "dice_loss"),
    [
        (TRUTH, TRUTH, 1, 1, 0),
        (1 - TRUTH, TRUTH, 0, 0.5, 1 - 1 / 9),
        (NOTHING, TRUTH, 0, 0.5, 1 - 1 / 5),
        (NOTHING, NOTHING, 1, math.nan, 0),
        (TRUTH, NOTHING, 0, math.nan, 1 - 1 / 5),
        # Half of the truth, and as much beside it: I = 2, P = G = 4.
        (np.array([1, 1, 0, 0, 1, 1, 0, 0]).reshape(2, 2, 2), TRUTH, 0.5, 0.5, 1 - 5 / 9),
        # One half counts as tumour.
        (0.5 * TRUTH, TRUTH, 1, 1, 1 - 5 / 7),
    ],
)
def test_by_hand(probability, truth, dsc, ap, dice_loss):
    numbers = evaluate_case(probability.astype(np.float32), truth)
    assert numbers == pytest.approx({"dsc": dsc, "ap": ap, "dice_loss": dice_loss}, nan_ok=True)


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.random((4, 20, 20)) < 0.1
    probability = np.clip(0.3 * truth + 0.7 * rng.random(truth.shape), 0, 1).astype(np.float32)
    expected = average_precision_score(truth.ravel(), probability.ravel())
    assert evaluate_case(probability, truth)["ap"] == pytest.approx(expected, abs=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"one shape\. Received: \(2, 2\) and \(2, 2, 2\)"):
        evaluate_case(np.zeros((2, 2)), TRUTH)


def test_the_summary_is_over_the_patients_for_whom_a_number_is_defined():
    summary = summarise(ROWS)
    assert list(summary) == ["dsc", "ap", "dice_loss", "seconds"]
    assert summary["dsc"] == {"mean": 0.75, "std": 0.25, "patients": 2}
    assert summary["ap"] == {"mean": 0.25, "std": 0.0, "patients": 1}
    assert summarise(ROWS[1:])["ap"] == {"mean": None, "std": None, "patients": 0}
    assert summarise([]) == {}


def test_json_has_null_for_what_is_not_defined():
    read = json.loads(metrics_json(ROWS))
    assert read["patients"][0] == ROWS[0]
    assert read["patients"][1]["ap"] is None
    assert read["summary"]["seconds"]["mean"] == 2
    # What was read from JSON can be written again.
    assert json.loads(metrics_json(read["patients"])) == read
    assert "anna" in metrics_table(read["patients"])


def test_csv_has_a_row_per_patient():
    read = list(csv.DictReader(io.StringIO(metrics_csv(ROWS))))
    assert [row["patient"] for row in read] == ["anna", "bert"]
    assert float(read[0]["dsc"]) == 0.5


def test_the_table_ends_with_the_mean():
    lines = metrics_table(ROWS).splitlines()
    assert lines[0].split() == ["patient", "fold", "DSC", "AP", "Dice", "loss", "seconds"]
    assert lines[2].split() == ["bert", "1", "1.0000", "-", "0.0000", "3.0000"]
    assert lines[-1].split() == ["mean", "0.7500", "0.2500", "0.2500", "2.0000"]
    assert len({len(line) for line in lines}) == 1
