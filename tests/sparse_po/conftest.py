import pytest

from tests.helpers.tiny import save_tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))
