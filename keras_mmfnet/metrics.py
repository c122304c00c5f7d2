import keras_mmfnet._backend  # noqa: F401  # isort: skip
from typing import Any

import keras
from keras import ops

from keras_mmfnet import devices
from keras_mmfnet.losses import with_background


def _as_float(y_true, y_pred, sample_weight, structures):
    """Casts to float32, and expands the weights to the rank of the prediction."""
    for name, values in {"y_true": y_true, "y_pred": y_pred}.items():
        if values.shape[-1] != structures:
            expected = f"must have the shape (batch, ..., structures), here of {structures} structures"
            raise ValueError(f"`{name}` {expected}. Received: {tuple(values.shape)}")
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    if sample_weight is None:
        return y_true, y_pred, ops.ones([1] * len(y_pred.shape), "float32")
    weights = ops.convert_to_tensor(sample_weight, "float32")
    while len(weights.shape) < len(y_pred.shape):
        weights = ops.expand_dims(weights, -1)
    return y_true, y_pred, weights


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceScore(keras.metrics.Metric):
    """Dice similarity coefficient of the predicted masks, over all batches of an epoch (eq. 14).

    `2 |P and G| / (|P| + |G|)` over the voxels of all batches together, or the mean over the patches that have the
    structure; 1 if there is nothing to compare. The mean over the structures. Always computed in float32.

    Args:
        threshold: Lowest probability that counts, of one structure or of overlapping ones.
        structures: Number of structures.
        exclusive: Whether no voxel belongs to two structures. Of several, a voxel then counts for the most probable
            one, unless the background, `1 - sum(p)`, is more probable.
        per_patch: Whether the coefficient is of each patch, and their mean is taken.
        name: Name of the metric.
        **kwargs: `dtype`, as for every Keras metric.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[DiceScore()])
    ```
    """

    def __init__(
        self,
        threshold: float = 0.5,
        structures: int = 1,
        exclusive: bool = True,
        per_patch: bool = False,
        name: str = "dice_score",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.threshold, self.structures, self.exclusive = threshold, structures, exclusive
        self.per_patch, shape = per_patch, (structures,)
        self.numerator = self.add_variable(shape, initializer="zeros", dtype="float32", name="numerator")
        self.denominator = self.add_variable(shape, initializer="zeros", dtype="float32", name="denominator")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: masks of 0 and 1, and probabilities of the same shape `(batch, ..., structures)`."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight, self.structures)
        if self.exclusive and self.structures > 1:
            best = ops.argmax(with_background(y_pred), axis=-1, keepdims=True)
            predicted = best == ops.arange(self.structures, dtype="int32")
        else:
            predicted = y_pred >= self.threshold
        predicted = ops.cast(predicted, "float32")
        axes = tuple(range(int(self.per_patch), len(y_pred.shape) - 1))
        twice = 2 * ops.sum(y_true * predicted * weights, axis=axes)
        true = ops.sum(y_true * weights, axis=axes)
        total = true + ops.sum(predicted * weights, axis=axes)
        if self.per_patch:
            there = ops.cast(true > 0, "float32")
            twice, total = ops.sum(there * twice / ops.maximum(total, 1e-12), axis=0), ops.sum(there, axis=0)
        self.numerator.assign_add(devices.sum_over_devices(twice))
        self.denominator.assign_add(devices.sum_over_devices(total))

    def result(self) -> Any:
        """The coefficient, a float32 scalar in [0, 1]."""
        found = self.numerator / ops.maximum(self.denominator, 1e-12)
        return ops.mean(ops.where(self.denominator > 0, found, 1.0))

    def get_config(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("threshold", "structures", "exclusive", "per_patch")}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class AveragePrecision(keras.metrics.Metric):
    """Average precision of the probabilities, over all batches of an epoch (eq. 15-17).

    `sum_n (R_n - R_(n-1)) P_n` over thresholds from 1 down to 0, as in scikit-learn's `average_precision_score`. The
    probabilities are rounded down to `bins` levels, so that two histograms represent an epoch. The value is 0 if there
    is no voxel of the structure. The mean over the structures. Always computed in float32. See
    `keras_mmfnet.evaluation` for exact values per patient.

    Args:
        bins: Number of levels of the probabilities.
        structures: Number of structures.
        name: Name of the metric.
        **kwargs: `dtype`, as for every Keras metric.

    Raises:
        ValueError: `bins` is less than 2.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[AveragePrecision()])
    ```
    """

    def __init__(self, bins: int = 200, structures: int = 1, name: str = "average_precision", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"`bins` must be an integer of 2 or more. Received: {bins!r}")
        self.bins, self.structures = bins, structures
        shape = (structures, bins)
        self.positives = self.add_variable(shape, initializer="zeros", dtype="float32", name="positives")
        self.negatives = self.add_variable(shape, initializer="zeros", dtype="float32", name="negatives")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: masks of 0 and 1, and probabilities of the same shape `(batch, ..., structures)`."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight, self.structures)
        level = ops.clip(ops.cast(ops.floor(y_pred * self.bins), "int32"), 0, self.bins - 1)
        # Each structure has levels of its own.
        level = ops.reshape(level + self.bins * ops.arange(self.structures, dtype="int32"), (-1,))
        for histogram, counts in ((self.positives, y_true * weights), (self.negatives, (1 - y_true) * weights)):
            # The sums are float32: the counts of one batch are exact up to 2 ** 24.
            sums = ops.segment_sum(ops.reshape(counts, (-1,)), level, num_segments=self.structures * self.bins)
            histogram.assign_add(devices.sum_over_devices(ops.reshape(sums, histogram.shape)))

    def result(self) -> Any:
        """The average precision, a float32 scalar in [0, 1]."""
        positives, negatives = ops.flip(self.positives, axis=1), ops.flip(self.negatives, axis=1)
        true_positives = ops.cumsum(positives, axis=1)
        precision = true_positives / ops.maximum(ops.cumsum(positives + negatives, axis=1), 1e-12)
        gained = positives / ops.maximum(true_positives[:, -1:], 1e-12)
        return ops.mean(ops.sum(gained * precision, axis=1))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bins": self.bins, "structures": self.structures}
