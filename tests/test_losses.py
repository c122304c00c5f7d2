import json

import keras
import numpy as np
import pytest
from checks import dtype_of, global_policy, to_numpy
from keras import ops

from keras_mmfnet.losses import DiceLoss

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
    truth = np.array(truth, "uint8").reshape(2, 1, 2)
    prediction = ops.cast(ops.convert_to_tensor(np.array(prediction, "float32").reshape(2, 1, 2)), dtype)
    for formula, expected in (("standard", standard), ("as_printed", as_printed)):
        loss = DiceLoss(formula=formula)(truth, prediction)
        assert dtype_of(loss) == "float32"
        assert tuple(loss.shape) == ()
        assert to_numpy(loss).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("smooth", [0.1, 2])
def test_smooth(smooth):
    truth, prediction = np.array([1.0, 1, 0, 0]), np.array([0.0, 1, 1, 0])
    standard, as_printed = (
        to_numpy(DiceLoss(smooth, formula)(truth, prediction)).item() for formula in ("standard", "as_printed")
    )
    assert standard == pytest.approx(1 - (2 + smooth) / (4 + smooth), abs=1e-6)
    assert as_printed == pytest.approx(1 - 2 * (1 + smooth) / (4 + smooth), abs=1e-6)


def test_sums_over_the_whole_batch():
    # The first patch has no tumour and no prediction: a loss per patch would be 0 there, and 0.4 in the second.
    truth, prediction = np.array([[0.0, 0, 0, 0], [1, 1, 0, 0]]), np.array([[0.0, 0, 0, 0], [0, 1, 1, 0]])
    assert to_numpy(DiceLoss()(truth, prediction)).item() == pytest.approx(0.4, abs=1e-6)


def test_float32_under_a_global_policy():
    truth = np.ones((1, 100, 1000), "uint8")
    prediction = ops.ones((1, 100, 1000), "float16")
    with global_policy("mixed_float16"):
        loss = DiceLoss()(truth, prediction)
    assert dtype_of(loss) == "float32"
    assert to_numpy(loss).item() == pytest.approx(0, abs=1e-6)  # a sum of 100,000 is infinite in float16


def test_config():
    loss = DiceLoss(smooth=0.5, formula="as_printed", name="dice", reduction="sum")
    text = json.dumps(keras.saving.serialize_keras_object(loss))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is DiceLoss
    assert again.get_config() == loss.get_config()
    assert (again.smooth, again.formula, again.name, again.reduction) == (0.5, "as_printed", "dice", "sum")


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
