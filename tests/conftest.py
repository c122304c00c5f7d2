import contextlib
import os
import resource
from pathlib import Path

# As the examples do: TensorFlow leaves it off on some processors.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# Each of several pytest processes has a core: PyTorch's threads would wait for one another most of the time.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# The small networks of the tests are compiled often and run once: JAX spends most of its time on making them fast.
if os.environ.get("KERAS_BACKEND") == "jax":
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Many tests train the same network: it is compiled once for all of them.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import keras
import numpy as np
import pytest
import SimpleITK as sitk

from keras_mmfnet import kernels
from keras_mmfnet.data import Grid, PreprocessedCase
from keras_mmfnet.synthetic import make_synthetic_cohort

# Tests that do not depend on the backend run with one: files, masks and metrics with TensorFlow; the others, and those
# marked `once`, with PyTorch, which starts fastest.
_HERE = Path(__file__).parent
_ONCE = {
    "tensorflow": [
        "data",
        "export",
        "test_evaluation.py",
        "test_mask_folders.py",
        "test_postprocess.py",
    ],
    "torch": [
        "benchmarks",
        "cli",
        "node",
        "review",
        "test_bundle.py",
        "test_jobs.py",
        "test_parallel.py",
        "test_plots.py",
        "test_report.py",
        "test_run.py",
        "test_status.py",
        "test_synthetic.py",
    ],
}
_ON_EVERY_BACKEND = {
    "test_augment.py",
    "test_explain_command.py",
    "test_export_command.py",
    "test_memory.py",
    "test_patches.py",
    "test_process.py",
    "test_reference_torch.py",
}


def pytest_collection_modifyitems(items):
    """Skips tests that do not depend on the backend, with all backends but one; two workers begin with slow ones."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    fast = [item for item in items if not item.get_closest_marker("slow")]
    # `--dist worksteal` gives each worker a half of the list.
    rest = len(items) // 2 - len(slow[::2])
    items[:] = [*slow[::2], *fast[:rest], *slow[1::2], *fast[rest:]]
    only = {_HERE / name: backend for backend, names in _ONCE.items() for name in names}
    for item in items:
        once = "torch" if item.get_closest_marker("once") else None
        backend = only.get(item.path, only.get(item.path.parent, once))
        if backend not in (None, keras.backend.backend()) and item.path.name not in _ON_EVERY_BACKEND:
            item.add_marker(pytest.mark.skip(reason=f"once is enough, with {backend}"))


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """Draws the same initial weights each time, so that a test passes always or never."""
    keras.utils.set_random_seed(0)


@pytest.fixture(params=kernels.KERNELS)
def each_kind(request):
    """Each implementation of the kernels in turn."""
    if request.param == "fast" and keras.backend.backend() == "jax":
        pytest.skip("no faster kernels than the plain ones")
    kernels.set_kernels(request.param)
    yield request.param
    kernels.set_kernels(None)


@pytest.fixture(scope="session")
def test_data():
    """The folder with real images."""
    folder = Path(os.environ.get("MMFNET_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}")
    return folder


@pytest.fixture
def full_disk():
    """A context in which no file grows beyond a number of bytes, as on a disk that is full."""

    @contextlib.contextmanager
    def full(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A folder of six synthetic patients."""
    folder = tmp_path_factory.mktemp("cohort")
    make_synthetic_cohort(folder, patients=6)
    return folder


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory):
    """A folder of six patients in files of a few kilobytes, t2 on a grid of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    for number in range(6):
        rng = np.random.default_rng(number)
        patient = folder / f"patient_{number:02d}"
        patient.mkdir()
        for name, spacing in (("t1", 3.0), ("t2", 2.5), ("cet1", 3.0), ("mask", 3.0)):
            count = round(96 / spacing)
            grid = Grid(
                (count, count, 20), (spacing, spacing, 4.0), (-48.0, -48.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)
            )
            x, y, z = np.moveaxis(grid.positions(np.stack(np.indices(grid.shape)[::-1], axis=-1)), -1, 0)
            body = (x / 40) ** 2 + (y / 45) ** 2 < 1
            tumour = (x - number) ** 2 + (y + number) ** 2 + (z - 36) ** 2 < 14**2
            tissue = 300 * body * (1 + 0.5 * tumour) + rng.normal(20, 5, grid.shape)
            array = tumour.astype(np.uint8) if name == "mask" else tissue.astype(np.int16)
            sitk.WriteImage(grid.image(array), str(patient / f"{name}.nii.gz"))
    return folder


@pytest.fixture(scope="session")
def make_case():
    """Makes a preprocessed patient whose tumour is bright in t1 and dark in t2, without any file."""

    def make(name="anna", shape=(20, 24, 24), centre=None, seed=0):
        rng = np.random.default_rng(seed)
        mask = np.zeros(shape, np.uint8)
        low = rng.integers(np.array(shape) // 4, np.array(shape) // 2)
        mask[tuple(slice(a, a + n // 4) for a, n in zip(low, shape, strict=True))] = 1
        images = {
            modality: (sign * mask.astype(float) + rng.normal(0, 0.3, shape)).astype(np.float32)
            for modality, sign in (("t1", 1), ("t2", -1))
        }
        grid = Grid(tuple(shape[::-1]), (1.0, 1.0, 4.0), (0.0, 0.0, 0.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
        return PreprocessedCase(name, images, {"tumour": mask}, grid, grid, centre or tuple(n // 2 for n in shape))

    return make
