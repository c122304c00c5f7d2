"""Trains and compares the methods of the paper's Tables I and II, and MONAI's networks, on a folder of patients.

    python benchmarks/reproduce_tables.py --data DIR --out DIR
    python benchmarks/reproduce_tables.py --data DIR --out DIR --methods multi_encoder mmfnet_mlp_std --fold 0 1

Every method sees the same folds, patches and number of updates. Started again with the same --out, it goes on where it
was stopped; started twice at the same time, the two share the work. A method of your own takes part through
--import my_methods.py, a file that calls keras_mmfnet.methods.register_method.
"""

import argparse
import contextlib
import csv
import dataclasses
import fcntl
import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path

# TensorFlow leaves it off on some processors; a step takes a third of the time with it.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import keras
import SimpleITK as sitk
from machine import machine
from tables import results_sections, write_tables

from keras_mmfnet._files import write, write_once
from keras_mmfnet._log import log_to_file, log_to_terminal, time_left
from keras_mmfnet.data import find_cases, five_folds
from keras_mmfnet.data.preprocess import read_tumour
from keras_mmfnet.evaluation import evaluate_case
from keras_mmfnet.explain import cohort_shares
from keras_mmfnet.inference import segment_case
from keras_mmfnet.methods import METHODS
from keras_mmfnet.models import MMFNet
from keras_mmfnet.recipe import Recipe, add_recipe_arguments, recipe_changes
from keras_mmfnet.report import cohort_html, recipe_html, report_html, software_html
from keras_mmfnet.training import preprocess_cases, train_method

try:
    from monai_peers import PEERS, train_peer
except ImportError:
    PEERS = {}


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of patients")
    add("--out", type=Path, help="folder for the results; a run that is there goes on")
    add("--methods", nargs="+", default=["all"], metavar="NAME", help="methods, 'all' or 'list' (default: all)")
    add("--import", dest="module", type=Path, metavar="FILE", help="Python file that registers methods of your own")
    add("--folds", type=int, default=argparse.SUPPRESS, metavar="K", help="folds of the cross-validation (5)")
    add("--fold", nargs="+", type=int, metavar="N", help="numbers of the folds to run, from 0 (default: all)")
    add("--baseline", default="multi_encoder", metavar="NAME", help="method that the others are compared with")
    add("--quiet", action="store_true", help="nothing on the terminal but errors and where the table is")
    add("--paper", action="store_true", help="the full recipe of the paper, in place of the small one for a CPU")
    add("--learning-rate", dest="rate", type=float, metavar="X",
        help="Adam's at the start; a tenth of it after self-transfer (0.01)")  # fmt: skip
    add_recipe_arguments(parser)
    parsed = parser.parse_args(arguments)

    if parsed.module:
        import_file(parsed.module)
    known = {**METHODS, **PEERS}
    if parsed.methods == ["list"]:
        print("\n".join(f"{name:26}{method.title}" for name, method in known.items()))
        sys.exit()
    if not (parsed.data and parsed.out):
        parser.error(f"--data and --out are expected. Received: --data {parsed.data}, --out {parsed.out}")
    if parsed.paper and parsed.rate:
        parser.error(f"--learning-rate: --paper has rates of its own. Received: {parsed.rate}")
    unknown = sorted({*parsed.methods, parsed.baseline} - {"all"} - set(known))
    if unknown:
        parser.error(
            "--methods, --baseline: names from '--methods list' are expected; MONAI's need 'pip install monai'. "
            f"Received: {', '.join(unknown)}"
        )
    parsed.methods = list(known.values()) if "all" in parsed.methods else [known[name] for name in parsed.methods]
    return parsed


def import_file(path):
    """Runs a Python file that registers methods."""
    if not path.is_file():
        raise ValueError(f"--import: a Python file is expected. Received: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def choose_recipe(parsed):
    """The recipe of all methods. But for the paper's, none stops early: all make the same number of updates."""
    changes = recipe_changes(parsed)
    if parsed.paper:
        recipe = Recipe().replace(changes)
    else:
        # In the paper's proportions, but faster: there are fewer updates.
        rate = parsed.rate or 1e-2
        rates = {"learning_rate": rate / 10, "pretrain_learning_rate": rate, "warmup_learning_rate": rate}
        recipe = Recipe.small().replace({"schedule": "cosine", "warmup_epochs": 1, **rates, **changes})
        recipe = recipe.replace({"training.patience": recipe.training.epochs})
    wanted = [modality for method in parsed.methods for modality in method.adapt(recipe).modalities]
    if set(wanted) <= set(recipe.data.modalities):
        return recipe
    # Methods of one's own may look at other modalities than the paper's.
    return recipe.replace({"data.modalities": tuple(dict.fromkeys(wanted))})


@contextlib.contextmanager
def claim(path, wait):
    """Holds a method of a fold for this process, until its end at the latest; yields whether it could."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run_method(method, fold, parts, cases, recipe, folder):
    """Trains one method on one fold, segments its test patients and returns the numbers."""
    training, validation, test = parts
    for name in method.encoders.values():
        # Once, in whichever process comes first.
        with claim(folder / f".{name}.lock", wait=True):
            train_method(METHODS[name], training, validation, recipe, folder)
    adapted, shares = method.adapt(recipe), {}
    if method.name in PEERS:
        predict, parameters, history = train_peer(method, training, validation, adapted, folder)
    else:
        network = train_method(method, training, validation, recipe, folder)
        predict, parameters = method.over_volumes(network, adapted), network.count_params()
        history = read_history(folder / f"{method.name}_history.csv")
        if isinstance(network, MMFNet):
            shares = cohort_shares(network, test)
    rows, begin = [], time.perf_counter()
    for patient in test:
        start = time.perf_counter()
        _, probability = segment_case(predict, patient, adapted)
        seconds = time.perf_counter() - start
        truth = read_tumour(cases[patient.name], adapted.data, patient)
        numbers = evaluate_case(sitk.GetArrayViewFromImage(probability), truth, patient.source.spacing[::-1])
        rows.append({"patient": patient.name, **numbers, "seconds": seconds})
        left = time_left(time.perf_counter() - begin, len(rows), len(test))
        logging.info("Segmented patient %d of %d: DSC %.4f%s", len(rows), len(test), numbers["dsc"], left)
    return {
        "method": method.name,
        "title": method.title,
        "paper": dict(method.paper),
        "fold": fold,
        "parameters": parameters,
        "updates": len(history) * recipe.training.steps_per_epoch,
        "training_seconds": sum(row["seconds"] for row in history),
        "machine": machine(
            "keras", "keras-mmfnet", "numpy", "torch" if method.name in PEERS else keras.backend.backend()
        ),
        "history": history,
        "patients": rows,
        "shares": {block: {name: x.tolist() for name, x in share.items()} for block, share in shares.items()},
    }


def read_history(path):
    """Epochs, losses, learning rates and stages that a training has written."""
    wanted = ("loss", "val_loss", "learning_rate", "seconds")
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {"epoch": int(row["epoch"]), "stage": row["stage"], **{name: float(row[name]) for name in wanted}}
            for row in csv.DictReader(file)
        ]


def main():
    try:
        parsed = parse_arguments()
        log_to_terminal("%(asctime)s %(message)s", parsed.quiet)
        recipe = choose_recipe(parsed)
        cases = {case.name: case for case in find_cases(parsed.data, recipe.data)}
        with log_to_file(parsed.out / "run.log"):
            compare(parsed, recipe, cases)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    table = parsed.out / "table.md"
    print(table if parsed.quiet else table.read_text(encoding="utf-8"))


def compare(parsed, recipe, cases):
    """Trains and evaluates the chosen methods on the chosen folds, and writes the table, the charts and the report."""
    write_once(parsed.out / "recipe.json", recipe.to_json(), "another recipe")
    splits = five_folds(list(cases), recipe.training.folds, recipe.training.validation_fraction, recipe.training.seed)
    folds = range(len(splits)) if parsed.fold is None else parsed.fold
    if not set(folds) <= set(range(len(splits))):
        raise ValueError(f"--fold: numbers from 0 to {len(splits) - 1} are expected. Received: {parsed.fold}")
    division = {"folds": [dataclasses.asdict(split) for split in splits]}
    write_once(parsed.out / "cohort.json", json.dumps(division, indent=2) + "\n", "other patients")
    patients, _ = preprocess_cases(list(cases.values()), recipe.data, parsed.out / "cache")

    tasks = [(fold, method) for fold in folds for method in parsed.methods]
    # What another process is at is left to it; in the end this one waits for what is still missing.
    for wait in (False, True):
        for number, (fold, method) in enumerate(tasks, start=1):
            folder = parsed.out / f"fold_{fold}"
            folder.mkdir(exist_ok=True)
            path = folder / f"{method.name}.json"
            with claim(folder / f".{method.name}.lock", wait) as free:
                if not free or path.exists():
                    continue
                logging.info("%d of %d: fold %d, %s", number, len(tasks), fold, method.title)
                parts = [[patients[name] for name in names] for names in dataclasses.astuple(splits[fold])]
                result = run_method(method, fold, parts, cases, recipe, folder)
                write(path, json.dumps(result) + "\n")
            keras.utils.clear_session()
    write_tables(parsed.out, parsed.out, parsed.baseline)
    sections = [
        *results_sections(parsed.out, parsed.baseline),
        ("Patients", cohort_html(patients.values(), division)),
        ("Recipe", recipe_html(recipe)),
        ("Software", software_html()),
    ]
    write(parsed.out / "report.html", report_html(f"Comparison: {parsed.out.resolve().name}", sections))


if __name__ == "__main__":
    main()
