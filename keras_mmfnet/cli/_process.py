"""What the command line changes in its own process: the backend's chatter, its device and its memory."""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_log = logging.getLogger(__name__)
# Ends the filter. Other processes may keep its pipe open.
_END = b"\0end\n"
# Passes on what is no line of the log of TensorFlow's or XLA's C++ code.
_FILTER = r"""
import re, sys
noise = re.compile(rb"[IWE]\d{4} \d\d:\d\d:|WARNING: All log messages before absl|To enable the following instr")
for line in sys.stdin.buffer:
    last, line = line.endswith(END), line.removesuffix(END)
    if not noise.match(line):
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
    if last:
        break
""".replace("END", repr(_END))


def start_backend(device: str | None = None) -> str:
    """Imports Keras, its backend and what trains without their messages, and chooses the device to compute on.

    Args:
        device: `cpu`, `gpu` or `gpu:<number>`; `None` for a GPU if the backend finds one.

    Returns:
        What it computes on, which is also logged.

    Raises:
        ImportError: The backend is not installed.
        ValueError: There is no such device.
    """
    from keras_mmfnet._backend import configured_backend
    from keras_mmfnet._machine import available_cores

    _choose_device(device, configured_backend())
    # TensorFlow leaves oneDNN off on some processors; a step takes a third of the time with it.
    for name, value in (("TF_ENABLE_ONEDNN_OPTS", "1"), ("TF_CPP_MIN_LOG_LEVEL", "3"), ("GLOG_minloglevel", "3")):
        os.environ.setdefault(name, value)
    with silenced():
        import keras

        from keras_mmfnet.cli.memory import keep_freed_memory
        from keras_mmfnet.devices import connect

        connect()  # before the backend is used

        # The patches need TensorFlow on every backend; it must not take the GPU's memory from another one.
        with contextlib.suppress(ImportError):
            from keras_mmfnet.data.patches import hide_gpus

            if keras.backend.backend() != "tensorflow":
                hide_gpus()
        keep_freed_memory()
        gpu = _gpu_name(keras.backend.backend())
        import keras_mmfnet.run  # noqa: F401
    if gpu is None and device and device != "cpu":
        raise ValueError(f"--device: a GPU that {keras.backend.backend()} can use is expected. Received: {device}")
    unused = "; there is a GPU, which it does not use" if device != "cpu" and not gpu and _has_gpu() else ""
    computes_on = f"{keras.backend.backend()} on {gpu or f'the CPU, {available_cores()} cores{unused}'}"
    _log.info("Computing with %s", computes_on)
    return computes_on


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps what C and C++ code writes off the terminal; it is shown after all if the block fails."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            file.seek(0)
            os.write(terminal, file.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Keeps the backend's log lines off the terminal, which TensorFlow writes whatever it is told.

    Another process passes on all other lines, so that the last words of one that crashes are not lost.
    """
    try:
        direct = sys.stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):
        direct = False
    if not direct:  # there is no terminal
        yield
        return
    terminal, stream = os.dup(2), sys.stderr
    reader = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _FILTER], stdin=subprocess.PIPE, stderr=terminal, start_new_session=True
    )
    with reader, os.fdopen(os.dup(terminal), "w", buffering=1) as sys.stderr:
        os.dup2(reader.stdin.fileno(), 2)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.write(2, _END)
            os.dup2(terminal, 2)
            os.close(terminal)
            sys.stderr = stream


def _choose_device(device, backend):
    """Sets what the backends look at when they are imported."""
    if device is None:
        return
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "gpu") or (number and (kind == "cpu" or not number.isdecimal())):
        raise ValueError(f"--device: cpu, gpu or gpu:<number> is expected. Received: {device}")
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        if backend == "jax":
            os.environ["JAX_PLATFORMS"] = "cpu"
    elif number:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(int(number) + 1)]
        if int(number) >= len(names):
            raise ValueError(f"--device: a GPU of CUDA_VISIBLE_DEVICES={visible} is expected. Received: {device}")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(number)]


def _gpu_name(backend):
    """Name of the GPU that the backend uses, `None` without one."""
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "a GPU") if gpus else None
    if backend == "torch":
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    import jax

    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else None


def _has_gpu():
    """Whether the machine has a GPU of NVIDIA, whatever the backend sees."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or shutil.which("nvidia-smi") is not None
