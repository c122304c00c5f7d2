import csv
import io
import json
import math

import numpy as np


def evaluate_case(probability, truth, spacing, threshold=0.5):
    """The numbers of one patient, over all voxels of the volume (section IV-B), and the distances of the surfaces.

    Args:
        probability: Probabilities `(depth, height, width)` from 0 to 1.
        truth: The expert's mask of 0 and 1, of the same shape.
        spacing: Size of a voxel in mm, `(z, y, x)`.
        threshold: A voxel counts as tumour from this probability on.

    Returns:
        A dict of floats: `dsc`, the Dice similarity coefficient (eq. 14), 1 where truth and prediction are both
        empty; `ap`, the average precision (eq. 15-17) as scikit-learn computes it, NaN for an empty truth;
        `dice_loss`, `1 - (2 I + 1) / (P + G + 1)` (eq. 1); and `hd95` and `assd` in mm, see `surface_distances`.

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
        **surface_distances(predicted, truth, spacing),
    }


def surface_distances(one, other, spacing):
    """How far apart the surfaces of two masks are.

    A mask's surface is its voxels that touch, by a face, one that is not of it; the volume's outside is not of it. The
    distances are those from each surface voxel's centre to the nearest one's of the other surface.

    Args:
        one: Mask `(depth, height, width)`.
        other: Mask of the same shape.
        spacing: Size of a voxel in mm, `(z, y, x)`.

    Returns:
        `hd95`, the larger of the two directions' 95th percentiles, and `assd`, the mean over all voxels of both
        surfaces, in mm. Both are 0 where both masks are empty and, where only one is, the length of the volume's
        diagonal, than which no distance is larger.
    """
    import SimpleITK as sitk

    one, other = np.asarray(one) > 0, np.asarray(other) > 0
    found = np.nonzero(one | other)
    if not len(found[0]):
        return {"hd95": 0.0, "assd": 0.0}
    if not (one.any() and other.any()):
        diagonal = float(np.linalg.norm(np.multiply(one.shape, spacing)))
        return {"hd95": diagonal, "assd": diagonal}
    # Only the part with both masks, and a voxel of rim.
    box = tuple(slice(index.min(), index.max() + 1) for index in found)
    maps, surfaces = [], []
    for mask in (one, other):
        image = sitk.GetImageFromArray(np.pad(mask[box], 1).astype(np.uint8))
        image.SetSpacing([float(size) for size in spacing[::-1]])
        surface = sitk.BinaryContour(image, fullyConnected=False)
        distance = sitk.SignedMaurerDistanceMap(surface, squaredDistance=False, useImageSpacing=True)
        surfaces.append(sitk.GetArrayFromImage(surface) > 0)
        maps.append(np.abs(sitk.GetArrayFromImage(distance)))
    there, back = maps[1][surfaces[0]], maps[0][surfaces[1]]
    return {
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float((there.sum(dtype=float) + back.sum(dtype=float)) / (there.size + back.size)),
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


def paired_difference(values, baseline, samples=10_000, seed=0):
    """How much one method differs from another on the same patients.

    Args:
        values: A number for each patient.
        baseline: The other method's numbers for the same patients, in the same order.
        samples: Bootstrap samples of the patients.
        seed: Seed of the bootstrap.

    Returns:
        A dict: `mean`, the mean of `values - baseline`; `low` and `high`, its 95% interval by the percentile
        bootstrap over patients; `p`, of the two-sided Wilcoxon signed-rank test (1 where no patient differs); and
        `patients`, how many there are. Patients without a number in either are left out.

    Raises:
        ValueError: The lengths differ, or no patient has both numbers.
    """
    from scipy.stats import wilcoxon

    values, baseline = np.asarray(values, float), np.asarray(baseline, float)
    if values.shape != baseline.shape or values.ndim != 1:
        raise ValueError(
            f"`values` and `baseline` must have one number per patient. Received: {values.shape} and {baseline.shape}"
        )
    differences = (values - baseline)[np.isfinite(values - baseline)]
    if not len(differences):
        raise ValueError("at least one patient must have both numbers. Received: none")
    chosen = np.random.default_rng(seed).integers(len(differences), size=(samples, len(differences)))
    low, high = np.percentile(differences[chosen].mean(axis=1), [2.5, 97.5])
    return {
        "mean": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(wilcoxon(differences).pvalue) if differences.any() else 1.0,
        "patients": len(differences),
    }


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
    header = ["patient", "fold", "DSC", "AP", "Dice loss", "HD95 mm", "ASSD mm", "seconds"]
    keys = ("dsc", "ap", "dice_loss", "hd95", "assd", "seconds")
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
