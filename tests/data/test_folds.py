import dataclasses
import json
import random

import numpy as np
import pytest

from keras_mmfnet.data.case import Case
from keras_mmfnet.data.folds import (
    Fold,
    divide_patients,
    five_folds,
    group_patients,
    read_groups,
    read_splits,
)
from keras_mmfnet.recipe import Recipe, TrainingRecipe

NAMES = [f"patient_{i}" for i in range(23)]
# The numbers of the patients with seed 3, in the order of their names.
STORED_TEST = [(1, 10, 14, 17, 3), (0, 12, 4, 6, 7), (16, 18, 2, 21, 22), (11, 13, 15, 8), (19, 20, 5, 9)]
STORED_VALIDATION = [(0, 16, 18, 19), (11, 18, 19, 2), (1, 10, 8, 9), (0, 14, 19, 22, 9), (15, 17, 18, 2, 21)]


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


# --- groups


def test_the_division_without_groups_is_stored():
    # Of 23 patients, as divided before there were groups.
    division = five_folds(NAMES, seed=3)
    assert [tuple(int(name.removeprefix("patient_")) for name in fold.test) for fold in division] == STORED_TEST
    assert [
        tuple(int(name.removeprefix("patient_")) for name in fold.validation) for fold in division
    ] == STORED_VALIDATION
    assert division == five_folds(NAMES, seed=3, groups={})
    assert division == five_folds(NAMES, seed=3, groups={"somebody else": "patient_1"})
    assert division == five_folds(NAMES, seed=3, groups={name: f"person of {name}" for name in NAMES[:7]})


@pytest.mark.parametrize("sizes", [[1] * 5, [2] * 10, [5, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4] * 6, [30, 1, 2, 1, 2, 9, 9]])
def test_no_group_is_divided(sizes):
    names = [f"{group}-{number}" for group, size in enumerate(sizes) for number in range(size)]
    # Who is alone need not be named.
    groups = {name: name.split("-")[0] for name in names if sizes[int(name.split("-")[0])] > 1}
    for seed in range(5):
        division = five_folds(names, seed=seed, groups=groups)
        assert division == five_folds(random.Random(seed).sample(names, len(names)), seed=seed, groups=groups)
        assert sorted(name for fold in division for name in fold.test) == sorted(names)
        for fold in division:
            parts = fold.train, fold.validation, fold.test
            assert all(parts)
            assert sorted(name for part in parts for name in part) == sorted(names)
            people = [{name.split("-")[0] for name in part} for part in parts]
            assert sum(map(len, people)) == len(set.union(*people))


def test_folds_of_groups_are_as_even_as_may_be():
    names = [f"{group}-{number}" for group in range(24) for number in range(1 + group % 4)]
    division = five_folds(names, groups={name: name.split("-")[0] for name in names})
    assert [len(fold.test) for fold in division] == [12] * 5
    assert all(abs(len(fold.validation) - 12) <= 3 for fold in division)


def test_too_few_groups_are_refused():
    groups = {name: name[0] for name in ("a1", "a2", "a3", "b1", "b2", "c", "d", "e")}
    with pytest.raises(ValueError, match=r"6 folds need at least 6 groups of patients. Received: 5 groups of patients"):
        five_folds(groups, folds=6, groups=groups)
    with pytest.raises(
        ValueError, match=r"a group to train on and one to validate beside 4 to test. Received: 5 groups"
    ):
        five_folds([f"a{n}" for n in range(9)] + list("bcde"), folds=2, groups={f"a{n}": "a" for n in range(9)})


def test_the_pattern_of_groups_is_checked():
    assert Recipe().training.group is None
    assert Recipe().replace({"training.group": r"(p\d+)_"}).training.group == r"(p\d+)_"
    with pytest.raises(ValueError, match=r"`training.group` must be a regular expression .*Received: '\(p'"):
        Recipe().replace({"training.group": "(p"})


def test_folds_balanced_by_volume_cover_its_range():
    volumes = {name: float(3**number) for number, name in enumerate(NAMES)}
    groups = {name: "several" for name in NAMES[20:]}
    for seed in range(10):
        division = five_folds(NAMES, seed=seed, volumes=volumes)
        assert division == five_folds(NAMES[::-1], seed=seed, volumes=volumes)
        ranks = [sorted(NAMES.index(name) // 5 for name in fold.test) for fold in division]
        # One patient of each fifth of the volumes, and of the last one, which has three, at most one.
        assert all(rank in ([0, 1, 2, 3], [0, 1, 2, 3, 4]) for rank in ranks)
        for fold in division:
            rest = sorted([*fold.train, *fold.validation], key=volumes.get)
            quarters = sorted(rest.index(name) // 4 for name in fold.validation)
            assert len(quarters) == len(set(quarters)) == round(0.25 * len(rest))
        together = five_folds(NAMES, seed=seed, volumes=volumes, groups=groups)
        assert all(len({name in fold.test for name in NAMES[20:]}) == 1 for fold in together)
    assert len({five_folds(NAMES, seed=seed, volumes=volumes)[0].test for seed in range(10)}) == 10


@pytest.mark.parametrize(("folds", "patients", "tumours"), [(3, 6, 3), (3, 10, 3), (5, 10, 3), (3, 20, 5)])
def test_few_tumours_are_shared_by_training_and_validation(folds, patients, tumours):
    names = NAMES[:patients]
    volumes = {name: float(max(0, number - patients + tumours + 1)) for number, name in enumerate(names)}
    for seed in range(20):
        for fold in five_folds(names, folds, seed=seed, volumes=volumes):
            assert fold.names == set(names)
            rest = sum(volumes[name] > 0 for name in (*fold.train, *fold.validation))
            if rest > 1:
                assert all(any(volumes[name] for name in part) for part in (fold.train, fold.validation))


def test_folds_from_a_file(tmp_path):
    path = tmp_path / "splits.json"
    names = [f"p{number}" for number in range(10)]
    path.write_text(json.dumps([{"train": names[:8], "val": names[8:]}, {"train": names[2:], "val": names[:2]}]))
    splits = read_splits(path)
    assert splits[0] == Fold(tuple(names[:8]), (), tuple(names[8:]))
    groups = {"p2": "x", "p3": "x", "p4": "x"}
    for seed in range(5):
        division = divide_patients(names, TrainingRecipe(seed=seed), groups, splits)
        # Those of nnU-Net's `val` are tested; others validate.
        assert [fold.test for fold in division] == [("p8", "p9"), ("p0", "p1")]
        for fold, split in zip(division, splits, strict=True):
            assert sorted([*fold.train, *fold.validation]) == list(split.train)
            assert len(fold.validation) == 2
            assert {"p2", "p3", "p4"} <= set(fold.train) or {"p2", "p3", "p4"} <= set(fold.validation)
    own = [{"train": ["p3", "p1"], "validation": ["p2"], "test": ["p0"]}]
    path.write_text("\ufeff" + json.dumps(own), encoding="utf-8")
    assert divide_patients(names, TrainingRecipe(), None, read_splits(path)) == [Fold(("p1", "p3"), ("p2",), ("p0",))]
    assert divide_patients(names, TrainingRecipe(), None, read_splits(path), left_out=["p3"])[0].train == ("p1",)
    path.write_text(json.dumps([dataclasses.asdict(fold) for fold in five_folds(names)]))
    assert divide_patients(names, TrainingRecipe(), None, read_splits(path)) == five_folds(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        pytest.param("[" * 99999, r"splits\.json: must be JSON. Received: ", id="deep"),
        ("[]", r"must be a list of .*Received: \[\[\]\]"),
        ('{"train": ["a"], "val": ["b"]}', r'must be a list of .*Received: \[{"train"'),
        ('[{"train": ["a"], "test": ["b"]}]', "must be a list of"),
        ('[{"train": ["a"], "val": [3]}]', "must be a list of"),
        ('[{"train": ["a", "b"], "val": "c"}]', "must be a list of"),
        ('[{"train": ["a", "b"], "val": ["patient"]}]', "--splits: .* mean patient_1 for patient. Received: patient"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', "fold 0 must have each patient.*Received in several: b"),
        ('[{"train": ["a", "g1"], "val": ["g2"]}]', "or group of patients, in one part. .*: g1, g2"),
        ('[{"train": ["a", "b"], "val": []}]', "fold 0 must have a patient for each part. Received: none for test"),
        ('[{"train": ["a"], "val": ["b"]}]', "Received: none for validation"),
        ('[{"train": ["g1", "g2"], "val": ["b"]}]', "Received: none for validation"),
        ('[{"train": ["a", "b"], "val": ["c"]}, {"train": ["a", "b"], "val": ["c"]}]', "Received: c in folds 0 and 1"),
    ],
)
def test_folds_that_do_not_fit(tmp_path, text, message):
    (tmp_path / "splits.json").write_text(text)
    names, groups = [*"abc", "g1", "g2", "patient_1"], {"g1": "g", "g2": "g"}
    with pytest.raises(ValueError, match=message):
        divide_patients(names, TrainingRecipe(), groups, read_splits(tmp_path / "splits.json"))


def test_groups_from_a_file(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("group,patient,date\n7,p7_before,2020\n7, p7_after,2021\n8,p8,\n9,another,\n")
    groups = read_groups(path)
    assert groups == {"p7_before": "7", "p7_after": "7", "p8": "8", "another": "9"}
    path.write_text("\ufeffpatient;group\nZoë, 1;7\n", encoding="utf-8")
    assert read_groups(path) == {"Zoë, 1": "7"}
    cases = [Case(name, {"t1": f"{name}.nii"}) for name in ("p7_before", "p7_after", "p8")]
    assert group_patients(cases, groups=groups) == {"p7_before": "7", "p7_after": "7", "p8": "8"}
    with pytest.raises(ValueError, match=r"of every patient. Received: none of p8$"):
        group_patients(cases, groups={"p7_before": "7", "p7_after": "7"})
    with pytest.raises(ValueError, match=r"a list or from `training.group`. Received: both, 'p'"):
        group_patients(cases, "p", groups)
    for text, message in (
        ("name,group\np,1\n", r"the columns patient and group. Received: 'name,group'"),
        ("", "Received: ''"),
        ("patient,group\np,\n", r"line 2: must have a patient and its one group. Received: 'p', ''"),
        ("patient,group\np\n", r"line 2: .*Received: 'p', ''"),
        ("patient,group\np," + "1" * 200_000, r"groups\.csv: groups must be CSV. Received: field larger"),
        ("patient," + "1" * 200_000, r"groups\.csv: groups must be CSV. Received: field larger"),
        ("patient,group\np,1\np,2\n", r"line 3: .*Received: 'p', '2'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_groups(path)
