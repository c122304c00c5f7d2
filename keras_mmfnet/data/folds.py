import csv
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from keras_mmfnet.data.case import Case
from keras_mmfnet.recipe import TrainingRecipe

# The parts of a fold in a file of nnU-Net, and in one of our own.
_PARTS = ({"train": "train", "val": "test"}, {"train": "train", "validation": "validation", "test": "test"})


@dataclasses.dataclass(frozen=True)
class Fold:
    """The patients of one fold of a cross-validation, by name.

    Args:
        train: Patients whose patches train the network.
        validation: Patients on whom the best epoch is chosen.
        test: Patients who are segmented after the training and take no part in it.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """All patients of the fold."""
        return {*self.train, *self.validation, *self.test}


def five_folds(
    names: Iterable[str],
    folds: int = 5,
    validation_fraction: float = 0.25,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    volumes: Mapping[str, float] | None = None,
) -> list[Fold]:
    """Divides patients into the folds of a cross-validation (section IV-C).

    The same names, groups, volumes and seed give the same folds, in whatever order the names come and on every
    computer.

    Args:
        names: The patients' names, each once.
        folds: Number of folds; each patient is in the test set of exactly one.
        validation_fraction: Share of the patients outside the test set that is held back for validation, rounded,
            at least one patient.
        seed: Another seed gives another division.
        groups: The group of each patient by name. A group is never divided among training, validation and test, so
            the folds are only as even as the groups allow. A patient without an entry is a group of one.
        volumes: The tumour's volume of each patient by name, whose range every part of every fold then covers: of the
            patients in the order of their volumes, neighbours go to different parts. A group counts by its largest.
            Where two units outside the test set have a tumour, so have training and validation.

    Returns:
        A list of `folds` times `Fold`, the names in each sorted.

    Raises:
        ValueError: Fewer than two folds, a name twice, fewer patients (or groups) than folds, or too few to train on
            one and validate on another.
    """
    names = sorted(names)
    if folds < 2:
        raise ValueError(f"`folds` must be 2 or more. Received: folds={folds}")
    if not 0 < validation_fraction < 1:
        received = f"validation_fraction={validation_fraction}"
        raise ValueError(f"`validation_fraction` must be between 0 and 1. Received: {received}")
    twice = sorted({name for name, following in itertools.pairwise(names) if name == following})
    if twice:
        raise ValueError(f"each patient's name must occur once. Received more than once: {twice}")
    units = _units(names, groups)
    kind = "groups of patients" if len(units) < len(names) else "patients"
    if len(units) < folds:
        raise ValueError(f"{folds} folds need at least {folds} {kind}. Received: {len(units)} {kind}")

    tests = [[] for _ in range(folds)]
    # The largest first, each into the fold with the fewest patients.
    order = itertools.chain.from_iterable(_strata(units, volumes, folds, seed))
    for first in sorted(order, key=lambda first: -len(units[first])):
        min(tests, key=lambda test: sum(len(units[one]) for one in test)).append(first)
    most = max(map(len, tests))
    if len(units) - most < 2:
        one = "patient" if kind == "patients" else "group"
        raise ValueError(
            f"{folds} folds must leave a {one} to train on and one to validate beside {most} to test. "
            f"Received: {len(units)} {kind}"
        )
    division = []
    for fold, test in enumerate(tests):
        rest = {first: units[first] for first in set(units) - set(test)}
        train, validation = _hold_back(rest, validation_fraction, volumes, seed, fold)
        division.append(Fold(train, validation, _names(test, units)))
    return division


def divide_patients(
    names: Iterable[str],
    recipe: TrainingRecipe,
    groups: Mapping[str, str] | None = None,
    splits: Sequence[Fold] | None = None,
    volumes: Mapping[str, float] | None = None,
    left_out: Collection[str] = (),
) -> list[Fold]:
    """The folds of a run: the user's own, checked against the patients, or those of `five_folds`.

    Args:
        names: The names of the patients that there are.
        recipe: The `TrainingRecipe`.
        groups: As for `five_folds`.
        splits: The user's folds, as from `read_splits`. One without validation gives some of its patients to train on
            for that, as `five_folds` does. `None`: those of `five_folds`.
        volumes: As for `five_folds`; used if the recipe has `balance`.
        left_out: Names in `splits` of patients that cannot be used; they are dropped from the folds.

    Returns:
        The folds, the names in each sorted.

    Raises:
        ValueError: As `five_folds`; or there is no such patient; a part of a fold has none; a patient or a group is in
            two parts of a fold, or a patient is tested in two folds.
    """
    volumes = volumes if recipe.balance else None
    if not splits:
        return five_folds(names, recipe.folds, recipe.validation_fraction, recipe.seed, groups, volumes)
    names, division, tested = set(names), [], {}
    for number, split in enumerate(splits):
        parts = {part: set(some) - set(left_out) for part, some in dataclasses.asdict(split).items()}
        used = sorted(name for some in parts.values() for name in some)
        if unknown := sorted(set(used) - names):
            near = difflib.get_close_matches(unknown[0], names, 1)
            meant = f"; did you mean {near[0]} for {unknown[0]}" if near else ""
            raise ValueError(
                f"--splits: fold {number} must name patients of the data{meant}. Received: {', '.join(unknown[:20])}"
            )
        units = _units(used, groups)
        divided = [unit for unit in units.values() if sum(not some.isdisjoint(unit) for some in parts.values()) > 1]
        twice = divided[0] if divided else [name for name in used if used.count(name) > 1]
        if twice:
            raise ValueError(
                f"fold {number} must have each patient, or group of patients, in one part. Received in several: "
                f"{', '.join(sorted(set(twice)))}"
            )
        if again := sorted(tested.keys() & parts["test"]):
            raise ValueError(
                f"each patient must be tested in one fold, or its numbers would count twice. Received: {again[0]} in "
                f"folds {tested[again[0]]} and {number}"
            )
        tested |= dict.fromkeys(parts["test"], number)
        rest = {first: unit for first, unit in units.items() if parts["train"] >= set(unit)}
        train, validation = tuple(sorted(parts["train"])), tuple(sorted(parts["validation"]))
        if not split.validation and len(rest) > 1:
            train, validation = _hold_back(rest, recipe.validation_fraction, volumes, recipe.seed, number)
        division.append(Fold(train, validation, tuple(sorted(parts["test"]))))
        for part, some in dataclasses.asdict(division[-1]).items():
            if not some:
                raise ValueError(f"fold {number} must have a patient for each part. Received: none for {part}")
    return division


def read_splits(path: str | os.PathLike) -> list[Fold]:
    """Reads folds from a JSON file: a list with an object of lists of patients' names for each fold.

    An object has `train`, `validation` and `test`, as the folds in a run's `cohort.json`, or `train` and `val`, as in
    nnU-Net's `splits_final.json`. nnU-Net only evaluates on `val`, so these are the patients to test; who validates is
    then chosen from `train`, see `divide_patients`.

    Args:
        path: The file.

    Returns:
        The folds; `validation` is empty where the file has none.

    Raises:
        ValueError: The file is no such list.
        OSError: The file cannot be read.
    """
    try:
        splits = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON. Received: {error}") from error
    folds = []
    for split in splits if isinstance(splits, list) and splits else [[splits]]:
        parts = next((parts for parts in _PARTS if isinstance(split, dict) and split.keys() == parts.keys()), None)
        if not parts or not all(isinstance(n, list) and all(isinstance(x, str) for x in n) for n in split.values()):
            raise ValueError(
                f'{path}: must be a list of {{"train": [names], "val": [names]}} or {{"train": ..., "validation": ..., '
                f'"test": ...}}. Received: {json.dumps(split)[:80]}'
            )
        folds.append(Fold(**{"validation": (), **{parts[key]: tuple(some) for key, some in split.items()}}))
    return folds


def read_groups(path: str | os.PathLike) -> dict[str, str]:
    """Reads which patients belong together from a CSV file with the columns `patient` and `group`.

    Args:
        path: The file; commas or semicolons separate the columns.

    Returns:
        The group by the patient's name.

    Raises:
        ValueError: A column is missing, a field is empty, or a patient is in two groups.
        OSError: The file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: groups must be CSV in UTF-8. Received: {error}") from error
    rows = csv.DictReader(text.splitlines(), delimiter=";" if ";" in text.partition("\n")[0] else ",")
    groups = {}
    try:
        if not {"patient", "group"} <= set(rows.fieldnames or ()):
            raise ValueError(
                f"{path}: must have the columns patient and group. Received: {text.partition(chr(10))[0][:80]!r}"
            )
        for row in rows:
            patient, group = ((row[column] or "").strip() for column in ("patient", "group"))
            if not (patient and group) or groups.setdefault(patient, group) != group:
                received = f"{patient!r}, {group!r}"
                raise ValueError(
                    f"{path}: line {rows.line_num}: must have a patient and its one group. Received: {received}"
                )
    except csv.Error as error:
        raise ValueError(f"{path}: groups must be CSV. Received: {error}") from error
    return groups


def _units(names, groups):
    """The patients that stay together, by the first of their names."""
    groups, units = groups or {}, {}
    for name in sorted(names):
        units.setdefault((groups.get(name), None if name in groups else name), []).append(name)
    return {together[0]: together for together in units.values()}


def _names(firsts, units):
    return tuple(sorted(name for first in firsts for name in units[first]))


def _strata(units, volumes, size, *key):
    """Units in a random order; with volumes, in strata of `size` units whose volumes are alike, from the smallest."""
    shuffled = _shuffle(units, *key)
    if volumes is None:
        return [shuffled]
    shuffled.sort(key=lambda first: max(volumes[name] for name in units[first]))
    return [_shuffle(shuffled[start : start + size], *key) for start in range(0, len(shuffled), size)]


def _hold_back(units, fraction, volumes, *key):
    """The patients to train on and those to validate on, of whole units."""
    # One of each stratum after the other.
    strata = itertools.zip_longest(*_strata(units, volumes, round(1 / fraction), *key))
    rest = [first for firsts in strata for first in firsts if first is not None]
    patients = sum(map(len, units.values()))
    wanted, validation = min(max(1, round(fraction * patients)), patients - 1), []
    for first in rest:
        if len(units[first]) + sum(len(units[one]) for one in validation) <= wanted:
            validation.append(first)
    validation = validation or [min(rest, key=lambda first: len(units[first]))]
    train = [first for first in rest if first not in validation]
    if volumes is not None:
        _share_tumours(train, validation, {first: any(volumes[name] for name in units[first]) for first in rest}, units)
    return _names(train, units), _names(validation, units)


def _share_tumours(train, validation, tumours, units):
    """Swaps two units, if one part has no tumour and the other has several."""
    for lacking, other in ((train, validation), (validation, train)):
        given = [first for first in other if tumours[first]]
        if len(given) > 1 and not any(tumours[first] for first in lacking):
            pairs = itertools.product(given, lacking)
            one, back = min(pairs, key=lambda pair: abs(len(units[pair[0]]) - len(units[pair[1]])))
            other[other.index(one)], lacking[lacking.index(back)] = back, one


def group_patients(
    cases: Sequence[Case], pattern: str | None = None, groups: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Groups patients by a list or by their names.

    Args:
        cases: The patients.
        pattern: The recipe's `training.group`: a regular expression, searched in each name. `None`: no groups.
        groups: The group of every patient by name, as from `read_groups`, in place of a pattern.

    Returns:
        The group by name, for `five_folds`: what the pattern's first group matched, or the whole match without one.
        Names that do not match are left out.

    Raises:
        ValueError: The pattern matches none; `groups` lack a patient; or there are both.
    """
    if groups is not None:
        if pattern is not None:
            raise ValueError(f"groups must come from a list or from `training.group`. Received: both, {pattern!r}")
        if lacking := [case.name for case in cases if case.name not in groups]:
            raise ValueError(f"the groups must be those of every patient. Received: none of {', '.join(lacking[:20])}")
        return {case.name: groups[case.name] for case in cases}
    matches = {case.name: re.search(pattern, case.name) for case in cases} if pattern is not None else {}
    groups = {name: match[1] if match.re.groups and match[1] else match[0] for name, match in matches.items() if match}
    if pattern is not None and not groups:
        raise ValueError(
            f"`training.group` must match the names of patients. Received: {pattern!r}, which matches none"
        )
    return groups


def _shuffle(names, *key):
    """The names in an order that depends on them and the key alone, not on any library's random generator."""
    return sorted(names, key=lambda name: hashlib.sha256(repr((*key, name)).encode()).digest())
