import dataclasses
import hashlib
import itertools


@dataclasses.dataclass(frozen=True)
class Fold:
    """The patients of one fold of a cross-validation, by name.

    Args:
        train: Patients whose patches train the network.
        validation: Patients who choose the best epoch.
        test: Patients who are only segmented in the end.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def five_folds(names, folds=5, validation_fraction=0.25, seed=0):
    """Divides patients into the folds of a cross-validation.

    The same names and seed give the same folds, in whatever order the names come and on every computer.

    Args:
        names: The patients' names, each once.
        folds: Number of folds; each patient is in the test set of exactly one.
        validation_fraction: Share of the patients outside the test set that is held back for validation, rounded,
            at least one patient.
        seed: Another seed gives another division.

    Returns:
        A list of `folds` times `Fold`, the names in each sorted.

    Raises:
        ValueError: Fewer than two folds, a name twice, fewer patients than folds, or too few patients to train on one
            and validate on another.

    Reference: Chen et al., MMFNet, section IV-C.
    """
    names = sorted(names)
    if folds < 2:
        raise ValueError(f"`folds` must be 2 or more. Received: folds={folds}")
    if not 0 < validation_fraction < 1:
        raise ValueError(
            f"`validation_fraction` must be between 0 and 1. Received: validation_fraction={validation_fraction}"
        )
    twice = sorted({name for name, following in itertools.pairwise(names) if name == following})
    if twice:
        raise ValueError(f"each patient's name must occur once. Received more than once: {twice}")
    if len(names) < folds:
        raise ValueError(f"{folds} folds need at least {folds} patients. Received: {len(names)} patients")
    largest_test = -(-len(names) // folds)
    if len(names) - largest_test < 2:
        raise ValueError(
            f"{folds} folds must leave a patient to train on and one to validate beside {largest_test} to test. "
            f"Received: {len(names)} patients"
        )

    shuffled = _shuffle(names, seed)
    division = []
    for fold in range(folds):
        test = shuffled[fold::folds]
        rest = _shuffle(set(names) - set(test), seed, fold)
        held_back = min(max(1, round(validation_fraction * len(rest))), len(rest) - 1)
        division.append(Fold(*(tuple(sorted(part)) for part in (rest[held_back:], rest[:held_back], test))))
    return division


def _shuffle(names, *key):
    """The names in an order that depends on them and the key alone, not on any library's random generator."""
    return sorted(names, key=lambda name: hashlib.sha256(repr((*key, name)).encode()).digest())
