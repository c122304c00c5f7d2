import keras
import pytest

from keras_mmfnet import _precision
from keras_mmfnet._precision import dtype_policy


@pytest.mark.parametrize(
    ("asked", "capability", "expected"),
    [
        ("auto", None, "float32"),
        ("auto", 7.5, "mixed_float16"),
        ("auto", 8.0, "mixed_bfloat16"),
        ("auto", 9.0, "mixed_bfloat16"),
        ("off", 9.0, "float32"),
        ("float16", 9.0, "mixed_float16"),
        ("float16", 6.1, "mixed_float16"),
        ("bfloat16", 7.5, "mixed_bfloat16"),
        ("off", None, "float32"),
    ],
)
def test_the_policy_for_a_card(monkeypatch, asked, capability, expected):
    monkeypatch.setattr(_precision, "_gpu_capability", lambda: capability)
    assert dtype_policy(asked) == expected


@pytest.mark.parametrize("asked", ["float16", "bfloat16"])
def test_half_precision_without_a_gpu(monkeypatch, asked):
    monkeypatch.setattr(_precision, "_gpu_capability", lambda: None)
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match=rf"`mixed_precision` must be .*Received: '{asked}'$"):
            dtype_policy(asked)
    else:
        assert dtype_policy(asked) == f"mixed_{asked}"


def test_the_capability_of_this_machine():
    capability = _precision._gpu_capability()
    assert capability is None or 3 <= capability < 20


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match=r"`mixed_precision` must be .*Received: 'double'"):
        dtype_policy("double")
