import dataclasses
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
_FILES = {**_DICOM, "probability": "_probability.nii.gz", "disagreement": "_disagreement.nii.gz", "picture": ".png"}


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
    limits = {"tolerance": tolerance, "max_points": max_points}
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

        failed = []
        found = find_patients(patients, recipe.data, failed.append)
        total = len(found) + len(failed)
        _require_distinct(found)
        cases = [case for case in found if not (rtstruct or seg) or _is_dicom(case)]
        expected = "must be DICOM series for --rtstruct and --seg. Received: image files"
        failed += [ValueError(f"{case.name}: {expected}") for case in found if case not in cases]
        _log.info("Computing with %s", start_backend(device))
        opened = options.open_run(run)
        folds = fold or opened.trained_folds()
        settings = {"folds": folds, "mirror": mirror, "gaussian": gaussian}
        networks_digest = [_digest(opened.network(number, "mmfnet")) for number in folds]
        sources, todo = {}, []
        for case in cases:
            try:
                sources[case.name] = {**settings, "source": _source(case, recipe.data, networks_digest)}
                _require_same(out, case, sources[case.name])
            except ValueError as error:
                failed.append(error)
            else:
                todo += [case] if _missing(out, case, wanted) else []
        if done := total - len(todo) - len(failed):
            _log.info("Segmented already: %d of %s", done, counted(total, "patient"))
        networks = options.load_networks(opened, fold) if todo else []
        if disagreement and len(networks) == 1:
            raise ValueError("--disagreement: networks of two or more folds are expected. Received: one network")
        if todo:
            out.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(todo, start=1):
            try:
                write(out / f"{case.name}.json", json.dumps(sources[case.name], indent=2) + "\n")
                line = _segment(case, networks, recipe, out, wanted, structure, mirror, gaussian, limits)
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


def _is_dicom(case):
    from keras_mmfnet.data.dicom import Series

    return isinstance(next(iter(case.images.values())), Series)


def _require_distinct(cases):
    """Refuses patients of whom one's file would have the name of another's."""
    names = {case.name for case in cases}
    clashes = sorted(
        case.name for case in cases for end in ("_probability", "_disagreement") if case.name + end in names
    )
    if len(names) < len(cases) or clashes:
        expected = "patients whose files have different names are expected"
        raise ValueError(f"{expected}. Received: {', '.join(clashes or sorted(case.name for case in cases))}")


def _digest(path):
    if not path.is_file():
        return None  # which `load_networks` tells
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _source(case, recipe, networks):
    """A hash of what a patient's files are made from: the networks and the images."""
    from keras_mmfnet.data.cache import key
    from keras_mmfnet.data.preprocess import recipe_of

    images = key(dataclasses.replace(case, mask=None), recipe_of(case, recipe))
    return hashlib.sha256(json.dumps([networks, images]).encode()).hexdigest()


def _require_same(out, case, source):
    """Refuses to add to a patient's files, or to leave them, where they were made from something else."""
    from keras_mmfnet._files import read_json

    record = out / f"{case.name}.json"
    there = _there(out, case)
    if there and not (record.exists() and read_json(record) == source):
        raise ValueError(
            f"{case.name}: {there[0]}: must be made from the same images, networks and options as now; choose another "
            "--out. Received: a file made otherwise"
        )


def _there(out, case):
    """The files of a patient that are there."""
    return [path for path in (out / f"{case.name}{end}" for end in (".nii.gz", *_FILES.values())) if path.exists()]


def _missing(out, case, wanted):
    """The files that are wanted of a patient and not there. The mask is written last, after all others."""
    mask = out / f"{case.name}.nii.gz"
    if not mask.exists():
        return [mask]
    missing = [name for name in wanted if not (out / f"{case.name}{_FILES[name]}").exists()]
    if set(missing) <= set(_DICOM) and missing:
        import SimpleITK as sitk

        return missing if sitk.GetArrayFromImage(sitk.ReadImage(str(mask))).any() else []
    return missing


def _segment(case, networks, recipe, out, wanted, structure, mirror, gaussian, limits):
    """Segments a patient, writes what is wanted and not there yet, and says what was found."""
    import SimpleITK as sitk

    from keras_mmfnet.data import CaseError, preprocess_case
    from keras_mmfnet.data.image_io import write_image
    from keras_mmfnet.data.preprocess import read_tumour
    from keras_mmfnet.evaluation import evaluate_case
    from keras_mmfnet.export import write_rtstruct, write_segmentation
    from keras_mmfnet.inference import segment_ensemble

    files = {name: out / f"{case.name}{_FILES[name]}" for name in wanted}
    files = {name: path for name, path in files.items() if not path.exists()}
    series = next(iter(case.images.values()))
    patient = preprocess_case(dataclasses.replace(case, mask=None), recipe.data)
    result = segment_ensemble(networks, patient, recipe, mirror=mirror, gaussian=gaussian)
    mask, probability, disagreement = result
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
    for name, image in (("probability", probability), ("disagreement", disagreement)):
        if name in files:
            write_image(image, files[name])
    if "rtstruct" in files and array.any():
        write_rtstruct(mask, series, files["rtstruct"], structure, probability, **limits)
    if "seg" in files and array.any():
        write_segmentation(mask, series, files["seg"], structure)
    if "picture" in files:
        _draw(case, mask, recipe, files["picture"])
    if not (path := out / f"{case.name}.nii.gz").exists():
        write_image(mask, path)
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
