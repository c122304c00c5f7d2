import keras_mmfnet._backend  # noqa: F401  # isort: skip
import keras
from keras import ops


def _as_float(y_true, y_pred, sample_weight):
    """Truth, prediction and weights in float32, the weights with as many axes as the prediction."""
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    if sample_weight is None:
        return y_true, y_pred, ops.ones([1] * len(y_pred.shape), "float32")
    weights = ops.convert_to_tensor(sample_weight, "float32")
    while len(weights.shape) < len(y_pred.shape):
        weights = ops.expand_dims(weights, -1)
    return y_true, y_pred, weights


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceScore(keras.metrics.Metric):
    """Dice similarity coefficient of the voxels from a threshold on, over all batches of an epoch (eq. 14).

    `2 |P and G| / (|P| + |G|)`, with the voxels of all batches taken together; 1 where both are empty. Computed in
    float32 under every dtype policy.

    Args:
        threshold: A voxel counts as tumour from this probability on.
        name: Name of the metric.
        **kwargs: As for every metric.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[DiceScore()])
    ```

    Reference: Chen et al., MMFNet, eq. 14.
    """

    def __init__(self, threshold=0.5, name="dice_score", **kwargs):
        super().__init__(name=name, **kwargs)
        self.threshold = threshold
        self.intersection = self.add_variable((), initializer="zeros", dtype="float32", name="intersection")
        self.total = self.add_variable((), initializer="zeros", dtype="float32", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch of masks of 0 and 1 and of probabilities, both of the same shape."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight)
        predicted = ops.cast(y_pred >= self.threshold, "float32")
        self.intersection.assign_add(ops.sum(y_true * predicted * weights))
        self.total.assign_add(ops.sum(y_true * weights) + ops.sum(predicted * weights))

    def result(self):
        """The coefficient as a float32 scalar between 0 and 1."""
        return ops.where(self.total > 0, 2 * self.intersection / ops.maximum(self.total, 1e-12), 1.0)

    def get_config(self):
        return {**super().get_config(), "threshold": self.threshold}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class AveragePrecision(keras.metrics.Metric):
    """Average precision of the probabilities, over all batches of an epoch (eq. 15-17).

    `sum_n (R_n - R_(n-1)) P_n` over thresholds that fall from 1 to 0, as scikit-learn's `average_precision_score`,
    but with the probabilities rounded down to `bins` levels, so that an epoch needs no list of its voxels. Without a
    tumour voxel the value is 0, as there. Computed in float32 under every dtype policy. For exact values per patient
    see `keras_mmfnet.evaluation`.

    Args:
        bins: Number of levels of the probabilities.
        name: Name of the metric.
        **kwargs: As for every metric.

    Raises:
        ValueError: `bins` is less than 2.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss(), metrics=[AveragePrecision()])
    ```

    Reference: Chen et al., MMFNet, eq. 15-17.
    """

    def __init__(self, bins=200, name="average_precision", **kwargs):
        super().__init__(name=name, **kwargs)
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"`bins` must be an integer of 2 or more. Received: {bins!r}")
        self.bins = bins
        self.positives = self.add_variable((bins,), initializer="zeros", dtype="float32", name="positives")
        self.negatives = self.add_variable((bins,), initializer="zeros", dtype="float32", name="negatives")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch of masks of 0 and 1 and of probabilities, both of the same shape."""
        y_true, y_pred, weights = _as_float(y_true, y_pred, sample_weight)
        level = ops.clip(ops.cast(ops.floor(y_pred * self.bins), "int32"), 0, self.bins - 1)
        for histogram, counts in ((self.positives, y_true * weights), (self.negatives, (1 - y_true) * weights)):
            # Segments are summed in float32; integer counts of one batch stay exact up to 2 ** 24.
            histogram.assign_add(
                ops.segment_sum(ops.reshape(counts, (-1,)), ops.reshape(level, (-1,)), num_segments=self.bins)
            )

    def result(self):
        """The average precision as a float32 scalar between 0 and 1."""
        true_positives = ops.cumsum(ops.flip(self.positives))
        predicted = ops.cumsum(ops.flip(self.positives + self.negatives))
        precision = true_positives / ops.maximum(predicted, 1e-12)
        gained = ops.flip(self.positives) / ops.maximum(true_positives[-1], 1e-12)
        return ops.sum(gained * precision)

    def get_config(self):
        return {**super().get_config(), "bins": self.bins}
