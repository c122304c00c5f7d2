"""Measures what sequences cost a trained network that are missing, or that moved against the first one.

    python benchmarks/robustness.py --run OUT/planned_40/seed_0 --fold 0 --methods mmfnet,nnunet_scaled
    python benchmarks/robustness.py --tables

OUT is the folder of `whole_patients.py`. Each subset of the sequences is left out: MMFNet gets zeros for them, and so
does nnU-Net. And all sequences but the first are shifted by 2, 4 and 8 mm and turned by as many degrees, each in a
direction of its own, without interpolation: the position in the file's header is changed. MMFNet segments these
patients also with the sequences registered first (`data.align=rigid`).
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

# Off by default on some processors; a prediction is faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import SimpleITK as sitk
from bootstrap import interval, resample
from scipy.spatial.transform import Rotation

from keras_mmfnet._files import read_json, write
from keras_mmfnet.data import preprocess_case
from keras_mmfnet.data.image_io import read_image, write_image
from keras_mmfnet.data.preprocess import read_masks
from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.inference import segment_case
from keras_mmfnet.models import load_network
from keras_mmfnet.run import Run

RESULTS = Path(__file__).parent / "results" / "robustness"
NOTHING, LEVELS = "as they are", (2, 4, 8)


def conditions(modalities):
    """What is done to the patients, by name: the sequences that are missing, or the mm and degrees of the others."""
    found = {NOTHING: ()}
    for count in range(1, len(modalities)):
        for missing in itertools.combinations(modalities, count):
            found[f"without {' and '.join(missing)}"] = missing
    return found | {f"moved by {level} mm and degrees": level for level in LEVELS}


def change(case, condition, folder, modalities):
    """The patient with sequences missing, or moved: a `Case` whose moved images are written to a folder."""
    if isinstance(condition, tuple):
        left = {name: image for name, image in case.images.items() if name not in condition}
        return dataclasses.replace(case, images=left)
    images = dict(case.images)
    for modality in modalities[1:]:
        # The same directions for each level.
        rng = np.random.default_rng(list(f"{case.name} {modality}".encode()))
        moved = displace(read_image(case.images[modality], case.name), condition, rng)
        path = folder / case.name / f"{modality}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(moved, path)
        images[modality] = path
    return dataclasses.replace(case, images=images)


def displace(image, amount, rng):
    """An image shifted by so many mm in a random direction, and turned by as many degrees about its centre."""
    axis, way = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 3)))
    rotation = Rotation.from_rotvec(np.radians(amount) * axis).as_matrix()
    middle = ((np.array(image.GetSize()) - 1) / 2).tolist()
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint(middle))
    moved = sitk.Image(image)
    moved.SetOrigin((rotation @ (image.GetOrigin() - centre) + centre + amount * way).tolist())
    moved.SetDirection((rotation @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    return moved


def segment(run, fold, cases, align):
    """The DSC of patients as MMFNet segments them: `{structure: {patient: value}}`."""
    recipe = run.recipe
    # A recipe allows this only for networks that were trained for it.
    data = recipe.data.model_copy(update={"allow_missing": True, "align": align})
    network, rules = load_network(run.network(fold)), run.postprocessing([fold])
    found = {}
    for case in cases:
        patient = preprocess_case(case, data)
        segmentation = segment_case(network, patient, recipe, rules)
        for structure, truth in read_masks(case, data, patient).items():
            probability, mask = (
                sitk.GetArrayViewFromImage(of[structure]) for of in (segmentation.probabilities, segmentation.masks)
            )
            numbers = evaluate_case(probability, truth, patient.source.spacing[::-1], predicted=mask)
            found.setdefault(structure, {})[case.name] = numbers["dsc"]
    return found


def segment_by_nnunet(run, fold, cases, setting, folder):
    """The same by nnU-Net, with every sequence on the grid of the first one."""
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    import nnunet
    import patients

    for case in cases:
        [patient] = run.patients([case.name])
        patients.write_images(case, run.recipe.data.modalities, patient.source, folder / "images")
    space, found = nnunet.Workspace((run.folder / "nnunet").absolute(), fold), {}
    predicted = nnunet.predict(run, space, setting, folder / "images", folder / "predicted")
    for name, (values, probabilities, seconds) in predicted.items():
        for row in patients.rows_of(run, name, values, probabilities, seconds):
            found.setdefault(row["structure"], {})[name] = row["dsc"]
    return found


def measure(run, fold, method, folder):
    """The DSC of the test patients under each condition: `{condition: {structure: {patient: value}}}`."""
    modalities, found = run.recipe.data.modalities, {}
    for name, condition in conditions(modalities).items():
        place = folder / name.replace(" ", "_")
        cases = [change(run.cases[one], condition, place / "moved", modalities) for one in run.folds[fold].test]
        if method == "mmfnet":
            found[name] = segment(run, fold, cases, run.recipe.data.align)
            if condition in LEVELS:
                found[f"{name}, registered"] = segment(run, fold, cases, "rigid")
        else:
            found[name] = segment_by_nnunet(run, fold, cases, method.removeprefix("nnunet_"), place)
        means = {structure: f"{_mean(patients):.3f}" for structure, patients in found[name].items()}
        print(f"{method}, {name}: {means}", flush=True)
    return found


def table(folder):
    """The mean DSC under each condition, for each recipe and method, and MMFNet's less nnU-Net's, as Markdown."""
    scores = {}
    for path in sorted(folder.glob("*/seed_*/fold_*/*.json")):
        kind, seed = path.parts[-4], int(path.parts[-3].removeprefix("seed_"))
        for condition, structures in read_json(path).items():
            for structure, patients in structures.items():
                one = scores.setdefault((structure, condition), {}).setdefault((kind, path.stem), {})
                for patient, dsc in patients.items():
                    one.setdefault(patient, {})[seed] = dsc
    lines = ["| structure | condition | recipe | method | mean DSC | MMFNet's less it [95%] | patients |"]
    lines.append("|---|---|---|---|---:|---:|---:|")
    for (structure, condition), methods in scores.items():
        # nnU-Net does not register; what it is compared with is the same patients.
        rivals = {**scores.get((structure, condition.removesuffix(", registered")), {}), **methods}
        for (kind, method), found in rivals.items():
            cells = [structure, condition, kind, method, f"{np.mean([*map(_mean, found.values())]):.3f}", ""]
            ours = methods.get((kind, "mmfnet"))
            if ours and method != "mmfnet":
                shared = sorted(found.keys() & ours.keys())
                rows = {name: [[_mean(one[p]) for p in shared]] for name, one in (("ours", ours), ("its", found))}
                drawn = resample(rows)
                low, high = interval(drawn["ours"] - drawn["its"])
                less = np.mean(rows["ours"]) - np.mean(rows["its"])
                cells[-1] = f"{less:+.3f} [{low:+.3f}, {high:+.3f}]"
            lines.append(f"| {' | '.join([*cells, str(len(found))])} |")
    return "\n".join(lines) + "\n"


def _mean(by_name):
    return np.mean(list(by_name.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run of whole_patients.py, <recipe>/seed_<number>")
    parser.add_argument("--fold", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--methods", default="mmfnet", metavar="NAMES", help="mmfnet, nnunet_planned, nnunet_scaled")
    parser.add_argument("--tables", action="store_true", help="only make the tables")
    parsed = parser.parse_args()
    if not (parsed.run or parsed.tables):
        parser.error("--run: a folder is expected. Received: none")
    if parsed.run:
        run = Run(parsed.run)
        place = RESULTS / Path(run.cohort["data"]).name / Path(*parsed.run.absolute().parts[-2:])
        for method in parsed.methods.split(","):
            path = place / f"fold_{parsed.fold}" / f"{method}.json"
            if not path.exists():
                found = measure(run, parsed.fold, method, parsed.run / "robustness" / method)
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, json.dumps(found) + "\n")
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        text = table(folder)
        write(folder / "table.md", text)
        print(text)


if __name__ == "__main__":
    main()
