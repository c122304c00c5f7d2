import json

import keras
import numpy as np
import pytest
from checks import dtype_of, global_policy, to_numpy
from keras import ops

from keras_mmfnet.losses import (
    LOSSES,
    CrossEntropy,
    DiceCrossEntropy,
    DiceLoss,
    TverskyLoss,
    make_loss,
    register_loss,
)

# truth, prediction, loss, loss as the paper prints it; I, P and G are the sums of the product and of the two.
TABLE = {
    "both empty": ([0, 0, 0, 0], [0, 0, 0, 0], 0, -1),
    "empty truth": ([0, 0, 0, 0], [0, 1, 1, 0], 1 - 1 / 3, 1 - 2 / 3),
    "empty prediction": ([1, 1, 0, 0], [0, 0, 0, 0], 1 - 1 / 3, 1 - 2 / 3),
    "perfect": ([1, 1, 0, 0], [1, 1, 0, 0], 0, 1 - 2 * 3 / 5),
    "half": ([1, 1, 0, 0], [0, 1, 1, 0], 1 - 3 / 5, 1 - 2 * 2 / 5),  # I = 1, P = G = 2
    "apart": ([1, 1, 0, 0], [0, 0, 1, 1], 1 - 1 / 5, 1 - 2 / 5),
    "unsure": ([1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], 1 - 3 / 5, 1 - 2 * 2 / 5),  # I = 1, P = G = 2
    "soft": ([1, 1, 1, 0], [0.75, 0.25, 0.5, 0.5], 1 - 4 / 6, 1 - 2 * 2.5 / 6),  # I = 1.5, P = 2, G = 3
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", TABLE)
def test_by_hand(case, dtype):
    truth, prediction, standard, as_printed = TABLE[case]
    truth = np.array(truth, "uint8").reshape(2, 2, 1)
    prediction = ops.cast(ops.convert_to_tensor(np.array(prediction, "float32").reshape(2, 2, 1)), dtype)
    for formula, expected in (("standard", standard), ("as_printed", as_printed)):
        loss = DiceLoss(formula=formula)(truth, prediction)
        assert dtype_of(loss) == "float32"
        assert tuple(loss.shape) == ()
        assert to_numpy(loss).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("smooth", [0.1, 2])
def test_smooth(smooth):
    truth, prediction = np.array([[1.0], [1], [0], [0]]), np.array([[0.0], [1], [1], [0]])
    standard, as_printed = (
        to_numpy(DiceLoss(smooth, formula)(truth, prediction)).item() for formula in ("standard", "as_printed")
    )
    assert standard == pytest.approx(1 - (2 + smooth) / (4 + smooth), abs=1e-6)
    assert as_printed == pytest.approx(1 - 2 * (1 + smooth) / (4 + smooth), abs=1e-6)


def test_sums_over_the_whole_batch():
    # The first patch has no tumour and no prediction: a loss per patch would be 0 there, and 0.4 in the second.
    truth, prediction = np.array([[0.0, 0, 0, 0], [1, 1, 0, 0]]), np.array([[0.0, 0, 0, 0], [0, 1, 1, 0]])
    truth, prediction = truth[..., None], prediction[..., None]
    assert number(DiceLoss(), truth, prediction) == pytest.approx(0.4, abs=1e-6)
    assert number(DiceLoss(per_patch=True), truth, prediction) == pytest.approx((0 + 0.4) / 2, abs=1e-6)


# Two exclusive structures in two patches of two voxels; the second one occurs in the first patch only, or nowhere.
HERE = np.array([[[1, 0], [0, 1]], [[1, 0], [0, 0]]], "uint8")
NOWHERE = HERE * np.array([1, 0], "uint8")
FOUND = np.array([[[0.5, 0.25], [0.25, 0.5]], [[1, 0], [0.25, 0.25]]], "float32")
LOG = -np.log([0.25, 0.5, 0.75])  # of the probabilities 1/4, 1/2 and 3/4


def number(loss, truth, prediction):
    value = loss(truth, prediction)
    assert dtype_of(value) == "float32"
    assert tuple(value.shape) == ()
    return to_numpy(value).item()


# By structure: I = 1.5, P = 2, G = 2 and I = 0.5, P = 1, G = 1 or, nowhere, I = 0, P = 1, G = 0.
STRUCTURES = {
    "dice": (DiceLoss(), HERE, (1 - 4 / 5 + 1 - 2 / 3) / 2),
    "dice of none": (DiceLoss(), NOWHERE, (1 - 4 / 5 + 1 - 1 / 2) / 2),
    # By patch, I, P, G = 0.5, 0.75, 1 and 1, 1.25, 1 of the first structure, 0.5, 0.75, 1 and 0, 0.25, 0 of the second.
    "dice per patch": (
        DiceLoss(per_patch=True),
        HERE,
        np.mean([1 - 2 / 2.75, 1 - 3 / 3.25, 1 - 2 / 2.75, 1 - 1 / 1.25]),
    ),
    # FP = 0.5, FN = 0.5; FP = 0.5, FN = 0.5 or, nowhere, FP = 1, FN = 0.
    "tversky": (TverskyLoss(), HERE, (0.5 / 3 + 0.5 / 2) / 2),
    "tversky of none": (TverskyLoss(), NOWHERE, (0.5 / 3 + 0.3 / 1.3) / 2),
    "tversky of false positives": (TverskyLoss(0.9, 0.1, smooth=2), NOWHERE, (0.5 / 4 + 0.9 / 2.9) / 2),
    "focal tversky": (TverskyLoss(gamma=2), HERE, (np.sqrt(0.5 / 3) + np.sqrt(0.5 / 2)) / 2),
    # The classes of the four voxels have the probabilities 1/2, 1/2, 1 and 1/2.
    "cross-entropy": (CrossEntropy(), HERE, 3 * LOG[1] / 4),
    "cross-entropy of none": (CrossEntropy(), NOWHERE, (2 * LOG[1] + LOG[0]) / 4),
    # Of the first structure 1/2, 3/4, 1, 3/4 are right, of the second 3/4, 1/2, 1, 3/4.
    "binary cross-entropy": (CrossEntropy(exclusive=False), HERE, (2 * LOG[1] + 4 * LOG[2]) / 8),
    "dice and cross-entropy": (DiceCrossEntropy(), HERE, (1 - 4 / 5 + 1 - 2 / 3) / 2 + 3 * LOG[1] / 4),
    "dice and binary cross-entropy": (
        DiceCrossEntropy(exclusive=False),
        NOWHERE,
        (1 - 4 / 5 + 1 - 1 / 2) / 2 + (2 * LOG[1] + 4 * LOG[2]) / 8,
    ),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structures_by_hand(case):
    loss, truth, expected = STRUCTURES[case]
    # The clipping and the sum that Keras divides by change the last digits.
    assert number(loss, truth, FOUND) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_extremes(name, exclusive):
    """Losses and gradients stay finite at 0 and 1; what is perfect costs nothing, and what is wrong costs something."""
    loss = make_loss(name, exclusive)
    wrong = np.flip(HERE, -1).astype("float32")
    for truth in (HERE, np.zeros_like(HERE)):
        assert number(loss, truth, truth.astype("float32")) == pytest.approx(0, abs=1e-5)
        assert number(loss, truth, wrong) > 0.1
        for prediction in (truth.astype("float32"), wrong, np.full_like(wrong, 0.25)):
            assert np.isfinite(gradient(loss, truth, prediction)).all()


def gradient(loss, truth, prediction):
    """The gradient by the probabilities."""
    variable = keras.Variable(prediction)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(truth, variable.value)
        return to_numpy(tape.gradient(value, variable.value))
    if keras.backend.backend() == "torch":
        loss(truth, variable.value).backward()
        return to_numpy(variable.value.grad)
    import jax

    return to_numpy(jax.grad(lambda x: loss(truth, x))(variable.value))


@pytest.mark.parametrize("name", LOSSES)
def test_one_structure_is_exclusive_or_not(name):
    truth, prediction = HERE[..., :1], FOUND[..., :1]
    one, other = (number(make_loss(name, exclusive), truth, prediction) for exclusive in (True, False))
    assert one == other > 0.05


def test_the_cross_entropy_of_one_structure_is_keras():
    truth, prediction = HERE[..., :1], FOUND[..., :1]
    assert number(CrossEntropy(), truth, prediction) == number(keras.losses.BinaryCrossentropy(), truth, prediction)


def test_other_numbers_of_structures_are_refused():
    with pytest.raises(ValueError, match=r"structures\)\. Received: \(2, 2, 1\) and \(2, 2, 2\)$"):
        DiceLoss()(HERE[..., :1], FOUND)


def test_registry():
    assert set(LOSSES) == {"dice", "dice_per_patch", "dice_ce", "tversky", "focal_tversky"}
    seen = []
    try:
        register_loss("mine", lambda exclusive: seen.append(exclusive) or DiceLoss(smooth=3))
        assert make_loss("mine", False).smooth == 3
        assert seen == [False]
        with pytest.raises(ValueError, match=r"^a loss's name must be new. Received: 'mine'$"):
            register_loss("mine", DiceCrossEntropy)
        with pytest.raises(ValueError, match=r"`training.loss`, must be one of dice, .*, mine. Received: 'none'$"):
            make_loss("none")
    finally:
        LOSSES.pop("mine", None)


def test_float32_under_a_global_policy():
    truth = np.ones((1, 100, 1000, 1), "uint8")
    prediction = ops.ones((1, 100, 1000, 1), "float16")
    with global_policy("mixed_float16"):
        loss = DiceLoss()(truth, prediction)
    assert dtype_of(loss) == "float32"
    assert to_numpy(loss).item() == pytest.approx(0, abs=1e-6)  # a sum of 100,000 is infinite in float16


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (DiceLoss, {"smooth": 0.5, "formula": "as_printed", "per_patch": True}),
        (TverskyLoss, {"alpha": 0.1, "beta": 0.2, "gamma": 2, "smooth": 0.5}),
        (CrossEntropy, {"exclusive": False}),
        (DiceCrossEntropy, {"exclusive": False}),
    ],
)
def test_config(loss, settings):
    settings |= {"name": "mine", "reduction": "sum"}
    text = json.dumps(keras.saving.serialize_keras_object(loss(**settings)))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is loss
    assert {**again.get_config(), **settings} == again.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"smooth": 0}, "`smooth` must be positive. Received: 0"),
        ({"smooth": -1.0}, "`smooth` must be positive. Received: -1.0"),
        ({"smooth": float("nan")}, "`smooth` must be positive. Received: nan"),
        ({"formula": "dice"}, "`formula` must be 'standard' or 'as_printed'. Received: 'dice'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        DiceLoss(**arguments)


@pytest.mark.parametrize("argument", ["alpha", "beta", "gamma", "smooth"])
def test_wrong_weights(argument):
    with pytest.raises(ValueError, match=f"^`{argument}` must be positive. Received: 0$"):
        TverskyLoss(**{argument: 0})


def test_fit_and_reload(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 4, 1)).astype("float32")
    truth = (x > 0).astype("uint8")
    model = keras.Sequential([keras.Input((4, 1)), keras.layers.Dense(1, "sigmoid", kernel_initializer="zeros")])
    model.compile(keras.optimizers.Adam(0.1), loss=DiceLoss(smooth=2))
    history = model.fit(x, truth, batch_size=8, epochs=30, verbose=0).history["loss"]
    # At first every probability is one half: I = G / 2, P = 16.
    tumour = int(truth.sum())
    assert history[0] == pytest.approx(1 - (tumour + 2) / (tumour + 16 + 2), rel=1e-4)
    assert history[-1] < 0.5 * history[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.loss.get_config() == model.loss.get_config()
    assert again.evaluate(x, truth, verbose=0) == pytest.approx(model.evaluate(x, truth, verbose=0))
