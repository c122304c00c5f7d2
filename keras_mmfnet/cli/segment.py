import dataclasses
import functools
import hashlib
import logging
import math
from pathlib import Path
from typing import Annotated

import typer

from keras_mmfnet.cli import _options as options
from keras_mmfnet.cli._outputs import DICOM, Outputs, source_of
from keras_mmfnet.cli._process import start_backend
from keras_mmfnet.cli._terminal import counted, session

_log = logging.getLogger(__name__)


def segment(
    run: options.RunOrBundle,
    patients: Annotated[Path, typer.Argument(metavar="INPUT", help="A patient or a folder of patients.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for PATIENT.nii.gz and the files chosen below.")],
    rtstruct: Annotated[
        bool, typer.Option("--rtstruct", help="Write a DICOM structure set, PATIENT_rtstruct.dcm.")
    ] = False,
    seg: Annotated[bool, typer.Option("--seg", help="Write a DICOM segmentation, PATIENT_seg.dcm.")] = False,
    probability: Annotated[bool, typer.Option("--probability", help="Write the probabilities as NIfTI.")] = False,
    disagreement: Annotated[
        bool, typer.Option("--disagreement", help="Write the standard deviation over the folds' networks as NIfTI.")
    ] = False,
    picture: Annotated[bool, typer.Option("--picture", help="Write a PNG of a slice with the contours.")] = False,
    structure: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Name in DICOM files, of networks of one structure.", show_default="the recipe's"
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="MM", min=0, help="Simplify contours by up to this distance.")
    ] = 0.0,
    max_points: Annotated[
        int | None, typer.Option(metavar="N", min=3, help="Refuse contours with more points.", show_default="no limit")
    ] = None,
    fold: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Fold whose network is used; may be repeated.", show_default="all"),
    ] = None,
    mirror: Annotated[bool, typer.Option("--mirror", help="Also predict flipped images and average.")] = False,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="Weight the centre of each window more.")] = False,
    device: options.Device = None,
    quiet: options.Quiet = False,
):
    """Segments one patient or a folder of patients with the networks of a run or a bundle."""
    flags = {"rtstruct": rtstruct, "seg": seg, "probability": probability, "disagreement": disagreement}
    wanted = [name for name, wish in {**flags, "picture": picture}.items() if wish]
    with session(quiet) as terminal:
        recipe, bundle = options.open_bundle(run)
        names = list(recipe.data.structures)
        if structure is not None:
            options.check_structure_name(structure, names)
            names = [structure]
        if mirror and not recipe.patches.flip_axes:
            raise ValueError("--mirror: networks trained with `patches.flip_axes` are expected. Received: none")
        from keras_mmfnet._log import progress
        from keras_mmfnet.data import find_patients
        from keras_mmfnet.data.case import group_messages
        from keras_mmfnet.data.dicom import Series
        from keras_mmfnet.data.preprocess import key_of_images
        from keras_mmfnet.export import write_rtstruct, write_segmentation
        from keras_mmfnet.inference import segment_ensemble

        failed = []
        found = find_patients(patients, recipe.data, failed.append)
        total = len(found) + len(failed)
        outputs = Outputs(out, recipe.data)
        outputs.require_distinct(found)
        cases = [c for c in found if not (rtstruct or seg) or isinstance(next(iter(c.images.values())), Series)]
        expected = "must be DICOM series for --rtstruct and --seg. Received: image files"
        failed += [ValueError(f"{case.name}: {expected}") for case in found if case not in cases]
        start_backend(device)
        from keras_mmfnet.run import Run

        opened = bundle or Run(run)
        folds = options.choose_trained(opened, fold)
        rules = opened.postprocessing(folds)
        applied = {"postprocess": rules.model_dump(mode="json")} if recipe.training.postprocess else {}
        hashes = [hashlib.sha256(opened.network(number).read_bytes()).hexdigest() for number in folds]
        todo, dicom = [], {}
        if rtstruct:
            dicom["rtstruct"] = {"names": names, "tolerance": tolerance}
        if seg:
            dicom["seg"] = {"names": names}
        for case in cases:
            record = {"folds": folds, "mirror": mirror, "gaussian": gaussian, **applied}
            record |= {"labels": outputs.labels, "mask": recipe.data.mask}
            try:
                images = key_of_images(case, recipe.data)
                record["source"] = source_of(images, hashes)
                outputs.require_same(case, record, dicom)
            except ValueError as error:
                failed.append(error)
            else:
                todo += [(case, images, record, missing)] if (missing := outputs.missing(case, wanted)) else []
        if done := total - len(todo) - len(failed):
            _log.info("Segmented already: %d of %s", done, counted(total, "patient"))
        networks = options.load_networks(opened, folds) if todo else []
        if disagreement and len(networks) == 1:
            raise ValueError("--disagreement: networks of two or more folds are expected. Received: one network")
        for name, rule in rules.structures.items() if todo and applied else ():
            _log.info("Post-processing, %s: %s", name, rule)
        prediction = {"postprocess": rules, "mirror": mirror, "gaussian": gaussian}
        predict = functools.partial(segment_ensemble, networks, recipe=recipe, **prediction)
        write_dicom = {
            "rtstruct": functools.partial(write_rtstruct, tolerance=tolerance, max_points=max_points),
            "seg": write_segmentation,
        }
        about = {"input": str(patients.absolute()), "data": recipe.data.model_dump(mode="json"), "dicom": dicom}
        for number, (case, images, record, missing) in enumerate(todo, start=1):
            about["images"] = images
            try:
                with outputs.claim(case):
                    # Another process may have written files since.
                    outputs.require_same(case, record, dicom)
                    outputs.write_record(case, record, about)
                    line, compared, found = _segment(case, predict, recipe, rules, missing, names, write_dicom)
                    outputs.write_record(case, record, about | found)
                seen = opened.seen_in_training(case, folds) if compared else ""
                _log.info("%d of %d: %s", number, len(todo), f"{line} ({seen})" if seen else line)
            except ValueError as error:
                failed.append(error)
                _log.warning("%d of %d: %s was not segmented, see the end", number, len(todo), case.name)
            progress("segmenting", number, len(todo))
        if failed:
            lines = [f"  {line}" for line in group_messages(map(str, failed))]
            raise ValueError("\n".join([f"not segmented: {len(failed)} of {counted(total, 'patient')}", *lines]))
        terminal.say(out, always=True)


def _segment(case, predict, recipe, rules, files, names, write_dicom):
    """Segments a patient and writes the files, the mask last.

    Returns:
        What is said of it, if it was compared with a mask, and for the record the numbers of each structure and the
        notes on its images.
    """
    import SimpleITK as sitk

    from keras_mmfnet.data import CaseError, preprocess_case
    from keras_mmfnet.data.image_io import write_image
    from keras_mmfnet.data.preprocess import read_masks
    from keras_mmfnet.evaluation import compare_masks
    from keras_mmfnet.export import Structure
    from keras_mmfnet.postprocess import level_half

    patient = preprocess_case(dataclasses.replace(case, mask=None), recipe.data)
    found = predict(patient)
    arrays = {name: sitk.GetArrayViewFromImage(mask) for name, mask in found.masks.items()}
    notes = [*patient.notes, *found.notes]
    about, anything = [case.name, *notes], any(array.any() for array in arrays.values())
    probabilities = {name: sitk.GetArrayViewFromImage(image) for name, image in found.probabilities.items()}
    voxel_ml = math.prod(patient.source.spacing) / 1000
    numbers = {}
    for name, array in arrays.items():
        numbers[name] = {"predicted_ml": round(float(array.sum() * voxel_ml), 4)}
        if spread := sitk.GetArrayViewFromImage(found.disagreements[name]).sum(dtype=float):
            # Relative to the probability: of a small tumour as of a large one.
            numbers[name]["disagreement"] = round(float(spread / max(probabilities[name].sum(dtype=float), 1e-6)), 4)
        about.append(f"{array.sum()} voxels of {name}, {array.sum() * voxel_ml:.1f} ml")
    if not anything:
        without = ", no DICOM file was written" if {what for what, _ in files} & DICOM.keys() else ""
        about[-len(arrays) :] = [f"no {' and no '.join(arrays)} was found, the mask is empty{without}"]
    if case.mask is not None:
        try:
            for name, truth in read_masks(case, recipe.data, patient).items():
                compared = compare_masks(arrays[name], truth, patient.source.spacing[::-1])
                which = f"{name} " * (len(arrays) > 1)
                if compared["volume_ml"]:
                    about.append(f"{which}DSC {compared['dsc']:.4f}, HD95 {compared['hd95']:.1f} mm")
                    shown = {key: float(compared[key]) for key in ("dsc", "hd95", "volume_ml")}
                    # There is no HD95 of an empty mask.
                    numbers[name] |= {key: round(value, 4) for key, value in shown.items() if math.isfinite(value)}
                else:
                    false = compared["false_positive_ml"]
                    about.append(f"the expert's mask {f'of {which}' * bool(which)}is empty, {false:.1f} ml are false")
        except CaseError as error:
            case = dataclasses.replace(case, mask=None)
            about.append(f"not compared with the expert's mask: {error}")
    images = {"probability": found.probabilities, "disagreement": found.disagreements, "mask": found.masks}
    structures = [
        Structure(
            name,
            found.masks[one],
            patient.source.image(level_half(probabilities[one], rules.structures[one].threshold)),
        )
        for name, (one, array) in zip(names, arrays.items(), strict=True)
        if array.any()
    ]
    for (what, one), path in files.items():
        if what == "picture":
            _draw(case, found.masks, recipe, path)
        elif what in DICOM:
            if structures:
                write_dicom[what](structures, next(iter(case.images.values())), path)
        elif what == "mask" and one is None:
            write_image(found.label_image, path)
        else:
            write_image(images[what][one or recipe.data.structure_names[0]], path)
    return "; ".join(about), case.mask is not None, {"found": numbers, "notes": notes}


def _draw(case, masks, recipe, path):
    """A slice with the contours, in pixels of the patient's own size."""
    import io

    from keras_mmfnet._files import write
    from keras_mmfnet.data import preprocess_case
    from keras_mmfnet.plots import plot_segmentation

    fine = preprocess_case(case, recipe.replace({"data.spacing": None}).data)
    predicted = {name: fine.grid.resample(mask) > 0 for name, mask in masks.items()}
    figure = plot_segmentation(fine.images, predicted, fine.masks, fine.spacing, margin=40)
    figure.savefig(png := io.BytesIO(), format="png", dpi=110)
    write(path, png.getvalue())
