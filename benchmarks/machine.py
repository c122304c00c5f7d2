"""What numbers were taken on, and writing them down."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path


def machine(*packages):
    """The processor, the system and the versions of packages, for a JSON file of results."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    libc, preloaded = " ".join(platform.libc_ver()), os.environ.get("LD_PRELOAD", "")
    return {
        "processor": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        # Who hands out memory decides much of what a step takes of it, and some of its time.
        "allocator": Path(preloaded).name if "malloc" in preloaded else libc,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def report(result, path):
    """Prints a result, and writes it as a JSON file."""
    # Here, since it brings in Keras, which the processes of step.py each start with a backend of their own.
    from keras_mmfnet._files import write

    text = json.dumps(result, indent=2)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text + "\n")
