"""Intervals and ranks over patients and trainings: a hierarchical bootstrap."""

import numpy as np


def resample(scores, samples=5000, seed=0):
    """Draws patients, and for each method trainings, with replacement.

    The patients are the same for all methods, whose differences are then those on the same patients. Of n trainings,
    the bootstrap sees (n - 1) / n of the variance between them on average: nothing with one, two thirds with three. The
    intervals are too narrow by that much.

    Args:
        scores: `{method: (trainings, patients)}`; the patients are in the same order for all.
        samples: How often to draw.
        seed: Seed.

    Returns:
        `{method: (samples,)}`, the mean over the drawn trainings and patients.
    """
    rng = np.random.default_rng(seed)
    [patients] = {np.shape(values)[1] for values in scores.values()}
    drawn = rng.integers(patients, size=(samples, patients))
    means = {}
    for method, values in scores.items():
        values = np.asarray(values)
        trainings = rng.integers(len(values), size=(samples, len(values)))
        # How often each training and each patient were drawn.
        by_training, by_patient = (
            np.stack([np.bincount(row, minlength=count) for row in rows]) / rows.shape[1]
            for rows, count in ((trainings, len(values)), (drawn, patients))
        )
        means[method] = np.einsum("st,tp,sp->s", by_training, values, by_patient)
    return means


def interval(values):
    """The 95% percentile interval."""
    return tuple(np.percentile(values, (2.5, 97.5)))


def ranks(means):
    """The rank of each method within each sample, 1 for the highest mean.

    Args:
        means: `{method: (samples,)}`, as from `resample`.

    Returns:
        `{method: (lowest rank of 95%, median, highest)}`.
    """
    values = np.stack(list(means.values()))
    places = np.argsort(np.argsort(-values, axis=0), axis=0) + 1
    return {method: tuple(np.percentile(row, (2.5, 50, 97.5))) for method, row in zip(means, places, strict=True)}
