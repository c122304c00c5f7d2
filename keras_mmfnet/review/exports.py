"""Accepted and corrected masks as files for other programs."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import SimpleITK as sitk

from keras_mmfnet._files import write
from keras_mmfnet.data.dicom import Series
from keras_mmfnet.data.layouts import MASKS_FILE
from keras_mmfnet.export import Structure, write_image, write_rtstruct, write_segmentation
from keras_mmfnet.inference import read_segmentation
from keras_mmfnet.review.corrections import versions_in
from keras_mmfnet.review.patients import ReviewPatient

_DICOM = {"rtstruct": write_rtstruct, "seg": write_segmentation}


def export_corrections(
    patients: Sequence[ReviewPatient],
    corrections: str | os.PathLike,
    folder: str | os.PathLike,
    dicom: Iterable[str] = (),
) -> list[Path]:
    """Writes the last version of each accepted or corrected patient: `PATIENT.nii.gz`, and DICOM files if wanted.

    The folder can be trained on: `masks.json` names the folders of the images, and `find_cases` finds the patients of
    both, the reviewed ones with these masks. One structure alone has its label value in them.

    Args:
        patients: The patients; those without a version are passed over.
        corrections: Folder of the corrections.
        folder: Folder for the files.
        dicom: `"rtstruct"` for `PATIENT_rtstruct.dcm`, `"seg"` for `PATIENT_seg.dcm`. An empty mask has none.

    Returns:
        The files.

    Raises:
        ValueError: Nobody was accepted or corrected, or the images are no DICOM series.
        FileExistsError: One of the files exists.
    """
    folder, wanted = Path(folder), list(dicom)
    found = {patient: versions for patient in patients if (versions := versions_in(corrections, patient))}
    if not found:
        raise ValueError(f"{corrections}: masks that were accepted or corrected are expected. Received: none")
    series = {patient: patient.case.images[patient.sequences[0]] for patient in found}
    if files := [patient.name for patient in found if wanted and not isinstance(series[patient], Series)]:
        raise ValueError(f"patients of DICOM series are expected for {', '.join(wanted)}. Received: {', '.join(files)}")
    tasks = []
    for patient, versions in found.items():
        masks = versions[-1].masks
        targets = {one: folder / f"{patient.name}{f'_{one}' * bool(one)}.nii.gz" for one in masks}
        tasks.append((patient, masks, targets, {kind: folder / f"{patient.name}_{kind}.dcm" for kind in wanted}))
    for *_, targets, others in tasks:
        for path in (folder / MASKS_FILE, *targets.values(), *others.values()):
            if path.exists():
                raise FileExistsError(f"{path}: a new file is expected. Received: one that exists")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for patient, masks, targets, others in tasks:
        images = read_segmentation(masks, patient.recipe.structures)
        drawn = [Structure(n, image) for n, image in images.items() if sitk.GetArrayViewFromImage(image).any()]
        for kind, path in others.items() if drawn else ():
            _DICOM[kind](drawn, series[patient], path)
            written.append(path)
        for one, path in targets.items():
            _write(masks[one], patient.recipe.structures, path)
            written.append(path)
    files = {}
    for patient, _, targets, _ in tasks:
        named = list(patient.recipe.named_structures)
        apart = {one or named[0]: path.name for one, path in targets.items()} if named else None
        files[patient.name] = apart or targets[None].name
    about = {"images": list(dict.fromkeys(str(patient.place.absolute()) for patient in patients)), "masks": files}
    write(folder / MASKS_FILE, json.dumps(about, indent=2) + "\n", replace=False)
    return [*written, folder / MASKS_FILE]


def _write(mask, structures, path):
    """Copies the file of a mask. That of one structure has 1, where the recipe may read another label."""
    labels = next(iter(structures.values())) if len(structures) == 1 else None
    if isinstance(labels, tuple) and 1 not in labels:
        write_image(sitk.ReadImage(str(mask)) * labels[0], path)
    else:
        shutil.copyfile(mask, path)
