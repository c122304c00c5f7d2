import json

import keras
import numpy as np
import pytest
from checks import dtype_of, global_policy, to_numpy
from keras import ops
from sklearn.metrics import average_precision_score

from keras_mmfnet.losses import DiceLoss
from keras_mmfnet.metrics import AveragePrecision, DiceScore

# truth, probabilities, Dice score, average precision
TABLE = {
    "both empty": ([0, 0, 0, 0], [0, 0, 0, 0], 1, 0),
    "empty truth": ([0, 0, 0, 0], [0, 1, 1, 0], 0, 0),
    "empty prediction": ([1, 1, 0, 0], [0, 0, 0, 0], 0, 1 / 2),  # one level: its precision is the share of tumour
    "perfect": ([1, 1, 0, 0], [1, 1, 0, 0], 1, 1),
    "half": ([1, 1, 0, 0], [0, 1, 1, 0], 1 / 2, 1 / 2 * 1 / 2 + 1 / 2 * 2 / 4),
    "apart": ([1, 1, 0, 0], [0, 0, 1, 1], 0, 2 / 4),
    "ranked": ([1, 0, 1, 0], [0.875, 0.75, 0.625, 0.125], 2 * 2 / 5, 1 / 2 * 1 + 1 / 2 * 2 / 3),
    # One half counts.
    "unsure": ([1, 1, 0, 0], [0.75, 0.5, 0.5, 0.25], 2 * 2 / 5, 1 / 2 * 1 + 1 / 2 * 2 / 3),
}
METRICS = {"dice": DiceScore, "ap": AveragePrecision}


def value(metric):
    result = metric.result()
    assert dtype_of(result) == "float32"
    assert tuple(result.shape) == ()
    return to_numpy(result).item()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", TABLE)
def test_by_hand(case, dtype):
    truth, probability, *expected = TABLE[case]
    truth = np.array(truth, "uint8").reshape(2, 2, 1)
    probability = ops.cast(ops.convert_to_tensor(np.array(probability, "float32").reshape(2, 2, 1)), dtype)
    for metric_class, wanted in zip(METRICS.values(), expected, strict=True):
        metric = metric_class()
        metric.update_state(truth, probability)
        assert value(metric) == pytest.approx(wanted, abs=1e-6)


def test_threshold():
    metric = DiceScore(threshold=0.25)
    metric.update_state(np.array([[1], [1], [0], [0]]), np.array([[0.3], [0.25], [0.3], [0.2]]))
    assert value(metric) == pytest.approx(2 * 2 / 5, abs=1e-6)


@pytest.mark.parametrize("bins", [2, 128, 200])
def test_average_precision_is_scikit_learns_on_its_levels(bins):
    rng = np.random.default_rng(bins)
    truth = rng.random((4, 30, 30, 1)) < 0.2
    # The middle of a level, which no rounding carries into the next.
    probability = (np.clip(rng.normal(0.3 + 0.3 * truth, 0.2), 0, 0.999) * bins).astype(int) / bins + 0.5 / bins
    metric = AveragePrecision(bins=bins)
    metric.update_state(truth.astype("uint8"), probability.astype("float32"))
    assert value(metric) == pytest.approx(average_precision_score(truth.ravel(), probability.ravel()), abs=1e-5)


def test_levels_are_rounded_down():
    # Of 4 levels the second holds 0.25 to 0.49, so that these two are told apart, and those two not.
    metric = AveragePrecision(bins=4)
    metric.update_state(np.array([[1], [0]]), np.array([[0.25], [0.24]]))
    assert value(metric) == pytest.approx(1, abs=1e-6)
    metric.reset_state()
    metric.update_state(np.array([[1], [0]]), np.array([[0.49], [0.26]]))
    assert value(metric) == pytest.approx(1 / 2, abs=1e-6)


# Two structures in five voxels.
TRUTH = np.array([[1, 0], [1, 0], [0, 1], [0, 0], [0, 0]], "uint8")
PROBABILITY = np.array([[0.75, 0.25], [0.375, 0.25], [0.375, 0.375], [0.25, 0.625], [0.5, 0]], "float32")
SEVERAL = {
    # The second voxel's tie is the structure's, the third's the first structure's, the fifth's the structure's.
    "exclusive": (DiceScore(structures=2), (2 * 2 / 6 + 0) / 2),
    "overlapping": (DiceScore(structures=2, exclusive=False), (2 * 1 / 4 + 2 * 0 / 2) / 2),
    "threshold": (DiceScore(0.3125, structures=2, exclusive=False), (2 * 2 / 6 + 2 * 1 / 3) / 2),
    # At 0.75 one of one, at 0.5 one of two, at 0.375 two of four; at 0.625 none of one, at 0.375 one of two.
    "average precision": (AveragePrecision(structures=2), (1 / 2 * 1 + 1 / 2 * 2 / 4 + 1 / 2) / 2),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_structures_by_hand(case):
    metric, expected = SEVERAL[case]
    metric.reset_state()
    metric.update_state(TRUTH, PROBABILITY)
    assert value(metric) == pytest.approx(expected, abs=1e-6)
    # A structure that there is not and that is not found.
    metric.reset_state()
    metric.update_state(TRUTH * [1, 0], TRUTH * np.array([1, 0], "float32"))
    assert value(metric) == pytest.approx(1 if isinstance(metric, DiceScore) else 1 / 2, abs=1e-6)
    with pytest.raises(ValueError, match=r"`y_true` must have .* of 2 structures. Received: \(5, 1\)$"):
        metric.update_state(TRUTH[:, :1], PROBABILITY)


@pytest.mark.parametrize("metric_class", METRICS.values())
def test_several_structures_are_the_mean_of_each(metric_class):
    rng = np.random.default_rng(2)
    truth, probability = (rng.random((3, 7, 5, 4)) < 0.3).astype("uint8"), rng.random((3, 7, 5, 4), "float32")
    options = {"exclusive": False} if metric_class is DiceScore else {}
    together, alone = metric_class(structures=4, **options), []
    together.update_state(truth, probability, sample_weight=np.array([1.0, 2.0, 0.5]))
    for k in range(4):
        metric = metric_class()
        metric.update_state(truth[..., k : k + 1], probability[..., k : k + 1], np.array([1.0, 2.0, 0.5]))
        alone.append(value(metric))
    assert len(set(alone)) == 4
    assert value(together) == pytest.approx(np.mean(alone), abs=1e-6)


def test_the_mean_over_the_patches_that_have_the_structure():
    truth = np.zeros((4, 2, 2, 2, 2), "uint8")
    truth[0, 0, 0, 0, 0] = truth[1, ..., 0] = truth[2, 0, :, :, 1] = 1  # the last patch has none
    probability = np.full(truth.shape, 0.25, "float32")
    probability[0, 0, 0, :, 0] = probability[1, 1, ..., 0] = probability[2, 0, 0, :, 1] = probability[3] = 0.75
    metric = DiceScore(structures=2, exclusive=False, per_patch=True)
    for batch in range(0, 4, 2):
        metric.update_state(truth[batch : batch + 2], probability[batch : batch + 2])
    # 2 * 1 / (1 + 2) and 2 * 4 / (8 + 4) of the first structure, 2 * 2 / (4 + 2) of the second.
    assert value(metric) == pytest.approx(((2 / 3 + 8 / 12) / 2 + 4 / 6) / 2, abs=1e-6)
    pooled = DiceScore(structures=2, exclusive=False)
    pooled.update_state(truth, probability)
    assert value(pooled) == pytest.approx((2 * 5 / (9 + 14) + 2 * 2 / (4 + 10)) / 2, abs=1e-6)


@pytest.fixture
def mixed_float16():
    with global_policy("mixed_float16"):
        yield


@pytest.fixture
def batches():
    rng = np.random.default_rng(1)
    truth = (rng.random((6, 5, 4, 3, 1)) < 0.3).astype("uint8")
    return truth, rng.random(truth.shape).astype("float32")


@pytest.mark.parametrize("metric_class", METRICS.values())
def test_batches_add_up_and_reset(metric_class, batches):
    truth, probability = batches
    whole, parts = metric_class(), metric_class()
    whole.update_state(truth, probability)
    assert 0.1 < value(whole) < 0.9
    parts.update_state(truth[:2], probability[:2])
    of_the_first = value(parts)
    parts.update_state(truth[2:], probability[2:])
    assert value(parts) == pytest.approx(value(whole), abs=1e-6)
    assert value(parts) != pytest.approx(of_the_first, abs=1e-4)
    parts.reset_state()
    parts.update_state(truth[:2], probability[:2])
    assert value(parts) == pytest.approx(of_the_first, abs=1e-6)


@pytest.mark.parametrize("metric_class", METRICS.values())
def test_sample_weight(metric_class, batches):
    truth, probability = batches
    weights = np.array([2, 0, 1, 0, 0, 1], "float32")
    repeated, weighted, by_voxel = metric_class(), metric_class(), metric_class()
    repeated.update_state(truth[[0, 0, 2, 5]], probability[[0, 0, 2, 5]])
    weighted.update_state(truth, probability, sample_weight=weights)
    assert value(weighted) == pytest.approx(value(repeated), abs=1e-6)
    everywhere = np.broadcast_to(weights[:, None, None, None, None], truth.shape)
    by_voxel.update_state(truth, probability, sample_weight=everywhere)
    assert value(by_voxel) == pytest.approx(value(repeated), abs=1e-6)


@pytest.mark.parametrize(
    "metric",
    [
        DiceScore(threshold=0.3, structures=2, exclusive=False, per_patch=True, name="dsc"),
        AveragePrecision(50, 2, name="ap"),
    ],
    ids=METRICS,
)
def test_config(metric):
    text = json.dumps(keras.saving.serialize_keras_object(metric))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(metric)
    assert again.get_config() == metric.get_config()
    assert {0.3, 50} & set(again.get_config().values())
    assert (again.structures, getattr(again, "exclusive", False)) == (2, False)


@pytest.mark.parametrize("bins", [1, 0, 10.0, "many"])
def test_wrong_bins(bins):
    with pytest.raises(ValueError, match=f"^`bins` must be an integer of 2 or more. Received: {bins!r}$"):
        AveragePrecision(bins=bins)


@pytest.mark.usefixtures("mixed_float16")
def test_in_fit_and_evaluate(batches):
    truth, x = batches
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), keras.layers.Conv3D(1, 1, activation="sigmoid", dtype="float32")]
    )
    model.compile("sgd", loss=DiceLoss(), metrics=[DiceScore(), AveragePrecision()])
    history = model.fit(x, truth, batch_size=2, verbose=0).history
    assert set(history) == {"loss", "dice_score", "average_precision"}
    model.layers[-1].set_weights([np.full((1, 1, 1, 1, 1), 4.0), np.array([-2.0])])
    found = model.evaluate(x, truth, batch_size=2, return_dict=True, verbose=0)
    predicted = 1 / (1 + np.exp(2 - 4 * x))
    dice = 2 * (truth * (predicted > 0.5)).sum() / (truth.sum() + (predicted > 0.5).sum())
    assert found["dice_score"] == pytest.approx(dice, abs=1e-6)
    levels = np.floor(predicted * 200)
    assert found["average_precision"] == pytest.approx(average_precision_score(truth.ravel(), levels.ravel()), abs=1e-5)


@pytest.mark.usefixtures("mixed_float16")
def test_large_batches_stay_exact():
    """A batch of the paper's size: its sums are far above the largest float16 number, and its voxels half of them."""
    rng = np.random.default_rng(0)
    shape = (8, 16, 256, 256, 1)
    truth = (rng.random(shape, dtype="float32") < 0.05).astype("uint8")
    # Middles of 200 levels, which float16 does not carry into the next.
    level = (rng.random(shape, dtype="float32") ** 2 * 200).astype("uint8")
    level = np.maximum(level, np.where(truth, level[::-1], 0))
    probability = ((level + 0.5) / 200).astype("float16")
    exact = probability.astype("float64")

    loss = to_numpy(DiceLoss()(truth, probability)).item()
    expected = (2 * exact[truth == 1].sum() + 1) / (exact.sum() + truth.sum() + 1)
    assert 1 - loss == pytest.approx(expected, rel=1e-4)

    dice = DiceScore()
    dice.update_state(truth, probability)
    predicted = exact > 0.5
    expected = 2 * (predicted & (truth == 1)).sum() / (predicted.sum() + truth.sum())
    assert value(dice) == pytest.approx(expected, rel=1e-4)

    ap = AveragePrecision()
    ap.update_state(truth, probability)
    # Eq. 15-17 on the counts of each level, from the highest; a sort of all voxels would take longer.
    positives, all_voxels = (np.bincount(level[m].ravel(), minlength=200)[::-1] for m in (truth == 1, truth >= 0))
    expected = (positives / positives.sum() * positives.cumsum() / all_voxels.cumsum()).sum()
    assert value(ap) == pytest.approx(expected, rel=1e-4)
