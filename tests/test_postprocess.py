import numpy as np
import pytest
from scipy import ndimage

from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.postprocess import MaskRule, PostProcessing, choose, level_half

# 10 cubic mm.
SPACING = (2.5, 2.0, 2.0)


def processed(probability, spacing=SPACING, **rule):
    """The mask of one structure."""
    rules = PostProcessing(structures={"tumour": MaskRule(**rule)})
    return rules.apply(probability[..., None], spacing)[..., 0]


def random_probability(structures, seed=0, shape=(6, 14, 15)):
    """Softmax of smooth noise, the background's logit 0; the classes' probabilities are the second value."""
    logits = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*shape, structures)), (1, 1, 1, 0)) * 12
    exponents = np.exp(np.concatenate([np.zeros((*shape, 1)), logits], axis=-1))
    classes = (exponents / exponents.sum(axis=-1, keepdims=True)).astype(np.float32)
    return classes[..., 1:], classes


def test_the_default_is_a_threshold_of_one_half_or_the_most_probable_class():
    one, _ = random_probability(1)
    one[0, 0, 0], one[0, 0, 1] = 0.5, np.nextafter(np.float32(0.5), np.float32(0))
    np.testing.assert_array_equal(PostProcessing.default(["tumour"]).apply(one, SPACING), one >= 0.5)
    for threshold in (0.3, 0.6, 0.7):
        np.testing.assert_array_equal(processed(one[..., 0], threshold=threshold), one[..., 0] >= threshold)
    three, classes = random_probability(3)
    masks = PostProcessing.default("abc").apply(three, SPACING)
    np.testing.assert_array_equal(masks, classes.argmax(axis=-1)[..., None] == [1, 2, 3])
    overlapping = PostProcessing.default("abc", exclusive=False).apply(three, SPACING)
    np.testing.assert_array_equal(overlapping, three >= 0.5)


def test_exclusive_masks_are_disjoint_by_any_rules():
    probability, classes = random_probability(3)
    low = MaskRule(threshold=0.1, fill_holes=True)
    masks = PostProcessing(structures={"a": low, "b": low, "c": MaskRule(threshold=0.7)}).apply(probability, SPACING)
    assert masks.any(axis=(0, 1, 2)).all()
    assert masks.sum(axis=-1).max() == 1
    # A threshold is of a structure against the background.
    likeliest = classes[..., 1:].argmax(axis=-1)
    np.testing.assert_array_equal(masks[..., 2], (likeliest == 2) & (classes[..., 3] >= 0.7 / 0.3 * classes[..., 0]))


def test_what_no_structure_reaches_is_not_looked_at():
    """Each mask is that of the definition over the whole volume, whichever threshold decides the box."""
    probability, _ = random_probability(3, seed=1)
    probability[:, :, 8:] *= 0.1
    background = 1 - probability.sum(axis=-1, keepdims=True)
    score = probability / (probability + background)
    likeliest = probability.argmax(axis=-1)[..., None] == range(3)
    for thresholds in ((0.3, 0.3, 0.3), (0.05, 0.6, 0.9), (0.9, 0.8, 0.7)):
        rules = {name: MaskRule(threshold=t) for name, t in zip("abc", thresholds, strict=True)}
        masks = PostProcessing(structures=rules).apply(probability, SPACING)
        np.testing.assert_array_equal(masks, likeliest & (score >= thresholds))
        assert masks.any(axis=(0, 1, 2)).all()


@pytest.mark.parametrize("exclusive", [True, False])
def test_nothing_is_found_where_no_structure_reaches_anything(exclusive):
    nothing, truth = np.zeros((4, 5, 6, 2), np.float32), np.zeros((4, 5, 6, 2), bool)
    truth[1:3, 1:3, 1:3, 0] = True
    assert not PostProcessing.default(["a", "b"], exclusive).apply(nothing, (1, 1, 1)).any()
    rules, gains = choose([(nothing, truth, (1, 1, 1))], ["a", "b"], exclusive)
    assert rules == PostProcessing.default(["a", "b"], exclusive)
    assert gains["a"] == {"patients": 1, "before": 0.0, "after": 0.0}


def test_components():
    probability = np.zeros((5, 12, 12), np.float32)
    probability[1, 1:3, 1:4] = 0.9
    probability[2, 3, 4] = 0.9  # one component of 7 voxels, 0.07 ml, joined at a corner
    probability[2:4, 7, 7] = 0.9
    probability[4, 11, 11] = 0.9
    big, pair, speck = (np.zeros(probability.shape, bool) for _ in range(3))
    big[:, :5] = probability[:, :5] > 0
    pair[2:4, 7, 7] = speck[4, 11, 11] = True
    np.testing.assert_array_equal(processed(probability), big | pair | speck)
    np.testing.assert_array_equal(processed(probability, smallest_ml=0.02), big | pair)
    np.testing.assert_array_equal(processed(probability, smallest_ml=0.021), big)
    np.testing.assert_array_equal(processed(probability, largest_only=True), big)
    assert not processed(probability, smallest_ml=0.08, largest_only=True).any()
    assert not processed(0 * probability, smallest_ml=0.1, largest_only=True, fill_holes=True).any()


def test_holes_are_what_is_enclosed_on_all_sides():
    mask = np.zeros((7, 12, 12), bool)
    mask[1:6, 2:9, 2:9] = True
    mask[3, 4, 4] = mask[2:4, 6, 6] = False
    mask[5, 8, 8] = mask[1, 3, 3] = False  # open to the outside
    filled = processed(mask.astype(np.float32), fill_holes=True)
    np.testing.assert_array_equal(filled, ndimage.binary_fill_holes(mask))
    assert filled.sum() == mask.sum() + 3
    # A hole at the border of the volume is open.
    border = np.ones((3, 5, 5), np.float32)
    border[0, 2, 2] = 0
    assert not processed(border, fill_holes=True)[0, 2, 2]
    # A voxel that is another structure more probably is not filled.
    probability = np.zeros((7, 12, 12, 2), np.float32)
    probability[mask, 0] = 0.9
    probability[3, 4, 4] = (0.1, 0.3)
    rules = PostProcessing(structures={"rim": MaskRule(fill_holes=True), "core": MaskRule()})
    masks = rules.apply(probability, SPACING)
    assert not masks[3, 4, 4].any()
    assert masks[2:4, 6, 6, 0].all()


def test_the_rules_as_json():
    rules = PostProcessing(structures={"b": MaskRule(threshold=0.4, smallest_ml=0.5), "a": MaskRule()}, exclusive=False)
    again = PostProcessing.model_validate_json(rules.model_dump_json())
    assert again == rules
    assert list(again.structures) == ["b", "a"]
    assert str(rules.structures["b"]) == "from a probability of 0.4, components from 0.5 ml"
    for wrong in ({"threshold": 0.0}, {"threshold": 1.0}, {"smallest_ml": -1.0}, {"biggest_only": True}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MaskRule(**wrong)


def test_an_ensemble_has_the_medians_and_the_majority():
    several = [
        PostProcessing(structures={"tumour": MaskRule(threshold=t, smallest_ml=ml, largest_only=only)})
        for t, ml, only in ((0.3, 0.0, True), (0.4, 0.0, True), (0.7, 2.0, False))
    ]
    assert PostProcessing.of_ensemble(several).structures == {"tumour": MaskRule(threshold=0.4, largest_only=True)}
    two = PostProcessing.of_ensemble(several[1:]).structures["tumour"]
    assert (two.threshold, two.smallest_ml, two.largest_only) == (pytest.approx(0.55), 1.0, False)


def test_contours_follow_the_threshold():
    probability = np.linspace(0, 1, 11, dtype=np.float32)
    level = level_half(probability, 0.4)
    assert level.dtype == np.float32
    np.testing.assert_array_equal(level >= 0.5, probability >= 0.4)
    np.testing.assert_allclose(level[[0, 2, 4, 7, 10]], [0, 0.25, 0.5, 0.75, 1], atol=1e-6)
    assert level_half(probability, 0.5) is probability


def test_channels_must_be_the_structures():
    rules = PostProcessing.default(["tumour"])
    with pytest.raises(ValueError, match=r"\(depth, height, width, 1\).*Received: \(2, 3, 4\)"):
        rules.apply(np.zeros((2, 3, 4)), SPACING)
    with pytest.raises(ValueError, match=r"Received: \(2, 3, 4, 2\)"):
        choose([(np.zeros((2, 3, 4, 1)), np.zeros((2, 3, 4, 2)), SPACING)], ["tumour"])


# --- choosing


def patient(seed, shape=(10, 30, 30), tumour=True, islands=3, height=0.9, hollow=False):
    """A probability with false islands of up to 27 voxels, and the expert's mask: `(probability, truth, spacing)`."""
    rng = np.random.default_rng(seed)
    truth, probability = np.zeros(shape, bool), np.full(shape, 0.02, np.float32)
    if tumour:
        truth[2:8, 4:14, 4:14] = True
        probability[truth] = height
    if hollow:
        probability[4:6, 7:11, 7:11] = 0.1
    for _ in range(islands):
        z, y, x = rng.integers((0, 17, 0), np.subtract(shape, 3))
        probability[z : z + 3, y : y + 3, x : x + 3] = 0.9
    return probability[..., None], truth[..., None], SPACING


def test_the_gain_is_what_the_metrics_say():
    cases = [patient(seed, hollow=seed == 1, islands=2 + seed) for seed in range(4)]
    chosen, gains = choose(iter(cases), ["tumour"])
    before, after = (
        np.mean(
            [evaluate_case(p[..., 0], t[..., 0], s, predicted=rules.apply(p, s)[..., 0])["dsc"] for p, t, s in cases]
        )
        for rules in (PostProcessing.default(["tumour"]), chosen)
    )
    assert gains["tumour"] == {"patients": 4, "before": pytest.approx(before), "after": pytest.approx(after)}
    assert before < 0.95
    assert after == 1
    rule = chosen.structures["tumour"]
    assert rule.fill_holes
    # All are equally good: of the sizes that remove all islands the smallest, and no other rule beside it.
    assert rule.threshold == 0.5
    assert rule.smallest_ml > 0
    assert not rule.largest_only


def test_the_threshold_is_lowered_where_tumours_are_missed():
    chosen, gains = choose([patient(0, height=0.45, islands=0), patient(1, height=0.42, islands=0)], ["tumour"])
    assert chosen.structures == {"tumour": MaskRule(threshold=0.4)}
    assert (gains["tumour"]["before"], gains["tumour"]["after"]) == (0, 1)


def test_the_default_stays_where_nothing_is_gained():
    cases = [patient(seed, islands=0) for seed in range(3)]
    assert choose(cases, ["tumour"])[0] == PostProcessing.default(["tumour"])
    # A false voxel of 600: a gain of less than the margin.
    cases[0][0][9, 29, 29] = 0.9
    chosen, gains = choose(cases, ["tumour"])
    assert chosen == PostProcessing.default(["tumour"])
    assert gains["tumour"]["before"] == gains["tumour"]["after"] < 1
    assert choose(cases, ["tumour"], margin=0)[0] != chosen


def test_patients_without_the_structure_do_not_count():
    # Largest only would remove one of two true lesions.
    probability, truth, _ = patient(0, islands=0)
    probability[1:4, 20:24, 20:24] = 0.9
    truth[1:4, 20:24, 20:24] = True
    empty = [patient(seed, tumour=False) for seed in range(5)]
    chosen, gains = choose([(probability, truth, SPACING), *empty], ["tumour"])
    assert chosen == PostProcessing.default(["tumour"])
    assert gains["tumour"] == {"patients": 1, "before": 1, "after": 1}
    chosen, gains = choose(empty, ["tumour"])
    assert chosen == PostProcessing.default(["tumour"])
    assert gains["tumour"] == {"patients": 0, "before": None, "after": None}


@pytest.mark.parametrize("exclusive", [True, False])
def test_each_structure_has_its_own_rule(exclusive):
    cases = []
    for seed in range(2):
        one, truth, _ = patient(seed, islands=6)
        other = np.zeros_like(one)
        true_other = np.zeros_like(truth)
        true_other[3:6, 4:14, 16:20] = True
        other[true_other] = 0.45
        one[true_other] = 0.0
        cases.append((np.concatenate([one, other], -1), np.concatenate([truth, true_other], -1), SPACING))
    chosen, gains = choose(cases, ["a", "b"], exclusive)
    assert chosen.structures["b"] == MaskRule(threshold=0.4)
    assert chosen.structures["a"].smallest_ml > 0
    assert gains["b"] == {"patients": 2, "before": 0, "after": 1}
    for probability, truth, spacing in cases:
        np.testing.assert_array_equal(chosen.apply(probability, spacing), truth)
