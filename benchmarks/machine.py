"""What numbers were taken on."""

import importlib.metadata
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
    return {
        "processor": f"{processor}, {len(os.sched_getaffinity(0))} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: importlib.metadata.version(name) for name in packages},
    }
