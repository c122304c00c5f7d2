"""The machine that results are computed on."""

import contextlib
import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def available_memory() -> float:
    """Bytes of memory that this machine has, or the container that this process runs in."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # on Windows
        memory = 8e9
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            memory = min(memory, int(Path(path).read_text()))
    return memory


def peak_memory() -> int:
    """The most bytes that the backend's first GPU has given so far, or without a GPU, that this process took.

    Returns:
        The bytes; 0 where they are not known, without a GPU on another system than Linux.
    """
    import keras

    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_logical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"]
    else:
        import jax

        if jax.devices()[0].platform == "gpu":
            return jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+)", status)
    return 1024 * int(found[1]) if found else 0


def name_process(number: int | None = None) -> str:
    """Names a process in a file that says who computes something: `"process 12 on node7 since <time>"`.

    Args:
        number: Number of a process of this machine; `None` for this one.
    """
    return f"process {number or os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def process_of(file: Path) -> str:
    """The process that a file names.

    Args:
        file: What was written of `name_process`; it need not exist.

    Returns:
        The text of the file, empty if that process has ended. A process of another machine is assumed to run.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.match(r"process (\d+) on (\S+)", text)
    if found and found[2] == platform.node():
        try:
            os.kill(int(found[1]), 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            pass
    return text


def machine(*packages: str) -> dict[str, str]:
    """Returns the processor, the system, the memory allocator and the versions of packages.

    Args:
        packages: Names of packages; those that are not installed are left out.

    Returns:
        A dict of strings.
    """
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    libc, preloaded = " ".join(platform.libc_ver()), os.environ.get("LD_PRELOAD", "")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": f"{processor}, {available_cores()} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        # The allocator affects the memory and the time of a training step.
        "allocator": Path(preloaded).name if "malloc" in preloaded else libc,
        **versions,
    }
