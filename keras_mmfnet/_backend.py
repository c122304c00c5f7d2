"""Ends an import in one line where Keras has no backend; imported before Keras by each module that needs it."""

import importlib.util
import json
import os
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "torch", "jax")
_INSTALL = "pip install " + " or ".join(f'"keras-mmfnet[{name}]"' for name in BACKENDS)


def configured_backend() -> str:
    """Name of the backend that Keras will import: that of KERAS_BACKEND, else of Keras' own file, else TensorFlow."""
    if name := os.environ.get("KERAS_BACKEND"):
        return name
    file = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return BACKENDS[0]


def require_backend() -> None:
    """Raises an `ImportError` that names the extras, unless Keras' backend is installed."""
    if "keras" in sys.modules:
        return
    name = configured_backend()
    if name not in BACKENDS:
        raise ImportError(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}; each is installed by {_INSTALL}. Received: {name!r}"
        )
    if importlib.util.find_spec(name) is None:
        raise ImportError(
            f"Keras needs a backend, which is not installed: {_INSTALL}, and KERAS_BACKEND set to it unless it is "
            f"tensorflow. Received: {name!r}"
        )


require_backend()
