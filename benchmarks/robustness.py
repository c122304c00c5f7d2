"""Measures what it costs a trained network that sequences are missing, or have moved against the first one.

    python benchmarks/robustness.py --run OUT/planned_40/seed_0 --fold 0 --methods mmfnet,nnunet_scaled
    python benchmarks/robustness.py --tables

OUT is the folder of `whole_patients.py`. Each subset of the sequences is left out: MMFNet gets zeros for them, and so
does nnU-Net. And all sequences but the first are shifted by 2, 4 and 8 mm and rotated by as many degrees, each in a
direction of its own, without interpolation: the position in the file's header is changed. MMFNet also segments these
patients with the sequences registered first (`data.align=rigid`).
"""

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

# Off by default on some processors; a prediction is faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import SimpleITK as sitk
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation
from trained import subsets
from whole_patients import less, mean_dsc, means_of

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
sys.path.append(str(Path(__file__).parent / "peers"))


def displace(image, amount, rng):
    """An image shifted by so many mm in a random direction, and rotated by as many degrees about its centre."""
    axis, way = (vector / np.linalg.norm(vector) for vector in rng.normal(size=(2, 3)))
    rotation = Rotation.from_rotvec(np.radians(amount) * axis).as_matrix()
    middle = ((np.array(image.GetSize()) - 1) / 2).tolist()
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint(middle))
    moved = sitk.Image(image)
    moved.SetOrigin((rotation @ (image.GetOrigin() - centre) + centre + amount * way).tolist())
    moved.SetDirection((rotation @ np.reshape(image.GetDirection(), (3, 3))).ravel().tolist())
    return moved


def move(case, modalities, amount, folder):
    """The patient with all sequences but the first displaced, in files in a folder; directions are always the same."""
    images = dict(case.images)
    for modality in modalities[1:]:
        rng = np.random.default_rng(list(f"{case.name} {modality}".encode()))
        path = folder / case.name / f"{modality}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(displace(read_image(case.images[modality], case.name), amount, rng), path)
        images[modality] = path
    return dataclasses.replace(case, images=images)


class OurNetwork:
    """A network of a run, with the post-processing that its validation patients chose."""

    def __init__(self, run, fold, method):
        self.run, self.network = run, load_network(run.network(fold, method))
        self.rules = run.postprocessing([fold], method)

    def segment(self, cases, missing=(), align=None):
        """The DSC of patients: `{structure: {patient: value}}`."""
        recipe, found = self.run.recipe, {}
        data = recipe.data.model_copy(update={"align": align or recipe.data.align})
        for case in cases:
            patient = preprocess_case(case, data)
            images = {name: image * (name not in missing) for name, image in patient.images.items()}
            segmentation = segment_case(self.network, dataclasses.replace(patient, images=images), recipe, self.rules)
            for structure, truth in read_masks(case, data, patient).items():
                probability, mask = (
                    sitk.GetArrayViewFromImage(of[structure]) for of in (segmentation.probabilities, segmentation.masks)
                )
                numbers = evaluate_case(probability, truth, patient.source.spacing[::-1], predicted=mask)
                found.setdefault(structure, {})[case.name] = numbers["dsc"]
        return found


class NnUNet:
    """nnU-Net's network of a run, whose commands read and write files in a folder."""

    def __init__(self, run, fold, method, folder):
        self.run, self.setting, self.folder = run, method.removeprefix("nnunet_"), folder / "nnunet"
        self.fold = fold

    def segment(self, cases, missing=()):
        """The DSC of patients, with all sequences on the grid of the first one: `{structure: {patient: value}}`."""
        import handover
        import nnunet

        shutil.rmtree(self.folder, ignore_errors=True)
        for case in cases:
            [patient] = self.run.patients([case.name])
            left = {name: image for name, image in case.images.items() if name not in missing}
            changed = dataclasses.replace(case, images=left)
            handover.write_images(changed, self.run.recipe.data.modalities, patient.source, self.folder / "images")
        space, found = nnunet.Workspace((self.run.folder / "nnunet").absolute(), self.fold), {}
        predicted = nnunet.predict(self.run, space, self.setting, self.folder / "images", self.folder / "predicted")
        for name, (values, probabilities, seconds) in predicted.items():
            for row in handover.rows_of(self.run, name, values, probabilities, seconds):
                found.setdefault(row["structure"], {})[name] = row["dsc"]
        return found


def measure(run, fold, method, folder):
    """The DSC of the test patients under each condition: `{condition: {structure: {patient: value}}}`."""
    ours, modalities = not method.startswith("nnunet_"), run.recipe.data.modalities
    network = OurNetwork(run, fold, method) if ours else NnUNet(run, fold, method, folder)
    cases, found = [run.cases[name] for name in run.folds[fold].test], {}

    def segment(condition, cases, **options):
        found[condition] = network.segment(cases, **options)
        print(f"{method}, {condition}: {[*map(_mean, found[condition].values())]}", flush=True)

    def segment_moved(condition, cases):
        segment(condition, cases)
        if ours:
            segment(f"{condition}, registered", cases, align="rigid")

    segment_moved(NOTHING, cases)
    for missing in subsets(modalities):
        segment(f"without {' and '.join(missing)}", cases, missing=missing)
    for amount in LEVELS:
        moved = [move(case, modalities, amount, folder / f"moved_{amount}") for case in cases]
        segment_moved(f"moved by {amount} mm and degrees", moved)
    return found


def read(folder):
    """The DSC under each condition: `{(structure, condition): {(recipe, method): {patient: {seed: value}}}}`."""
    scores = {}
    for path in sorted(folder.glob("*/seed_*/fold_*/*.json")):
        kind, seed = path.parts[-4], int(path.parts[-3].removeprefix("seed_"))
        for condition, structures in read_json(path).items():
            for structure, patients in structures.items():
                one = scores.setdefault((structure, condition), {}).setdefault((kind, path.stem), {})
                for patient, dsc in patients.items():
                    if dsc is not None and np.isfinite(dsc):
                        one.setdefault(patient, {})[seed] = dsc
    return scores


def table(scores):
    """The mean DSC of each recipe and method under each condition, and what the condition costs, as Markdown."""
    lines = [
        "| structure | condition | recipe | method | mean DSC | minus that without it [95%], patients | "
        "minus that of the first method [95%], patients |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for (structure, condition), methods in scores.items():
        first = next(iter(methods))
        for (kind, method), found in methods.items():
            cells = [
                *(structure, condition, kind, method, f"{np.mean(means_of(found)):.3f}"),
                less(found, scores[structure, NOTHING][kind, method]) if condition != NOTHING else "",
                less(found, methods[first]) if (kind, method) != first else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(scores, path):
    """Draws a row for each condition and a panel for each structure: the mean DSC with its interval over patients."""
    structures, conditions = (list(dict.fromkeys(names)) for names in zip(*scores, strict=True))
    methods = list(dict.fromkeys(method for found in scores.values() for method in found))
    figure = Figure(figsize=(3 + 4 * len(structures), 1 + 0.4 * len(conditions)), layout="constrained")
    axes = figure.subplots(1, len(structures), squeeze=False, sharey=True)
    for axis, structure in zip(axes[0], structures, strict=True):
        for number, method in enumerate(methods):
            places = [place for place, one in enumerate(conditions) if method in scores.get((structure, one), {})]
            points = [mean_dsc(scores[structure, conditions[place]][method]) for place in places]
            mean, low, high = np.transpose(points)
            # Beside each other, about the middle of the row.
            rows = np.array(places) + 0.6 * ((number + 0.5) / len(methods) - 0.5)
            label = ", ".join(method[::-1])
            axis.errorbar(mean, rows, xerr=(mean - low, high - mean), fmt="o", capsize=3, label=label)
        axis.set(title=structure, xlabel="mean DSC", xlim=(-0.02, 1), yticks=range(len(conditions)))
        axis.set_yticklabels(conditions)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=120)


def _mean(by_patient):
    return round(float(np.nanmean(list(by_patient.values()))), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run, <recipe>/seed_<number>")
    parser.add_argument("--fold", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--methods", default="mmfnet", metavar="NAMES", help="of the run (%(default)s)")
    parser.add_argument("--tables", action="store_true", help="only make the tables and charts")
    parsed = parser.parse_args()
    if not (parsed.run or parsed.tables):
        parser.error("--run: a folder is expected. Received: none")
    if parsed.run:
        run = Run(parsed.run)
        place = RESULTS / Path(run.cohort["data"]).name / Path(*parsed.run.absolute().parts[-2:])
        for method in parsed.methods.split(","):
            path = place / f"fold_{parsed.fold}" / f"{method}.json"
            if not path.exists():
                found = measure(run, parsed.fold, method, parsed.run / "robustness" / f"fold_{parsed.fold}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, json.dumps(found) + "\n")
    for folder in sorted({path.parents[2] for path in RESULTS.glob("*/*/seed_*/fold_*")}):
        scores = read(folder)
        write(folder / "table.md", table(scores))
        draw(scores, folder / "chart.png")
        print(table(scores))


if __name__ == "__main__":
    main()
