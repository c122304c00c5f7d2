"""What is checked before a run starts: the patients, the folds, the donor and the methods."""

import dataclasses
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from keras_mmfnet._files import read_json, write_once
from keras_mmfnet._precision import dtype_policy
from keras_mmfnet.data import check_ids, find_cases, find_duplicates, group_patients, refuse_duplicates
from keras_mmfnet.data.case import Case, CaseError
from keras_mmfnet.data.folds import Fold, divide_patients
from keras_mmfnet.devices import check_recipe
from keras_mmfnet.losses import make_loss
from keras_mmfnet.methods import Method, build_mmfnet, find_method, method_of
from keras_mmfnet.models import load_network
from keras_mmfnet.recipe import Recipe

_log = logging.getLogger(__name__)
# The parts of a fold that a network learns from.
LEARNING = ("train", "validation")


@dataclasses.dataclass
class Start:
    """What a run starts from.

    Args:
        recipe: The `Recipe`.
        methods: The methods that are to be trained.
        cases: The patients' files.
        bad: The `CaseError`s of patients that cannot be used.
        grouped: The group of each patient who is in one, as from `group_patients`.
        groups: The groups that were given, as for `Run.start`.
        splits: The folds that were given, as for `Run.start`.
        donor: What `cohort.json` says of the donor.
        trained: Numbers of the folds that are to be trained; `None` for all.
    """

    recipe: Recipe
    methods: Sequence[Method]
    cases: list[Case]
    bad: list[CaseError]
    grouped: Mapping[str, str]
    groups: Mapping[str, str] | None
    splits: Sequence[Fold]
    donor: dict | None
    trained: Sequence[int] | None = None

    def divide(self, patients=None):
        """The folds; those of preprocessed patients, whose tumours are known, if they are given."""
        names = [case.name for case in self.cases] if patients is None else patients
        volumes = patients and {name: patient.tumour_ml for name, patient in patients.items()}
        left_out = [error.patient for error in self.bad]
        folds = divide_patients(names, self.recipe.training, self.grouped, self.splits, volumes, left_out)
        structures = patients and {name: patient.structures_ml for name, patient in patients.items()}
        trained = {n: fold for n, fold in enumerate(folds) if self.trained is None or n in self.trained}
        _check_folds(trained, self.cases, structures, self.recipe, self.methods)
        return folds


def check_start(run, data, recipe, resume=False, groups=None, splits=None, methods=None, donor=None, folds=None):
    """Finds the patients of a run, and makes all checks that `Run.start` makes before it preprocesses.

    Nothing is written. Patients who cannot be used are listed in the `Start` that is returned. `folds` are the numbers
    of those that are to be trained, `None` for all.
    """
    if not resume:
        run.require_none()
    elif run.recipe_file.exists():
        keep_recipe(run, recipe)
    methods = [method_of(recipe)] if methods is None else methods
    for method in methods:
        make_loss(method.adapt(recipe).training.loss)
        check_recipe(method.adapt(recipe))
    _log.info("Computing in %s", dtype_policy(recipe.training.mixed_precision))
    given = donor and _donor(Path(donor), recipe)
    bad = []
    cases = find_cases(data, recipe.data, on_error=bad.append)
    kept = read_json(run.cohort_file) if run.cohort_file.exists() else {}
    if "donor" in kept and not _is_file_of(run.donor_file, kept["donor"]["sha256"]):
        raise ValueError(f"{run.donor_file}: must be the donor this run started from. Received: another or no file")
    groups = kept.get("groups") if groups is None else dict(groups)
    splits = [Fold(**fold) for fold in kept.get("splits", ())] if splits is None else splits
    if splits:
        used = set().union(*(fold.names for fold in splits))
        if unused := [case.name for case in cases if case.name not in used]:
            _log.info("In no fold, and not used: %s", ", ".join(unused))
        cases, bad = [case for case in cases if case.name in used], [one for one in bad if one.patient in used]
    grouped = group_patients(cases, recipe.training.group, groups)
    if not kept:  # A run that is resumed must have the same images, which were checked at its start.
        refuse_duplicates(find_duplicates(cases), grouped)
        check_ids(cases, grouped)
    start = Start(recipe, methods, cases, bad, grouped, groups, splits, given or kept.get("donor"), folds)
    start.divide()  # Too few patients are found before the long work.
    if len(recipe.data.mask_files) > 1:
        files = Counter(f"{case.name}_{structure}" for case in cases for structure in recipe.data.mask_files)
        if twice := [file for file, count in files.items() if count > 1]:
            expected = "names of patients and structures must not join to the same name of a file"
            raise ValueError(f"{expected}. Received: {twice[0]} twice")
    return start


def keep_recipe(run, recipe):
    """Writes the recipe of a run; refuses another than the run has already."""
    write_once(run.recipe_file, recipe.to_json(), "another recipe")


def require_same_patients(run, images, bad):
    """Refuses to resume a run whose patients are not as they were.

    `images` has the hash of each patient's images, and `bad` a `CaseError` for each who cannot be used.
    """
    kept, errors = run.cohort["images"], {error.patient: str(error) for error in bad}
    received = [
        errors.get(name) or ("other images" if name in images else "no files") + f" of {name}"
        for name in kept
        if images.get(name) != kept[name]
    ]
    if received:
        more = [f"{len(received) - 5} more"] * (len(received) > 5)
        raise ValueError(
            f"{run}: the run's patients must be as they were at its start; restore their files, or start another run. "
            f"Received: {'; '.join(received[:5] + more)}"
        )


def _is_file_of(path, sha256):
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _donor(path, recipe):
    """What `cohort.json` says of a donor: its hash, the modalities whose encoders it gives, and what it learnt from.

    Raises:
        ValueError: It has none of the recipe's modalities, or encoders that do not fit the recipe.
    """
    network = load_network(path)
    inputs = network.input if isinstance(getattr(network, "input", None), dict) else {}
    names = [name for name in recipe.data.modalities if name in inputs]
    if not names:
        raise ValueError(
            f"{path}: must be a network with an encoder for one of {', '.join(recipe.data.modalities)}. "
            f"Received: one for {', '.join(inputs) or 'no modality'}"
        )
    build_mmfnet(recipe, "float32", dict.fromkeys(recipe.data.modalities) | dict.fromkeys(names, network))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"modalities": names, "sha256": sha256, "learned": _learned(path.absolute())}


def _learned(network):
    """The hashes of the images that a network of a run was trained on or chosen by, and those of its own donor."""
    cohort, number = network.parents[1] / "cohort.json", network.parent.name.removeprefix("fold_")
    if not (cohort.is_file() and number.isdecimal()):
        return []  # of a bundle, or from elsewhere
    cohort = read_json(cohort)
    fold, hashes = cohort["folds"][int(number)], cohort.get("image_hashes", {})
    own = itertools.chain.from_iterable(hashes.get(name, ()) for part in LEARNING for name in fold[part])
    return sorted({*own, *cohort.get("donor", {}).get("learned", ())})


def _check_folds(folds, cases, volumes, recipe, methods):
    """Refuses folds, `{number: Fold}`, in which nobody can train or validate a network, or nobody has a tumour.

    If the `volumes` of the structures are known, somebody to train on must have each structure.
    """
    images = {case.name: case.images for case in cases}
    networks = dict.fromkeys(name for method in methods for name in method.encoders.values())
    methods = [*map(find_method, networks), *methods]
    for number, part, names in ((n, part, getattr(f, part)) for n, f in folds.items() for part in LEARNING):
        for method in methods:
            served = [name for name in names if method.serves(images[name], recipe)]
            if not served:
                raise ValueError(
                    f"fold {number}: {method.title} must have a patient with "
                    f"{' or '.join(method.adapt(recipe).data.modalities)} for {part}; another `training.seed` or "
                    f"--splits may help. Received: {', '.join(names)} without"
                )
            there = {one for name in served for one, ml in (volumes or {}).get(name, {}).items() if ml}
            lacking = [one for one in recipe.data.structures if one not in there]
            if volumes is not None and (lacking if part == "train" else not there):
                wanted = {one: (one,) for one in lacking} if there else {"tumour": tuple(recipe.data.structures)}
                known = _who_has(wanted, volumes, recipe, 1 if there else 2)
                raise ValueError(
                    f"fold {number}: {method.title} must have a patient with {', '.join(wanted)} for {part}; "
                    f"{known}. Received: {', '.join(served)}, all without"
                )


def _who_has(wanted, volumes, recipe, needed):
    """How many patients have what is `wanted`, `{name: structures}`, and what may help."""
    counts = {
        name: sum(any(ml[one] for one in structures) for ml in volumes.values()) for name, structures in wanted.items()
    }
    listed = [f"{n} of {len(volumes)} patients {'has' if n == 1 else 'have'} {name}" for name, n in counts.items()]
    if not (fewest := min(counts.values())):
        remedy = "`data.structures` may be wrong"
    elif fewest < needed:
        remedy = "two are needed, to train and to validate"
    elif fewest == 1:
        remedy = "only folds that train on that patient can be trained"
    elif recipe.training.balance:
        remedy = "another --fold or --splits may help"
    else:
        remedy = "`training.balance=volume` or --splits may help"
    return f"{', '.join(listed)}; {remedy}"
