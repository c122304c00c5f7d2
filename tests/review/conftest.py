import pytest
from review_patients import make_patient


@pytest.fixture
def patient(tmp_path):
    return make_patient(tmp_path)


@pytest.fixture
def regions(tmp_path):
    """Regions that overlap."""
    return make_patient(tmp_path, {"wt": (1, 2, 4), "tc": (1, 4), "et": (4,)})
