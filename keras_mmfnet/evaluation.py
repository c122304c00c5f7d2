"""Metrics of a patient, their summary over patients, and tests between methods."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Metric:
    """Describes a metric.

    Args:
        label: Short name.
        unit: Unit, or `""`.
        about: One sentence that explains it.
        better: `"higher"`, `"lower"`, or `""` if neither is better.
        digits: Decimals shown.
    """

    label: str
    unit: str
    about: str
    better: str
    digits: int

    @property
    def title(self) -> str:
        """The label and the unit."""
        return f"{self.label} {self.unit}".strip()

    def text(self, value: float | None) -> str:
        """Formats a value: an int without decimals, `-` if it is `None` or NaN."""
        if isinstance(value, int):
            return str(value)
        return "-" if value is None or math.isnan(value) else f"{value:.{self.digits}f}"


METRICS: dict[str, Metric] = {
    "dsc": Metric("DSC", "", "Dice coefficient: overlap of both masks, 1 if they are equal.", "higher", 4),
    "ap": Metric("AP", "", "Average precision of the probabilities, over all thresholds.", "higher", 4),
    "dice_loss": Metric("Dice loss", "", "1 - Dice coefficient of the probabilities, without a threshold.", "lower", 4),
    "hd95": Metric(
        "HD95",
        "mm",
        "95th percentile of the distances between both surfaces; false islands raise it. If nothing was found: the "
        "diagonal of the volume.",
        "lower",
        2,
    ),
    "assd": Metric("ASSD", "mm", "Mean distance between both surfaces.", "lower", 2),
    "sensitivity": Metric("Sensitivity", "", "Share of the tumour that was found.", "higher", 4),
    "precision": Metric("Precision", "", "Share of the prediction that is tumour.", "higher", 4),
    "volume_ml": Metric("Expert volume", "ml", "Volume of the expert's mask.", "", 2),
    "predicted_ml": Metric("Predicted volume", "ml", "Volume of the predicted mask.", "", 2),
    "false_positive_ml": Metric("False volume", "ml", "Volume of the prediction outside the tumour.", "lower", 2),
    "false_islands": Metric("False islands", "", "Connected parts of the prediction without any tumour.", "lower", 2),
    "detection_sensitivity": Metric(
        "Detected", "", "1 if any of the tumour was found, else 0; of patients with tumour.", "higher", 2
    ),
    "detection_specificity": Metric(
        "Nothing found", "", "1 if nothing was found, else 0; of patients without tumour.", "higher", 2
    ),
    "seconds": Metric("Time", "s", "From the preprocessed images to the written mask.", "lower", 2),
}


def evaluate_case(
    probability: np.ndarray,
    truth: np.ndarray,
    spacing_zyx: Sequence[float],
    threshold: float = 0.5,
    predicted: np.ndarray | None = None,
) -> dict[str, float]:
    """Computes the metrics of one patient over all voxels of the volume (section IV-B).

    | metric | definition | truth empty | prediction empty | both empty |
    |---|---|---|---|---|
    | `dsc` | 2 TP / (P + G), eq. 14 | NaN | 0 | NaN |
    | `ap` | average precision, eq. 15-17, by scikit-learn | NaN | that of the probabilities | NaN |
    | `dice_loss` | 1 - (2 I + 1) / (P + G + 1) of the probabilities, eq. 1 | NaN | as defined | NaN |
    | `hd95`, `assd` | mm, see `surface_distances` | NaN | volume's diagonal | NaN |
    | `sensitivity` | TP / G | NaN | 0 | NaN |
    | `precision` | TP / P | 0 | NaN | NaN |
    | `volume_ml`, `predicted_ml` | G and P in ml | 0, P | G, 0 | 0, 0 |
    | `false_positive_ml` | P - TP in ml | P | 0 | 0 |
    | `false_islands` | components of the prediction (26 neighbours) without a voxel of truth | all | 0 | 0 |
    | `detection_sensitivity` | 1 if TP > 0, else 0 | NaN | 0 | NaN |
    | `detection_specificity` | 1 if P = 0, else 0; without tumour only | 0 | NaN | 1 |

    Args:
        probability: Probabilities `(depth, height, width)` in [0, 1].
        truth: The expert's mask of 0 and 1, of the same shape.
        spacing_zyx: Size of a voxel in mm.
        threshold: Lowest probability that counts as tumour.
        predicted: The predicted mask of 0 and 1, where it is not made by the threshold.

    Returns:
        The metrics by the keys of `METRICS`, except `seconds`.

    Raises:
        ValueError: The shapes differ.
    """
    from scipy import ndimage
    from sklearn.metrics import average_precision_score

    probability, truth = np.asarray(probability), np.asarray(truth) > 0
    _check_shapes(probability, truth)
    predicted = probability >= threshold if predicted is None else np.asarray(predicted) > 0
    _check_shapes(predicted, truth)
    both, found, volume = (float(np.count_nonzero(mask)) for mask in (predicted & truth, predicted, truth))
    soft, voxel_ml = probability.sum(dtype=np.float64), float(np.prod(spacing_zyx)) / 1000
    # How well a tumour is segmented is not defined without one.
    distances = surface_distances(predicted, truth, spacing_zyx) if volume else {"hd95": math.nan, "assd": math.nan}
    loss = float(1 - (2 * probability[truth].sum(dtype=np.float64) + 1) / (soft + volume + 1))
    islands, count = ndimage.label(predicted, np.ones((3, 3, 3)))
    return {
        "dsc": 2 * both / (found + volume) if volume else math.nan,
        "ap": float(average_precision_score(truth.ravel(), probability.ravel())) if volume else math.nan,
        "dice_loss": loss if volume else math.nan,
        **distances,
        "sensitivity": both / volume if volume else math.nan,
        "precision": both / found if found else math.nan,
        "volume_ml": volume * voxel_ml,
        "predicted_ml": found * voxel_ml,
        "false_positive_ml": (found - both) * voxel_ml,
        "false_islands": int(count - np.count_nonzero(np.unique(islands[truth]))),
        "detection_sensitivity": float(both > 0) if volume else math.nan,
        "detection_specificity": math.nan if volume else float(not found),
    }


def _check_shapes(probability, truth):
    if probability.shape != truth.shape:
        raise ValueError(
            f"`probability` and `truth` must have the same shape. Received: {probability.shape} and {truth.shape}"
        )


def surface_distances(one: np.ndarray, other: np.ndarray, spacing_zyx: Sequence[float]) -> dict[str, float]:
    """Distances between the surfaces of two masks.

    The surface of a mask is its voxels that share a face with the background, which includes everything outside the
    volume. A distance is measured from the centre of a surface voxel to the nearest one of the other surface.

    Args:
        one: Mask `(depth, height, width)`.
        other: Mask of the same shape.
        spacing_zyx: Size of a voxel in mm.

    Returns:
        `hd95`, the larger of the 95th percentiles of the two directions, and `assd`, the mean over all voxels of both
        surfaces, in mm. If both masks are empty, both are 0. If one mask is empty, both are the length of the volume's
        diagonal, which is the upper bound of all distances.
    """
    import SimpleITK as sitk

    one, other = np.asarray(one) > 0, np.asarray(other) > 0
    found = np.nonzero(one | other)
    if not len(found[0]):
        return {"hd95": 0.0, "assd": 0.0}
    if not (one.any() and other.any()):
        diagonal = float(np.linalg.norm(np.multiply(one.shape, spacing_zyx)))
        return {"hd95": diagonal, "assd": diagonal}
    # Crop to both masks and one voxel around them.
    box = tuple(slice(index.min(), index.max() + 1) for index in found)
    maps, surfaces = [], []
    for mask in (one, other):
        image = sitk.GetImageFromArray(np.pad(mask[box], 1).astype(np.uint8))
        image.SetSpacing([float(size) for size in spacing_zyx[::-1]])
        surface = sitk.BinaryContour(image, fullyConnected=False)
        distance = sitk.SignedMaurerDistanceMap(surface, squaredDistance=False, useImageSpacing=True)
        surfaces.append(sitk.GetArrayFromImage(surface) > 0)
        maps.append(np.abs(sitk.GetArrayFromImage(distance)))
    there, back = maps[1][surfaces[0]], maps[0][surfaces[1]]
    return {
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float((there.sum(dtype=float) + back.sum(dtype=float)) / (there.size + back.size)),
    }


def calibration(
    probability: np.ndarray, truth: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Calibration of probabilities: the share of tumour among voxels of similar predicted probability.

    Args:
        probability: Probabilities in [0, 1].
        truth: The expert's mask of 0 and 1, of the same shape.
        bins: Number of bins of equal width. A bin includes its upper edge; the first one also its lower edge.

    Returns:
        `(mean, share, voxels, error)`: the mean probability and the share of tumour of each non-empty bin, the number
        of voxels of every bin `(bins,)`, and the expected calibration error, `|mean - share|` averaged over voxels.

    Raises:
        ValueError: The shapes differ.
    """
    from sklearn.calibration import calibration_curve

    probability, truth = np.asarray(probability, float), np.asarray(truth) > 0
    _check_shapes(probability, truth)
    share, mean = calibration_curve(truth.ravel(), probability.ravel(), n_bins=bins)
    voxels = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability.ravel()), minlength=bins)
    return mean, share, voxels, float(np.average(np.abs(mean - share), weights=voxels[voxels > 0]))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of a mean over patients, with a fixed seed.

    Args:
        values: A finite number per patient, at least one.

    Returns:
        `(low, high)`; for one patient, both are its number.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, float)
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def summarise(rows: Sequence[Mapping]) -> dict[str, dict]:
    """Mean, standard deviation and 95% interval of every metric over patients.

    Args:
        rows: A dict per patient with `patient`, `fold` and metrics. An undefined metric is `None`, NaN or missing.

    Returns:
        `{metric: {"mean": ..., "std": ..., "low": ..., "high": ..., "patients": ...}}` over the patients for whom the
        metric is defined; `None` if there are none. `std` is the population standard deviation, `low` and `high` are
        the interval from `mean_interval`, `None` for one patient.
    """
    summary = {}
    # Rows written by earlier versions have fewer keys.
    for name in dict.fromkeys(key for row in rows for key in row):
        if name in ("patient", "structure", "fold"):
            continue
        values = np.array([row.get(name) for row in rows], float)
        values = values[np.isfinite(values)]
        interval = mean_interval(values) if len(values) > 1 else (None, None)
        numbers = (float(values.mean()), float(values.std()), *interval) if len(values) else [None] * 4
        summary[name] = {**dict(zip(("mean", "std", "low", "high"), numbers, strict=True)), "patients": len(values)}
    return summary


def mean_over_structures(rows: Sequence[Mapping]) -> list[dict]:
    """The mean over the structures of each patient.

    Args:
        rows: A dict per patient and structure with `patient`, `structure` and metrics.

    Returns:
        A dict per patient, without `structure`: each metric's mean over the structures for which it is defined. Of one
        structure these are its numbers.
    """
    patients = {}
    for row in rows:
        patients.setdefault(row["patient"], []).append({k: v for k, v in row.items() if k != "structure"})
    means = []
    for first, *others in patients.values():
        means.append(dict(first))
        for key in METRICS if others else ():
            values = [row[key] for row in (first, *others) if key in row and math.isfinite(row[key])]
            if key in first:
                means[-1][key] = sum(values) / len(values) if values else math.nan
    return means


def rows_by_structure(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Divides rows by structure.

    Args:
        rows: A dict per patient and structure.

    Returns:
        `{structure: its rows}`, in the order given; rows without `structure`, as of earlier versions, have the name
        `"tumour"`.
    """
    found = {}
    for row in rows:
        found.setdefault(row.get("structure", "tumour"), []).append(row)
    return found


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Compares two methods on the same patients.

    Args:
        values: A number per patient.
        baseline: The numbers of the other method for the same patients, in the same order.

    Returns:
        A dict: `mean` of `values - baseline`; `low` and `high`, its interval from `mean_interval`; `p` of the two-sided
        Wilcoxon signed-rank test (1 if no patient differs); and the number of `patients`. Patients without a finite
        number in both are left out.

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
    low, high = mean_interval(differences)
    return {
        "mean": float(differences.mean()),
        "low": low,
        "high": high,
        "p": float(wilcoxon(differences).pvalue) if differences.any() else 1.0,
        "patients": len(differences),
    }


def metrics_json(rows: Sequence[Mapping]) -> str:
    """The metrics of each patient and their summary as JSON text. An undefined metric is `null`.

    Of several structures, `summary` is by structure, and `mean_over_structures` that of `mean_over_structures`.
    """
    patients = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    numbers, structures = {"patients": patients, "summary": summarise(rows)}, rows_by_structure(rows)
    if len(structures) > 1:
        numbers["summary"] = {name: summarise(some) for name, some in structures.items()}
        numbers["mean_over_structures"] = summarise(mean_over_structures(rows))
    return json.dumps(numbers, indent=2, allow_nan=False) + "\n"
