"""From probabilities to masks: thresholds, components and holes, chosen on validation patients."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Self

import numpy as np
import pydantic
from pydantic import Field

from keras_mmfnet.evaluation import components, mask_box

# The values that `choose` tries for each field of a rule, the simplest first.
_CANDIDATES = {
    "threshold": (0.5, 0.4, 0.6, 0.3, 0.7),
    "smallest_ml": (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0),
    "largest_only": (False, True),
    "fill_holes": (False, True),
}


class MaskRule(pydantic.BaseModel):
    """How the mask of one structure is made from its probability, in this order.

    Args:
        threshold: Lowest probability that counts; among exclusive structures see `PostProcessing`.
        fill_holes: Fill what the mask encloses on all sides (6 neighbours).
        smallest_ml: Smaller components (26 neighbours) are removed, even if nothing is left.
        largest_only: Only the largest component is kept.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    fill_holes: bool = False
    smallest_ml: Annotated[float, Field(ge=0)] = 0.0
    largest_only: bool = False

    def __str__(self):
        parts = [f"from a probability of {self.threshold:g}"]
        parts += ["holes filled"] * self.fill_holes + ["the largest component only"] * self.largest_only
        return ", ".join(parts + [f"components from {self.smallest_ml:g} ml"] * (self.smallest_ml > 0))


class PostProcessing(pydantic.BaseModel):
    """The rules of all structures; JSON by `model_dump_json` and `model_validate_json`.

    Overlapping structures are independent of each other. Of exclusive ones, a voxel can only belong to that of the
    largest probability there, and does if `p / (p + background)` reaches its threshold, with the background's
    probability, 1 less all structures'. By the default threshold that is the most probable class, and with a single
    structure the threshold is that of the probability. Holes are filled with the same restriction, so that the masks
    are disjoint by any rules.

    Args:
        structures: A `MaskRule` by the name of each structure, in the order of the channels.
        exclusive: Whether the structures exclude each other.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    structures: dict[str, MaskRule]
    exclusive: bool = True

    @classmethod
    def default(cls, structures: Sequence[str], exclusive: bool = True) -> Self:
        """The default rule for each structure."""
        return cls(structures={name: MaskRule() for name in structures}, exclusive=exclusive)

    @classmethod
    def of_ensemble(cls, several: Sequence[Self]) -> Self:
        """One for the mean probability of several networks: medians of their numbers, and what most of them do."""
        rules = {}
        for name in several[0].structures:
            found = {
                field: np.median([getattr(one.structures[name], field) for one in several]) for field in _CANDIDATES
            }
            flags = {field: bool(found[field] > 0.5) for field in ("largest_only", "fill_holes")}
            rules[name] = MaskRule(**found | flags)
        return cls(structures=rules, exclusive=several[0].exclusive)

    def apply(self, probability: np.ndarray, spacing_zyx: Sequence[float]) -> np.ndarray:
        """The masks of a patient.

        Args:
            probability: Probabilities `(depth, height, width, structures)` in [0, 1].
            spacing_zyx: Size of a voxel in mm.

        Returns:
            Bool masks of the same shape.

        Raises:
            ValueError: There is not one channel per structure.
        """
        _check_channels(probability, self.structures)
        masks = np.zeros(probability.shape, bool)
        least = min(rule.threshold for rule in self.structures.values())
        outer, scores = _scores(probability, self.exclusive, least)
        for inner, score, rule in zip(np.moveaxis(masks[outer], -1, 0), scores, self.structures.values(), strict=True):
            box = mask_box(score >= rule.threshold)
            mask = _reached(score[box], rule.threshold, rule.fill_holes)
            if rule.smallest_ml or rule.largest_only:
                parts, voxels = components(mask)
                mask = np.append(False, _kept(voxels, rule, spacing_zyx))[parts]
            inner[box] = mask
        return masks


def choose(
    cases: Iterable[tuple[np.ndarray, np.ndarray, Sequence[float]]],
    structures: Sequence[str],
    exclusive: bool = True,
    margin: float = 0.005,
) -> tuple[PostProcessing, dict[str, dict]]:
    """Chooses the rules that raise the mean DSC of validation patients.

    For each structure, one field of the rule after the other takes the value of the highest mean DSC, of equal ones
    the simplest, until none raises the mean by more than `margin`. Nothing else counts: a patient without the structure
    has no DSC, so false islands in such patients are neither a reason for a rule nor against it.

    Args:
        cases: For each patient, probabilities and the expert's masks `(depth, height, width, structures)`, and the
            size of a voxel in mm, (z, y, x). Iterated once; one patient is held at a time.
        structures: Names of the structures, in the order of the channels.
        exclusive: Whether they exclude each other.
        margin: Least gain in mean DSC for which a field is changed.

    Returns:
        The `PostProcessing`, and by structure `{"patients": ..., "before": ..., "after": ...}`: the number of patients
        that have it, and their mean DSC with the default rule and the chosen one, `None` if nobody has it.

    Raises:
        ValueError: There is not one channel per structure.
    """
    tables = {name: [] for name in structures}
    for probability, truth, spacing in cases:
        _check_channels(probability, structures)
        _check_channels(truth, structures)
        box, scores = _scores(probability, exclusive, min(_CANDIDATES["threshold"]))
        for number, (name, score) in enumerate(zip(structures, scores, strict=True)):
            expert = truth[..., number] > 0
            if expert.any():
                tables[name].append((_table(score, expert[box]), np.count_nonzero(expert), spacing))
    rules, gains = {}, {}
    for name, patients in tables.items():
        rule, before = MaskRule(), _mean_dsc(patients, MaskRule()) if patients else None
        after, last = before, None
        while patients and rule != last:
            last = rule
            for field, values in _CANDIDATES.items():
                found = [(_mean_dsc(patients, changed), changed) for v in values for changed in [_with(rule, field, v)]]
                best, changed = max(found, key=lambda pair: pair[0])
                if best > after + margin:
                    after, rule = best, changed
        rules[name], gains[name] = rule, {"patients": len(patients), "before": before, "after": after}
    return PostProcessing(structures=rules, exclusive=exclusive), gains


def level_half(probability: np.ndarray, threshold: float) -> np.ndarray:
    """A float32 probability stretched so that the threshold lies at 0.5, the level that contours follow."""
    below, above = 0.5 / threshold, 0.5 / (1 - threshold)
    values = np.where(probability >= threshold, 1 - (1 - probability) * above, probability * below)
    return values.astype(np.float32) if threshold != 0.5 else probability


def _check_channels(array, structures):
    if array.shape[-1] != len(structures):
        expected = f"(depth, height, width, {len(structures)})"
        raise ValueError(f"an array of {expected} is expected, for {', '.join(structures)}. Received: {array.shape}")


def _with(rule, field, value):
    return rule.model_copy(update={field: value})


def _scores(probability, exclusive, least):
    """A box outside which no threshold from `least` on is reached, and in it what those of each structure are compared
    with; -1 where another, exclusive structure is more probable.
    """
    own = np.moveaxis(probability, -1, 0)
    if not exclusive or len(own) == 1:
        return (slice(None),) * (own.ndim - 1), own
    # The most probable of S structures has p >= (1 - background) / S, so p / (p + background) >= t needs this p. The
    # margin is for rounding.
    box = mask_box(functools.reduce(np.maximum, own) >= least / (1 + (len(own) - 1) * least) - 1e-6)
    own = np.ascontiguousarray(own[(slice(None), *box)])
    background, best = 1 - own.sum(axis=0), own.argmax(axis=0)
    return box, [np.where(best == n, p / np.maximum(p + background, 1e-7), -1) for n, p in enumerate(own)]


def _reached(score, threshold, fill_holes):
    """The mask of a score that reaches the threshold, with its holes filled or not."""
    from scipy import ndimage

    mask = score >= threshold
    if fill_holes:
        parts, _ = ndimage.label(~np.pad(mask, 1))
        mask |= (parts != parts[0, 0, 0])[1:-1, 1:-1, 1:-1] & (score >= 0)
    return mask


def _kept(voxels, rule, spacing):
    """Which components a rule keeps."""
    kept = voxels * (np.prod(spacing) / 1000) >= rule.smallest_ml
    return kept & (np.arange(len(voxels)) == np.argmax(voxels)) if rule.largest_only and len(voxels) else kept


def _table(score, expert):
    """For each threshold, with holes filled or not, the voxels of the components and those that are the expert's."""
    table, box = {}, mask_box(score >= min(_CANDIDATES["threshold"]))
    for key in itertools.product(_CANDIDATES["threshold"], _CANDIDATES["fill_holes"]):
        mask = _reached(score[box], *key)
        parts, voxels = components(mask)
        table[key] = voxels, np.bincount(parts[mask & expert[box]], minlength=len(voxels) + 1)[1:]
    return table


def _mean_dsc(patients, rule):
    scores = []
    for table, volume, spacing in patients:
        voxels, hits = table[rule.threshold, rule.fill_holes]
        kept = _kept(voxels, rule, spacing)
        scores.append(2 * hits[kept].sum() / (voxels[kept].sum() + volume))
    return float(np.mean(scores))
