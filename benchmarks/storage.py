"""Compares formats for the voxels of preprocessed patients: patches per second, megabytes read and on disk.

    pip install blosc2 zarr
    python benchmarks/storage.py DATA/lgg_patients BRATS

The package keeps float32 arrays in `.npy` files, which are memory-mapped. Here random boxes are read from them, from
the same in float16, and from float16 in compressed chunks by Blosc2 and Zarr. All files are in the system's memory, as
on a fast disk; the megabytes that a patch reads say what a slow one would take. The formats take turns.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine, report
from pipeline import parser_of, relative

from keras_mmfnet.data import find_cases, preprocess_case
from keras_mmfnet.recipe import DataRecipe

RESULTS = Path(__file__).parent / "results" / "storage.json"
PATCH, CHUNK = (16, 96, 96), (8, 32, 32)


class Npy:
    """Memory-mapped arrays, read page by page of 4 KB."""

    def __init__(self, dtype):
        self.dtype = dtype

    def write(self, array, path):
        np.save(path.with_suffix(".npy"), array.astype(self.dtype))

    def open(self, path):
        return np.load(path.with_suffix(".npy"), mmap_mode="r")

    def read_mb(self, array, box):
        rows = [range(*slice_.indices(n)) for slice_, n in zip(box, array.shape, strict=True)]
        index = np.add.outer(np.multiply(rows[0], array.shape[1]), rows[1]).ravel() * array.shape[2]
        first, last = (array.itemsize * (index + column) // 4096 for column in (rows[2][0], rows[2][-1]))
        return 4096 * len(np.unique([first, last])) / 1e6


class Chunks:
    """Compressed chunks, each read whole."""

    def read_mb(self, array, box):
        chunks = np.prod(
            [
                (slice_.stop - 1) // size - slice_.start // size + 1
                for slice_, size in zip(box, array.chunks, strict=True)
            ]
        )
        return chunks * np.prod(array.chunks) / np.prod(array.shape) * self.stored(array) / 1e6


class Blosc2(Chunks):
    def write(self, array, path):
        import blosc2

        parameters = {"codec": blosc2.Codec.ZSTD, "clevel": 5, "nthreads": 1}
        chunks = tuple(map(min, CHUNK, array.shape))
        blosc2.asarray(
            array.astype(np.float16), chunks=chunks, blocks=chunks, urlpath=str(path.with_suffix(".b2nd")),
            mode="w", cparams=parameters,
        )  # fmt: skip

    def open(self, path):
        import blosc2

        return blosc2.open(str(path.with_suffix(".b2nd")), mode="r", mmap_mode="r", dparams={"nthreads": 1})

    def stored(self, array):
        return array.schunk.cbytes


class Zarr(Chunks):
    def write(self, array, path):
        import zarr

        chunks = tuple(map(min, CHUNK, array.shape))
        store = zarr.create_array(path.with_suffix(".zarr"), shape=array.shape, chunks=chunks, dtype=np.float16)
        store[:] = array

    def open(self, path):
        import zarr

        return zarr.open_array(path.with_suffix(".zarr"), mode="r")

    def stored(self, array):
        return array.nbytes_stored()


FORMATS = {"npy float32": Npy(np.float32), "npy float16": Npy(np.float16), "blosc2": Blosc2(), "zarr": Zarr()}


def preprocessed(folder):
    """The images of the patients of a folder, as they are in the cache."""
    recipe = DataRecipe(modalities=("t1", "cet1"), spacing=None)
    return [
        list(preprocess_case(case, recipe).images.values()) for case in find_cases(folder, recipe, require_mask=False)
    ]


def boxes(shapes, seed):
    """Random patients and boxes in them, without end."""
    rng = np.random.default_rng(seed)
    while True:
        patient = rng.integers(len(shapes))
        sizes = np.minimum(PATCH, shapes[patient])
        start = rng.integers(np.subtract(shapes[patient], sizes) + 1)
        yield patient, tuple(slice(int(a), int(a + n)) for a, n in zip(start, sizes, strict=True))


def measure(patients, turns, seconds):
    """The numbers of each format."""
    shapes = [images[0].shape for images in patients]
    with tempfile.TemporaryDirectory() as folder:
        files, found = {}, {}
        for name, one in FORMATS.items():
            own = Path(folder) / name.replace(" ", "_")
            own.mkdir()
            start = time.process_time()
            for number, images in enumerate(patients):
                for channel, image in enumerate(images):
                    one.write(image, own / f"{number}_{channel}")
            files[name] = [[own / f"{n}_{c}" for c in range(len(images))] for n, images in enumerate(patients)]
            size = sum(path.stat().st_size for path in own.rglob("*") if path.is_file())
            found[name] = {"write_s": time.process_time() - start, "disk_mb": size / 1e6, "rates": []}
        for turn in range(turns + 1):
            for name, one in FORMATS.items():
                start, patches = time.process_time(), 0
                for patient, box in boxes(shapes, turn):
                    if time.process_time() - start > seconds:
                        break
                    for path in files[name][patient]:
                        array = one.open(path)  # as the cache does: a cohort has more files than may be open
                        np.asarray(array[box], np.float16)
                    patches += 1
                found[name]["rates"].append(patches / (time.process_time() - start))
        # What is read: not timed.
        for name, one in FORMATS.items():
            megabytes = []
            for (patient, box), _ in zip(boxes(shapes, 0), range(100), strict=False):
                megabytes.append(sum(one.read_mb(one.open(path), box) for path in files[name][patient]))
            found[name]["mb_read_per_patch"] = statistics.mean(megabytes)
    rates = {name: numbers["rates"][1:] for name, numbers in found.items()}
    return {
        name: {
            "patches_per_second_of_a_core": round(statistics.median(rates[name]), 1),
            "relative": relative(rates, name, "npy float32"),
            **{key: round(numbers[key], 2) for key in ("mb_read_per_patch", "disk_mb", "write_s")},
        }
        for name, numbers in found.items()
    }


def main():
    parser = parser_of(__doc__, RESULTS, turns=7, seconds=2)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DATA", help="folders of patients")
    parsed = parser.parse_args()
    result = {"machine": machine("numpy", "blosc2", "zarr")}
    for folder in parsed.folders:
        patients = preprocessed(folder)
        result[folder.name] = {
            "patients": len(patients),
            "voxels": int(np.mean([images[0].size for images in patients])),
            "formats": measure(patients, parsed.turns, parsed.seconds),
        }
    report(result, parsed.out)


if __name__ == "__main__":
    main()
