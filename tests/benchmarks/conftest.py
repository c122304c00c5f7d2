from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of the benchmarks, from which their modules can be imported."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    return folder
