import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data():
    """The folder with real images."""
    folder = Path(os.environ.get("MMFNET_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}")
    return folder
