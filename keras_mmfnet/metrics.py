import keras_mmfnet._backend  # noqa: F401  # isort: skip
from typing import Any

import keras
from keras import ops


def _as_float(y_true, y_pred, sample_weight):
    """Casts to float32, and expands the weights to the rank of the prediction."""
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    if sample_weight is None:
        return y_true, y_pred, ops.ones([1] * len(y_pred.shape), "float32")
    weights = ops.convert_to_tensor(sample_weight, "float32")
    while len(weights.shape) < len(y_pred.shape):
        weights = ops.expand_dims(weights, -1)
    return y_true, y_pred, weights


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceScore(keras.metrics.Metric):
    """Dice similarity coefficient of the thresholded probabilities, over all batches of an epoch (eq. 14).

    `2 |P and G| / (|P| + |G|)` over the voxels of all batches together; 1 if both are empty. Always computed in
    float32.

    Args:
        threshold: Lowest probability that counts as tumour.
        name: Name of the metric.
        **kwargs: `dtype`, as for every Keras metric.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[DiceScore()])
    ```
    """

    def __init__(self, threshold: float = 0.5, name: str = "dice_score", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.threshold = threshold
        self.intersection = self.add_variable((), initializer="zeros", dtype="float32", name="intersection")
        self.total = self.add_variable((), initializer="zeros", dtype="float32", name="total")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: masks of 0 and 1, and probabilities of the same shape."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight)
        predicted = ops.cast(y_pred >= self.threshold, "float32")
        self.intersection.assign_add(ops.sum(y_true * predicted * weights))
        self.total.assign_add(ops.sum(y_true * weights) + ops.sum(predicted * weights))

    def result(self) -> Any:
        """The coefficient, a float32 scalar in [0, 1]."""
        return ops.where(self.total > 0, 2 * self.intersection / ops.maximum(self.total, 1e-12), 1.0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "threshold": self.threshold}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class AveragePrecision(keras.metrics.Metric):
    """Average precision of the probabilities, over all batches of an epoch (eq. 15-17).

    `sum_n (R_n - R_(n-1)) P_n` over thresholds from 1 down to 0, as in scikit-learn's `average_precision_score`. The
    probabilities are rounded down to `bins` levels, so that two histograms represent an epoch. The value is 0 if there
    is no tumour voxel. Always computed in float32. See `keras_mmfnet.evaluation` for exact values per patient.

    Args:
        bins: Number of levels of the probabilities.
        name: Name of the metric.
        **kwargs: `dtype`, as for every Keras metric.

    Raises:
        ValueError: `bins` is less than 2.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[AveragePrecision()])
    ```
    """

    def __init__(self, bins: int = 200, name: str = "average_precision", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"`bins` must be an integer of 2 or more. Received: {bins!r}")
        self.bins = bins
        self.positives = self.add_variable((bins,), initializer="zeros", dtype="float32", name="positives")
        self.negatives = self.add_variable((bins,), initializer="zeros", dtype="float32", name="negatives")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Adds a batch: masks of 0 and 1, and probabilities of the same shape."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight)
        level = ops.clip(ops.cast(ops.floor(y_pred * self.bins), "int32"), 0, self.bins - 1)
        for histogram, counts in ((self.positives, y_true * weights), (self.negatives, (1 - y_true) * weights)):
            # The sums are float32: the counts of one batch are exact up to 2 ** 24.
            histogram.assign_add(
                ops.segment_sum(ops.reshape(counts, (-1,)), ops.reshape(level, (-1,)), num_segments=self.bins)
            )

    def result(self) -> Any:
        """The average precision, a float32 scalar in [0, 1]."""
        true_positives = ops.cumsum(ops.flip(self.positives))
        predicted = ops.cumsum(ops.flip(self.positives + self.negatives))
        precision = true_positives / ops.maximum(predicted, 1e-12)
        gained = ops.flip(self.positives) / ops.maximum(true_positives[-1], 1e-12)
        return ops.sum(gained * precision)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bins": self.bins}
