import dataclasses
import functools
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import counted, session

_log = logging.getLogger(__name__)
_DICOM = {"rtstruct": "_rtstruct.dcm", "seg": "_seg.dcm"}
# What each file of a patient ends with.
_FILES = {
    **{"probability": "_probability.nii.gz", "disagreement": "_disagreement.nii.gz", **_DICOM, "picture": ".png"},
    "mask": ".nii.gz",
}


def segment(
    run: options.RunFolder,
    patients: Annotated[Path, typer.Argument(metavar="INPUT", help="A patient or a folder of patients.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for PATIENT.nii.gz and the files chosen below.")],
    rtstruct: Annotated[bool, typer.Option("--rtstruct", help="DICOM structure set, PATIENT_rtstruct.dcm.")] = False,
    seg: Annotated[bool, typer.Option("--seg", help="DICOM segmentation, PATIENT_seg.dcm.")] = False,
    probability: Annotated[bool, typer.Option("--probability", help="Probability of tumour, as NIfTI.")] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="Standard deviation over the folds' networks, as NIfTI.")
    ] = False,
    picture: Annotated[bool, typer.Option("--picture", help="PNG of a slice with the contours.")] = False,
    structure: Annotated[str, typer.Option(metavar="NAME", help="Name of the contour in DICOM.")] = "tumour",
    tolerance: Annotated[
        float, typer.Option(metavar="MM", min=0, help="How far structure set contours may move to save points.")
    ] = 0.0,
    max_points: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Most points of a contour; more are refused. [any number]")
    ] = None,
    fold: Annotated[list[int] | None, typer.Option(metavar="N", help="Fold whose network counts. [all]")] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Average with the mirror image.")] = False,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="Weight the middle of each window more.")] = False,
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Segments one patient or a folder of patients with the networks of a run."""
    chosen = {"rtstruct": rtstruct, "seg": seg, "probability": probability, "disagreement": disagreement}
    wanted = [name for name, wish in {**chosen, "picture": picture}.items() if wish]
    with session(quiet) as terminal:
        recipe = options.recipe_of_run(run)
        if not 1 <= len(structure) <= 64 or "\\" in structure:
            raise ValueError(f"--structure: 1 to 64 characters without a backslash are expected. Received: {structure}")
        if mirror and recipe.patches.flip_axis is None:
            raise ValueError("--mirror: networks trained with `patches.flip_axis` are expected. Received: none")
        from keras_mmfnet._files import write
        from keras_mmfnet._log import progress
        from keras_mmfnet.data import find_patients
        from keras_mmfnet.data.case import group_messages
        from keras_mmfnet.data.dicom import Series
        from keras_mmfnet.export import write_rtstruct, write_segmentation
        from keras_mmfnet.inference import segment_ensemble

        failed = []
        found = find_patients(patients, recipe.data, failed.append)
        total = len(found) + len(failed)
        _require_distinct(found)
        cases = [c for c in found if not (rtstruct or seg) or isinstance(next(iter(c.images.values())), Series)]
        expected = "must be DICOM series for --rtstruct and --seg. Received: image files"
        failed += [ValueError(f"{case.name}: {expected}") for case in found if case not in cases]
        start_backend(device)
        from keras_mmfnet.run import Run

        opened = Run(run)
        folds = fold or opened.trained_folds()
        files = [opened.network(number, "mmfnet") for number in folds]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]
        todo = []
        for case in cases:
            record = {"folds": folds, "mirror": mirror, "gaussian": gaussian}
            try:
                record["source"] = _source(case, recipe.data, hashes)
                _require_same(out, case, record)
            except ValueError as error:
                failed.append(error)
            else:
                todo += [(case, record, missing)] if (missing := _missing(out, case, wanted)) else []
        if done := total - len(todo) - len(failed):
            _log.info("Segmented already: %d of %s", done, counted(total, "patient"))
        networks = options.load_networks(opened, fold) if todo else []
        if disagreement and len(networks) == 1:
            raise ValueError("--disagreement: networks of two or more folds are expected. Received: one network")
        if todo:
            out.mkdir(parents=True, exist_ok=True)
        predict = functools.partial(segment_ensemble, networks, recipe=recipe, mirror=mirror, gaussian=gaussian)
        write_dicom = {
            "rtstruct": functools.partial(write_rtstruct, name=structure, tolerance=tolerance, max_points=max_points),
            "seg": lambda mask, series, path, probability: write_segmentation(mask, series, path, structure),
        }
        for number, (case, record, missing) in enumerate(todo, start=1):
            try:
                write(out / f"{case.name}.json", json.dumps(record, indent=2) + "\n")
                line = _segment(case, predict, recipe, missing, write_dicom)
                seen = opened.seen_in_training(case, folds) if "DSC" in line else ""
                _log.info("%d of %d: %s", number, len(todo), f"{line} ({seen})" if seen else line)
            except ValueError as error:
                if not _there(out, case):
                    (out / f"{case.name}.json").unlink(missing_ok=True)
                failed.append(error)
                _log.warning("%d of %d: %s was not segmented, see the end", number, len(todo), case.name)
            progress("segmenting", number, len(todo))
        if failed:
            lines = [f"  {line}" for line in group_messages(map(str, failed))]
            raise ValueError("\n".join([f"not segmented: {len(failed)} of {counted(total, 'patient')}", *lines]))
        terminal.say(out, always=True)


def _require_distinct(cases):
    """Refuses patients of whom one's file would have the name of another's."""
    names = {case.name for case in cases}
    clashes = sorted(
        case.name for case in cases for end in ("_probability", "_disagreement") if case.name + end in names
    )
    if len(names) < len(cases) or clashes:
        expected = "patients whose files have different names are expected"
        raise ValueError(f"{expected}. Received: {', '.join(clashes or sorted(case.name for case in cases))}")


def _source(case, recipe, networks):
    """A hash of what a patient's files are made from: the networks and the images."""
    from keras_mmfnet.data.cache import key
    from keras_mmfnet.data.preprocess import recipe_of

    images = key(dataclasses.replace(case, mask=None), recipe_of(case, recipe))
    return hashlib.sha256(json.dumps([networks, images]).encode()).hexdigest()


def _require_same(out, case, record):
    """Refuses to add to a patient's files, or to keep them, if they were made from something else."""
    from keras_mmfnet._files import read_json

    path, there = out / f"{case.name}.json", _there(out, case)
    if there and not (path.exists() and read_json(path) == record):
        raise ValueError(
            f"{case.name}: {next(iter(there.values()))}: must be made from the same images, networks and options as "
            "now; choose another --out. Received: a file made otherwise"
        )


def _there(out, case):
    """The files of a patient that exist."""
    files = {name: out / f"{case.name}{end}" for name, end in _FILES.items()}
    return {name: path for name, path in files.items() if path.exists()}


def _missing(out, case, wanted):
    """The files of a patient that are to be written. No DICOM file of an empty mask is."""
    there = _there(out, case)
    missing = {name: out / f"{case.name}{_FILES[name]}" for name in (*wanted, "mask") if name not in there}
    if missing and set(missing) <= set(_DICOM):
        import SimpleITK as sitk

        return missing if sitk.GetArrayFromImage(sitk.ReadImage(str(there["mask"]))).any() else {}
    return missing


def _segment(case, predict, recipe, files, write_dicom):
    """Segments a patient, writes the files, the mask last, and says what was found."""
    import SimpleITK as sitk

    from keras_mmfnet.data import CaseError, preprocess_case
    from keras_mmfnet.data.image_io import write_image
    from keras_mmfnet.data.preprocess import read_tumour
    from keras_mmfnet.evaluation import evaluate_case

    patient = preprocess_case(dataclasses.replace(case, mask=None), recipe.data)
    mask, probability, disagreement = predict(patient)
    array = sitk.GetArrayViewFromImage(mask)
    about = [case.name, *patient.notes]
    about.append(f"{array.sum()} voxels of tumour, {array.sum() * math.prod(mask.GetSpacing()) / 1000:.1f} ml")
    if not array.any():
        without = ", no DICOM file was written" if set(files) & set(_DICOM) else ""
        about[-1] = f"no tumour was found, the mask is empty{without}"
    if case.mask is not None:
        try:
            truth = read_tumour(case, recipe.data, patient)
            numbers = evaluate_case(sitk.GetArrayViewFromImage(probability), truth, patient.source.spacing[::-1])
            if numbers["volume_ml"]:
                about.append(f"DSC {numbers['dsc']:.4f}, HD95 {numbers['hd95']:.1f} mm")
            else:
                about.append(f"the expert's mask is empty, {numbers['false_positive_ml']:.1f} ml are false")
        except CaseError as error:
            case = dataclasses.replace(case, mask=None)
            about.append(f"not compared with the expert's mask: {error}")
    images = {"probability": probability, "disagreement": disagreement, "mask": mask}
    for name in (name for name in _FILES if name in files):
        if name in images:
            write_image(images[name], files[name])
        elif name == "picture":
            _draw(case, mask, recipe, files[name])
        elif array.any():
            write_dicom[name](mask, next(iter(case.images.values())), files[name], probability=probability)
    return "; ".join(about)


def _draw(case, mask, recipe, path):
    """A slice with the contours, in pixels of the patient's own size."""
    import io

    from keras_mmfnet._files import write
    from keras_mmfnet.data import preprocess_case
    from keras_mmfnet.plots import plot_segmentation

    fine = preprocess_case(case, recipe.replace({"data.spacing": None}).data)
    figure = plot_segmentation(fine.images, fine.grid.resample(mask), fine.mask, fine.spacing, margin=40)
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    write(path, png.getvalue())
