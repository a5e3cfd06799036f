import pytest

from tests.helpers.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny model."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))
