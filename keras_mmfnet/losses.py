import keras_mmfnet._backend  # noqa: F401  # isort: skip
from typing import Any, Literal

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceLoss(keras.losses.Loss):
    """Dice loss of probabilities, with sums over the whole batch (eq. 1).

    `"standard"` is `1 - (2 I + s) / (P + G + s)` with `I = sum(p * g)`, `P = sum(p)`, `G = sum(g)`: it is 0 if truth
    and prediction are both empty. `"as_printed"` is the paper's `1 - 2 (I + s) / (P + G + s)`, which is -1 in that
    case. The two agree for tumours of many voxels. Always computed in float32.

    Of a batch without tumour the standard loss is `P / (P + s)`: close to 1 and nearly flat until `P` is a few voxels.
    So what is found in patients without tumour counts by the batches that they share with tumours, where it raises `P`.

    Args:
        smooth: The smoothing term `s` > 0.
        formula: `"standard"` or `"as_printed"`.
        name: Name of the loss.
        **kwargs: `reduction` and `dtype`, as for every Keras loss.

    Call arguments:
        y_true: Mask of 0 and 1, any shape.
        y_pred: Probabilities, of the same shape.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: `smooth` is not positive or `formula` is unknown.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss())
    ```
    """

    def __init__(
        self,
        smooth: float = 1.0,
        formula: Literal["standard", "as_printed"] = "standard",
        name: str = "dice_loss",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        if not smooth > 0:
            raise ValueError(f"`smooth` must be positive. Received: {smooth!r}")
        if formula not in ("standard", "as_printed"):
            raise ValueError(f"`formula` must be 'standard' or 'as_printed'. Received: {formula!r}")
        self.smooth = smooth
        self.formula = formula

    def call(self, y_true, y_pred):
        intersection = ops.sum(y_true * y_pred)
        total = ops.sum(y_pred) + ops.sum(y_true) + self.smooth
        smooth = self.smooth if self.formula == "standard" else 2 * self.smooth
        return 1 - (2 * intersection + smooth) / total

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "smooth": self.smooth, "formula": self.formula}
