"""Every public function and class has a docstring and typed arguments."""

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import keras
import pytest

import keras_mmfnet

# What subclasses of Keras' classes override; Keras types and describes them.
OVERRIDDEN = {
    "build",
    "call",
    "compute_output_shape",
    "compute_output_spec",
    "convolution_op",
    "from_config",
    "get_config",
}
KERAS = (keras.layers.Layer, keras.losses.Loss, keras.metrics.Metric)
MODULES = [
    module.name
    for module in pkgutil.walk_packages(keras_mmfnet.__path__, "keras_mmfnet.")
    # Not interfaces: the command line, and the implementations of what `kernels` declares.
    if "._" not in module.name and not module.name.startswith(("keras_mmfnet.cli", "keras_mmfnet.kernels."))
]


def functions(cls):
    """The public methods and properties that a class defines, as functions by name."""
    for name, value in vars(cls).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.cached_property):
            value = value.func
        generated = name == "__init__" and getattr(value, "__qualname__", "").startswith("__create_fn__")
        overridden = issubclass(cls, KERAS) and name in OVERRIDDEN
        if inspect.isfunction(value) and (name[0] != "_" or name == "__init__") and not (overridden or generated):
            yield name, value


def public(module):
    """The functions and classes that a module defines, and the methods of these classes, by name."""
    for name, value in vars(module).items():
        if name[0] == "_" or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            yield name, value
            for method, function in functions(value):
                yield f"{name}.{method}", function
        elif inspect.isfunction(value):
            yield name, value


def untyped(name, value):
    """The arguments of a function, and its result, that have no type."""
    if inspect.isclass(value):
        return []
    # Keyword arguments that go on to Keras have Keras' types.
    arguments = [p for p in inspect.signature(value).parameters.values() if p.kind is not p.VAR_KEYWORD]
    missing = [p.name for p in arguments if p.annotation is p.empty and p.name not in ("self", "cls")]
    without_result = "__init__" not in name and inspect.signature(value).return_annotation is inspect.Signature.empty
    return [*missing, *(["return"] if without_result else [])]


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_typed_and_described(module):
    found = dict(public(importlib.import_module(module)))
    types = {name: untyped(name, value) for name, value in found.items()}
    assert {name: missing for name, missing in types.items() if missing} == {}
    assert [name for name, value in found.items() if not name.endswith("__init__") and not value.__doc__] == []


def test_the_modules_are_found_and_what_is_missing_is_noticed():
    assert len(MODULES) > 30
    assert (Path(keras_mmfnet.__file__).parent / "py.typed").is_file()

    def half_typed(one: int, other) -> None:
        pass

    assert untyped("half_typed", half_typed) == ["other"]
    assert untyped("public", public) == ["module", "return"]
