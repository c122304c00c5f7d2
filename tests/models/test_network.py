import gc
import weakref

import keras
import numpy as np
import pytest
from checks import BACKEND, fill, random_volume, to_numpy

from keras_mmfnet import kernels
from keras_mmfnet.models import MMFNet, MultiEncoderUNet3D, SingleEncoderUNet3D, UNet2D

torch_only = pytest.mark.skipif(BACKEND != "torch", reason="the one backend that tells")


def small(model_class=MMFNet):
    """A network of two modalities, and images for it."""
    model = model_class(modalities=("t1", "t2"), patch_shape=(4, 8, 8), filters=(2, 3))
    fill(model)
    return model, {name: random_volume(2, 4, 8, 8, 1, seed=seed) for seed, name in enumerate(model.modalities)}


@pytest.mark.parametrize("model_class", [MMFNet, MultiEncoderUNet3D])
@pytest.mark.parametrize("training", [False, True])
def test_gives_what_keras_gives(model_class, training):
    model, images = small(model_class)
    keras_own = keras.Model(model.input, model.output)
    np.testing.assert_array_equal(
        to_numpy(model(images, training=training)), to_numpy(keras_own(images, training=training))
    )


@pytest.mark.once
@pytest.mark.parametrize("model_class", [MMFNet, MultiEncoderUNet3D, SingleEncoderUNet3D, UNet2D])
def test_runs_every_layer_once(model_class):
    model = model_class(patch_shape=(16, 16) if model_class is UNet2D else (16, 16, 16))
    names = calls(model)
    images = {name: keras.ops.ones((2, *x.shape[1:])) for name, x in model.input.items()}
    model(images, training=True)
    assert sorted(names) == sorted(layer.name for layer in model.layers if layer.name not in model.input)


def calls(model, watch=lambda name, outputs: None):
    """The layers' names in the order they run in; `watch` gets each before it runs, and the outputs so far."""
    names, outputs = [], {}

    def wrap(layer, call):
        def wrapped(*args, **kwargs):
            names.append(layer.name)
            watch(layer.name, outputs)
            output = call(*args, **kwargs)
            outputs[layer.name] = weakref.ref(output)
            return output

        return wrapped

    for layer in model.layers:
        if layer.name not in model.input:
            layer.call = wrap(layer, layer.call)
    return names


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="where the order decides about memory")
def test_a_fusion_block_runs_before_the_next_level():
    model, images = small()
    names = calls(model)
    model(images, training=True)
    assert names.index("fusion1") < names.index("t1_block2_1_conv")
    assert names.index("t1_block1_2_norm") < names.index("t2_block1_1_conv") < names.index("t1_block1_pool")
    assert len(names) == len(set(names)) == len(model.layers) - 2


@torch_only
def test_features_are_released_after_their_last_use():
    model, images = small()
    alive = {}

    def watch(name, outputs):
        gc.collect()  # Keras leaves lists of inputs in cycles of references
        alive[name] = {other for other, output in outputs.items() if output() is not None}

    calls(model, watch)
    model.predict_on_batch(images)
    assert alive["t1_block1_2_conv"] == {"t1_block1_1_norm"}
    assert alive["fusion1"] == {"t1_block1_2_norm", "t2_block1_2_norm"}
    assert alive["decoder_block1_up"] == {"fusion1", "decoder_block2_norm"}
    assert alive["probability"] == {"decoder_block1_norm"}


@torch_only
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_a_gpu(monkeypatch, training):
    """No number goes to the device, and none is asked of it: each would wait until all that was begun is done."""
    import torch

    monkeypatch.setattr(kernels, "_chosen", "fast")
    model, images = small()
    images = {name: keras.ops.convert_to_tensor(image) for name, image in images.items()}
    model(images)

    def wait(*args, **kwargs):
        raise AssertionError(f"on a GPU this would wait. Received: a {type(args[0]).__name__}")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    for name in ("as_tensor", "tensor"):
        monkeypatch.setattr(torch, name, wait)
    outputs = model(images, training=training)
    outputs.sum().backward()
    monkeypatch.undo()
    assert all(weight.value.grad is not None for weight in model.trainable_weights)


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_head_has_a_channel_for_each_structure(exclusive, tmp_path):
    names = ("gtv", "node", "ring")
    model = MMFNet(("t1", "t2"), (4, 8, 8), filters=(2, 3), structures=names, exclusive=exclusive)
    fill(model)
    images = {name: random_volume(2, 4, 8, 8, 1, seed=seed) for seed, name in enumerate(model.modalities)}
    head = model.get_layer("probability")
    logits = keras.Model(model.input, head.input)(images)
    kernel, bias = (to_numpy(weight) for weight in head.weights)
    logits = to_numpy(logits) @ kernel[0, 0, 0] + bias
    expected = 1 / (1 + np.exp(-logits))
    if exclusive:  # a softmax with a fourth class whose logit is 0
        classes = np.exp(np.concatenate([np.zeros_like(logits[..., :1]), logits], axis=-1))
        expected = (classes / classes.sum(axis=-1, keepdims=True))[..., 1:]
    found = to_numpy(model(images))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert (loaded.structures, loaded.exclusive) == (names, exclusive)
    np.testing.assert_array_equal(to_numpy(loaded(images)), found)
    with pytest.raises(ValueError, match=r"`structures` must be distinct names, at least one. Received: \('a', 'a'\)"):
        UNet2D("t1", (8, 8), (2, 3), structures=("a", "a"))
