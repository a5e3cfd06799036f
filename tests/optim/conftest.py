import pytest

from trl_ext.optim import register


@pytest.fixture
def registered():
    """Names of optimizers for stock trainers, until the test ends."""
    register()
