import csv
import io
import json
import math
import warnings

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from keras_mmfnet._files import csv_text
from keras_mmfnet.evaluation import (
    METRICS,
    calibration,
    compare_masks,
    defined_metrics,
    evaluate_case,
    match_lesions,
    mean_interval,
    metrics_json,
    paired_difference,
    summarise,
    surface_dice,
    surface_distances,
)

# Four voxels of truth.
TRUTH = np.array([1, 1, 1, 1, 0, 0, 0, 0]).reshape(2, 2, 2)
NOTHING = np.zeros_like(TRUTH)
ROWS = [
    {
        "patient": "anna",
        "structure": "tumour",
        "fold": 0,
        "dsc": 0.5,
        "ap": 0.25,
        "dice_loss": 0.5,
        "hd95": 4.0,
        "assd": 2.0,
        "seconds": 1.0,
    },
    {
        "patient": "bert",
        "structure": "tumour",
        "fold": 1,
        "dsc": 1.0,
        "ap": math.nan,
        "dice_loss": 0.0,
        "hd95": 0.0,
        "assd": 0.0,
        "seconds": 3.0,
    },
]


nan = math.nan
HALF = np.array([1, 1, 0, 0, 1, 1, 0, 0]).reshape(2, 2, 2)


@pytest.mark.parametrize(
    (
        "probability",
        "truth",
        "dsc",
        "ap",
        "dice_loss",
        "sensitivity",
        "precision",
        "volumes",
        "false",
        "detection",
        "lesions",
    ),
    [
        (TRUTH, TRUTH, 1, 1, 0, 1, 1, (4, 4), (0, 0), (1, nan), (1, 0, 1)),
        (1 - TRUTH, TRUTH, 0, 0.5, 1 - 1 / 9, 0, 0, (4, 4), (4, 1), (0, nan), (0, 1, 0)),
        (NOTHING, TRUTH, 0, 0.5, 1 - 1 / 5, 0, nan, (4, 0), (0, 0), (0, nan), (0, 1, 0)),
        (NOTHING, NOTHING, nan, nan, nan, nan, nan, (0, 0), (0, 0), (nan, 1), (0, 0, nan)),
        (TRUTH, NOTHING, nan, nan, nan, nan, 0, (0, 4), (4, 1), (nan, 0), (0, 0, nan)),
        # Half of the truth, and as much beside it: I = 2, P = G = 4.
        (HALF, TRUTH, 0.5, 0.5, 1 - 5 / 9, 0.5, 0.5, (4, 4), (2, 0), (1, nan), (1, 0, 1)),
        # One half counts as tumour.
        (0.5 * TRUTH, TRUTH, 1, 1, 1 - 5 / 7, 1, 1, (4, 4), (0, 0), (1, nan), (1, 0, 1)),
    ],
)
def test_by_hand(probability, truth, dsc, ap, dice_loss, sensitivity, precision, volumes, false, detection, lesions):
    spacing = (4.0, 1.0, 1.0)
    numbers = evaluate_case(probability.astype(np.float32), truth, spacing)
    assert list(numbers) == [key for key in METRICS if key != "seconds"]
    assert json.loads(json.dumps(numbers)) == pytest.approx(numbers, nan_ok=True)
    distances = surface_distances(probability >= 0.5, truth, spacing)
    distances["nsd"] = surface_dice(probability >= 0.5, truth, spacing)
    distances = distances if truth.any() else dict.fromkeys(distances, nan)
    assert {name: numbers.pop(name) for name in distances} == pytest.approx(distances, nan_ok=True)
    expected = {"dsc": dsc, "ap": ap, "dice_loss": dice_loss, "sensitivity": sensitivity, "precision": precision}
    # Voxels of 4 cubic mm.
    expected |= dict(zip(("volume_ml", "predicted_ml"), np.multiply(volumes, 0.004), strict=True))
    expected |= {"volume_error_ml": (volumes[1] - volumes[0]) * 0.004}
    expected |= {"relative_volume_error": volumes[1] / volumes[0] - 1 if volumes[0] else nan}
    expected |= {"false_positive_ml": false[0] * 0.004, "false_islands": false[1]}
    expected |= dict(zip(("lesions_found", "lesions_missed", "lesion_f1"), lesions, strict=True))
    expected |= {"found_lesions_ml": lesions[0] * 0.016, "missed_lesions_ml": lesions[1] * 0.016}
    expected |= dict(zip(("detection_sensitivity", "detection_specificity"), detection, strict=True))
    assert numbers == pytest.approx(expected, nan_ok=True)


def test_a_given_mask_counts_instead_of_the_threshold():
    probability = (0.4 * TRUTH).astype(np.float32)
    found = evaluate_case(probability, TRUTH, (1, 1, 1), predicted=HALF)
    of_mask, of_probability = (evaluate_case(x.astype(np.float32), TRUTH, (1, 1, 1)) for x in (HALF, probability))
    soft = {name: of_probability[name] for name in ("ap", "dice_loss")}
    assert found == pytest.approx(of_mask | soft, nan_ok=True)
    assert compare_masks(HALF, TRUTH, (1, 1, 1)) == pytest.approx(
        {name: value for name, value in found.items() if name not in soft}, nan_ok=True
    )
    with pytest.raises(ValueError, match=r"Received: \(2, 2\) and \(2, 2, 2\)"):
        evaluate_case(probability, TRUTH, (1, 1, 1), predicted=HALF[0])


def test_against_independent_formulas():
    rng = np.random.default_rng(0)
    truth, predicted = rng.random((2, 6, 9, 8)) < 0.2
    spacing = (3.0, 1.0, 0.7)
    found = evaluate_case(predicted.astype(np.float32), truth, spacing)
    assert found["dsc"] == pytest.approx(f1_score(truth.ravel(), predicted.ravel()))
    assert found["sensitivity"] == pytest.approx(recall_score(truth.ravel(), predicted.ravel()))
    assert found["precision"] == pytest.approx(precision_score(truth.ravel(), predicted.ravel()))
    one, other = (np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in (predicted, truth))
    distances = cdist(one, other)
    expected = max(np.percentile(distances.min(axis=axis), 95) for axis in (0, 1))
    assert found["hd95"] == pytest.approx(expected, rel=1e-5)


def test_false_islands_are_parts_without_tumour():
    truth, predicted = np.zeros((2, 5, 20, 20), bool)
    truth[2, 2:6, 2:6] = True
    predicted[2, 5, 5] = predicted[3, 6, 6] = True  # one part, joined at a corner, with one voxel of tumour
    predicted[2, 10, 10:12] = True
    predicted[4, 15, 15] = predicted[2, 15, 15] = True
    predicted[1, 1, 1] = True  # beside the tumour, not in it
    assert evaluate_case(predicted, truth, (1, 1, 1))["false_islands"] == 4


def test_lesions_are_found_by_one_voxel():
    truth, predicted = np.zeros((2, 6, 20, 20), bool)
    truth[1, 1:5, 1:5] = truth[2, 5, 5] = True  # one lesion of 17 voxels, joined at a corner
    truth[4, 10:14, 10] = True
    truth[4, 18, 18] = True
    predicted[2, 5, 5:9] = True
    predicted[4, 18, 17:19] = True
    predicted[0, 15, 1:4] = True
    lesions = match_lesions(predicted, truth, (5, 2, 1))
    assert lesions == {"found": pytest.approx([0.17, 0.01]), "missed": [0.04], "false": [0.03]}
    found = evaluate_case(predicted, truth, (5, 2, 1))
    assert [found[f"lesions_{name}"] for name in ("found", "missed")] == [2, 1]
    assert [found[f"{name}_lesions_ml"] for name in ("found", "missed")] == pytest.approx([0.18, 0.04])
    assert found["lesion_f1"] == pytest.approx(2 / (2 + (1 + 1) / 2))


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    truth = rng.random((4, 20, 20)) < 0.1
    probability = np.clip(0.3 * truth + 0.7 * rng.random(truth.shape), 0, 1).astype(np.float32)
    expected = average_precision_score(truth.ravel(), probability.ravel())
    assert evaluate_case(probability, truth, (1, 1, 1))["ap"] == pytest.approx(expected, abs=1e-6)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"the same shape\. Received: \(2, 2\) and \(2, 2, 2\)"):
        evaluate_case(np.zeros((2, 2)), TRUTH, (1, 1, 1))
    with pytest.raises(ValueError, match=r"`predicted` and `truth` must have the same shape"):
        compare_masks(np.zeros((2, 2)), TRUTH, (1, 1, 1))


def test_the_summary_is_over_the_patients_for_whom_a_number_is_defined():
    summary = summarise(ROWS)
    assert list(summary) == ["dsc", "ap", "dice_loss", "hd95", "assd", "seconds"]
    assert summary["dsc"] == {"mean": 0.75, "std": 0.25, "low": 0.5, "high": 1.0, "patients": 2}
    assert summary["ap"] == {"mean": 0.25, "std": 0.0, "low": None, "high": None, "patients": 1}
    assert summarise(ROWS[1:])["ap"] == {"mean": None, "std": None, "low": None, "high": None, "patients": 0}
    assert summarise([]) == {}


def test_what_is_defined_for_somebody():
    assert list(defined_metrics(ROWS)) == ["dsc", "ap", "dice_loss", "hd95", "assd", "seconds"]
    assert list(defined_metrics(ROWS[1:])) == ["dsc", "dice_loss", "hd95", "assd", "seconds"]
    assert defined_metrics([{"dsc": None, "hd95": 0.0}]) == {"hd95": METRICS["hd95"]}
    assert defined_metrics([]) == {}


def test_json_has_null_for_what_is_not_defined():
    read = json.loads(metrics_json(ROWS))
    assert read["patients"][0] == ROWS[0]
    assert read["patients"][1]["ap"] is None
    assert read["summary"]["seconds"]["mean"] == 2
    # What was read from JSON can be written again.
    assert json.loads(metrics_json(read["patients"])) == read


def test_csv_has_a_row_per_patient():
    read = list(csv.DictReader(io.StringIO(csv_text(ROWS))))
    assert [row["patient"] for row in read] == ["anna", "bert"]
    assert float(read[0]["dsc"]) == 0.5
    read = list(csv.DictReader(io.StringIO(csv_text([*ROWS, {"patient": "carl", "precision": 0.5}]))))
    assert (read[0]["precision"], read[2]["precision"], read[2]["dsc"]) == ("", "0.5", "")


def test_every_metric_is_explained():
    titles = [metric.title for metric in METRICS.values()]
    assert len(set(titles)) == len(titles)
    for metric in METRICS.values():
        assert metric.about.endswith(".")
        assert metric.better in ("higher", "lower", "")
    assert METRICS["hd95"].text(1.234) == "1.23"
    assert (METRICS["false_islands"].text(3), METRICS["false_islands"].text(0.5)) == ("3", "0.50")
    assert METRICS["dsc"].text(None) == METRICS["dsc"].text(nan) == "-"


def test_the_interval_of_a_mean():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = mean_interval(values)
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * values.std() / 20, atol=0.001)
    assert mean_interval(values) == (low, high)
    assert mean_interval([0.25]) == mean_interval([0.25] * 3) == (0.25, 0.25)


def test_calibration_against_every_bin():
    rng = np.random.default_rng(0)
    probability = rng.random((3, 10, 10)) ** 2
    probability[0, 0, :2] = 0, 1
    truth = rng.random(probability.shape) < probability**1.5
    mean, share, voxels, error = calibration(probability, truth, bins=4)
    inside = [(probability > low) & (probability <= low + 0.25) for low in (0, 0.25, 0.5, 0.75)]
    inside[0] |= probability == 0
    np.testing.assert_allclose(mean, [probability[some].mean() for some in inside])
    np.testing.assert_allclose(share, [truth[some].mean() for some in inside])
    np.testing.assert_array_equal(voxels, [some.sum() for some in inside])
    assert error == pytest.approx(sum(some.mean() * abs(m - s) for some, m, s in zip(inside, mean, share, strict=True)))
    mean, _, voxels, error = calibration(np.array([0.0, 1.0, 1.0]), np.array([0, 1, 0]))
    assert (len(mean), len(voxels), error) == (2, 10, pytest.approx(1 / 3))


# --- surfaces


def ball(radius, centre, shape=(20, 60, 60), spacing=(2.0, 0.5, 0.5)):
    """A ball in mm."""
    points = np.moveaxis(np.indices(shape), 0, -1) * spacing
    return np.linalg.norm(points - centre, axis=-1) <= radius


def test_equal_masks_are_0_apart():
    mask = ball(8, (20, 15, 15))
    assert surface_distances(mask, mask, (2, 0.5, 0.5)) == {"hd95": 0, "assd": 0}


@pytest.mark.parametrize(("axis", "step"), [(0, 2.0), (1, 0.5), (2, 0.5)])
def test_a_shifted_plate_is_as_far_as_the_shift_in_mm(axis, step):
    one, other = np.zeros((2, 40, 40, 40), bool)
    index = [slice(None)] * 3
    index[axis] = 10
    one[tuple(index)] = True
    index[axis] = 17
    other[tuple(index)] = True
    assert surface_distances(one, other, (2.0, 0.5, 0.5)) == pytest.approx({"hd95": 7 * step, "assd": 7 * step})


def test_one_ball_in_another():
    inner, outer = (ball(radius, (20, 15, 15)) for radius in (6, 10))
    found = surface_distances(inner, outer, (2.0, 0.5, 0.5))
    # 4 mm, but for the size of a voxel.
    assert found["hd95"] == pytest.approx(4, abs=1.0)
    assert found["assd"] == pytest.approx(4, abs=0.5)


def test_a_far_speck_counts_in_its_direction():
    one = np.zeros((3, 3, 100), bool)
    one[1, 1, :4] = True
    other = one.copy()
    other[1, 1, 50] = True
    found = surface_distances(one, other, (1, 1, 1))
    # From `other`: four times 0 and once 47; from `one`: four times 0.
    assert found["hd95"] == pytest.approx(np.percentile([0, 0, 0, 0, 47], 95))
    assert found["assd"] == pytest.approx(47 / 9)
    assert surface_distances(other, one, (1, 1, 1)) == pytest.approx(found)


def test_against_every_pair_of_surface_voxels():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 6, 8, 10)) < 0.3
    spacing = np.array([3.0, 1.0, 0.7])

    def surface(mask):
        padded = np.pad(mask, 1)
        inner = np.all([np.roll(padded, step, axis) for axis in range(3) for step in (-1, 1)], axis=0)
        return np.argwhere(padded & ~inner) * spacing

    distances = np.linalg.norm(surface(one)[:, None] - surface(other)[None], axis=-1)
    there, back = distances.min(axis=1), distances.min(axis=0)
    expected = {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "assd": np.concatenate([there, back]).mean(),
    }
    assert surface_distances(one, other, spacing) == pytest.approx(expected, rel=1e-5)


def test_empty_masks():
    mask = ball(8, (20, 15, 15))
    diagonal = np.linalg.norm([40, 30, 30])
    expected = {"hd95": diagonal, "assd": diagonal}
    assert surface_distances(mask, 0 * mask, (2, 0.5, 0.5)) == pytest.approx(expected)
    assert surface_distances(0 * mask, mask, (2, 0.5, 0.5)) == pytest.approx(expected)
    assert surface_distances(0 * mask, 0 * mask, (2, 0.5, 0.5)) == {"hd95": 0, "assd": 0}


def test_distances_and_surface_dice_are_monais():
    monai = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for spacing in ((1.0, 1.0, 1.0), (5.0, 0.7, 0.7), (3.0, 1.0, 0.8)):
        # From noise, in which every set of corners occurs, to smooth surfaces; they end at the volume's border.
        for smooth in (0, 1, 2):
            masks = [gaussian_filter(rng.normal(size=(12, 20, 24)), smooth) > 0 for _ in range(2)]
            tensors = [torch.tensor(mask)[None, None].float() for mask in masks]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                distance = monai.compute_hausdorff_distance(*tensors, True, percentile=95, spacing=spacing)
                shares = [
                    monai.compute_surface_dice(*tensors, [tolerance], True, spacing=spacing, use_subvoxels=True)
                    for tolerance in (0.0, 1.0, 2.0)
                ]
            found = [surface_dice(*masks, spacing, tolerance) for tolerance in (0.0, 1.0, 2.0)]
            assert surface_distances(*masks, spacing)["hd95"] == pytest.approx(float(distance), rel=1e-5)
            assert found == pytest.approx([float(share) for share in shares], rel=1e-5)


def test_surface_dice_by_hand():
    # Plates of one slice of 2.5 mm. The upper side of one and the lower side of the other are 2.5 mm apart; these are
    # half of each surface.
    one, other = np.zeros((2, 9, 50, 50), bool)
    one[3], other[5] = True, True
    spacing = (2.5, 1.0, 1.0)
    assert surface_dice(one, other, spacing, 2.4) == 0
    assert surface_dice(one, other, spacing, 2.5) == pytest.approx(0.5)
    assert surface_dice(one, other, spacing, 5.0) == 1
    assert surface_dice(one, one, spacing, 0) == surface_dice(0 * one, 0 * one, spacing) == 1
    assert surface_dice(one, 0 * one, spacing) == surface_dice(0 * one, one, spacing) == 0
    # A false voxel of 1 x 2 x 3 mm far away, whose surface is eight triangles, counts by its area.
    one[:], other[:] = False, False
    one[1, 1, 1] = other[1, 1, 1] = other[7, 40, 40] = True
    assert surface_dice(one, other, (1.0, 2.0, 3.0), 0) == pytest.approx(2 / 3)


def test_paired_difference():
    ours, baseline = np.array([0.5, 0.7, 0.9, 0.8, 0.6, np.nan]), np.array([0.4, 0.5, 0.6, 0.4, 0.1, 0.3])
    found = paired_difference(ours, baseline)
    assert found["patients"] == 5
    np.testing.assert_allclose(found["mean"], 0.3)
    # All five differ in one direction: the exact two-sided p is 2 / 2**5.
    np.testing.assert_allclose(found["p"], 0.0625)
    # Of differences from 0.1 to 0.5 no mean is outside them; the interval is about 0.3 and symmetric.
    assert 0.1 < found["low"] < 0.3 < found["high"] < 0.5
    np.testing.assert_allclose(found["high"] - 0.3, 0.3 - found["low"], atol=0.03)
    assert paired_difference(baseline, ours)["mean"] == -found["mean"]
    assert paired_difference(ours, baseline) == found


def test_paired_interval_covers_the_mean_of_a_normal_sample():
    rng = np.random.default_rng(1)
    differences = rng.normal(0.02, 0.1, 400)
    found = paired_difference(differences, np.zeros(400))
    error = differences.std() / 20
    np.testing.assert_allclose((found["high"] - found["low"]) / 2, 1.96 * error, rtol=0.05)


def test_paired_difference_of_equal_methods():
    same = paired_difference([0.1, 0.2], [0.1, 0.2])
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "patients": 2}
    with pytest.raises(ValueError, match=r"one number per patient.*Received: \(2,\) and \(3,\)"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least one patient"):
        paired_difference([np.nan], [1])
