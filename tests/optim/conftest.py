import pytest

from trl_ext.optim import unregister


@pytest.fixture(autouse=True)
def _names_as_in_a_fresh_process():
    """Configurations of ours register names for the whole process."""
    unregister()
    yield
    unregister()
