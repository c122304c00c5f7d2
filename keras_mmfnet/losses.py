"""Losses between masks and probabilities `(batch, ..., structures)`, and the registry that `training.loss` names.

Keras' own `Dice` and `Tversky` do not smooth: for a structure that a batch lacks their value is 1 and their gradient 0,
whatever is predicted. The cross-entropies are Keras' own.
"""

import keras_mmfnet._backend  # noqa: F401  # isort: skip
from collections.abc import Callable
from typing import Any, Literal

import keras
from keras import ops

from keras_mmfnet import devices


def _sums(y_true, y_pred, per_patch):
    """Sums of `y_true * y_pred`, `y_pred` and `y_true` over the voxels, `(structures,)` or `(batch, structures)`.

    Those of a batch are over all devices.
    """
    if len(y_true.shape) != len(y_pred.shape) or y_true.shape[-1] != y_pred.shape[-1]:
        raise ValueError(
            "`y_true` and `y_pred` must have the same shape (batch, ..., structures). "
            f"Received: {tuple(y_true.shape)} and {tuple(y_pred.shape)}"
        )
    axes = tuple(range(1 if per_patch else 0, len(y_pred.shape) - 1))
    sums = [ops.sum(values, axis=axes) for values in (y_true * y_pred, y_pred, y_true)]
    return sums if per_patch else [devices.sum_over_devices(values) for values in sums]


def _of_batch(values):
    """The mean as a tensor of shape (1,): on TensorFlow Keras does not scale a scalar by the number of devices."""
    return ops.reshape(ops.mean(values), (1,))


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceLoss(keras.losses.Loss):
    """Dice loss of probabilities, with sums over the whole batch (eq. 1); the mean over the structures.

    `"standard"` is `1 - (2 I + s) / (P + G + s)` with `I = sum(p * g)`, `P = sum(p)`, `G = sum(g)`: it is 0 if truth
    and prediction are both empty. `"as_printed"` is the paper's `1 - 2 (I + s) / (P + G + s)`, which is -1 in that
    case. The two agree for tumours of many voxels. Always computed in float32.

    Of a structure that the batch lacks the standard loss is `P / (P + s)`: close to 1 and nearly flat until `P` is a
    few voxels. It stays in the mean: without that term, false positives of an absent structure would cost nothing, and
    the other structures would weigh more in some batches. False positives in patients without tumour count in the
    batches that they share with tumours, where they raise `P`.

    Args:
        smooth: The smoothing term `s` > 0.
        formula: `"standard"` or `"as_printed"`.
        per_patch: Sums over each patch instead of the batch, and the mean over the patches.
        name: Name of the loss.
        **kwargs: `reduction` and `dtype`, as for every Keras loss.

    Call arguments:
        y_true: Masks of 0 and 1, `(batch, ..., structures)`.
        y_pred: Probabilities, of the same shape.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: `smooth` is not positive, `formula` is unknown, or the shapes differ.

    Example:

    ```python
    model.compile(optimizer="adam", loss=DiceLoss())
    ```
    """

    def __init__(
        self,
        smooth: float = 1.0,
        formula: Literal["standard", "as_printed"] = "standard",
        per_patch: bool = False,
        name: str = "dice_loss",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        _check_positive("smooth", smooth)
        if formula not in ("standard", "as_printed"):
            raise ValueError(f"`formula` must be 'standard' or 'as_printed'. Received: {formula!r}")
        self.smooth = smooth
        self.formula = formula
        self.per_patch = per_patch

    def call(self, y_true, y_pred):
        intersection, predicted, truth = _sums(y_true, y_pred, self.per_patch)
        smooth = self.smooth if self.formula == "standard" else 2 * self.smooth
        return _of_batch(1 - (2 * intersection + smooth) / (predicted + truth + self.smooth))

    def get_config(self) -> dict[str, Any]:
        own = {"smooth": self.smooth, "formula": self.formula, "per_patch": self.per_patch}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class TverskyLoss(keras.losses.Loss):
    """Tversky loss of probabilities, which weighs false positives and false negatives; the mean over the structures.

    `(1 - T) ** (1 / gamma)` with `T = (I + s) / (I + alpha FP + beta FN + s)`, `FP = P - I` and `FN = G - I`, and sums
    over the whole batch as in `DiceLoss`, which this is for `alpha = beta = 0.5`, `s = 0.5` and `gamma = 1`. A `gamma`
    above 1 is the focal Tversky loss. Always computed in float32.

    Args:
        alpha: Weight of the false positives.
        beta: Weight of the false negatives. (In Keras' `Tversky` these two are the other way round.)
        gamma: The focal parameter.
        smooth: The smoothing term `s` > 0.
        name: Name of the loss.
        **kwargs: `reduction` and `dtype`, as for every Keras loss.

    Raises:
        ValueError: An argument is not positive, or the shapes differ.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        gamma: float = 1.0,
        smooth: float = 1.0,
        name: str = "tversky_loss",
        **kwargs: Any,
    ):
        super().__init__(name=name, **kwargs)
        self.alpha, self.beta, self.gamma, self.smooth = alpha, beta, gamma, smooth
        for argument in ("alpha", "beta", "gamma", "smooth"):
            _check_positive(argument, getattr(self, argument))

    def call(self, y_true, y_pred):
        intersection, predicted, truth = _sums(y_true, y_pred, per_patch=False)
        weighted = self.alpha * (predicted - intersection) + self.beta * (truth - intersection)
        loss = weighted / (intersection + weighted + self.smooth)
        # The slope of a root is infinite at 0.
        return _of_batch(loss if self.gamma == 1 else ops.maximum(loss, keras.config.epsilon()) ** (1 / self.gamma))

    def get_config(self) -> dict[str, Any]:
        own = {"alpha": self.alpha, "beta": self.beta, "gamma": self.gamma, "smooth": self.smooth}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class CrossEntropy(keras.losses.Loss):
    """Mean cross-entropy of the voxels, by Keras' functions, which clip the probabilities by 1e-7.

    Of exclusive structures it is that of the classes, one of which is the background with the probability `1 - sum(p)`;
    of overlapping structures, the mean of the binary cross-entropies. For one structure the two are the same. Always
    computed in float32.

    Args:
        exclusive: Whether no voxel belongs to two structures.
        name: Name of the loss.
        **kwargs: `reduction` and `dtype`, as for every Keras loss.
    """

    def __init__(self, exclusive: bool = True, name: str = "cross_entropy", **kwargs: Any):
        super().__init__(name=name, **kwargs)
        self.exclusive = exclusive

    def call(self, y_true, y_pred):
        if not self.exclusive or y_pred.shape[-1] == 1:
            return keras.losses.binary_crossentropy(y_true, y_pred)
        return keras.losses.categorical_crossentropy(with_background(y_true), with_background(y_pred))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "exclusive": self.exclusive}


def with_background(values: Any) -> Any:
    """Appends the background, 1 - their sum, to exclusive structures.

    Args:
        values: Masks or probabilities `(..., structures)`.

    Returns:
        A tensor `(..., structures + 1)`.
    """
    return ops.concatenate([values, 1 - ops.sum(values, axis=-1, keepdims=True)], axis=-1)


@keras.saving.register_keras_serializable(package="keras_mmfnet")
class DiceCrossEntropy(CrossEntropy):
    """`CrossEntropy` plus `DiceLoss`, the loss of nnU-Net; the arguments are those of `CrossEntropy`."""

    def __init__(self, exclusive: bool = True, name: str = "dice_cross_entropy", **kwargs: Any):
        super().__init__(exclusive, name, **kwargs)

    def call(self, y_true, y_pred):
        return DiceLoss().call(y_true, y_pred) + _of_batch(super().call(y_true, y_pred))


def _check_positive(argument, value):
    if not value > 0:
        raise ValueError(f"`{argument}` must be positive. Received: {value!r}")


LOSSES: dict[str, Callable[[bool], keras.losses.Loss]] = {
    "dice": lambda exclusive: DiceLoss(),
    "dice_per_patch": lambda exclusive: DiceLoss(per_patch=True),
    "dice_ce": DiceCrossEntropy,
    "tversky": lambda exclusive: TverskyLoss(),
    "focal_tversky": lambda exclusive: TverskyLoss(gamma=4 / 3),
}


def register_loss(name: str, factory: Callable[[bool], keras.losses.Loss]) -> None:
    """Adds a loss that `training.loss` can name.

    Args:
        name: Its name.
        factory: Function `factory(exclusive)` that returns the `keras.losses.Loss` for masks and probabilities of shape
            `(batch, ..., structures)`. `exclusive` says whether no voxel belongs to two structures. The loss's `call`
            returns a value for each sample, or one of shape (1,) for the batch: on several devices with TensorFlow,
            Keras does not scale scalars.

    Raises:
        ValueError: The name is already registered.

    Example:

    ```python
    register_loss("focal", lambda exclusive: keras.losses.BinaryFocalCrossentropy())
    ```
    """
    if name in LOSSES:
        raise ValueError(f"a loss's name must be new. Received: {name!r}")
    LOSSES[name] = factory


def make_loss(name: str, exclusive: bool = True) -> keras.losses.Loss:
    """Makes a registered loss.

    Args:
        name: Name of the loss.
        exclusive: Whether no voxel belongs to two structures.

    Returns:
        The loss.

    Raises:
        ValueError: There is no such loss.
    """
    if name not in LOSSES:
        raise ValueError(f"the loss, `training.loss`, must be one of {', '.join(LOSSES)}. Received: {name!r}")
    return LOSSES[name](exclusive)
