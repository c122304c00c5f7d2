"""Compares how MMFNet learns, one factor at a time about a reference, on the same folds and patients.

    python benchmarks/learning.py --data CUBES --out OUT --updates 640
    python benchmarks/learning.py --data LGG --out OUT --updates 640 --only reference,cosine --seeds 0
    python benchmarks/learning.py --data LGG --out OUT --updates 640 --items --seeds 0,1

Without --items: the head's bias, the learning rate, its schedule, Dice by batch or by patch; the reference is bias 0,
rate 0.001, constant, Dice by batch. With --items: losses, patches, augmentation, the network and the training; the
reference is what came out best before. A seed changes the initial weights and the patches. It may be stopped at any
moment, and a second call resumes. Two processes with the same --out share the work. Each training leaves a JSON file;
the table is made of those there are.
"""

import argparse
import contextlib
import functools
import json
import os
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import numpy as np
from scipy.stats import bootstrap

from keras_mmfnet._files import read_json, write
from keras_mmfnet.methods import Method, build_mmfnet
from keras_mmfnet.recipe import PatchRecipe, Recipe
from keras_mmfnet.run import Run, RunLocked, run_fold

RESULTS = Path(__file__).parent / "results" / "learning"
# What the recipe needs for a data set, by the name of its folder.
DATA = {
    "tumour_core_cubes": {
        "data.normalised_scale": 1000.0,
        "data.spacing": None,
        "patches.shape": (32, 32, 32),
        "training.batch_size": 8,
    },
    "lgg_patients": {
        "data.modalities": ("flair", "t1", "cet1"),
        "data.spacing": None,
        "patches.shape": (16, 64, 64),
        "patches.stride": (8, 32, 32),
        "training.batch_size": 4,
    },
}
# By name: the head's bias, and what differs in the recipe from the reference.
STARTS = {
    "reference": (0.0, {}),
    "bias_-3": (-3.0, {}),
    "rate_0.01": (0.0, {"training.pretrain_learning_rate": 1e-2}),
    "cosine": (0.0, {"training.schedule": "cosine"}),
    "polynomial": (0.0, {"training.schedule": "polynomial"}),
    "per_patch": (0.0, {"training.loss": "dice_per_patch"}),
    "bias_-3_rate_0.01": (-3.0, {"training.pretrain_learning_rate": 1e-2}),
}
# What came out best among the starts, the reference of the items.
BEST = {"training.schedule": "cosine"}
# Those of the items that differ from one recipe to the next by more than one field.
AUGMENTATION = PatchRecipe.strong().model_dump(exclude={"shape", "stride", "foreground"}, exclude_defaults=True)
KINDS = {
    "spatial": ("max_rotation", "max_scaling"),
    "resolution": ("blur", "low_resolution", "noise"),
    "intensity": ("bias_field", "gamma", "contrast", "brightness"),
}
THICK = {
    "network.strides": ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    "network.kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
}
ITEMS = {
    "reference": {},
    "dice_per_patch": {"training.loss": "dice_per_patch"},
    "dice_ce": {"training.loss": "dice_ce"},
    "tversky": {"training.loss": "tversky"},
    "focal_tversky": {"training.loss": "focal_tversky"},
    "foreground_0": {"patches.foreground": 0.0},
    "foreground_0.67": {"patches.foreground": 0.67},
    "strong_augmentation": {f"patches.{field}": value for field, value in AUGMENTATION.items()},
    "no_augmentation": {"patches.offset_fraction": (0, 0, 0), "patches.max_rotation": 0, "patches.flip_axes": ()},
    **{
        f"{kind}_augmentation": {f"patches.{field}": AUGMENTATION[field] for field in fields}
        for kind, fields in KINDS.items()
    },
    "misalignment": {"patches.misalignment": (1.0, 1.0)},
    "dropout_of_sequences": {"network.modality_dropout": 0.2},
    "strides_by_spacing": THICK,
    "instance_normalization": {"network.normalization": "instance"},
    "residual": {"network.residual": True},
    "deep_supervision": {"network.deep_supervision": True},
    "three_levels": {"network.filters": (8, 16, 32)},
    "filters_16": {"network.filters": (16, 32, 64, 128)},
    "sgd": {
        "training.optimizer": "sgd",
        "training.schedule": "polynomial",
        "training.pretrain_learning_rate": 1e-2,
    },
    "adamw": {"training.optimizer": "adamw"},
    "rate_0.003": {"training.pretrain_learning_rate": 3e-3},
    "rate_0.01": {"training.pretrain_learning_rate": 1e-2},
    "average_of_5_epochs": {"training.weight_average": 5},
    "clip_norm_1": {"training.clip_norm": 1.0},
    "choose_by_dsc": {"training.choose_by": "dsc"},
    "postprocess": {"training.postprocess": True},
}


def build(recipe, dtype, encoders=None, bias=0.0):
    """MMFNet whose head starts from this bias."""
    model = build_mmfnet(recipe, dtype)
    head = model.get_layer("probability")
    head.bias.assign(keras.ops.full_like(head.bias, bias))
    return model


def method_of(name, bias, changes, seed):
    """A training as a method without self-transfer."""
    changes = {**changes, "training.seed": seed}
    return Method(f"{name}_seed{seed}", f"{name}, seed {seed}", functools.partial(build, bias=bias), changes)


def recipe_of(data, updates):
    """The reference's recipe, in epochs of 40 updates."""
    steps = min(updates, 40)
    length = {"training.steps_per_epoch": steps, "training.epochs": updates // steps, "training.patience": None}
    single = {"training.self_transfer": False, "training.pretrain_learning_rate": 1e-3}
    return Recipe.small().replace({**DATA[data], **length, **single})


def train(run, method, name, bias, fold, path):
    """Trains and tests, and writes the JSON file, unless another process is at it."""
    with contextlib.suppress(RunLocked):
        result = run_fold(run, method, fold)
        found = {
            "training": name,
            "bias": bias,
            "recipe": json.loads(method.adapt(run.recipe).to_json()),
            **{key: result[key] for key in ("fold", "updates", "training_seconds", "machine")},
            "val_loss": [row["val_loss"] for row in result["history"]],
            "dsc": {row["patient"]: row["dsc"] for row in result["patients"]},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(found, indent=1) + "\n")
        print(f"{path.stem}: mean DSC {np.nanmean(list(found['dsc'].values())):.3f}", flush=True)


def table(folder, trainings):
    """Mean and median DSC of each training, and what they are above the reference's, as Markdown.

    A patient's DSC is the mean over the seeds that a training shares with the reference. The intervals are 95%
    percentile bootstrap intervals over the patients, who are the same in both.
    """
    scores = {}
    for path in sorted(folder.glob("*.json")):
        one = read_json(path)
        seed = one["recipe"]["training"]["seed"]
        for patient, dsc in one["dsc"].items():
            if dsc is not None and np.isfinite(dsc):
                scores.setdefault(one["training"], {})[seed, patient] = dsc
    lines = [
        "| training | mean DSC | by seed | median DSC | mean less reference's [95%] | median less reference's [95%] | "
        "patients |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name in (name for name in trainings if name in scores):
        shared = scores[name].keys() & scores.get("reference", scores[name]).keys()
        own = _by_patient(scores[name], shared)
        baseline = _by_patient(scores.get("reference", {}), shared)
        seeds = sorted({seed for seed, _ in scores[name]})
        means = [np.mean([dsc for (seed, _), dsc in scores[name].items() if seed == one]) for one in seeds]
        compared = name != "reference" and len(baseline) > 1
        cells = [
            name,
            f"{np.mean(own):.3f}",
            " ".join(f"{mean:.3f}" for mean in means),
            f"{np.median(own):.3f}",
            *(difference(own, baseline, of) if compared else "" for of in (np.mean, np.median)),
            str(len(own)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _by_patient(scores, keys):
    """The mean over the seeds of each patient, in the order of their names."""
    names = sorted({patient for _, patient in keys})
    return [np.mean([scores[key] for key in keys if key[1] == name]) for name in names] if scores else []


def difference(values, baseline, statistic):
    """The difference of a statistic between two trainings on the same patients, with its interval."""

    def less(a, b, axis=-1):
        return statistic(a, axis=axis) - statistic(b, axis=axis)

    values, baseline = np.asarray(values), np.asarray(baseline)
    rng = np.random.default_rng(0)
    found = bootstrap((values, baseline), less, paired=True, vectorized=True, method="percentile", rng=rng)
    low, high = found.confidence_interval
    return f"{less(values, baseline):+.3f} [{low:+.3f}, {high:+.3f}]"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of patients, named {' or '.join(DATA)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run, which may be deleted afterwards")
    parser.add_argument("--updates", type=int, default=640, metavar="N", help="updates of each training (640)")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,..", help="seeds (0,1,2)")
    parser.add_argument("--folds", default="0", metavar="N,..", help="folds (0)")
    parser.add_argument("--items", action="store_true", help="compare the recipe's items instead of the starts")
    parser.add_argument("--only", metavar="NAMES", help="some of the trainings (all)")
    parsed = parser.parse_args()
    trainings = {name: (0.0, {**BEST, **changes}) for name, changes in ITEMS.items()} if parsed.items else STARTS
    names = parsed.only.split(",") if parsed.only else list(trainings)
    seeds, folds = (text.split(",") for text in (parsed.seeds, parsed.folds))
    if unknown := [name for name in names if name not in trainings]:
        parser.error(f"--only: names of {', '.join(trainings)} are expected. Received: {', '.join(unknown)}")
    if parsed.data.name not in DATA:
        parser.error(f"--data: a folder named {' or '.join(DATA)} is expected. Received: {parsed.data}")
    folder = RESULTS / f"{'items' if parsed.items else 'starts'}_{parsed.data.name}_{parsed.updates}"
    # Each seed of all trainings before the next one.
    tasks = {
        folder / f"{name}_fold{fold}_seed{seed}.json": (name, int(fold), int(seed))
        for seed in seeds
        for fold in folds
        for name in names
    }
    if open_tasks := {path: task for path, task in tasks.items() if not path.exists()}:
        methods = {path: method_of(name, *trainings[name], seed) for path, (name, _, seed) in open_tasks.items()}
        recipe = recipe_of(parsed.data.name, parsed.updates)
        run = Run.start(parsed.out, parsed.data, recipe, resume=True, methods=methods.values())
        for path, (name, fold, _) in open_tasks.items():
            train(run, methods[path], name, trainings[name][0], fold, path)
    text = table(folder, trainings)
    write(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
