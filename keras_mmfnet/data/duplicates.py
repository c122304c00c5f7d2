"""Finds who is in a cohort several times, by voxels and by the IDs of DICOM series."""

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import SimpleITK as sitk

from keras_mmfnet.data._dicom_header import read_header
from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.dicom import Series, patient_id
from keras_mmfnet.data.geometry import upright_grid
from keras_mmfnet.data.image_io import read_grid, read_image

_log = logging.getLogger(__name__)

# PatientID and StudyInstanceUID.
_STUDY = (0x00100020, 0x0020000D)


def refuse_duplicates(copies: Sequence[Collection[str]], groups: Mapping[str, str]) -> None:
    """Refuses patients who occur several times, unless they are in one group.

    Args:
        copies: The names of each patient who occurs more than once, as from `find_duplicates`.
        groups: The group of each patient by name, as from `group_patients`.

    Raises:
        ValueError: One of them is in no group, or two are in different groups.
    """
    if apart := _apart(copies, groups):
        raise ValueError(
            "each patient must occur once, or training and test would share images; remove the copies, or give one "
            "group to all of a patient's by `training.group`, a regular expression for the part of a name that tells "
            f"the patient, or by --groups. Received: {_equal(apart)}"
        )


def check_ids(cases: Sequence[Case], groups: Mapping[str, str]) -> None:
    """Refuses DICOM patients of one study unless they are in groups, and warns of others with one PatientID.

    Groups are trusted: anonymisation may have left one study or ID to several persons.

    Args:
        cases: The patients.
        groups: The group of each patient by name, as from `group_patients`.

    Raises:
        ValueError: Patients have one PatientID and one StudyInstanceUID, and are in no group.
    """
    refuse_duplicates([_names_of(same) for same in _alike(cases, map(_study, cases))], dict.fromkeys(groups, ""))
    if apart := _apart(same_ids(cases), dict.fromkeys(groups, "")):
        about = "These have the same PatientID; if they are one person, give them one group (--groups), or training and"
        _log.warning("%s test would share the person: %s", about, _equal(apart))


def same_ids(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    """Finds DICOM patients with the same PatientID, but for what anonymisation leaves to all, such as `ANON`.

    Args:
        cases: The patients.

    Returns:
        The names of those with each such PatientID.
    """

    def patient(case):
        source = next(iter(case.images.values()))
        return patient_id(source) if isinstance(source, Series) else None

    return [_names_of(same) for same in _alike(cases, map(patient, cases))]


def find_duplicates(cases: Sequence[Case]) -> list[tuple[str, ...]]:
    """Finds patients who are in the cohort several times, by the voxels of each one's reference modality.

    Format, pixel type, compression and the order of the axes make no difference. Only images of equal size and spacing
    are read; those that cannot be read are passed over.

    Args:
        cases: The patients.

    Returns:
        The names of each patient who occurs more than once.
    """
    with ThreadPoolExecutor() as pool:
        alike = _alike(cases, pool.map(_grid, cases))
        return sorted(_names_of(same) for group in alike for same in _alike(group, pool.map(_voxels, group)))


def _alike(cases, values):
    """The cases that have the same value, two or more; a value that is empty is no one's."""
    found = {}
    for case, value in zip(cases, values, strict=True):
        if value:
            found.setdefault(value, []).append(case)
    return [same for same in found.values() if len(same) > 1]


def _names_of(cases):
    return tuple(sorted(case.name for case in cases))


def _apart(alike, groups):
    """Those of some names that belong together who are not in one group."""
    return [sorted(names) for names in alike if len({groups.get(name, (name,)) for name in names}) > 1]


def _equal(several):
    more = f"; ... and {len(several) - 20} more" if len(several) > 20 else ""
    return "; ".join(" = ".join(names) for names in several[:20]) + more


def _study(case):
    """PatientID and StudyInstanceUID of a DICOM series, `None` if they are unknown."""
    source = next(iter(case.images.values()))
    try:
        study = tuple(map(read_header(source.files[0], case.name).get, _STUDY)) if isinstance(source, Series) else ()
    except CaseError:
        return None
    return study if all(study) else None


def _grid(case):
    """Size and spacing of the image in the order of the patient's axes."""
    try:
        grid = upright_grid(read_grid(next(iter(case.images.values())), case.name))
    except CaseError:
        return None
    return grid.size, tuple(f"{np.float32(step):.5g}" for step in grid.spacing)


def _voxels(case):
    """A hash of the voxels in the order of the patient's axes."""
    try:
        image = read_image(next(iter(case.images.values())), case.name, sitk.sitkFloat32)
    except CaseError:
        return None
    return sitk.Hash(sitk.DICOMOrient(image, "LPS"))
