"""What every layer and every model of the package has to pass."""

import contextlib
import inspect
import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_mmfnet.losses import DiceLoss

BACKEND = keras.backend.backend()
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
# Largest error of an output in half precision, as a share of the largest output.
TOLERANCES = {"mixed_float16": 0.01, "mixed_bfloat16": 0.06}


def to_numpy(x):
    """A tensor of any backend and dtype as a float32 array."""
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def dtype_of(x):
    return keras.backend.standardize_dtype(x.dtype)


@contextlib.contextmanager
def global_policy(name):
    """Keras' own dtype policy is `name` inside."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def random_volume(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def fill(layer, seed=0):
    """Random weights, so that no bias, scale or moving average has a value at which a mistake stays hidden."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if weight.path.endswith(("gamma", "moving_variance")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif len(weight.shape) == 1:  # mostly positive: with so few channels none may die at a ReLU
            weight.assign(rng.uniform(-0.25, 1.25, weight.shape))
        else:
            weight.assign(rng.normal(size=weight.shape) * np.sqrt(2 / np.prod(weight.shape[:-1])))


def named_weights(layer):
    """The weights as arrays, by their path inside the layer."""
    return {weight.path.removeprefix(f"{layer.name}/"): to_numpy(weight) for weight in layer.weights}


def count(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


def _has_gpu():
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _needs_xla(layer):
    """Whether gradients come out right with XLA only.

    TensorFlow's bfloat16 kernel for the weight gradient of a 3D convolution reads memory that nothing was written to,
    on a CPU, where Keras does not compile with XLA by itself.
    """
    return BACKEND == "tensorflow" and layer.dtype_policy.compute_dtype == "bfloat16" and not _has_gpu()


def gradient_function(layer):
    """Maps inputs to the gradients, in training, of the mean output by the inputs and by each trainable weight."""
    weights = [weight.value for weight in layer.trainable_weights]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=_needs_xla(layer))
        def gradient(inputs):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                mean = tf.reduce_mean(tf.cast(layer(inputs, training=True), "float32"))
            return tape.gradient(mean, [*tf.nest.flatten(inputs), *weights])

    elif BACKEND == "torch":
        import torch

        def gradient(inputs):
            inputs = keras.tree.map_structure(lambda x: x.clone().requires_grad_(), inputs)
            mean = layer(inputs, training=True).float().mean()
            return torch.autograd.grad(mean, [*keras.tree.flatten(inputs), *weights])

    else:
        import jax

        def mean_output(inputs, weights):
            # Not `stateless_call`: that of a layer leaves out the casts of `__call__`.
            with keras.StatelessScope(zip(layer.trainable_weights, weights, strict=True)):
                return layer(inputs, training=True).astype("float32").mean()

        @jax.jit
        def gradient(inputs):
            return jax.tree.leaves(jax.grad(mean_output, argnums=(0, 1))(inputs, weights))

    def to_arrays(inputs):
        return [to_numpy(found) for found in gradient(keras.tree.map_structure(ops.convert_to_tensor, inputs))]

    return to_arrays


def check_layer(layer_class, arguments, shapes, reference, weights, folder):
    """Checks one layer in one configuration.

    Args:
        layer_class: The layer's class.
        arguments: Its arguments, none of them at its default: a default that config or reload fall back to would go
            unnoticed.
        shapes: Shape of the input, channels last, or a list of shapes for a list of inputs.
        reference: Takes the weights by path and the input arrays, and returns the output, in NumPy.
        weights: `(trainable, non_trainable)` numbers of weights.
        folder: A folder for files.
    """

    def make(**changes):
        return layer_class(**{**arguments, "name": "layer", **changes})

    several = isinstance(shapes, list)
    inputs = (
        [random_volume(*shape, seed=seed) for seed, shape in enumerate(shapes)] if several else random_volume(*shapes)
    )
    layer = make()
    layer(inputs)
    fill(layer)
    outputs = to_numpy(layer(inputs))

    assert (count(layer.trainable_weights), count(layer.non_trainable_weights)) == weights
    expected = reference(named_weights(layer), *(inputs if several else [inputs]))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)

    _check_config(layer, arguments)
    other = {"data_format": "channels_first", "dtype": "mixed_bfloat16", "trainable": False}
    _check_config(make(**other), arguments)
    _check_symbolic(make, layer, inputs, outputs, folder)
    _check_containers(layer, inputs, outputs)
    _check_channels_first(make, layer, inputs, outputs)
    for policy in POLICIES:
        _check_policy(make, policy, layer, inputs, outputs)


def _check_config(layer, arguments):
    config = layer.get_config()
    names = [p.name for p in inspect.signature(type(layer)).parameters.values() if p.kind != p.VAR_KEYWORD]
    assert set(names) <= set(config)
    assert all(getattr(layer, name) == config[name] for name in names)
    assert {name: config[name] for name in arguments} == arguments
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is type(layer)
    assert again.get_config() == config
    assert again.dtype_policy.name == layer.dtype_policy.name
    assert again.data_format == layer.data_format


def _check_symbolic(make, layer, inputs, outputs, folder):
    """The shapes and dtypes promised without data are those that come with data; unknown sizes; saving."""
    symbols = keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape), inputs)
    promised = make()(symbols)
    assert promised.shape == outputs.shape
    assert dtype_of(promised) == "float32"
    shapes = [x.shape for x in inputs] if isinstance(inputs, list) else inputs.shape
    assert tuple(layer.compute_output_shape(shapes)) == outputs.shape

    symbols = keras.tree.map_structure(lambda x: keras.Input((None, None, None, x.shape[-1])), inputs)
    model = keras.Model(symbols, layer(symbols))
    assert model.output.shape == (None, None, None, None, outputs.shape[-1])
    np.testing.assert_array_equal(to_numpy(model(inputs)), outputs)
    crop = keras.tree.map_structure(lambda x: x[:1, :, 1:, :-1], inputs)
    np.testing.assert_allclose(to_numpy(model(crop)), to_numpy(layer(crop)), rtol=1e-6)
    if BACKEND == "tensorflow":  # the one backend whose graphs hold sizes that are not known
        import tensorflow as tf

        signature = keras.tree.map_structure(lambda x: tf.TensorSpec((None,) * 4 + x.shape[-1:]), inputs)
        graph = tf.function(lambda x: model(x), input_signature=[signature])
        np.testing.assert_allclose(to_numpy(graph(inputs)), outputs, rtol=1e-5, atol=1e-6)

    path = folder / "layer.keras"
    model.save(path)
    again = keras.saving.load_model(path)
    assert again.get_layer(layer.name).get_config() == layer.get_config()
    np.testing.assert_array_equal(to_numpy(again(inputs)), outputs)


class _Subclassed(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs):
        return self.layer(inputs)


def _check_containers(layer, inputs, outputs):
    subclassed = _Subclassed(layer)
    np.testing.assert_array_equal(to_numpy(subclassed(inputs)), outputs)
    assert len(subclassed.weights) == len(layer.weights)
    if not isinstance(inputs, list):
        sequential = keras.Sequential([keras.Input(inputs.shape[1:]), layer])
        np.testing.assert_array_equal(to_numpy(sequential(inputs)), outputs)
        assert len(sequential.weights) == len(layer.weights)


def _check_channels_first(make, layer, inputs, outputs):
    moved = keras.tree.map_structure(lambda x: np.ascontiguousarray(np.moveaxis(x, -1, 1)), inputs)
    symbols = keras.tree.map_structure(lambda x: keras.Input((x.shape[1], None, None, None)), moved)
    first = make(data_format="channels_first")
    assert first(symbols).shape == (None, outputs.shape[-1], None, None, None)
    first.set_weights(layer.get_weights())
    np.testing.assert_allclose(np.moveaxis(to_numpy(first(moved)), 1, -1), outputs, rtol=1e-4, atol=1e-5)


def _check_policy(make, policy, layer, inputs, outputs):
    """Dtypes and values under a dtype policy, and gradients in training on inputs that invite infinities."""
    mixed = make(dtype=policy)
    compute_dtype = mixed.compute_dtype
    promised = mixed(keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape), inputs))
    mixed.set_weights(layer.get_weights())
    found = mixed(inputs)
    assert dtype_of(promised) == dtype_of(found) == compute_dtype
    assert {dtype_of(weight) for weight in mixed.weights} == {"float32"}
    if policy != "float32":
        error = np.abs(to_numpy(found) - outputs).max() / np.abs(outputs).max()
        assert 0 < error < TOLERANCES[policy]

    gradient_of = gradient_function(mixed)
    for name, value in (
        ("zero", np.zeros_like),
        ("constant", lambda x: np.full_like(x, 2.5)),
        ("large", lambda x: 300 * np.sign(x)),
    ):
        for gradient in gradient_of(keras.tree.map_structure(value, inputs)):
            assert np.isfinite(gradient).all(), f"{name} input, {policy}"


def check_model(model_class, arguments, policy, weights, folder):
    """Checks one model in one configuration, under one dtype policy.

    Args:
        model_class: The model's class.
        arguments: Its arguments, with a small `patch_shape`.
        policy: Name of the dtype policy.
        weights: `(trainable, non_trainable)` numbers of weights.
        folder: A folder for files.
    """
    patch_shape = arguments["patch_shape"]
    if policy == "mixed_float16" and len(patch_shape) == 3 and BACKEND == "tensorflow" and not _has_gpu():
        pytest.skip("TensorFlow has no 3D pooling in float16 on a CPU")

    def make(**changes):
        return model_class(**{**arguments, "dtype": policy, **changes})

    model = make()
    fill(model)
    inputs = {name: random_volume(2, *patch_shape, 1, seed=seed) for seed, name in enumerate(model.input)}
    outputs = _check_probabilities(model, inputs, patch_shape)
    assert (count(model.trainable_weights), count(model.non_trainable_weights)) == weights
    assert {dtype_of(weight) for weight in model.weights} == {"float32"}
    assert not any(isinstance(layer, keras.Model) for layer in model.layers)
    compute_dtypes = {layer.name: layer.compute_dtype for layer in model.layers if layer.name not in model.input}
    assert compute_dtypes.pop("probability") == "float32"
    assert set(compute_dtypes.values()) == {keras.dtype_policies.get(policy).compute_dtype}
    if policy != "float32":
        single = make(dtype="float32")
        single.set_weights(model.get_weights())
        error = np.abs(outputs - to_numpy(single(inputs))).max()
        assert 0 < error < TOLERANCES[policy]

    _check_model_files(model, arguments, inputs, outputs, folder)

    if policy == "float32":
        _check_unknown_sizes(make, model, inputs, outputs)
    if not _needs_xla(model):  # and takes long with it: there the package refuses to train in this policy
        _check_training(model, inputs)


def _check_probabilities(model, inputs, shape):
    outputs = model(inputs)
    assert dtype_of(outputs) == "float32" == dtype_of(model.output)
    outputs = to_numpy(outputs)
    batch = len(next(iter(inputs.values())))
    assert outputs.shape == (batch, *shape, 1)
    assert model.output.shape[0] is None
    assert all(promised in (None, size) for promised, size in zip(model.output.shape, outputs.shape, strict=True))
    assert outputs.min() >= 0
    assert outputs.max() <= 1
    assert np.ptp(outputs) > 0.01
    return outputs


def _check_unknown_sizes(make, model, inputs, outputs):
    rank = len(model.patch_shape)
    free = make(patch_shape=(None,) * rank)
    free.set_weights(model.get_weights())
    np.testing.assert_allclose(to_numpy(free(inputs)), outputs, rtol=1e-5, atol=1e-6)
    doubled = {name: np.concatenate([x[:1], x[1:]], axis=1) for name, x in inputs.items()}
    _check_probabilities(free, doubled, (2 * model.patch_shape[0], *model.patch_shape[1:]))


def _check_model_files(model, arguments, inputs, outputs, folder):
    config = model.get_config()
    names = [p.name for p in inspect.signature(type(model)).parameters.values() if p.kind != p.VAR_KEYWORD]
    assert set(names) <= set(config)
    assert all(getattr(model, name) == config[name] for name in arguments)
    assert {name: config[name] for name in arguments} == arguments
    text = json.dumps(keras.saving.serialize_keras_object(model))
    assert keras.saving.deserialize_keras_object(json.loads(text)).get_config() == config

    model.save(folder / "model.keras")
    again = keras.saving.load_model(folder / "model.keras")
    assert type(again) is type(model)
    assert again.get_config() == config
    np.testing.assert_array_equal(to_numpy(again(inputs)), outputs)


def _check_training(model, inputs):
    """One update leaves everything finite and moves every weight and moving average."""
    truth = (next(iter(inputs.values())) > 0).astype("uint8")
    before = model.get_weights()
    model.compile(keras.optimizers.Adam(1e-3), loss=DiceLoss())
    loss = model.fit(inputs, truth, batch_size=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    for weight, old, new in zip(model.weights, before, model.get_weights(), strict=True):
        assert np.isfinite(new).all(), weight.path
        assert (old != new).any(), weight.path
