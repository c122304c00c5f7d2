import pytest

from keras_mmfnet.kernels import set_kernels


@pytest.fixture
def fast_kernels():
    """The fast kernels, also where the plain ones are the default."""
    set_kernels("fast")
    yield
    set_kernels(None)
