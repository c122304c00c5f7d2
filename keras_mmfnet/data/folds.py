import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.dicom import Series, read_tags
from keras_mmfnet.data.image_io import read_grid, read_image

# PatientID and StudyInstanceUID.
_STUDY = (0x00100020, 0x0020000D)


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


def five_folds(
    names: Iterable[str],
    folds: int = 5,
    validation_fraction: float = 0.25,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> list[Fold]:
    """Divides patients into the folds of a cross-validation (section IV-C).

    The same names, groups and seed give the same folds, in whatever order the names come and on every computer.

    Args:
        names: The patients' names, each once.
        folds: Number of folds; each patient is in the test set of exactly one.
        validation_fraction: Share of the patients outside the test set that is held back for validation, rounded,
            at least one patient.
        seed: Another seed gives another division.
        groups: The group of each patient by name. A group is never divided among training, validation and test, so
            the folds are only as even as the groups allow. A patient without an entry is a group of one.

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
        raise ValueError(
            f"`validation_fraction` must be between 0 and 1. Received: validation_fraction={validation_fraction}"
        )
    twice = sorted({name for name, following in itertools.pairwise(names) if name == following})
    if twice:
        raise ValueError(f"each patient's name must occur once. Received more than once: {twice}")
    groups = groups or {}
    units = {}  # patients that stay together, by the first of their names
    for name in names:
        units.setdefault((groups.get(name), None if name in groups else name), []).append(name)
    units = {together[0]: together for together in units.values()}
    kind = "groups of patients" if len(units) < len(names) else "patients"
    if len(units) < folds:
        raise ValueError(f"{folds} folds need at least {folds} {kind}. Received: {len(units)} {kind}")

    tests = [[] for _ in range(folds)]
    # The largest first, each into the fold with the fewest patients.
    for first in sorted(_shuffle(units, seed), key=lambda first: -len(units[first])):
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
        rest = _shuffle(set(units) - set(test), seed, fold)
        patients = sum(len(units[first]) for first in rest)
        wanted, validation = min(max(1, round(validation_fraction * patients)), patients - 1), []
        for first in rest:
            if len(units[first]) + sum(len(units[one]) for one in validation) <= wanted:
                validation.append(first)
        validation = validation or [min(rest, key=lambda first: len(units[first]))]
        train = [first for first in rest if first not in validation]
        parts = [sorted(name for first in part for name in units[first]) for part in (train, validation, test)]
        division.append(Fold(*map(tuple, parts)))
    return division


def group_patients(cases: Sequence[Case], pattern: str | None = None) -> dict[str, str]:
    """Groups patients by their names; without a group for them, refuses duplicates.

    Args:
        cases: The patients.
        pattern: The recipe's `training.group`: a regular expression, searched in each name. `None`: no groups.

    Returns:
        The group by name, for `five_folds`: what the pattern's first group matched, or the whole match without one.
        Names that do not match are left out.

    Raises:
        ValueError: `find_duplicates` finds patients whose names do not match, or the pattern matches none.
    """
    matches = {case.name: re.search(pattern, case.name) for case in cases} if pattern is not None else {}
    groups = {name: match[1] if match.re.groups and match[1] else match[0] for name, match in matches.items() if match}
    if pattern is not None and not groups:
        raise ValueError(
            f"`training.group` must match the names of patients. Received: {pattern!r}, which matches none"
        )
    # Where the pattern matches, the names tell who is who.
    apart = [names for names in find_duplicates(cases) if not groups.keys() >= set(names)]
    if apart:
        listed = "; ".join(" = ".join(names) for names in apart[:20])
        raise ValueError(
            "each patient must occur once, or training and test would share images; remove the copies, or give "
            "`training.group`, a regular expression for the part of a name that tells the patient. "
            f"Received: {listed}{f'; ... and {len(apart) - 20} more' if len(apart) > 20 else ''}"
        )
    return groups


def find_duplicates(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    """Finds patients who are in the cohort several times, by the image of each one's reference modality.

    DICOM series are compared by PatientID and StudyInstanceUID, image files by their voxels, whatever the format,
    pixel type or compression. Only files of equal size and spacing are read; those that cannot be read are passed over.

    Args:
        cases: The patients.

    Returns:
        The names of each patient who occurs more than once.
    """
    alike = [cases]
    with ThreadPoolExecutor() as pool:
        for key in (_header, _voxels):
            divided = []
            for group in alike:
                by_key = {}
                for case, value in zip(group, pool.map(key, group), strict=True):
                    by_key.setdefault(value or case.name, []).append(case)
                divided += [same for same in by_key.values() if len(same) > 1]
            alike = divided
    return sorted(tuple(sorted(case.name for case in same)) for same in alike)


def _header(case):
    """Size and spacing of an image file, PatientID and StudyInstanceUID of a DICOM series; `None` if unknown."""
    source = next(iter(case.images.values()))
    try:
        if isinstance(source, Series):
            study = tuple(read_tags(source.files[0], case.name, _STUDY))
            return study if all(study) else None
        grid = read_grid(source, case.name)
        return grid.size, tuple(f"{np.float32(step):.5g}" for step in grid.spacing)
    except CaseError:
        return None


def _voxels(case):
    """A hash of the voxels of an image file; the same value for all DICOM series, which only the header compares."""
    source = next(iter(case.images.values()))
    try:
        return ("series",) if isinstance(source, Series) else sitk.Hash(read_image(source, case.name, sitk.sitkFloat32))
    except CaseError:
        return None


def _shuffle(names, *key):
    """The names in an order that depends on them and the key alone, not on any library's random generator."""
    return sorted(names, key=lambda name: hashlib.sha256(repr((*key, name)).encode()).digest())
