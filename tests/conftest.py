import os
from pathlib import Path

import numpy as np
import pytest

from keras_mmfnet.data import Grid, PreprocessedCase, make_phantom_cohort


@pytest.fixture(scope="session")
def test_data():
    """The folder with real images."""
    folder = Path(os.environ.get("MMFNET_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}")
    return folder


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """A folder of six synthetic patients."""
    folder = tmp_path_factory.mktemp("cohort")
    make_phantom_cohort(folder, patients=6)
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
        return PreprocessedCase(name, images, mask, grid, grid, centre or tuple(n // 2 for n in shape))

    return make
