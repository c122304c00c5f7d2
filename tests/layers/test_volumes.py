import keras
import numpy as np
import pytest
from checks import BACKEND, fill, gradient_function, random_volume, to_numpy

from keras_mmfnet.layers import volumes

pytestmark = pytest.mark.usefixtures("each_kind")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("Conv3D", {"filters": 2, "kernel_size": 1, "padding": "same"}),
        ("Conv3D", {"filters": 2, "kernel_size": (1, 3, 3), "padding": "same", "activation": "sigmoid"}),
        ("Conv3D", {"filters": 2, "kernel_size": 3, "padding": "same", "use_bias": False, "dilation_rate": 2}),
        ("Conv3D", {"filters": 2, "kernel_size": 3, "padding": "same", "strides": 2}),
        ("Conv3D", {"filters": 2, "kernel_size": 2}),
        ("MaxPooling3D", {"pool_size": 2}),
        ("MaxPooling3D", {"pool_size": 3, "strides": 1, "padding": "same"}),
    ],
)
def test_same_as_keras(kind, arguments, data_format, tmp_path):
    """The output, the gradients by the input and the weights, and what a saved model gives."""
    arguments = {**arguments, "data_format": data_format}
    inputs = keras.Input((4, 4, 4, 4))
    model, other = (
        keras.Model(inputs, getattr(module, kind)(**arguments)(inputs)) for module in (volumes, keras.layers)
    )
    fill(model)
    other.set_weights(model.get_weights())
    x = random_volume(2, 4, 4, 4, 4)
    found = to_numpy(model(x))
    assert model.output.shape[1:] == found.shape[1:]
    np.testing.assert_allclose(found, to_numpy(other(x)), rtol=1e-5, atol=1e-6)
    for one, two in zip(gradient_function(model)(x), gradient_function(other)(x), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(keras.saving.load_model(tmp_path / "model.keras")(x)), found)


@pytest.mark.skipif(BACKEND != "torch", reason="the backend that works around it")
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("depth", "size"), [(1, 3), (2, 3), (3, 3), (2, 5), (4, 5), (5, 5)])
def test_gradients_of_few_slices_in_bfloat16(depth, size, data_format):
    """PyTorch's own are garbage on a processor for fewer slices than the kernel's."""
    shape = (depth, 4, 4, 3) if data_format == "channels_last" else (3, depth, 4, 4)
    arguments = {"filters": 8, "kernel_size": size, "padding": "same", "data_format": data_format}
    inputs, found = keras.Input(shape), []
    for dtype in ("mixed_bfloat16", "float32"):
        model = keras.Model(inputs, volumes.Conv3D(**arguments, dtype=dtype)(inputs))
        fill(model)
        found.append(gradient_function(model)(random_volume(8, *shape)))
    for half, whole in zip(*found, strict=True):
        scale = np.abs(to_numpy(whole)).max()
        np.testing.assert_allclose(to_numpy(half).astype("float32"), to_numpy(whole), atol=0.03 * scale)
