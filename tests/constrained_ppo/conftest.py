import pytest

from tests.helpers.tiny import save_tiny_model


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """Folder of a tiny policy."""
    return save_tiny_model(tmp_path_factory.mktemp("policy"))
