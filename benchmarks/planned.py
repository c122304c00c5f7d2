"""Cross-validates MMFNet with self-transfer as planned for a data set, beside `Recipe.small()`.

    python benchmarks/planned.py --data LGG --out OUT --minutes 40 --folds 0,1,2,3,4
    python benchmarks/planned.py --data CUBES --out OUT --minutes 25 --recipes planned

The recipe is planned once, and kept with the folds beside the results; from then on it is what is trained. It may be
stopped at any moment, and a second call resumes. Two processes with the same --out share the work. Each fold leaves a
JSON file; the table is made of those there are.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from pathlib import Path

# Off by default on some processors; a training step is three times faster with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
from learning import difference

from keras_mmfnet._files import read_json, write
from keras_mmfnet.data import Fold, find_cases
from keras_mmfnet.methods import method_of
from keras_mmfnet.plan import given_recipe, plan_recipe
from keras_mmfnet.recipe import Recipe
from keras_mmfnet.run import Run, RunLocked, run_fold

RESULTS = Path(__file__).parent / "results" / "planned"
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


def make_recipe(name, data, minutes, cache):
    """The recipe of that name for a data set."""
    given, needed = DATA[data.name]
    if name == "small":
        return Recipe.small().replace({**given, **needed})
    cases = find_cases(data, given_recipe(given).data)
    return plan_recipe(cases, given, seconds=60 * minutes, cache=cache)


def table(folder):
    """The DSC of each recipe and structure over the folds that all have, as Markdown.

    The interval of the difference is a 95% percentile bootstrap interval over the patients.
    """
    results = {}
    for path in sorted(folder.glob("*/fold_*.json")):
        results.setdefault(path.parent.name, {})[path.stem] = read_json(path)
    shared = set.intersection(*map(set, results.values())) if results else set()
    scores, lines = {}, []
    for name, folds in results.items():
        for fold in sorted(shared):
            for row in folds[fold]["patients"]:
                if row["dsc"] is not None and np.isfinite(row["dsc"]):
                    scores.setdefault((name, row["structure"]), {})[row["patient"]] = row["dsc"]
    for (name, structure), found in scores.items():
        values = [found[patient] for patient in sorted(found)]
        base = scores.get(("small", structure))
        base = base and name != "small" and [base[patient] for patient in sorted(found)]
        minutes = np.mean([results[name][fold]["seconds"] / 60 for fold in shared])
        cells = [
            name,
            structure,
            f"{np.mean(values):.3f}",
            f"{np.median(values):.3f}",
            f"{np.mean(np.less(values, 0.5)):.0%}",
            *(difference(values, base, of) if base else "" for of in (np.mean, np.median)),
            str(len(values)),
            str(len(shared)),
            f"{minutes:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    head = (
        "| recipe | structure | mean DSC | median DSC | below 0.5 | mean less small's [95%] | "
        "median less small's [95%] | patients | folds | minutes a fold |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    )
    return "\n".join([*head, *lines]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of patients, named {' or '.join(DATA)}")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs, which may be deleted afterwards")
    parser.add_argument("--minutes", type=float, default=40, help="for a fold, when it is planned (%(default)s)")
    parser.add_argument("--recipes", default="planned,small", metavar="NAMES", help="some of %(default)s")
    parser.add_argument("--folds", default="0", metavar="N,..", help="folds (0)")
    parsed = parser.parse_args()
    if parsed.data.name not in DATA:
        parser.error(f"--data: a folder named {' or '.join(DATA)} is expected. Received: {parsed.data}")
    folder = RESULTS / parsed.data.name
    folds = folder / "folds.json"  # of the first run, for all
    for number in parsed.folds.split(","):
        for name in parsed.recipes.split(","):
            path, kept = folder / name / f"fold_{number}.json", folder / name / "recipe.json"
            if path.exists():
                continue
            run = Run(parsed.out / name)
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                write(kept, make_recipe(name, parsed.data, parsed.minutes, run.cache).to_json())
            recipe = Recipe.load(kept)
            begun = run.recipe_file.exists() or not folds.exists()
            splits = None if begun else [Fold(**fold) for fold in json.loads(folds.read_text())]
            run = Run.start(run.folder, parsed.data, recipe, resume=True, splits=splits)
            if not folds.exists():
                write(folds, json.dumps([dataclasses.asdict(fold) for fold in run.folds], indent=1) + "\n")
            with contextlib.suppress(RunLocked):
                result = run_fold(run, method_of(recipe), int(number))
                seconds = sum(row["seconds"] for rows in run.histories(int(number)).values() for row in rows)
                keys = ("fold", "parameters", "updates", "machine", "history", "patients", "postprocess")
                found = {key: result.get(key) for key in keys} | {"seconds": seconds}
                write(path, json.dumps(found) + "\n")
                dsc = np.nanmean([row["dsc"] for row in result["patients"]])
                print(f"{name}, fold {number}: mean DSC {dsc:.3f}", flush=True)
    text = table(folder)
    write(folder / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
