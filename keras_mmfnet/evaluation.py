import csv
import io
import json
import math

import numpy as np

METRICS = ("dsc", "ap", "dice_loss")


def evaluate_case(probability, truth, threshold=0.5):
    """The paper's numbers of one patient, over all voxels of the volume (section IV-B).

    Args:
        probability: Probabilities from 0 to 1, any shape.
        truth: The expert's mask of 0 and 1, of the same shape.
        threshold: A voxel counts as tumour from this probability on.

    Returns:
        A dict of floats: `dsc`, the Dice similarity coefficient (eq. 14), 1 where truth and prediction are both
        empty; `ap`, the average precision (eq. 15-17) as scikit-learn computes it, NaN for an empty truth; and
        `dice_loss`, `1 - (2 I + 1) / (P + G + 1)` (eq. 1).

    Raises:
        ValueError: The shapes differ.
    """
    from sklearn.metrics import average_precision_score

    probability, truth = np.asarray(probability), np.asarray(truth) > 0
    if probability.shape != truth.shape:
        raise ValueError(
            f"`probability` and `truth` must have one shape. Received: {probability.shape} and {truth.shape}"
        )
    predicted = probability >= threshold
    size, volume = predicted.sum() + truth.sum(), float(truth.sum())
    soft = probability.sum(dtype=np.float64)
    return {
        "dsc": float(2 * (predicted & truth).sum() / size) if size else 1.0,
        "ap": float(average_precision_score(truth.ravel(), probability.ravel())) if volume else math.nan,
        "dice_loss": float(1 - (2 * probability[truth].sum(dtype=np.float64) + 1) / (soft + volume + 1)),
    }


def summarise(rows):
    """Mean and standard deviation of every number over patients.

    Args:
        rows: Dicts with a `patient`, a `fold` and numbers.

    Returns:
        `{number: {"mean": ..., "std": ..., "patients": ...}}`, over the patients for whom the number is defined; the
        population's standard deviation.
    """
    names = [name for name in rows[0] if name not in ("patient", "fold")] if rows else []
    summary = {}
    for name in names:
        values = np.array([row[name] for row in rows], float)
        values = values[np.isfinite(values)]
        defined = {"mean": float(values.mean()), "std": float(values.std())} if len(values) else {}
        summary[name] = {"mean": None, "std": None, **defined, "patients": len(values)}
    return summary


def metrics_json(rows):
    """The numbers of each patient and their summary as JSON text; a number that is not defined is `null`."""
    patients = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    return json.dumps({"patients": patients, "summary": summarise(rows)}, indent=2, allow_nan=False) + "\n"


def metrics_csv(rows):
    """Dicts with the same keys as CSV text, one row each."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def metrics_table(rows):
    """The numbers of each patient and their mean as a plain-text table."""
    summary = summarise(rows)
    header = ["patient", "fold", "DSC", "AP", "Dice loss", "seconds"]
    keys = ("dsc", "ap", "dice_loss", "seconds")
    lines = [[row["patient"], str(row["fold"]), *(_number(row[key]) for key in keys)] for row in rows]
    lines.append(["mean", "", *(_number(summary[key]["mean"]) for key in keys)])
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, *lines]
    ]
    return "\n".join([*text[:-1], "-" * len(text[0]), text[-1]])


def _number(value):
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
