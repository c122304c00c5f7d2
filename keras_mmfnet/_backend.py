"""Raises a clear error if Keras' backend is not installed. Modules that need Keras import this one first."""

import importlib.util
import json
import os
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "torch", "jax")
_INSTALL = "pip install " + " or ".join(f'"keras-mmfnet[{name}]"' for name in BACKENDS)


def configured_backend() -> str:
    """The backend that Keras will import: KERAS_BACKEND, else the one in keras.json, else TensorFlow."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    file = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return BACKENDS[0]


def require_backend() -> None:
    """Raises an `ImportError` that names the extras if Keras' backend is not installed."""
    if "keras" in sys.modules:
        return
    name = configured_backend()
    if name not in BACKENDS:
        raise ImportError(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}, installed by {_INSTALL}. Received: {name!r}"
        )
    if importlib.util.find_spec(name) is None:
        raise ImportError(
            f"Keras needs a backend, which is not installed: {_INSTALL}, and set KERAS_BACKEND unless it is "
            f"tensorflow. Received: {name!r}"
        )


require_backend()
