import pytest

from trl_ext.optim import register, unregister


@pytest.fixture(autouse=True)
def _names_as_in_a_fresh_process():
    """Commands of ours register names for the whole process."""
    unregister()
    yield
    unregister()


@pytest.fixture
def registered():
    register()
