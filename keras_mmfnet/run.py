"""The folder of a run: trains, segments and evaluates methods on the folds of a cross-validation."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import filelock
import keras
import numpy as np
import SimpleITK as sitk

from keras_mmfnet._files import csv_text, read_json, write, write_once
from keras_mmfnet._log import progress
from keras_mmfnet._machine import machine, name_process, process_of
from keras_mmfnet._parallel import attempt, map_patients
from keras_mmfnet._start import LEARNING, check_start, keep_recipe, require_same_patients
from keras_mmfnet.bundle import write_bundle
from keras_mmfnet.data import find_cases, preprocess_case
from keras_mmfnet.data.cache import image_hashes, key
from keras_mmfnet.data.case import Case, CaseError, PreprocessedCase, group_messages
from keras_mmfnet.data.folds import Fold
from keras_mmfnet.data.image_io import write_image
from keras_mmfnet.data.preprocess import key_of_images, read_masks, recipe_of
from keras_mmfnet.evaluation import METRICS, evaluate_case, metrics_json
from keras_mmfnet.explain import cohort_shares
from keras_mmfnet.inference import mask_file, masks_of, read_segmentation, segment_case
from keras_mmfnet.methods import METHODS, Method, find_method, method_of
from keras_mmfnet.models import MMFNet
from keras_mmfnet.postprocess import PostProcessing, choose
from keras_mmfnet.recipe import RECIPE_FILE, Recipe
from keras_mmfnet.training import read_history, train_method

_log = logging.getLogger(__name__)
# The keys of `machine` that are not versions of packages.
_MACHINE = ("processor", "system", "allocator")


class RunLocked(RuntimeError):
    """Another process is computing what was asked for."""


class Run:
    """A run folder: its files and what they hold. The only place that spells its paths.

    | file | holds |
    |---|---|
    | `recipe.json` | the `Recipe` |
    | `cohort.json` | the data's path, the patients with notes and a hash of their images, those left out, the folds; \
the groups, folds and donor that were given |
    | `donor.keras` | the network whose encoders the recipe's own method starts from, if one was given |
    | `cache/` | the preprocessed patients |
    | `fold_<n>/<method>.keras`, `<method>_history.csv` | a trained network and its epochs |
    | `fold_<n>/<method>.json` | the numbers of a method's test patients |
    | `fold_<n>/masks/<method>/<patient>.nii.gz` | their predicted masks, each on the reference modality's own grid; \
`<patient>_<structure>.nii.gz` if each structure has a file of its own |
    | `fold_<n>/tensorboard/<method>/` | the losses for TensorBoard, with `tracking` |
    | `metrics.json`, `metrics.csv` | the numbers of one method over all folds run so far |
    | `run.log`, `report.html` | what was said, and the report |
    | `jobs/` | the jobs that were started for the run, and their logs |

    Args:
        folder: The folder; `Run.start` makes a new one.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.recipe_file = self.folder / RECIPE_FILE
        self.cohort_file = self.folder / "cohort.json"
        self.donor_file = self.folder / "donor.keras"
        self.cache = self.folder / "cache"
        self.log_file = self.folder / "run.log"
        self.report_file = self.folder / "report.html"
        self.jobs = self.folder / "jobs"
        self.scheduler = self.jobs / ".scheduler"

    def __str__(self):
        return str(self.folder)

    # --- paths

    def fold_folder(self, fold: int) -> Path:
        """Folder of a fold."""
        return self.folder / f"fold_{fold}"

    def network(self, fold: int, name: str = "mmfnet") -> Path:
        """File of a trained network."""
        return self.fold_folder(fold) / f"{name}.keras"

    def history(self, fold: int, name: str) -> Path:
        """CSV file of a network's epochs; see `training.read_history`."""
        return self.fold_folder(fold) / f"{name}_history.csv"

    def result(self, fold: int, name: str) -> Path:
        """JSON file of a method's numbers on the test patients of a fold."""
        return self.fold_folder(fold) / f"{name}.json"

    def owner(self, fold: int, name: str) -> Path:
        """Text file that names the process that computes a network; it stays if that process is killed."""
        return self.fold_folder(fold) / f".{name}.owner"

    def masks(self, fold: int, name: str, patient: str) -> dict[str | None, Path]:
        """The files of what a method predicted for a test patient: by structure, or one for all under `None`."""
        folder = self.fold_folder(fold) / "masks" / name
        return {one: folder / mask_file(patient, one) for one in self.recipe.data.mask_files}

    def lost_masks(self, fold: int, name: str) -> list[str]:
        """The test patients of a method's result of whom a mask is gone."""
        names = dict.fromkeys(row["patient"] for row in read_json(self.result(fold, name))["patients"])
        return [one for one in names if not all(mask.exists() for mask in self.masks(fold, name, one).values())]

    def read_masks(self, fold: int, name: str, patient: str) -> dict[str, sitk.Image]:
        """What a method predicted for a test patient, by structure."""
        return read_segmentation(self.masks(fold, name, patient), self.recipe.data.structures)

    def postprocessing(self, folds: Sequence[int], name: str = "mmfnet") -> PostProcessing:
        """How masks are made of the mean probability of a method's networks of some folds.

        Raises:
            ValueError: The recipe wants it chosen, and a fold has no result yet, which holds it.
        """
        data = self.recipe.data
        if not self.recipe.training.postprocess:
            return PostProcessing.default(data.structure_names, data.exclusive)
        chosen = []
        for fold in folds:
            path = self.result(fold, name)
            if not path.exists():
                raise ValueError(
                    f"{path}: a finished fold is expected, whose result holds its post-processing; --resume finishes "
                    "it. Received: no such file"
                )
            if "postprocess" not in (result := read_json(path)):
                raise ValueError(f"{path}: a result with the recipe's `postprocess` is expected. Received: one without")
            chosen.append(PostProcessing(**result["postprocess"]["rules"]))
        return PostProcessing.of_ensemble(chosen)

    def histories(self, fold: int) -> dict[str, list[dict]]:
        """The epochs of every network that was trained in a fold, by its name; see `training.read_history`."""
        paths = sorted(self.fold_folder(fold).glob("*_history.csv"))
        return {path.name.removesuffix("_history.csv"): read_history(path) for path in paths}

    @property
    def begun_folds(self) -> list[int]:
        """Numbers of the folds that have a folder."""
        numbers = (path.name.removeprefix("fold_") for path in self.folder.glob("fold_*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def trained_folds(self) -> list[int]:
        """Numbers of the folds whose MMFNet is trained."""
        return [fold for fold in self.begun_folds if self.network(fold).exists()]

    def results(self) -> dict[str, list[dict]]:
        """The results so far, `{method: [that of a fold, ...]}`, in the order of the registry and then by name."""
        found = {}
        for path in self.folder.glob("fold_*/*.json"):
            result = read_json(path)
            if path.parent == self.fold_folder(result["fold"]):  # no copy of a fold's folder
                found.setdefault(result["method"], []).append(result)
        names = sorted(found, key=lambda name: (list(METHODS).index(name) if name in METHODS else len(METHODS), name))
        return {name: sorted(found[name], key=lambda result: result["fold"]) for name in names}

    def rows(self, name: str) -> list[dict]:
        """A method's numbers so far, as `cross_validate` returns them."""
        return [
            {"patient": row["patient"], "structure": row["structure"], "fold": result["fold"], **row}
            for result in self.results()[name]
            for row in result["patients"]
        ]

    # --- what the files hold

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The run's `Recipe`."""
        if not self.recipe_file.is_file():
            raise ValueError(f"the folder of a run, with a recipe.json, is expected. Received: {self.folder}")
        return Recipe.load(self.recipe_file)

    @functools.cached_property
    def cohort(self) -> dict:
        """What `cohort.json` holds: `data`, `patients`, `images`, `skipped`, `folds`, and the rest if given."""
        if not self.cohort_file.is_file():
            raise ValueError(f"the folder of a run, with a cohort.json, is expected. Received: {self.folder}")
        return read_json(self.cohort_file)

    @property
    def folds(self) -> list[Fold]:
        """The folds of the cross-validation."""
        return [Fold(**{part: tuple(names) for part, names in fold.items()}) for fold in self.cohort["folds"]]

    @functools.cached_property
    def cases(self) -> dict[str, Case]:
        """The files of the run's patients by name."""
        skipped = []
        cases = {case.name: case for case in find_cases(self.cohort["data"], self.recipe.data, on_error=skipped.append)}
        missing = sorted(set(self.cohort["patients"]) - set(cases))
        if missing:
            raise ValueError(
                f"{self.cohort['data']}: must hold the patients of the run {self.folder}. Received: a folder without "
                f"{', '.join(missing)}"
            )
        return {name: cases[name] for name in self.cohort["patients"]}

    def patients(self, names: Iterable[str]) -> list[PreprocessedCase]:
        """Preprocessed patients by name, from the cache."""
        return [preprocess_case(self.cases[name], self.recipe.data, self.cache) for name in names]

    def donated(self, method: Method) -> dict[str, Path]:
        """The encoders that a method starts from: `{modality: self.donor_file}`, empty without a donor.

        Only the recipe's own method does.
        """
        donor = self.cohort.get("donor", {"modalities": []})
        return dict.fromkeys(donor["modalities"], self.donor_file) if method.name == "mmfnet" else {}

    def borrowed(self, method: Method) -> dict[str, str]:
        """The networks of a fold that a method's other encoders are borrowed from: `{modality: name}`."""
        donated = self.donated(method)
        return {modality: name for modality, name in method.encoders.items() if modality not in donated}

    def seen_in_training(self, case: Case, folds: Iterable[int]) -> str:
        """Says that networks of some folds were trained on a patient, or chosen by it; empty text if none was."""
        if not self.cohort_file.is_file():
            return ""
        names, who, images = {case.name}, "a patient of this name", set(image_hashes(case))
        if not images.isdisjoint(self.cohort.get("donor", {}).get("learned", ())):
            return "this patient was in the training set of the network that the training started from"
        # New masks, or none, make no other patient.
        hashes = self.cohort.get("image_hashes", {})
        if same := {name for name, own in hashes.items() if not images.isdisjoint(own)}:
            names, who = same, "this patient"
        seen = [str(fold) for fold in folds if names & {*self.folds[fold].train, *self.folds[fold].validation}]
        return f"{who} was in the training set of fold{'s' * (len(seen) > 1)} {', '.join(seen)}" if seen else ""

    def save_bundle(self, path: str | os.PathLike, about: str | None = None) -> None:
        """Writes a bundle to share, of the networks of the recipe's own method: see `Bundle`.

        It holds no image and no name of a patient, and no path of this machine.

        Args:
            path: A new folder, or a new file that ends with `.zip`.
            about: What only you know, for the model card, in Markdown: whose images these were, of which scanners and
                diagnoses, who drew the masks, and the terms on which the networks may be used.

        Raises:
            FileExistsError: There is something at the path.
            ValueError: No fold is finished, or one has a trained network but no numbers yet.
        """
        results, folds = self.results().get("mmfnet", []), self.trained_folds()
        finished = {result["fold"]: result for result in results if result["fold"] in folds}
        if not finished or len(finished) < len(folds):
            raise ValueError(
                f"{self}: finished folds are expected; --resume finishes them. Received: trained "
                f"{', '.join(map(str, folds)) or 'none'}, finished {', '.join(map(str, finished)) or 'none'}"
            )
        machines = {fold: result["machine"] for fold, result in finished.items()}
        packages = {fold: {k: v for k, v in of.items() if k not in _MACHINE} for fold, of in machines.items()}
        rules = {fold: self.postprocessing([fold]) for fold in finished}
        text = about or "The training data were not described."
        if self.donor_file.exists():
            names = ", ".join(self.donated(method_of(self.recipe)))
            text += (
                f"\n\nThe encoders of {names} started from those of another network, whose data are not described here."
            )
        networks = {fold: self.network(fold) for fold in finished}
        rows = [row for row in self.rows("mmfnet") if row["fold"] in finished]
        write_bundle(path, self.recipe, networks, rules, packages, rows, text)

    # --- starting, and sharing the work

    def require_none(self) -> None:
        """Raises `ValueError` if the folder holds a run, or jobs are making one."""
        if not self.recipe_file.exists() and (scheduler := process_of(self.scheduler)):
            raise ValueError(f"{self}: must hold no run that jobs are making. Received: jobs scheduled by {scheduler}")
        if self.recipe_file.exists():
            raise ValueError(
                f"{self}: must hold no run, unless that run is to be resumed (--resume). Received: a folder with "
                f"{self.recipe_file.name}"
            )
        if left := [path for kind in ("keras", "json") for path in self.folder.glob(f"fold_*/*.{kind}")]:
            raise ValueError(f"{self}: must hold no results of another run. Received: a folder with {left[0]}")

    @classmethod
    def start(
        cls,
        folder: str | os.PathLike,
        data: str | os.PathLike,
        recipe: Recipe,
        resume: bool = False,
        on_error: Callable[[CaseError], None] | None = None,
        groups: Mapping[str, str] | None = None,
        splits: Sequence[Fold] | None = None,
        methods: Sequence[Method] | None = None,
        donor: str | os.PathLike | None = None,
        folds: Sequence[int] | None = None,
    ) -> "Run":
        """A new run over a folder of patients, or the one that is there; preprocesses the patients.

        Nothing but the cache is written before all of it was validated.

        Args:
            folder: Folder for the results.
            data: Folder of patients; see `find_cases`.
            recipe: The `Recipe`.
            resume: Go on with the run that is in the folder, of the same recipe and patients.
            on_error: Called with the `CaseError` of each patient that cannot be used; that patient is then left out.
                `None`: an error that lists all of them is raised.
            groups: The group of every patient by name, as from `read_groups`, instead of the recipe's `training.group`.
                `None`, when a run is resumed, for those it was started with.
            splits: Folds, as from `read_splits`, instead of the recipe's; patients in none of them are not used.
                `None`, when a run is resumed, for those it was started with.
            methods: The methods to be run, for each network of which a fold must have patients with its sequences;
                `None` for the recipe's own.
            folds: Numbers of the folds that are to be run, the only ones that must have such patients; `None` for all.
            donor: The `.keras` file of an `MMFNet`, or of another network with such encoders, from whose encoders the
                recipe's own method starts: those of the sequences that both have. They are frozen during the warm-up,
                as in self-transfer, which remains for the other sequences. `None`, when a run is resumed, for the one
                it was started with.

        Returns:
            The `Run`.

        Raises:
            CaseError: A patient cannot be used.
            ValueError: The folder holds another run; there are too few patients for the folds; a patient occurs
                twice; the groups or folds do not fit the patients; a fold has nobody to train or to validate a network
                on; no loss has the recipe's name; the devices cannot train this recipe; the donor has
                none of the sequences, or encoders of another kind; or the backend cannot compute in the precision
                wanted.
        """
        run = cls(folder)
        start = check_start(run, data, recipe, resume, groups, splits, methods, donor, folds)
        names, patients, bad = [case.name for case in start.cases], {}, start.bad
        preprocess = functools.partial(preprocess_case, recipe=recipe.data, cache=run.cache)
        preprocess = functools.partial(attempt, preprocess)
        for name, found in zip(names, map_patients(preprocess, start.cases, names, "preprocessing"), strict=True):
            if isinstance(found, CaseError):
                bad.append(found)
            else:
                patients[name] = found
        _log.info("Preprocessed %d of %d patients", len(patients), len(start.cases))
        for line in group_messages(f"{name}: {note}" for name, patient in patients.items() for note in patient.notes):
            _log.info("%s", line)
        # Those of a resumed run must be the same, not only their names.
        images = {
            case.name: key(case, recipe_of(case, recipe.data), run.cache)
            for case in start.cases
            if case.name in patients
        }
        if run.cohort_file.exists():
            require_same_patients(run, images, bad)
        if bad and on_error is None:
            raise CaseError.of_several(bad, len(patients) + len(bad))
        for error in bad:
            on_error(error)
        cases = {case.name: case for case in start.cases if case.name in patients}
        division = start.divide(patients)
        cohort = {
            "data": str(Path(data).absolute()),
            "patients": {name: list(patient.notes) for name, patient in patients.items()},
            "images": images,
            "images_alone": {name: key_of_images(case, recipe.data, run.cache) for name, case in cases.items()},
            "image_hashes": {name: image_hashes(case, run.cache) for name, case in cases.items()},
            "skipped": {error.patient: str(error) for error in bad},
            "folds": [dataclasses.asdict(fold) for fold in division],
            **({} if start.groups is None else {"groups": start.groups}),
            **({"splits": [dataclasses.asdict(fold) for fold in start.splits]} if start.splits else {}),
            **({"donor": start.donor} if start.donor else {}),
        }
        run.folder.mkdir(parents=True, exist_ok=True)
        if donor and not run.cohort_file.exists():
            write(run.donor_file, Path(donor).read_bytes())
        text = json.dumps(cohort, indent=2) + "\n"
        # The folder of the patients may have moved, of which the errors tell too; older runs have fewer hashes.
        other = "another donor, other patients, groups or folds"
        write_once(run.cohort_file, text, other, free=("data", "skipped", "images_alone", "image_hashes"))
        keep_recipe(run, recipe)  # Of a new run it is the last file: a folder with a recipe is a run.
        run.cases = cases
        return run

    @contextlib.contextmanager
    def claim(self, fold: int, name: str, wait: bool = False) -> Iterator[None]:
        """Holds a network of a fold for this process, until the end of the block or of the process.

        Args:
            fold: Number of the fold.
            name: Name of the network.
            wait: Wait for another process that holds it.

        Raises:
            RunLocked: Another process holds it, which the message names.
        """
        folder = self.fold_folder(fold)
        folder.mkdir(parents=True, exist_ok=True)
        owner = self.owner(fold, name)
        lock = filelock.FileLock(folder / f".{name}.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except filelock.Timeout:
            holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
            raise RunLocked(f"{self}: fold {fold}, {name}: is being computed by {holder}") from None
        try:
            write(owner, name_process())
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


def run_fold(run: Run, method: Method, fold: int, wait: bool = False) -> dict:
    """Trains a method on one fold, segments its test patients and evaluates them; what is done is not done again.

    The single-modality networks of a fold are trained once for all methods that borrow from them. Patients who have
    none of the method's sequences are passed over.

    Args:
        run: The `Run`.
        method: The `Method`.
        fold: Number of the fold, from 0.
        wait: Wait for another process that computes the same, instead of an error.

    Returns:
        The result as it stands in `run.result(fold, method.name)`: `method`, `title`, `paper`, `fold`, `parameters`,
        `updates`, `training_seconds`, `machine`, `history`, `patients` (a dict of `patient`, `structure`, the
        numbers of `evaluate_case` and `seconds` for each structure of each patient), `shares` of the fusion blocks
        and, with `training.postprocess`, `postprocess`: the `rules` of a `PostProcessing` and the `gains` of `choose`.

    Raises:
        RunLocked: Another process computes the same.
        ValueError: There is no such fold.
    """
    if fold not in range(len(run.folds)):
        raise ValueError(f"a fold must be a number from 0 to {len(run.folds) - 1}. Received: {fold}")
    path = run.result(fold, method.name)
    with run.claim(fold, method.name, wait):
        if path.exists():
            gone = run.lost_masks(fold, method.name)
            if not gone:
                return read_json(path)
            lost = f"{method.title}, fold {fold}: the masks of {', '.join(gone)} are gone"
            if not run.network(fold, method.name).exists():
                _log.warning("%s and so is the network; the fold is computed again once %s is deleted", lost, path)
                return read_json(path)
            _log.warning("%s; segmenting the patients again", lost)
        training, validation, test = _parts(run, method, fold)
        recipe = method.adapt(run.recipe)
        predict, parameters, history, shares = _learn(run, method, fold, training, validation, test)
        chosen = _choose_rules(predict, validation, run, recipe) if recipe.training.postprocess else {}
        rules = PostProcessing(**chosen["postprocess"]["rules"]) if chosen else None
        rows = []
        for number, patient in enumerate(test, start=1):
            rows += _test(predict, patient, run, recipe, rules, run.masks(fold, method.name, patient.name))
            about = ", ".join(_about(rows[-len(recipe.data.structures) :]))
            _log.info("Segmented patient %d of %d: %s", number, len(test), about)
            progress("segmenting", number, len(test))
        result = {
            "method": method.name,
            "title": method.title,
            "paper": dict(method.paper),
            "fold": fold,
            "parameters": parameters,
            "updates": len(history) * recipe.training.steps_per_epoch,
            "training_seconds": sum(row["seconds"] for row in history),
            "machine": machine("keras", "keras-mmfnet", "numpy", method.library or keras.backend.backend()),
            "history": history,
            "patients": rows,
            "shares": {block: {name: x.tolist() for name, x in share.items()} for block, share in shares.items()},
            **chosen,
        }
        write(path, json.dumps(result) + "\n")
    keras.utils.clear_session()
    return result


def train_donor(run: Run, fold: int, name: str) -> None:
    """Trains the single-modality network of a fold from which others borrow the encoder; once, for all of them.

    Args:
        run: The `Run`.
        fold: Number of the fold, from 0.
        name: Name of the network, such as `unet3d_t1`. Another process that trains it is waited for.
    """
    with run.claim(fold, name, wait=True):
        if not run.network(fold, name).exists():
            patients = (run.patients(getattr(run.folds[fold], part)) for part in LEARNING)
            train_method(find_method(name), *patients, run.recipe, run.fold_folder(fold))


def _parts(run, method, fold):
    """The patients of a fold to train on, to validate on and to test, who have one of the method's sequences."""
    parts = [run.patients(names) for names in dataclasses.astuple(run.folds[fold])]
    if lacking := [p.name for part in parts for p in part if not method.serves(p.images, run.recipe)]:
        _log.info("%s, fold %d: passed over, without its sequences: %s", method.title, fold, ", ".join(lacking))
        parts = [[patient for patient in part if patient.name not in lacking] for part in parts]
    about = "%s, fold %d: %d patients to learn from, %d to choose the best epoch, %d to test"
    _log.info(about, method.title, fold, *map(len, parts))
    return parts


def _learn(run, method, fold, training, validation, test):
    """Trains a method: its predictor, the number of its weights, its epochs, and the shares of its fusion blocks."""
    recipe, folder = method.adapt(run.recipe), run.fold_folder(fold)
    if method.train:
        return *method.train(method, training, validation, recipe, folder), {}
    finished, donated = run.network(fold, method.name).exists(), run.donated(method)
    own = run.borrowed(method)
    for name in () if finished else own.values():
        train_donor(run, fold, name)
    encoders = dict.fromkeys(run.recipe.data.modalities) | donated if donated else None
    encoders = encoders and encoders | {modality: run.network(fold, name) for modality, name in own.items()}
    network = train_method(method, training, validation, run.recipe, folder, encoders)
    shares = cohort_shares(network, test) if isinstance(network, MMFNet) and test else {}
    history = read_history(run.history(fold, method.name))
    return method.over_volumes(network, recipe), network.count_params(), history, shares


def _choose_rules(predict, validation, run, recipe):
    """The post-processing that the validation patients choose, as the result has it.

    Regions are chosen by themselves, and fitted together in the masks: they keep the default rules unless the mean DSC
    over all of them rises.
    """
    data = recipe.data
    rules, gains = choose(_examples(predict, validation, run, recipe), data.structure_names, data.exclusive)
    default = PostProcessing.default(data.structure_names, data.exclusive)
    if not data.exclusive and not data.named_structures and rules != default:
        before, after = _dsc_of_regions(_examples(predict, validation, run, recipe), data, (default, rules))
        if sum(after.values()) <= sum(before.values()):
            rules, after = default, before
        gains = {name: one | {"before": before.get(name), "after": after.get(name)} for name, one in gains.items()}
    for name, rule in rules.structures.items():
        before, after = (METRICS["dsc"].text(gains[name][key]) for key in ("before", "after"))
        _log.info("Post-processing, %s: %s; DSC of validation patients %s to %s", name, rule, before, after)
    return {"postprocess": {"rules": rules.model_dump(mode="json"), "gains": gains}}


def _dsc_of_regions(examples, data, several):
    """By each post-processing, the mean DSC of each region as the masks have it, `{region: DSC}`."""
    scores = [{} for _ in several]
    for probability, truth, spacing in examples:
        probabilities = dict(zip(data.structure_names, np.moveaxis(probability, -1, 0), strict=True))
        experts = dict(zip(data.structure_names, np.moveaxis(truth > 0, -1, 0), strict=True))
        for rules, by_name in zip(several, scores, strict=True):
            masks, _ = masks_of(probabilities, data, rules, spacing)
            for name, expert in experts.items():
                if volume := np.count_nonzero(expert):
                    dsc = 2 * np.count_nonzero(masks[name] & expert) / (np.count_nonzero(masks[name]) + volume)
                    by_name.setdefault(name, []).append(dsc)
    return [{name: float(np.mean(found)) for name, found in by_name.items()} for by_name in scores]


def _examples(predict, patients, run, recipe):
    """The probabilities, the expert's masks and the spacing of patients, one at a time, for `choose`."""
    for number, patient in enumerate(patients, start=1):
        images = segment_case(predict, patient, recipe).probabilities
        truth = read_masks(run.cases[patient.name], run.recipe.data, patient)
        probability = np.stack([sitk.GetArrayViewFromImage(image) for image in images.values()], axis=-1)
        yield probability, np.stack([truth[name] for name in images], axis=-1), patient.source.spacing[::-1]
        progress("choosing the post-processing", number, len(patients))


def _test(predict, patient, run, recipe, rules, paths):
    """Segments one patient, writes the masks and compares them with the expert's: a row for each structure."""
    start = time.perf_counter()
    found = segment_case(predict, patient, recipe, rules)
    for structure, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_image(found.label_image if structure is None else found.masks[structure], path)
    seconds = time.perf_counter() - start
    truth = read_masks(run.cases[patient.name], run.recipe.data, patient)
    rows = []
    for structure, expected in truth.items():
        probability, mask = (sitk.GetArrayViewFromImage(some[structure]) for some in (found.probabilities, found.masks))
        numbers = evaluate_case(probability, expected, patient.source.spacing[::-1], predicted=mask)
        rows.append({"patient": patient.name, "structure": structure, **numbers, "seconds": seconds})
    return rows


def _about(rows):
    """What is said of each structure of a patient; one alone is not named."""
    for row in rows:
        key = "dsc" if row["volume_ml"] else "false_positive_ml"
        yield f"{row['structure']} " * (len(rows) > 1) + f"{METRICS[key].title} {METRICS[key].text(row[key])}"


def cross_validate(run: Run, method: Method, folds: Sequence[int] | None = None) -> list[dict]:
    """Trains a method on the patients of each fold and evaluates it on those held back (section IV-C).

    Writes `metrics.json` and `metrics.csv` over all folds run so far.

    Args:
        run: The `Run`.
        method: The `Method`, such as `method_of(run.recipe)`.
        folds: Numbers of the folds to run, from 0; `None` for all.

    Returns:
        A dict for each structure of each test patient of all folds run so far: `patient`, `structure`, `fold`, the
        numbers of `evaluate_case` and `seconds`, the time from the preprocessed images to the written masks.

    Raises:
        RunLocked: Another process computes one of the folds.
        ValueError: There is no such fold.
    """
    for fold in range(len(run.folds)) if folds is None else folds:
        run_fold(run, method, fold)
    rows = run.rows(method.name)
    write(run.folder / "metrics.json", metrics_json(rows))
    write(run.folder / "metrics.csv", csv_text(rows))
    return rows


def compare_methods(run: Run, methods: Sequence[Method], folds: Sequence[int] | None = None) -> dict[str, list[dict]]:
    """Trains and evaluates several methods on the same folds, patches and numbers of updates.

    Several processes share the work: each leaves to the others what they are computing, and waits for it in the end.

    Args:
        run: The `Run`.
        methods: The methods.
        folds: Numbers of the folds to run, from 0; `None` for all.

    Returns:
        `run.results()`.

    Raises:
        ValueError: There is no such fold.
    """
    tasks = [(fold, method) for fold in (range(len(run.folds)) if folds is None else folds) for method in methods]
    for wait in (False, True):
        for fold, method in tasks:
            with contextlib.suppress(RunLocked):
                run_fold(run, method, fold, wait)
    return run.results()


def modalities_of(methods: Iterable[Method], recipe: Recipe) -> tuple[str, ...]:
    """The recipe's modalities if the methods use no others, else the methods' modalities."""
    wanted = [name for method in methods for name in method.adapt(recipe).data.modalities]
    return recipe.data.modalities if set(wanted) <= set(recipe.data.modalities) else tuple(dict.fromkeys(wanted))
