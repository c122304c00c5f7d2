"""Image files with damaged or lying headers: refused with a message of this package, or read; never worse.

A crash would take the tests along, so the files are read in a process of its own:

    python tests/data/test_fuzz.py KIND COUNT
"""

import gzip
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

KINDS = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", "frames.dcm")
COUNT = 500
# For one file of a kilobyte.
SECONDS, MEBIBYTES = 20, 100
# A stop for the machine's sake.
ADDRESS_SPACE = 8 << 30

TEXTS = (
    *("", "0", "-1", "1", "2 2", "6 5 4 2", "6 5 4000000", "99999 99999 99999", "2147483647 2 2", "-6 5 4"),
    *("nan nan nan", "1e308 1 1", "0 0 0", "1 0 0 0 0 0 0 0 0", "9" * 400, "\xff" * 9, "%n%s%x", "missing.raw"),
    *("True", "False", "gzip", "bzip2", "raw", "ascii", "hex", "LOCAL", "LIST", "LIST 2", "/dev/zero", "..", "."),
    *("slice_%03d.raw 1 100000000 1", "skip 99999999999", "MET_DOUBLE", "MET_UCHAR_ARRAY", "double", "block", "uint64"),
)
NUMBERS = (0, 1, 2, 3, 4, 8, 16, 127, 255, 256, 1024, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
REALS = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 1e12, 352.0, 1e-30)
# Sizes, pixel types, positions, the transfer syntax and the voxels.
TAGS = [(0x28, element) for element in (0x2, 0x8, 0x10, 0x11, 0x30, 0x100, 0x101, 0x102, 0x103)]
TAGS += [(0x20, 0x32), (0x20, 0x37), (0x2, 0x0), (0x2, 0x10), (0x7FE0, 0x10)]


def write_whole(folder, kind):
    """Writes undamaged files of a kind, and returns their paths."""
    if kind == ".dcm":
        from dicom_files import GRID, write_series

        write_series(folder, grid=GRID.crop((0, 0, 0), (3, 6, 5)), uid="1.2.3")
        return sorted(folder.iterdir())
    array = np.random.default_rng(0).integers(0, 1000, (4, 5, 6)).astype(np.int16)
    if kind == "frames.dcm":
        from dicom_files import write_enhanced

        frames = [{"position": (0, 0, 4 * n), "slope": 1.0 + n, "echo": 5.0} for n in range(4)]
        write_enhanced(folder / kind, frames, array, SOPInstanceUID="1.2.3", SeriesInstanceUID="1.2.4")
        return [folder / kind]
    sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"image{kind}"))
    return [folder / f"image{kind}"]


def change_lines(header, rng):
    """A header of lines `name = value` or `name: value` with another value, or with a line less or twice."""
    lines = header.split(b"\n")
    index = int(rng.integers(len(lines)))
    action = rng.integers(6)
    if action == 0:
        del lines[index]
    elif action == 1:
        lines.insert(int(rng.integers(len(lines))), lines[index])
    else:
        name = re.match(rb"([^:=]*[:=]+ ?)?", lines[index])[0]
        lines[index] = name + str(rng.choice(TEXTS)).encode("latin1")
    return b"\n".join(lines)


def change_bytes(content, rng, low, high):
    """Another number of 1, 2, 4 or 8 bytes somewhere from byte `low` to `high`."""
    kind = str(rng.choice(["<B", "<H", "<I", "<f", "<d", "<Q"]))
    value = (
        float(rng.choice(REALS)) if kind in ("<f", "<d") else int(rng.choice(NUMBERS)) % 256 ** struct.calcsize(kind)
    )
    number = struct.pack(kind, value)
    place = int(rng.integers(low, max(low + 1, min(high, len(content)) - len(number))))
    place -= place % min(len(number), 2)
    return content[:place] + number + content[place + len(number) :]


def change(path, kind, rng):
    """Damages one file: cut short, or with one to three changes in its header, or anywhere."""
    content = path.read_bytes()
    # The stream inside a compressed file more often than the file.
    packed = kind == ".nii.gz" and rng.random() < 0.8
    content = gzip.decompress(content) if packed else content
    action = rng.integers(8)
    if action == 0:
        content = content[: int(rng.integers(len(content)))]
    elif action > 1 and kind in (".mha", ".mhd", ".nrrd", ".nhdr"):
        end = {".mha": b"LOCAL\n", ".nrrd": b"\n\n"}.get(kind, rb"\Z")
        header, voxels = re.fullmatch(rb"(.*?" + end + rb")(.*)", content, re.DOTALL).groups()
        if kind == ".mha" and rng.random() < 0.3:
            header, voxels = header.replace(b"CompressedData = False", b"CompressedData = True"), zlib.compress(voxels)
        for _ in range(rng.integers(1, 4)):
            header = change_lines(header, rng)
        content = header + voxels
    else:
        for _ in range(rng.integers(1, 4)):
            low, high = (0, len(content)) if action == 1 or kind == "frames.dcm" else (0, 352)
            if action > 3 and kind == ".dcm":
                tag = struct.pack("<HH", *TAGS[rng.integers(len(TAGS))])
                low = max(content.find(tag), 0) + 4
                high = low + 12
            content = change_bytes(content, rng, low, high)
    path.write_bytes(gzip.compress(content, 1) if packed else content)


def is_read(folder, paths, kind):
    """Whether the package surveys and reads the files or refuses them in its own words; all else is raised."""
    from keras_mmfnet.data.case import Case, CaseError
    from keras_mmfnet.data.dicom import find_objects
    from keras_mmfnet.data.image_io import read_image
    from keras_mmfnet.data.survey import survey_case
    from keras_mmfnet.recipe import DataRecipe

    try:
        for source in find_objects(folder, "ann")[0] if kind.endswith(".dcm") else paths:
            for problem in survey_case(Case("ann", {"t1": source}), DataRecipe(modalities=("t1",))).problems:
                raise CaseError(problem)
            read_image(source, "ann", sitk.sitkFloat32)
    except CaseError as error:
        if not re.fullmatch(r"ann: .*Received: .+", str(error), re.DOTALL):
            raise RuntimeError("an error that does not say what is wrong with which file") from error
        return False
    return True


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(kind, count):
    """Reads files damaged by each of some seeds; prints the seed before, so that the last one printed is at fault."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as top:
        whole, changed = Path(top, "whole"), Path(top, "changed")
        whole.mkdir()
        names = [path.name for path in write_whole(whole, kind)]
        if not is_read(whole, [whole / name for name in names], kind):
            raise RuntimeError("the undamaged files are refused")
        number_read, memory = 0, peak()
        for seed in range(count):
            print(kind, seed, flush=True)
            rng = np.random.default_rng([seed, KINDS.index(kind)])
            shutil.copytree(whole, changed)
            change(changed / str(rng.choice(names)), kind, rng)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)  # ends the process
            number_read += is_read(changed, [changed / name for name in names], kind)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if peak() > memory + MEBIBYTES:
                raise MemoryError(f"{peak() - memory} MiB")
            shutil.rmtree(changed)
    print(f"read {number_read}")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_and_lying_files_are_refused_or_read(kind):
    done = subprocess.run(
        [sys.executable, __file__, kind, str(COUNT)],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "KERAS_BACKEND": "numpy"},  # is there soonest
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-100:]}\n{done.stderr[-2000:]}"
    # The changes are small enough for some files to stay readable, and large enough for many not to.
    assert COUNT / 20 < int(done.stdout.split()[-1]) < COUNT * 0.9


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(sys.argv[1], int(sys.argv[2]))
