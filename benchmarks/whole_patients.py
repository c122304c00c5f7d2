"""Compares methods on whole patients by cross-validation: this package's, nnU-Net and MONAI's networks.

    python benchmarks/whole_patients.py --data DATA/lgg_patients --out OUT --methods mmfnet,nnunet_scaled --folds 0,1
    python benchmarks/whole_patients.py --data DATA/lgg_patients --out OUT --methods mmfnet --learn-from 20
    python benchmarks/whole_patients.py --data DATA/lgg_patients --tables

Each recipe is made once, and kept beside the results with the folds; from then on it is what is trained. nnU-Net and
MONAI's networks are trained for --peer-minutes on the same patients. Everything may be stopped at any moment, and a
second call resumes; several calls with the same --out share the work. Each training leaves a JSON file under
`results/whole_patients/`, from which the tables are made.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
from bootstrap import interval, ranks, resample
from filelock import FileLock

from keras_mmfnet._files import read_json, write
from keras_mmfnet.data import Fold, find_cases
from keras_mmfnet.methods import find_method, method_of
from keras_mmfnet.plan import given_recipe, plan_recipe
from keras_mmfnet.recipe import PatchRecipe, Recipe
from keras_mmfnet.run import Run, RunLocked, run_fold

RESULTS = Path(__file__).parent / "results" / "whole_patients"
PEERS = Path(__file__).parent / "peers"
# What is given for a data set, by the name of its folder; and what `Recipe.small()` needs besides.
DATA = {
    "lgg_patients": ({"data.modalities": ("flair", "t1", "cet1")}, {}),
    "tumour_core_cubes": (
        {
            "data.modalities": ("t1", "t2", "cet1", "flair"),
            "data.mask": "regions",
            "data.structures": {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)},
        },
        {"data.normalised_scale": 1000.0, "data.spacing": None, "patches.shape": (32, 32, 32)},
    ),
}
# The sequences of the paper's methods; those over all of them are trained over all of the recipe's.
PAPERS = ("t1", "t2", "cet1")
# The spacing of these patients is an estimate: nothing in mm is reported.
NO_SPACING = ("lgg_patients",)
# Further columns: the metric, and its digits.
METRICS = {"NSD": ("nsd", 3), "HD95, mm": ("hd95", 1), "lesion F1": ("lesion_f1", 2)}
# Recipes are planned or fixed, `planned_40` or `small`, and may be changed, as in `planned_40_dropout`; or they are for
# as many updates as those of another program took in its minutes, as in `planned_40_815_updates`.
_STRONG = PatchRecipe.strong().model_dump(exclude={"shape", "stride", "foreground"}, exclude_defaults=True)
VARIANTS = {
    "uniform": lambda recipe: {"patches.foreground": 0.0},
    "strong": lambda recipe: {f"patches.{field}": value for field, value in _STRONG.items()},
    "dropout": lambda recipe: {"network.modality_dropout": 0.3},
    "misaligned": lambda recipe: {"patches.misalignment": (4.0, 4.0)},
    # For the minutes that the networks of self-transfer take: of three sequences about as many as MMFNet.
    "scratch": lambda recipe: {"training.self_transfer": False, "training.epochs": 2 * recipe.training.epochs},
}
RECIPE = re.compile(rf"(small|planned_\d+)(?:_({'|'.join(VARIANTS)}|(\d+)_updates))?")
# Between the name of a recipe and the number of patients to learn from.
FROM = "_from_"
# Each with the script that trains it, and its name there.
PROGRAMS = {
    **{f"nnunet_{name}": ("nnunet.py", "--settings", name) for name in ("planned", "scaled", "zeroed")},
    **{f"monai_{name}": ("monai_networks.py", "--networks", name) for name in ("segresnet", "dynunet", "swinunetr")},
}
# What is kept of a result, and of each of its epochs.
KEPT = ("method", "title", "fold", "parameters", "updates", "machine", "postprocess")
EPOCH = ("epoch", "loss", "val_loss", "seconds")


def make_recipe(name, data, results, cache):
    """The recipe of that name for a data set, which is made once; `planned_40` is planned for 40 minutes a fold."""
    path, (given, needed) = results / name / "recipe.json", DATA[data.name]
    if not path.exists():
        base, variant, updates = RECIPE.fullmatch(name).groups()
        if variant:
            recipe = make_recipe(base, data, results, cache)
            epochs = max(1, round(int(updates or 0) / recipe.training.steps_per_epoch))
            recipe = recipe.replace({"training.epochs": epochs} if updates else VARIANTS[variant](recipe))
        elif base == "small":
            recipe = Recipe.small().replace({**given, **needed})
        else:
            cases = find_cases(data, given_recipe(given).data)
            recipe = plan_recipe(cases, given, seconds=60 * float(base.removeprefix("planned_")), cache=cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, recipe.to_json())
    return Recipe.load(path)


def our_method(name, recipe):
    """A method of this package over the recipe's sequences.

    `mmfnet` is the recipe's MMFNet, with self-transfer if the recipe has it, and `mmfnet_scratch` the same without;
    `single_encoder` has the sequences stacked, `multi_encoder` has no fusion blocks, and `unet3d_<sequence>` has one
    sequence. A row of the paper's Table II, such as `mmfnet_base`, has that fusion block.
    """
    if name in ("mmfnet", "mmfnet_scratch"):
        method = method_of(recipe)
        if name == "mmfnet_scratch" or not method.encoders:
            return dataclasses.replace(method, name=name, encoders={})
        return dataclasses.replace(method, title="MMFNet with self-transfer")
    method = find_method(name)
    if method.changes["data.modalities"] == PAPERS:
        changes = {path: value for path, value in method.changes.items() if path != "data.modalities"}
        borrowed = recipe.data.modalities if method.encoders else ()
        encoders = {modality: f"unet3d_{modality}" for modality in borrowed}
        return dataclasses.replace(method, changes=changes, encoders=encoders)
    return method


def start(folder, data, kind, seed, results, learners=None):
    """The run of a recipe and seed. The recipe and the folds of the first run are kept, and are those of all others.

    Args:
        folder: Folder of the run.
        data: Folder of the patients.
        kind: Name of the recipe.
        seed: Seed of the training.
        results: Folder of the results.
        learners: How many patients of each fold to learn from, `None` for all.
    """
    folds, run = results / "folds.json", Run(folder)
    if learners and not folds.exists():
        # The folds are those of all patients.
        start(folder.parents[1] / kind / folder.name, data, kind, seed, results)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parents[1] / ".lock"):
        recipe = make_recipe(kind, data, results, run.cache).replace({"training.seed": seed})
        splits = None
        if folds.exists() and not run.recipe_file.exists():
            splits = [fewer(fold, learners) for fold in read_folds(folds)]
        run = Run.start(folder, data, recipe, resume=True, splits=splits)
        if not folds.exists():
            write(folds, json.dumps([dataclasses.asdict(fold) for fold in run.folds], indent=1) + "\n")
    if run.folds != [fewer(fold, learners) for fold in read_folds(folds)]:
        raise ValueError(f"{folder}: a run with the folds of {folds} is expected. Received: one with others")
    return run


def read_folds(path):
    """The folds that are kept beside the results."""
    return [Fold(**{part: tuple(names) for part, names in fold.items()}) for fold in json.loads(path.read_text())]


def fewer(fold, learners):
    """A fold with fewer patients to train and to validate on, the same share of both; 20 include those of 10."""
    if learners is None:
        return fold
    all_of = len(fold.train) + len(fold.validation)
    if not 2 <= learners <= all_of:
        raise ValueError(f"--learn-from: 2 to {all_of} patients are expected. Received: {learners}")
    validating = max(1, round(learners * len(fold.validation) / all_of))
    order = np.random.default_rng(0)
    train, validation = (
        tuple(sorted(order.permutation(names)[:count].tolist()))
        for names, count in ((fold.train, learners - validating), (fold.validation, validating))
    )
    return Fold(train, validation, fold.test)


def train(run, name, fold, minutes):
    """Trains and tests a method; returns its result, and the epochs of each of its networks."""
    if name in PROGRAMS:
        script, option, setting = PROGRAMS[name]
        options = ("--run", run.folder, "--folds", fold, "--minutes", minutes, option, setting)
        # Its networks share their converted patients.
        with run.claim(fold, script.removesuffix(".py")):
            subprocess.run([sys.executable, PEERS / script, *map(str, options)], check=True)
        result = read_json(run.result(fold, name))
        return result, [result["history"]]
    method = our_method(name, run.recipe)
    result, epochs = run_fold(run, method, fold), run.histories(fold)
    return result, [epochs[one] for one in (*run.borrowed(method).values(), name)]


def compute(parsed, results, kind, name, seed, fold):
    """Trains and tests a method on a fold, unless its result is there, or another process does it."""
    group = kind if parsed.learn_from is None else f"{kind}{FROM}{parsed.learn_from}"
    path = results / group / f"seed_{seed}" / f"fold_{fold}" / f"{name}.json"
    if path.exists():
        return
    run = start(parsed.out / group / f"seed_{seed}", parsed.data, kind, seed, results, parsed.learn_from)
    with contextlib.suppress(RunLocked):
        result, networks = train(run, name, fold, parsed.peer_minutes)
        found = {key: result.get(key) for key in KEPT} | {
            # A training that was paused has a few long epochs, which do not count.
            "seconds": sum(len(rows) * np.median([row["seconds"] for row in rows]) for rows in networks),
            "history": [{key: row.get(key) for key in EPOCH} for row in result["history"]],
            "patients": result["patients"],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(found) + "\n")
        dsc = np.nanmean([row["dsc"] for row in result["patients"]])
        print(f"{group}, seed {seed}, fold {fold}, {name}: mean DSC {dsc:.3f}", flush=True)


def read(folder):
    """The results of a data set: `{(recipe, method): {(seed, fold): result}}`."""
    found = {}
    for path in sorted(folder.glob("*/seed_*/fold_*/*.json")):
        seed, fold = (int(part.rpartition("_")[2]) for part in path.parts[-3:-1])
        found.setdefault((path.parts[-4], path.stem), {})[seed, fold] = read_json(path)
    return found


def structures_of(results):
    """The names of the structures."""
    found = (one for folds in results.values() for one in folds.values())
    return list(dict.fromkeys(row["structure"] for one in found for row in one["patients"]))


def by_patient(results, structure, metric="dsc"):
    """The numbers of each patient in each training: `{patient: {seed: value}}`."""
    found = {}
    for (seed, _), result in results.items():
        for row in result["patients"]:
            if row["structure"] == structure and row[metric] is not None and np.isfinite(row[metric]):
                found.setdefault(row["patient"], {})[seed] = row[metric]
    return found


def common(scores):
    """Scores as `{name: (trainings, patients)}`, of the patients whom all have in all their trainings."""
    seeds = {name: sorted({seed for values in found.values() for seed in values}) for name, found in scores.items()}
    everywhere = (
        {patient for patient, values in found.items() if len(values) == len(seeds[name])}
        for name, found in scores.items()
    )
    shared = sorted(set.intersection(*everywhere))
    return {
        name: np.array([[found[patient][seed] for patient in shared] for seed in seeds[name]])
        for name, found in scores.items()
    }


def less(found, baseline):
    """How much higher the mean of some scores is than the baseline's, on the patients whom both have."""
    shared = common({"found": found, "baseline": baseline})
    count = shared["found"].shape[1]
    if not count:
        return ""
    drawn = resample(shared)
    low, high = interval(drawn["found"] - drawn["baseline"])
    difference = shared["found"].mean() - shared["baseline"].mean()
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}], {count}"


def mean_dsc(by_patient):
    """The mean over patients and trainings, and its 95% interval."""
    [values] = common({"": by_patient}).values()
    return values.mean(), *interval(resample({"": values})[""])


def means_of(by_patient):
    """The mean over the trainings of each patient."""
    return [np.mean(list(values.values())) for values in by_patient.values()]


def tables(folder, baseline):
    """The tables of a data set as Markdown: all methods at about the same minutes, and some at the same updates."""
    results = read(folder)
    updates = {key: RECIPE.fullmatch(key[0].partition(FROM)[0])[3] for key in results}
    text = table(folder, {key: found for key, found in results.items() if not updates[key]}, baseline)
    for number in sorted({int(one) for one in updates.values() if one}):
        # An epoch of MMFNet is whole.
        same = {
            key: found
            for key, found in results.items()
            if all(abs(one["updates"] - number) <= 0.05 * number for one in found.values())
        }
        first = next((key for key in same if key[1] == baseline[1]), baseline)
        text += f"\nAt the same number of updates, {number}:\n\n{table(folder, same, first)}"
    return text


def table(folder, results, baseline):
    """A row for each recipe and method, for each structure, as Markdown.

    Means are over the patients that a method was tested on, differences over those that the baseline shares, and ranks
    over those that all share.
    """
    metrics = {"lesion F1": METRICS["lesion F1"]} if folder.name in NO_SPACING else METRICS
    head = ["recipe", "method", "structure", "mean DSC", "median DSC", "below 0.5", *metrics]
    head += [f"DSC minus that of {' '.join(baseline)} [95%], patients", "rank [95%]", "trainings", "folds", "patients"]
    head += ["minutes a fold", "updates", "seconds a patient"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---" + "|---:" * (len(head) - 3) + "|"]
    for structure in structures_of(results):
        scores = {key: by_patient(folds, structure) for key, folds in results.items()}
        shared = common(scores)
        places = ranks(resample(shared)) if next(iter(shared.values())).size else {}
        for key, folds in results.items():
            values = means_of(scores[key])
            cells = [
                key[0],
                next(iter(folds.values()))["title"],
                structure,
                f"{np.mean(values):.3f}",
                f"{np.median(values):.3f}",
                f"{np.mean(np.less(values, 0.5)):.0%}",
                *(
                    f"{np.mean(means_of(by_patient(folds, structure, metric))):.{digits}f}"
                    for metric, digits in metrics.values()
                ),
                less(scores[key], scores[baseline]) if baseline in scores and key != baseline else "",
                "{1:.0f} [{0:.0f}, {2:.0f}]".format(*places[key]) if places else "",
                str(len({seed for seed, _ in folds})),
                str(len({fold for _, fold in folds})),
                str(len(values)),
                f"{np.mean([one['seconds'] / 60 for one in folds.values()]):.0f}",
                f"{np.mean([one['updates'] for one in folds.values()]):.0f}",
                f"{np.median([row['seconds'] for one in folds.values() for row in one['patients']]):.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help=f"folder of patients, named {' or '.join(DATA)}")
    add("--out", type=Path, help="folder for the runs, which may be deleted afterwards")
    recipes = f"small or planned_<minutes>, or one of them followed by _{', _'.join(VARIANTS)} or _<n>_updates"
    ours = "mmfnet, mmfnet_scratch, single_encoder, multi_encoder, unet3d_<sequence>"
    add("--methods", default="mmfnet", metavar="NAMES", help=f"some of {ours}, {', '.join(PROGRAMS)} (%(default)s)")
    add("--recipes", default="planned_40", metavar="NAMES", help=f"{recipes} (%(default)s)")
    add("--peer-minutes", type=float, default=60, help="for a training of another program (%(default)s)")
    add("--seeds", default="0", metavar="N,..", help="(%(default)s)")
    add("--folds", default="0", metavar="N,..", help="(%(default)s)")
    add("--learn-from", type=int, metavar="N", help="only so many patients, a share of them to validate on")
    add("--tables", action="store_true", help="only make the table")
    parsed = parser.parse_args()
    for kind in parsed.recipes.split(","):
        if not RECIPE.fullmatch(kind):
            parser.error(f"--recipes: {recipes} is expected. Received: {kind}")
    if parsed.data.name not in DATA:
        parser.error(f"--data: a folder named {' or '.join(DATA)} is expected. Received: {parsed.data}")
    if not (parsed.out or parsed.tables):
        parser.error("--out: a folder is expected. Received: none")
    folder = RESULTS / parsed.data.name
    if not parsed.tables:
        options = (parsed.seeds, parsed.folds, parsed.methods, parsed.recipes)
        for seed, fold, method, kind in itertools.product(*(option.split(",") for option in options)):
            compute(parsed, folder, kind, method, int(seed), int(fold))
    text = tables(folder, (parsed.recipes.split(",")[0], "mmfnet"))
    write(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
