"""From the patients to a `Recipe` for them, with the reason for each number."""

import bisect
import dataclasses
import functools
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np

from keras_mmfnet._log import progress
from keras_mmfnet._machine import peak_memory
from keras_mmfnet._parallel import attempt, map_patients
from keras_mmfnet.data.case import Case, CaseError, ZScoreError
from keras_mmfnet.data.fingerprint import fingerprint_case, intensities, misalignment
from keras_mmfnet.data.folds import group_patients
from keras_mmfnet.data.geometry import upright_grid
from keras_mmfnet.data.image_io import read_grid
from keras_mmfnet.data.preprocess import preprocess_case
from keras_mmfnet.data.windows import window_starts
from keras_mmfnet.recipe import DataRecipe, Recipe

_log = logging.getLogger(__name__)
# Patients whose intensities and structures decide the preprocessing, and who are registered.
_SAMPLE, _REGISTERED = 8, 4
# Misalignment in mm above which the sequences are registered: twice the error of a registration; and that in mm or
# degrees above which it may as well be a failed registration.
_MOVED, _FAR = 2.0, 10.0
# Factors of the median pixel that are tried, the largest pixels in mm, and the diameter of a structure in pixels that
# must be left.
_FACTORS, _LARGEST, _RESOLVED = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4), 2.0, 16
# Shortest edge of the features of a level, and the most levels, the paper's; filters of the finest level.
_SHORTEST, _LEVELS = 4, 4
_WIDTHS = (32, 16, 8)
# Least depth of a patch in mm over its width; the paper's is 3/8.
_ASPECT = 0.5
# Voxels between a structure and the edge of the window at the centre.
_MARGIN = 4
# Patches that each network should be trained on, those for which self-transfer paid in `benchmarks/cubes.md`, and the
# fewest, for which the patch is made smaller; updates that are made of them at least.
_PATCHES, _TRANSFER, _FEW, _UPDATES = 10_000, 2_500, 1_000, 1_250
_BATCH = (2, 8)
# The paper's epochs and updates per epoch, and the fewest updates.
_EPOCHS, _STEPS, _LEAST_STEPS = 100, 75, 30
# Fewer bytes per feature are no measurement: a training step keeps several copies of the features.
_LEAST_BYTES = 8
# The share of a training step that a prediction takes.
_PREDICTION = 0.4
# A single-modality network has an encoder and a decoder; see `_units`.
_SINGLE_UNITS = 2


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What a training step takes per voxel of a patch and feature of the network.

    The defaults were measured on two cores of an AMD EPYC, the bytes on PyTorch.

    Args:
        seconds: Seconds.
        bytes: Bytes of memory.
    """

    seconds: float = 1.5e-8
    bytes: float = 35.0


def plan_recipe(
    cases: Sequence[Case],
    changes: Mapping[str, Any] | None = None,
    memory: float = 8e9,
    seconds: float = 7200.0,
    cost: StepCost | None = None,
    cache: str | PathLike | None = None,
    on_error: Callable[[CaseError], None] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Recipe:
    """Plans a recipe from the patients: a fingerprint of them, and rules from there to each number.

    Some patients are read first, which decides how all are preprocessed; then all, which decides the rest. No structure
    of any patient lies outside all windows.

    Args:
        cases: The patients, with masks.
        changes: Fields that are given, `{path: value}`, as for `Recipe.replace`; the others are planned around them.
        memory: Bytes that a training step may take.
        seconds: What the training of one fold may take, self-transfer included.
        cost: What a training step takes on this machine, from `measure_cost`. `None`: the defaults of `StepCost`.
        cache: As for `preprocess_case`; the training then finds the patients there.
        on_error: Called with the `CaseError` of each patient that cannot be used. `None`: they are raised as one.
        groups: As for `group_patients`: there are no more folds than groups.

    Returns:
        A `Recipe` with `reasons`.

    Raises:
        CaseError: Patients cannot be used.
        ValueError: There is no patient, or none who has one of the modalities or a structure, or a change is invalid.
    """
    plan, bad = _Plan(dict(changes or {}), memory, seconds, cost or StepCost()), []
    grouped = group_patients(cases, plan.base.training.group, groups)
    _plan_data(plan, cases)
    read = functools.partial(attempt, functools.partial(_fingerprint, recipe=plan.data(), cache=cache))
    patients, used = [], []
    found = map_patients(read, cases, [case.name for case in cases], "reading patients for the plan")
    for case, patient in zip(cases, found, strict=True):
        if isinstance(patient, CaseError):
            bad.append(patient)
        else:
            patients.append(patient)
            used.append(case.name)
    if bad and (on_error is None or not patients):
        raise CaseError.of_several(bad, len(cases))
    for error in bad:
        on_error(error)
    if not any(patient.box for patient in patients):
        raise ValueError(f"a patient with a structure is expected. Received: {len(patients)} patients, all without")
    _plan_network(plan, patients)
    _plan_folds(plan, used, grouped)
    return plan.recipe(Recipe())


def _fingerprint(case, recipe, cache):
    return fingerprint_case(preprocess_case(case, recipe, cache))


def given_recipe(changes: Mapping[str, Any]) -> Recipe:
    """The recipe before planning: what is given, and otherwise values that refuse no patient and no patch shape.

    Sequences may be missing, pixels stay as they are, and the network fits patches of any shape.

    Raises:
        RecipeError: There is no such field, or a value is outside its range.
    """
    levels = [value for field in ("filters", "strides", "kernel_sizes") if (value := changes.get(f"network.{field}"))]
    count = len(levels[0]) if levels and isinstance(levels[0], list | tuple) else 1
    count = max(count, 3) if changes.get("network.deep_supervision") and not levels else count
    able = {"network.filters": (1,) * count, "network.strides": ((1, 1, 1),) * count, "data.spacing": None}
    if "patches.stride" not in changes:
        able["patches.stride"] = (None, None, None)
    if changes.get("data.allow_missing", True) and changes.get("network.modality_dropout", True):
        able |= {"data.allow_missing": True, "network.modality_dropout": 0.3}
    if "patches.shape" not in changes:  # one that fits what is given
        steps, strides = changes.get("patches.stride"), changes.get("network.strides") or able["network.strides"]
        able["patches.shape"] = _multiple(steps, strides)
    return Recipe().replace({**able, **changes})


def _multiple(steps, strides):
    """The smallest shape that the strides of all levels divide and that is no less than the steps between windows."""
    try:
        factors = np.prod(strides, axis=0).tolist()
        pairs = zip(steps or (1, 1, 1), factors, strict=True)
        return tuple(factor * math.ceil((step or 1) / factor) for step, factor in pairs)
    except (TypeError, ValueError):  # which the recipe refuses
        return 1, 1, 1


def recipe_to_check(
    cases: Sequence[Case],
    changes: Mapping[str, Any],
    voxels: bool = False,
    groups: Mapping[str, str] | None = None,
) -> Recipe:
    """What a plan has of the fields that decide who can be used and how the patients are divided.

    Args:
        cases: The patients.
        changes: As for `plan_recipe`.
        voxels: Whether the voxels of a patient may be read, which tell whether the images are z-scores already.
        groups: As for `plan_recipe`.

    Returns:
        A `Recipe` with `reasons`. Its network is not planned.

    Raises:
        RecipeError: There is no such field, or a value is outside its range.
    """
    plan = _Plan(dict(changes))
    if voxels:
        _plan_scale(plan, cases, plan.data())
        plan.set("training.balance", "volume", "each part of a fold covers the volumes that there are")
    try:
        grouped = group_patients(cases, plan.base.training.group, groups)
    except ValueError:
        grouped = {}  # Dividing the patients will tell.
    _plan_folds(plan, [case.name for case in cases], grouped)
    return plan.recipe(plan.base)


def _find_scale(cases, recipe):
    """By what z-scores were multiplied, if the images of the first patient who can be read are z-scores already."""
    for case in cases:
        try:
            preprocess_case(case, recipe)
        except ZScoreError as error:
            return error.scale
        except CaseError:
            continue
        return None
    return None


class _Plan:
    """The fields planned so far, `{path: (value, reason)}`; those that are given stay as they are."""

    def __init__(self, given, memory=0.0, seconds=0.0, step=None):
        self.given, self.base, self.fields = given, given_recipe(given), {}
        self.memory, self.seconds, self.step = memory, seconds, step
        # How many times as long as MMFNet's the training takes, with the single-modality networks of self-transfer.
        count = len(self.base.data.modalities)
        self.networks = 1 + self.base.training.self_transfer * count * _SINGLE_UNITS / _units(count)
        self.batch = self.base.training.batch_size if self.has("training.batch_size") else _BATCH[0]
        self.widths = self.base.network.filters[:1] if self.has("network.filters") else _WIDTHS

    def has(self, path):
        return any(one == path or one.startswith(f"{path}.") for one in self.given)

    def get(self, path):
        """A value that is given."""
        part, name = path.split(".")
        return getattr(getattr(self.base, part), name)

    def set(self, path, value, reason):
        """Sets a planned value and its reason, unless the user gave one; returns the value that applies."""
        if self.has(path):
            return self.get(path)
        self.fields[path] = (value, reason)
        return value

    def data(self):
        """The `DataRecipe` as far as it is planned."""
        planned = {path[5:]: value for path, (value, _) in self.fields.items() if path.startswith("data.")}
        return DataRecipe(**{**self.base.data.model_dump(), **planned})

    def recipe(self, base):
        reasons = {path: reason for path, (_, reason) in self.fields.items()}
        changes = {**{path: value for path, (value, _) in self.fields.items()}, **self.given}
        return base.replace(changes).model_copy(update={"reasons": reasons})

    def cost(self, shape, strides, width):
        """Bytes and seconds of a patch in a training step."""
        units = math.prod(shape) * _load(_filters(width, len(strides)), strides, len(self.base.data.modalities))
        return self.step.bytes * units, self.step.seconds * units

    def patches(self, seconds_each):
        """How many patches each network can be trained on, validation taking up to a third of the time."""
        return 2 / 3 * self.seconds / self.networks / seconds_each

    def affords(self, shape, strides, patches, width=None):
        size, seconds = self.cost(shape, strides, width or self.widths[-1])
        return self.batch * size <= self.memory and self.patches(seconds) >= patches


def _filters(width, levels):
    return tuple(width * 2**level for level in range(levels))


def _load(filters, strides, modalities):
    """Features of the network per voxel of a patch, in units of `StepCost`."""
    total, voxels = 0.0, 1.0
    for count, stride in zip(filters, strides, strict=True):
        total, voxels = total + voxels * count, voxels / math.prod(stride)
    return (total + voxels * filters[-1]) * _units(modalities)


def _units(modalities):
    """How many times a level of MMFNet has its features: in each encoder, the fusion block and the decoder."""
    return modalities + 2


# --- how patients are preprocessed


def _plan_data(plan, cases):
    """The fields of `data`, from the headers of all patients and the voxels of a sample."""
    modalities, count = plan.base.data.modalities, len(cases)
    lacking = {name: sum(name not in case.images for case in cases) for name in modalities}
    if not cases or count in lacking.values():
        without = ", ".join(name for name in modalities if lacking[name] == count)
        raise ValueError(f"`data.modalities` must be sequences that patients have. Received: {without}, which none has")
    if any(lacking.values()):
        listed = ", ".join(f"{name} in {number}" for name, number in lacking.items() if number)
        plan.set("data.allow_missing", True, f"missing: {listed} of {count} patients")
    elif not plan.has("data.allow_missing"):
        plan.base = plan.base.replace({"data.allow_missing": False})
    if plan.base.data.allow_missing and "network.modality_dropout" not in plan.given:
        # Those of single sequences, which are given, replace it for these.
        reason = "for missing sequences: DSC without T2 0.70 instead of 0.58"
        plan.fields["network.modality_dropout"] = (0.3, reason)
    sample = _read_sample(plan, cases)
    if not sample:
        return  # Reading all patients will tell why.
    read, patients, values = zip(*sample, strict=True)
    if plan.data().normalised_scale is None:
        reason = f"the 0.5% and 99.5% quantiles of the values in the body and in structures {_of(sample)}"
        plan.set("data.clip", _limits(values), reason)
    _plan_alignment(plan, read[:_REGISTERED])
    _plan_spacing(plan, cases, patients)


def _of(some):
    return f"of {len(some)} patient{'' if len(some) == 1 else 's'}"


def _read_sample(plan, cases):
    """Some patients in their own pixels without clipping: the case, its fingerprint and its values.

    Also finds out whether the images are z-scores already.
    """
    step = math.ceil(len(cases) / _SAMPLE)
    order, sample = [*cases[::step], *(case for i, case in enumerate(cases) if i % step)], []
    recipe = plan.data().model_copy(update={"spacing": None, "clip": {}})
    if scale := _plan_scale(plan, order, recipe):
        recipe = recipe.model_copy(update={"normalised_scale": scale})
    for case in order:
        try:
            patient = preprocess_case(case, recipe)
        except CaseError:
            continue  # Reading all patients will tell.
        sample.append((case, fingerprint_case(patient), intensities(patient)))
        progress("reading a sample for the plan", len(sample), min(_SAMPLE, len(cases)))
        if len(sample) == _SAMPLE:
            break
    return sample


def _plan_scale(plan, cases, recipe):
    """Whether the images are z-scores already; returns their scale."""
    if not plan.has("data.normalised_scale") and (scale := _find_scale(cases, recipe)):
        plan.set("data.clip", {}, "z-scores are used as they are")
        return plan.set("data.normalised_scale", scale, f"the images are z-scores already, times {scale:g}")
    return None


def _limits(values):
    """The limits of the z-scores by modality, which leave out neither the body's nor the structures' values."""
    limits = {}
    for name in dict.fromkeys(name for one in values for name in one):
        pooled = np.concatenate([one[name] for one in values if name in one], axis=1)
        low, high = np.quantile(pooled, (0.005, 0.995), axis=1)
        limits[name] = math.floor(10 * low.min()) / 10, math.ceil(10 * high.max()) / 10
    return limits


def _plan_alignment(plan, sample):
    """Whether the sequences are registered, by how far those of a sample lie apart."""
    recipe = plan.data()
    if len(recipe.modalities) < 2 or (plan.has("data.align") and plan.has("patches.misalignment")):
        return
    found = {name: [] for name in recipe.modalities[1:]}
    for number, case in enumerate(sample, start=1):
        for name, moved in misalignment(case, recipe).items():
            found[name].append(moved)
        progress("registering a sample for the plan", number, len(sample))
    near = {name: [moved for moved in each if max(moved) <= _FAR] for name, each in found.items()}
    known = [name for name, each in near.items() if len(each) > len(sample) / 2]
    far = [name for name in near if len(found[name]) > len(sample) / 2 and name not in known]
    if far and recipe.align != "rigid":
        about = "%s: more than %g mm or %g degrees from the reference modality in half of the sample or more, or the "
        about += "registration failed. If the patients moved so far, set data.align=rigid."
        _log.warning(about, ", ".join(far), _FAR, _FAR)
    if not known:
        why = "misalignment not known: images too small or far apart, or registration failed"
        return plan.set("data.align", "header", why)
    millimetres, degrees = np.max([np.median(near[name], axis=0) for name in known], axis=0)
    apart = f"sequences lie {millimetres:.1f} mm and {degrees:.1f} degrees apart, the median {_of(sample)}"
    if unknown := [name for name in near if name not in known]:
        apart += f", not known of {', '.join(unknown)}"
    apart += f"; registered from {_MOVED:g} mm on"
    rigid = plan.set("data.align", "rigid" if millimetres > _MOVED else "header", apart) == "rigid"
    left = (1.0, 1.0) if rigid else (round(float(millimetres), 1), round(float(degrees), 1))
    about = "error of a registration" if rigid else "median misalignment of the sample"
    plan.set("patches.misalignment", left, f"{about}, in mm and degrees")


def _plan_spacing(plan, cases, patients):
    """The pixel size: the median, or larger pixels where those would be too many for the time and the memory."""
    sides = []
    for case in cases:
        first = next(name for name in plan.base.data.modalities if name in case.images)
        try:
            sides.append(upright_grid(read_grid(case.images[first], case.name)).spacing[:2])
        except CaseError:
            continue
    pixels = [math.prod(pair) ** 0.5 for pair in sides]
    median, slices = statistics.median(pixels), statistics.median(patient.spacing[0] for patient in patients)
    volumes = [volume for patient in patients for volume in patient.volumes.values() if volume]
    diameter = 2 * (np.quantile(volumes, 0.1) * 750 / math.pi) ** (1 / 3) if volumes else math.inf
    for factor in _FACTORS:
        size = factor * median
        # Slices cannot be made thicker, and pixels of twice their distance would not be pooled with them.
        if factor > 1 and (size > min(_LARGEST, diameter / _RESOLVED) or size >= 2 * slices):
            break
        spacing = float(f"{size:.3g}")
        there = [_at(patient, spacing) for patient in patients]
        if plan.has("patches.shape") or _fit(plan, there, _PATCHES, deepest_only=True):
            break
    if spacing > 1.01 * median:
        reason = (
            f"finer pixels (the median is {median:.3g} mm) are too many for the time or memory; "
            f"the smallest tenth of the structures has {diameter / spacing:.0f} pixels across"
        )
    else:
        reason = f"the median pixel {_of(pixels)}, from {min(pixels):.3g} to {max(pixels):.3g} mm"
        if all(max(one) < 1.02 * min(one) for one in zip(*sides, strict=True)):
            size = " x ".join(f"{one:.3g}" for one in dict.fromkeys(sides[0]))
            spacing, reason = None, f"all images have pixels of {size} mm, which need no resampling"
    plan.set("data.spacing", spacing, reason)


def _at(patient, spacing):
    """About what a patient will be with other pixels."""
    scale = np.array([1.0, *(size / spacing for size in patient.spacing[1:])])
    box = patient.box and (np.floor(patient.box[0] * scale).astype(int), np.ceil(patient.box[1] * scale).astype(int))
    return dataclasses.replace(
        patient,
        shape=tuple(np.ceil(patient.shape * scale).astype(int).tolist()),
        spacing=(patient.spacing[0], spacing, spacing),
        centre=tuple(np.rint(patient.centre * scale).astype(int).tolist()),
        box=box and tuple(tuple(edge.tolist()) for edge in box),
    )


# --- patches, network and training


def _plan_network(plan, patients):
    """The patches, the network and its training, from the preprocessed patients."""
    spacing = _spacing(patients)
    if plan.has("patches.shape"):
        shape, strides, kernels = _levels(plan, spacing, plan.get("patches.shape"))
    else:
        fits = (_fit(plan, patients, least) for least in (_PATCHES, _PATCHES // 2, _TRANSFER, _FEW))
        shape, strides, kernels = next(filter(None, fits), None) or _shrink(plan, patients)
    width = _plan_filters(plan, shape, strides, kernels, spacing)
    stride = _plan_windows(plan, patients, shape, spacing)
    _plan_training(plan, patients, shape, strides, stride, width)


def _spacing(patients):
    return np.median([patient.spacing for patient in patients], axis=0)


def _fit(plan, patients, least, deepest_only=False):
    """The deepest patch that holds every structure in the window at the body's centre, if the plan affords it.

    Returns:
        Its shape, strides and kernel sizes, or `None`.
    """
    spacing, (thinnest, deepest), plane = _spacing(patients), *_extent(patients)
    for depth in range(deepest, deepest - 1 if deepest_only else thinnest - 1, -1):
        found = _levels(plan, spacing, (depth, *plane))
        if plan.affords(*found[:2], least):
            return found
    return None


def _shrink(plan, patients):
    """A patch whose windows slide in plane, as large as the plan affords."""
    spacing, (thinnest, _), plane = _spacing(patients), *_extent(patients)
    for share in np.arange(0.95, 0, -0.05):
        sides = [round(share * size) for size in (thinnest, *plane)]
        found = _levels(plan, spacing, np.maximum(sides, (min(thinnest, 8), 32, 32)))
        if plan.affords(*found[:2], _FEW):
            break
    return found


def _extent(patients):
    """Of a patch the least and the largest depth, and the height and width that hold every structure.

    At most it is as deep as wide in mm and as the thinnest volume, though volumes with less than a quarter of the
    median's slices are padded.
    """
    plane = [_width_at_centre(patients, axis) for axis in (1, 2)]
    slices = [patient.shape[0] for patient in patients]
    spacing = _spacing(patients)
    wide = max(np.multiply(plane, spacing[1:])) / spacing[0]
    deepest = max(1, int(min(max(min(slices), statistics.median(slices) / 4), wide)))
    return (min(deepest, max(8, math.ceil(_ASPECT * wide))), deepest), plane


def _width_at_centre(patients, axis):
    """The smallest window at the body's centre that holds every structure and a margin."""
    sizes = range(1, max(patient.shape[axis] for patient in patients) + 1)
    return sizes[bisect.bisect_left(sizes[:-1], True, key=lambda size: _holds(patients, axis, size, None, _MARGIN))]


def _holds(patients, axis, size, step, margin=0):
    """Whether the windows along an axis hold the structures of all patients, with a margin where the image has one."""
    for patient in patients:
        if patient.box:
            length, (low, high) = patient.shape[axis], (edge[axis] for edge in patient.box)
            starts = [start for (start,) in window_starts((length,), (size,), (step,), (patient.centre[axis],))]
            if min(starts) > max(low - margin, 0) or max(starts) + size < min(high + margin, length):
                return False
    return True


def _levels(plan, spacing, shape):
    """The strides and kernel sizes of each level, and the shape that they divide.

    An axis is pooled once its voxels are less than twice as large as the smallest, as long as the features keep an edge
    of 4; and convolved from then on.
    """
    given = plan.get("network.strides") if plan.has("network.strides") else None
    exact, levels = plan.has("patches.shape"), len(given or ()) or _LEVELS
    least = 3 if plan.base.network.deep_supervision else 1
    levels = len(plan.get("network.filters")) if plan.has("network.filters") else levels
    size, step, strides, kernels = list(map(int, shape)), list(spacing), [], [(1, 1, 1)]
    while len(strides) < levels:
        able = [n >= 2 * _SHORTEST and not (exact and n % 2) for n in size]
        if len(strides) >= least and not (any(able) or given or plan.has("network.filters")):
            break
        finest = min((mm for mm, can in zip(step, able, strict=True) if can), default=0)
        pooled = [2 if can and mm < 2 * finest else 1 for mm, can in zip(step, able, strict=True)]
        strides.append(tuple(given[len(strides)] if given else pooled))
        near = [mm < 2 * min(step) for mm in step]
        kernels.append(tuple(3 if k == 3 or close else 1 for k, close in zip(kernels[-1], near, strict=True)))
        size = [math.ceil(n / by) for n, by in zip(size, strides[-1], strict=True)]
        step = [mm * by for mm, by in zip(step, strides[-1], strict=True)]
    factors = np.prod(strides, axis=0, dtype=int) if strides else np.ones(3, int)
    if not exact:
        smallest = [size or 1 for size in plan.base.patches.stride]  # or windows would leave gaps
        shape = [max(shape[0] // factors[0], 1) * factors[0], *shape[1:]]
        pairs = zip(np.maximum(shape, smallest), factors, strict=True)
        shape = [math.ceil(n / by) * by for n, by in pairs]
    return tuple(map(int, shape)), tuple(strides), tuple(kernels[1:])


def _plan_filters(plan, shape, strides, kernels, spacing):
    """The network's fields; returns the number of filters of the finest level."""
    wanted = _EPOCHS * _STEPS * _BATCH[1]
    width = next((width for width in plan.widths if plan.affords(shape, strides, wanted, width)), plan.widths[-1])
    bottom = np.floor_divide(shape, np.prod(strides, axis=0))
    reason = f"levels: {len(strides)}, after which the features have {_by(bottom)} voxels; "
    reason += "the paper's width" if width == _WIDTHS[-1] else "the width that the time allows"
    plan.set("network.filters", _filters(width, len(strides)), reason)
    voxel = _by(np.round(spacing, 2))
    reason = f"voxels of {voxel} mm: an axis is pooled once its voxels are less than twice as large as the smallest, "
    reason += f"while the features keep an edge of {_SHORTEST}"
    plan.set("network.strides", strides, reason)
    reason = (
        f"voxels of {voxel} mm: no convolution along an axis whose voxels are twice as large as the smallest or more"
    )
    plan.set("network.kernel_sizes", kernels, reason)
    return width


def _plan_windows(plan, patients, shape, spacing):
    """The fields of `patches`; returns the step between windows."""
    held = [_holds(patients, axis, shape[axis], None) for axis in (1, 2)]
    sides = _by(np.round(np.multiply(shape, spacing)).astype(int))
    about = "all that time and memory allow"
    if all(held):
        about = "in plane, the window at the body's centre holds every structure"
    plan.set("patches.shape", shape, f"{sides} mm; {about}")
    half = [max(size // 2, 1) for size in shape]
    stride = (half[0], *(None if inside else step for inside, step in zip(held, half[1:], strict=True)))
    outside = "no structure lies outside all windows; half a patch from one to the next"
    stride = plan.set("patches.stride", stride, outside)
    middles = [(np.mean([edge[2] for edge in p.box]) - p.centre[2]) / shape[2] for p in patients if p.box]
    left, right = (sum(sign * middle > 0.05 for middle in middles) for sign in (1, -1))
    few, both = left + right < 10, min(left, right) > 0.2 * (left + right)
    reason = f"structures lie left of the centre in {left} patients and right in {right}: "
    reason += "either side occurs" if both else "one side is rare"
    if few:
        reason = f"too few patients off the centre ({left} left, {right} right) to rule out a side"
    plan.set("patches.flip_axes", (2,) if few or both else (), reason)
    thick, flat = max(spacing) >= 2 * min(spacing), shape[0] < _SHORTEST
    how = "far from cubes: patches rotate in plane" if thick else "near enough to cubes to rotate about any axis"
    reason = (
        f"patches of {shape[0]} slices rotate in plane"
        if flat
        else f"voxels of {_by(np.round(spacing, 2))} mm are {how}"
    )
    plan.set("patches.in_plane", thick or flat, reason)
    starts = [(p, s) for p in patients for s in window_starts(p.shape, shape, stride, p.centre)]
    empty = np.mean(
        [not p.box or any(b <= a or a + n <= c for a, n, c, b in zip(s, shape, *p.box, strict=True)) for p, s in starts]
    )
    plan.set("patches.foreground", 0.33, f"nnU-Net's third; {empty:.0%} of the windows have no structure")
    return stride


def _plan_training(plan, patients, shape, strides, stride, width):
    size, seconds = plan.cost(shape, strides, width)
    patches, count = plan.patches(seconds), len(patients)
    if plan.networks > 1:
        short = "the time is too short to train a network for each sequence first"
        reason = "raised the DSC on 171 gliomas from 0.769 to 0.795" if patches >= _TRANSFER else short
        if not plan.set("training.self_transfer", patches >= _TRANSFER, reason):
            plan.networks, patches = 1, plan.patches(seconds)
    batch = int(np.clip(min(plan.memory / size, patches / _UPDATES), *_BATCH))
    reason = f"{size / 1e9:.2g} GB per patch, of {plan.memory / 1e9:.3g} GB; at least {_UPDATES} updates if time allows"
    batch = plan.set("training.batch_size", batch, reason)
    windows = [len(window_starts(patient.shape, shape, stride, patient.centre)) for patient in patients]
    validation = _PREDICTION * statistics.mean(windows) * max(1, 0.2 * count)
    # An epoch is long enough to be worth validating; the time decides how many there are, or how long they are.
    total, choices = plan.seconds / plan.networks / seconds, (_EPOCHS, 80, 60, 40, 30, 20, 10)
    if plan.has("training.epochs"):
        choices = (plan.get("training.epochs"),)
    elif plan.has("training.steps_per_epoch"):
        each = plan.get("training.steps_per_epoch") * batch + validation
        choices = (int(np.clip(total / each, 1, _EPOCHS)),)
    for epochs in choices:
        steps = (total / epochs - validation) / batch
        if steps >= max(_LEAST_STEPS, 2 * validation / batch):
            break
    steps = int(np.clip(steps, 1, _STEPS))
    if plan.has("training.steps_per_epoch"):
        steps = plan.get("training.steps_per_epoch")
    spent = plan.networks * epochs * seconds * (steps * batch + validation)
    reason = f"about {_duration(spent)} of {_duration(plan.seconds)} per fold, {1000 * seconds:.3g} ms per patch"
    epochs = plan.set("training.epochs", epochs, f"{reason}, with validation; at most the paper's {_EPOCHS}")
    reason = f"at most the paper's {_STEPS}; each epoch is validated on {validation / _PREDICTION:.0f} windows"
    plan.set("training.steps_per_epoch", steps, reason)
    if batch * size > plan.memory:
        about = "A training step takes about %.2g GB, more than the %.2g GB that it may take: no smaller one is planned"
        _log.warning(about, batch * size / 1e9, plan.memory / 1e9)
    if spent > 1.5 * plan.seconds:
        about = "The training of a fold takes about %s, more than the %s that it may take: no shorter one is planned"
        _log.warning(about, _duration(spent), _duration(plan.seconds))
    if plan.networks > 1:
        plan.set("training.warmup_epochs", max(1, round(0.05 * epochs)), "the paper's 5% of the epochs")
        rate = "the same as in pretraining: DSC 0.795 on 171 gliomas, 0.777 at a tenth of it"
        plan.set("training.learning_rate", plan.base.training.pretrain_learning_rate, rate)
    plan.set("training.schedule", "cosine", "falls to 0 at the last epoch, whose number depends on the time")
    plan.set("training.patience", None, "no early stopping: the learning rate falls until the last epoch")
    if volumes := [volume for patient in patients for volume in patient.volumes.values() if volume]:
        reason = f"structures have {min(volumes):.3g} to {max(volumes):.3g} ml: each part of a fold covers that range"
        plan.set("training.balance", "volume", reason)
    plan.set("training.postprocess", True, "chosen by the DSC of validation patients")


def _plan_folds(plan, names, grouped):
    count = len({grouped[name] for name in names if name in grouped}) + sum(name not in grouped for name in names)
    kind = "patients" if count == len(names) else "groups of patients"
    if count < 3:
        _log.warning("3 or more %s are needed to train: there %s", kind, "is 1" if count == 1 else f"are {count}")
    elif count < plan.base.training.folds:
        plan.set("training.folds", count, f"there are {count} {kind}")


def _by(sizes):
    return "x".join(f"{size:g}" for size in sizes)


def _duration(seconds):
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.2g} s"


def measure_cost(patch_shape: Sequence[int] = (16, 64, 64)) -> StepCost:
    """Measures training steps of an MMFNet of one sequence and one level, which is compiled in seconds.

    The memory is by how much more a step of eight patches takes than one of four. Where it cannot be told, as in a
    process that took more before, it is the default of `StepCost`.

    Args:
        patch_shape: `(depth, height, width)` of the patches.

    Returns:
        The cost, for `plan_recipe`.
    """
    import keras

    from keras_mmfnet._precision import dtype_policy
    from keras_mmfnet.losses import DiceLoss
    from keras_mmfnet.models import MMFNet

    filters, strides, few = (8,), ((2, 2, 2),), 4
    units = math.prod(patch_shape) * _load(filters, strides, modalities=1)
    model = MMFNet(("t1",), patch_shape, filters, dtype=dtype_policy("auto"))
    model.compile(keras.optimizers.Adam(), DiceLoss())
    model.optimizer.build(model.trainable_variables)  # or TensorFlow traces the step twice
    image = np.random.default_rng(0).normal(size=(2 * few, *patch_shape, 1)).astype("float32")
    mask = (image > 1).astype("uint8")

    def step(patches):
        start = time.perf_counter()
        float(model.train_on_batch({"t1": image[:patches]}, mask[:patches]))
        return time.perf_counter() - start

    before = peak_memory()
    seconds = min(step(few) for _ in range(6)) / (few * units)
    peak = peak_memory()
    step(2 * few)
    # A peak that the first steps did not raise is of something else, and hides a part of the growth.
    grown = (peak_memory() - peak) / (few * units) if peak > before else 0
    return StepCost(seconds, grown if grown > _LEAST_BYTES else StepCost.bytes)
