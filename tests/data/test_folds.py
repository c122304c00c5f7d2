import random

import numpy as np
import pytest

from keras_mmfnet.data.folds import Fold, five_folds

NAMES = [f"patient_{i}" for i in range(23)]


@pytest.mark.parametrize("count", [5, 6, 9, 23, 149])
def test_each_patient_is_tested_once_and_used_once_per_fold(count):
    names = [f"p{i}" for i in range(count)]
    division = five_folds(names)
    assert len(division) == 5
    assert sorted(name for fold in division for name in fold.test) == sorted(names)
    for fold in division:
        assert sorted([*fold.train, *fold.validation, *fold.test]) == sorted(names)
        assert abs(len(fold.test) - count / 5) < 1
        assert len(fold.validation) == max(1, round(0.25 * (count - len(fold.test))))
        assert fold.train


def test_the_order_of_the_names_does_not_matter():
    mixed = random.Random(0).sample(NAMES, len(NAMES))
    assert five_folds(mixed) == five_folds(NAMES)
    assert five_folds(iter(NAMES)) == five_folds(NAMES)


def test_the_division_stays_the_same():
    # A run that is resumed after an update must find its patients where they were.
    expected = Fold(train=("a", "b", "e"), validation=("c",), test=("d", "f"))
    assert five_folds(list("abcdef"), folds=3)[0] == expected


def test_another_seed_gives_another_division():
    assert five_folds(NAMES, seed=1) != five_folds(NAMES, seed=0)
    firsts = {five_folds(NAMES, seed=seed)[0].test for seed in range(20)}
    assert len(firsts) == 20


def test_each_patient_is_as_likely_as_any_other():
    counts = {name: 0 for name in NAMES}
    for seed in range(400):
        for name in five_folds(NAMES, seed=seed)[0].test:
            counts[name] += 1
    # 5 of 23, 400 times: 87 +- 8.
    np.testing.assert_allclose(list(counts.values()), 400 * 5 / 23, atol=4 * 8.3)


def test_the_validation_fraction_is_rounded_and_leaves_someone_to_train():
    assert len(five_folds(NAMES, folds=2, validation_fraction=0.5)[0].validation) == round(0.5 * 11)
    assert len(five_folds(list("abc"), folds=3, validation_fraction=0.01)[0].validation) == 1
    fold = five_folds(list("abc"), folds=3, validation_fraction=0.99)[0]
    assert (len(fold.train), len(fold.validation), len(fold.test)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": list("abcd")}, "5 folds need at least 5 patients. Received: 4 patients"),
        ({"names": []}, "5 folds need at least 5 patients. Received: 0 patients"),
        ({"names": list("abc"), "folds": 2}, "to train on and one to validate beside 2 to test. Received: 3 patients"),
        ({"names": list("abcdefa")}, r"must occur once. Received more than once: \['a'\]"),
        ({"names": list("abcdef"), "folds": 1}, "must be 2 or more. Received: folds=1"),
        (
            {"names": list("abcdef"), "validation_fraction": 1.0},
            "must be between 0 and 1. Received: validation_fraction=1.0",
        ),
    ],
)
def test_impossible_divisions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        five_folds(**arguments)
