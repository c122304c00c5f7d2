"""Metrics of a patient, their summary over patients, and tests between methods."""

import dataclasses
import functools
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
    "nsd": Metric("NSD", "", "Share of both surfaces within 2 mm of the other.", "higher", 4),
    "sensitivity": Metric("Sensitivity", "", "Share of the tumour that was found.", "higher", 4),
    "precision": Metric("Precision", "", "Share of the prediction that is tumour.", "higher", 4),
    "volume_ml": Metric("Expert volume", "ml", "Volume of the expert's mask.", "", 2),
    "predicted_ml": Metric("Predicted volume", "ml", "Volume of the predicted mask.", "", 2),
    "volume_error_ml": Metric(
        "Volume error", "ml", "Predicted less expert volume: above 0 is too large, nearest to 0 is best.", "", 2
    ),
    "relative_volume_error": Metric(
        "Relative volume error", "", "Volume error as a share of the expert's volume; nearest to 0 is best.", "", 4
    ),
    "false_positive_ml": Metric("False volume", "ml", "Volume of the prediction outside the tumour.", "lower", 2),
    "false_islands": Metric("False islands", "", "Connected parts of the prediction without any tumour.", "lower", 2),
    "lesions_found": Metric("Lesions found", "", "Connected parts of the tumour that the prediction touches.", "", 2),
    "lesions_missed": Metric("Lesions missed", "", "Connected parts of the tumour that it does not touch.", "lower", 2),
    "found_lesions_ml": Metric("Found lesions", "ml", "Volume of the lesions that were found.", "", 2),
    "missed_lesions_ml": Metric("Missed lesions", "ml", "Volume of the lesions that were missed.", "lower", 2),
    "lesion_f1": Metric("Lesion F1", "", "F1 score of lesions found, lesions missed and false islands.", "higher", 4),
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
    predicted: np.ndarray | None = None,
) -> dict[str, float]:
    """Computes the metrics of one patient and one structure over all voxels of the volume (section IV-B).

    | metric | definition | truth empty | prediction empty | both empty |
    |---|---|---|---|---|
    | `dsc` | 2 TP / (P + G), eq. 14 | NaN | 0 | NaN |
    | `ap` | average precision, eq. 15-17, by scikit-learn | NaN | that of the probabilities | NaN |
    | `dice_loss` | 1 - (2 I + 1) / (P + G + 1) of the probabilities, eq. 1 | NaN | as defined | NaN |
    | `hd95`, `assd` | mm, see `surface_distances` | NaN | volume's diagonal | NaN |
    | `nsd` | see `surface_dice`, within 2 mm | NaN | 0 | NaN |
    | `sensitivity` | TP / G | NaN | 0 | NaN |
    | `precision` | TP / P | 0 | NaN | NaN |
    | `volume_ml`, `predicted_ml` | G and P in ml | 0, P | G, 0 | 0, 0 |
    | `volume_error_ml` | P - G in ml | P | -G | 0 |
    | `relative_volume_error` | (P - G) / G | NaN | -1 | NaN |
    | `false_positive_ml` | P - TP in ml | P | 0 | 0 |
    | `false_islands` | false lesions, see `match_lesions` | all | 0 | 0 |
    | `lesions_found`, `lesions_missed` | lesions, see `match_lesions` | 0, 0 | 0, all | 0, 0 |
    | `found_lesions_ml`, `missed_lesions_ml` | volume of the lesions found and missed | 0, 0 | 0, G | 0, 0 |
    | `lesion_f1` | 2 found / (2 found + missed + false) | NaN | 0 | NaN |
    | `detection_sensitivity` | 1 if TP > 0, else 0 | NaN | 0 | NaN |
    | `detection_specificity` | 1 if P = 0, else 0; without tumour only | 0 | NaN | 1 |

    Args:
        probability: Probabilities `(depth, height, width)` in [0, 1].
        truth: The expert's mask of 0 and 1, of the same shape.
        spacing_zyx: Size of a voxel in mm.
        predicted: The predicted mask of 0 and 1, of the same shape, such as one of `PostProcessing`; `None` for
            `probability >= 0.5`.

    Returns:
        The metrics by the keys of `METRICS`, except `seconds`.

    Raises:
        ValueError: The shapes differ.
    """
    from sklearn.metrics import average_precision_score

    probability, truth = np.asarray(probability), np.asarray(truth) > 0
    _check_shapes(probability=probability, truth=truth)
    volume, soft = np.count_nonzero(truth), probability.sum(dtype=np.float64)
    loss = float(1 - (2 * probability[truth].sum(dtype=np.float64) + 1) / (soft + volume + 1))
    found = {
        **compare_masks(probability >= 0.5 if predicted is None else predicted, truth, spacing_zyx),
        "ap": float(average_precision_score(truth.ravel(), probability.ravel())) if volume else math.nan,
        "dice_loss": loss if volume else math.nan,
    }
    return {key: found[key] for key in METRICS if key in found}


def compare_masks(predicted: np.ndarray, truth: np.ndarray, spacing_zyx: Sequence[float]) -> dict[str, float]:
    """Computes the metrics of `evaluate_case` that need no probabilities: all but `ap` and `dice_loss`.

    Args:
        predicted: The predicted mask of 0 and 1, `(depth, height, width)`.
        truth: The expert's mask, of the same shape.
        spacing_zyx: Size of a voxel in mm.

    Returns:
        The metrics by the keys of `METRICS`.

    Raises:
        ValueError: The shapes differ.
    """
    predicted, truth = np.asarray(predicted) > 0, np.asarray(truth) > 0
    _check_shapes(predicted=predicted, truth=truth)
    both, found, volume = (float(np.count_nonzero(mask)) for mask in (predicted & truth, predicted, truth))
    voxel_ml = float(np.prod(spacing_zyx)) / 1000
    # How well a tumour is segmented is not defined without one.
    distances = surface_distances(predicted, truth, spacing_zyx) if volume else {"hd95": math.nan, "assd": math.nan}
    hits, misses, islands = match_lesions(predicted, truth, spacing_zyx).values()
    return {
        "dsc": 2 * both / (found + volume) if volume else math.nan,
        **distances,
        "nsd": surface_dice(predicted, truth, spacing_zyx) if volume else math.nan,
        "sensitivity": both / volume if volume else math.nan,
        "precision": both / found if found else math.nan,
        "volume_ml": volume * voxel_ml,
        "predicted_ml": found * voxel_ml,
        "volume_error_ml": (found - volume) * voxel_ml,
        "relative_volume_error": (found - volume) / volume if volume else math.nan,
        "false_positive_ml": (found - both) * voxel_ml,
        "false_islands": len(islands),
        "lesions_found": len(hits),
        "lesions_missed": len(misses),
        "found_lesions_ml": float(sum(hits)),
        "missed_lesions_ml": float(sum(misses)),
        "lesion_f1": 2 * len(hits) / (2 * len(hits) + len(misses) + len(islands)) if volume else math.nan,
        "detection_sensitivity": float(both > 0) if volume else math.nan,
        "detection_specificity": math.nan if volume else float(not found),
    }


def match_lesions(predicted: np.ndarray, truth: np.ndarray, spacing_zyx: Sequence[float]) -> dict[str, list[float]]:
    """Finds which lesions were found, by the rule of the ISLES 2022 challenge.

    A lesion is a connected part of the truth (26 neighbours). It is found if the prediction has one of its voxels or
    more. A connected part of the prediction without a voxel of truth is a false lesion.

    Args:
        predicted: The predicted mask `(depth, height, width)`.
        truth: The expert's mask of the same shape.
        spacing_zyx: Size of a voxel in mm.

    Returns:
        `{"found": ..., "missed": ..., "false": ...}`, the volumes in ml of the lesions of each kind; those of the
        false ones are of the prediction.
    """
    predicted, truth = np.asarray(predicted) > 0, np.asarray(truth) > 0
    box, volumes = mask_box(predicted | truth), []
    for mask, other in ((truth[box], predicted[box]), (predicted[box], truth[box])):
        parts, voxels = components(mask)
        ml = voxels * (np.prod(spacing_zyx) / 1000)
        touched = np.bincount(parts[mask & other], minlength=len(voxels) + 1)[1:] > 0
        volumes += [ml[touched].tolist(), ml[~touched].tolist()]
    return dict(zip(("found", "missed", "false"), (volumes[0], volumes[1], volumes[3]), strict=True))


def components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected parts of a bool mask (26 neighbours): the number of each voxel's part, 0 outside, and their sizes.

    Args:
        mask: Bool mask `(depth, height, width)`.

    Returns:
        `(parts, voxels)`: the numbers from 1, of the mask's shape, and the voxels of each part.
    """
    from scipy import ndimage

    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts, np.bincount(parts[mask], minlength=count + 1)[1:]


def mask_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box about a bool mask; one without voxels if the mask is empty."""
    from scipy import ndimage

    found = ndimage.find_objects(mask.astype(np.uint8)) if mask.size else []
    return found[0] if found else (slice(0),) * mask.ndim


def _check_shapes(**arrays):
    if len({array.shape for array in arrays.values()}) > 1:
        names, shapes = (
            " and ".join(f"`{name}`" for name in arrays),
            " and ".join(str(x.shape) for x in arrays.values()),
        )
        raise ValueError(f"{names} must have the same shape. Received: {shapes}")


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
    if not (one.any() or other.any()):
        return {"hd95": 0.0, "assd": 0.0}
    if not (one.any() and other.any()):
        diagonal = float(np.linalg.norm(np.multiply(one.shape, spacing_zyx)))
        return {"hd95": diagonal, "assd": diagonal}
    # Crop to both masks and one voxel around them.
    box, maps, surfaces = mask_box(one | other), [], []
    for mask in (one, other):
        image = sitk.GetImageFromArray(np.pad(mask[box], 1).astype(np.uint8))
        image.SetSpacing([float(size) for size in spacing_zyx[::-1]])
        surface = sitk.BinaryContour(image, fullyConnected=False)
        surfaces.append(sitk.GetArrayFromImage(surface) > 0)
        maps.append(np.abs(_distance_map(surface)))
    there, back = maps[1][surfaces[0]], maps[0][surfaces[1]]
    return {
        "hd95": float(max(np.percentile(there, 95), np.percentile(back, 95))),
        "assd": float((there.sum(dtype=float) + back.sum(dtype=float)) / (there.size + back.size)),
    }


def _distance_map(surface):
    """The distance of every voxel to the nearest of an image's voxels of 1, in mm; 0 or less at those themselves."""
    import SimpleITK as sitk

    distance = sitk.SignedMaurerDistanceMap(surface, squaredDistance=False, useImageSpacing=True)
    return sitk.GetArrayFromImage(distance)


def surface_dice(one: np.ndarray, other: np.ndarray, spacing_zyx: Sequence[float], tolerance_mm: float = 2.0) -> float:
    """Normalised surface Dice: the share of the area of both surfaces that lies within a tolerance of the other one.

    As defined by Nikolov et al. (2018) and computed by their package `surface-distance`: the surface runs through the
    corners where 2x2x2 voxels meet that are not all alike, and has at each the area of the marching cubes' triangles
    in mm2. Thick slices thus count by their true area, not by their number of voxels.

    Args:
        one: Mask `(depth, height, width)`.
        other: Mask of the same shape.
        spacing_zyx: Size of a voxel in mm.
        tolerance_mm: Largest distance of surfaces that count as equal.

    Returns:
        The share in [0, 1]; 1 if both masks are empty, 0 if one is.
    """
    import SimpleITK as sitk

    one, other = np.asarray(one) > 0, np.asarray(other) > 0
    if not (one.any() and other.any()):
        return float(one.any() == other.any())
    box, spacing = mask_box(one | other), np.asarray(spacing_zyx, float)
    areas = np.linalg.norm(_triangles() * (spacing.prod() / spacing), axis=-1).sum(axis=-1)
    areas = [areas[_corner_codes(mask[box])] for mask in (one, other)]
    # What lies within the tolerance of both surfaces' boxes is all that can be near the other one.
    boxes, reach = [mask_box(area > 0) for area in areas], np.ceil(tolerance_mm / spacing).astype(int)
    low = np.max([[side.start for side in some] for some in boxes], axis=0) - reach
    high = np.min([[side.stop for side in some] for some in boxes], axis=0) + reach
    both = tuple(slice(max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True))
    near = 0.0
    for own, opposite in (areas, areas[::-1]):
        if own[both].any() and opposite[both].any():
            surface = sitk.GetImageFromArray((opposite[both] > 0).astype(np.uint8))
            surface.SetSpacing(spacing[::-1].tolist())
            # A distance is rounded to float32.
            near += own[both][_distance_map(surface) <= tolerance_mm + 1e-4].sum()
    return float(near / sum(area.sum() for area in areas))


def _corner_codes(mask):
    """Which of the 2x2x2 voxels that meet in each corner are in the mask, as a number of 8 bits."""
    padded, shape = np.pad(mask, 1).astype(np.uint8), np.add(mask.shape, 1)
    codes = np.zeros(shape, np.uint8)
    for bit, corner in enumerate(np.ndindex(2, 2, 2)):
        codes |= padded[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))] << bit
    return codes


@functools.cache
def _triangles():
    """The marching cubes: for each set of a cube's corners, the triangles' normals `(256, 4, 3)`, as long as the areas.

    On each face, the middle of an edge where a run of corners of the set begins is joined to that where it ends. These
    lines make closed loops over the faces, each of which is divided into the fan of triangles with the largest area.
    """
    corners = np.array(list(np.ndindex(2, 2, 2)))
    rings = []
    for axis, side in np.ndindex(3, 2):
        ring = [int(np.insert(corner, axis, side) @ (4, 2, 1)) for corner in ((0, 0), (0, 1), (1, 1), (1, 0))]
        rings.append(ring if (axis + side) % 2 else ring[::-1])
    normals = np.zeros((256, 4, 3))
    for code in range(1, 255):
        chosen = [code >> bit & 1 for bit in range(8)]
        # A set and its complement have the same surface.
        chosen = [1 - bit for bit in chosen] if sum(chosen) > 4 else chosen
        follow, triangles = {}, []
        for ring in rings:
            for start in (n for n in range(4) if chosen[ring[n]] and not chosen[ring[n - 1]]):
                end = next(n for n in range(start, start + 4) if not chosen[ring[(n + 1) % 4]])
                follow[frozenset((ring[start - 1], ring[start]))] = frozenset((ring[end % 4], ring[(end + 1) % 4]))
        while follow:
            loop = [next(iter(follow))]
            while loop[-1] in follow:
                loop.append(follow.pop(loop[-1]))
            points = np.array([corners[list(edge)].mean(axis=0) for edge in loop[1:]])
            spokes = [np.roll(points, -n, axis=0)[1:] - points[n] for n in range(len(points))]
            fans = [np.cross(some[:-1], some[1:]) / 2 for some in spokes]
            triangles.extend(max(fans, key=lambda fan: np.linalg.norm(fan, axis=-1).sum()))
        normals[code, : len(triangles)] = triangles
    return normals


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
    _check_shapes(probability=probability, truth=truth)
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
        rows: Dicts with `patient`, `fold` and the same metrics. An undefined metric is `None` or NaN.

    Returns:
        `{metric: {"mean": ..., "std": ..., "low": ..., "high": ..., "patients": ...}}` over the patients for whom the
        metric is defined; `None` if there are none. `std` is the population standard deviation, `low` and `high` are
        the interval from `mean_interval`, `None` for one patient.
    """
    summary = {}
    for name in rows[0] if rows else ():
        if name in ("patient", "structure", "fold"):
            continue
        values = np.array([row[name] for row in rows], float)
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
            if key in first:
                values = [row[key] for row in (first, *others) if math.isfinite(row[key])]
                means[-1][key] = sum(values) / len(values) if values else math.nan
    return means


def rows_by_structure(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    """Divides rows by structure.

    Args:
        rows: A dict per patient and structure, with `structure`.

    Returns:
        `{structure: its rows}`, in the order given.
    """
    found = {}
    for row in rows:
        found.setdefault(row["structure"], []).append(row)
    return found


def defined_metrics(rows: Sequence[Mapping]) -> dict[str, Metric]:
    """The metrics that are defined for some of the rows, by key.

    Args:
        rows: Dicts of metrics. An undefined metric is `None`, NaN or missing.

    Returns:
        A part of `METRICS`.
    """
    return {k: m for k, m in METRICS.items() if np.isfinite(np.array([row.get(k) for row in rows], float)).any()}


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
