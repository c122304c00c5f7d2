"""Accepted and corrected masks as files for other programs."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import SimpleITK as sitk

from keras_mmfnet._files import new_folder, write
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.image_io import read_image
from keras_mmfnet.data.layouts import MASKS_FILE
from keras_mmfnet.export import Structure, write_image, write_rtstruct, write_segmentation
from keras_mmfnet.inference import mask_file
from keras_mmfnet.review.corrections import read_version, versions_in
from keras_mmfnet.review.patients import ReviewPatient

_log = logging.getLogger(__name__)
_DICOM = {"rtstruct": write_rtstruct, "seg": write_segmentation}


def export_corrections(
    patients: Sequence[ReviewPatient],
    corrections: str | os.PathLike,
    folder: str | os.PathLike,
    dicom: Iterable[str] = (),
) -> list[Path]:
    """Writes the last version of each accepted or corrected patient: `PATIENT.nii.gz`, and DICOM files if wanted.

    The folder can be trained on: `masks.json` names the folders of the images, and `find_cases` finds the patients of
    both, the reviewed ones with these masks. A single structure has the label value that the recipe reads.

    Args:
        patients: The patients; those without a version are passed over.
        corrections: Folder of the corrections.
        folder: A new folder for the files.
        dicom: `"rtstruct"` for `PATIENT_rtstruct.dcm`, `"seg"` for `PATIENT_seg.dcm`. An empty mask has none.

    Returns:
        The files.

    Raises:
        ValueError: No mask was accepted or corrected, the images are no DICOM series or not those that were segmented,
            or a mask is of other structures or on another grid.
        FileExistsError: The folder exists.
    """
    folder, wanted = Path(folder), list(dicom)
    found = {patient: versions for patient in patients if (versions := versions_in(corrections, patient))}
    for patient in patients:
        if Path(corrections, patient.name, "strokes").exists():
            _log.warning("%s: what was drawn since the last version is not saved, and is left out", patient.name)
    if not found:
        raise ValueError(f"{corrections}: masks that were accepted or corrected are expected. Received: none")
    series = {patient: patient.case.images[patient.sequences[0]] for patient in found}
    if files := [patient.name for patient in found if wanted and not isinstance(series[patient], Series)]:
        raise ValueError(f"patients of DICOM series are expected for {', '.join(wanted)}. Received: {', '.join(files)}")
    files = {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as filled:
        for patient, versions in found.items():
            patient.require_same_images()
            masks, about = versions[-1].masks, versions[-1].about
            images = read_version(versions[-1], patient)
            drawn = [Structure(n, image) for n, image in images.items() if sitk.GetArrayViewFromImage(image).any()]
            for kind in wanted if drawn else ():
                path = filled / f"{patient.name}_{kind}.dcm"
                _DICOM[kind](drawn, series[patient], path, reviewed_by=about["by"])
            names = {one: mask_file(patient.name, one) for one in masks}
            for one, name in names.items():
                _write(masks[one], patient.recipe.structures, filled / name)
            named = list(patient.recipe.named_structures)
            files[patient.name] = {one or named[0]: name for one, name in names.items()} if named else names[None]
        about = {"images": list(dict.fromkeys(str(patient.place.absolute()) for patient in patients)), "masks": files}
        write(filled / MASKS_FILE, json.dumps(about, indent=2) + "\n")
    return sorted(folder.iterdir())


def _write(mask, structures, path):
    """Copies the file of a mask. A single structure, which has 1 there, gets the label that the recipe reads."""
    labels = next(iter(structures.values())) if len(structures) == 1 else None
    if isinstance(labels, tuple) and 1 not in labels:
        write_image(sitk.Cast(read_image(mask, mask.name), sitk.sitkInt32) * labels[0], path)
    else:
        shutil.copyfile(mask, path)
