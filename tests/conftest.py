import os
import random

import numpy as np
import pytest
import torch


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("MPLBACKEND", "Agg")


def seed_everything():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """A fixture that several tests share draws the same numbers whichever of them comes first."""
    if fixturedef.scope != "function":
        seed_everything()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """A test draws the same numbers whatever ran before it."""
    seed_everything()
