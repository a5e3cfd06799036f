"""Under ZeRO-3 no model can be copied; reference and critic have the policy's weights all the same."""

from pathlib import Path

import pytest

from tests.helpers.launching import run


pytestmark = pytest.mark.distributed
SCRIPT = str(Path(__file__).with_name("train_reference.py"))


def test_reference_of_a_model_changed_in_memory_that_is_in_pieces(model, tmp_path):
    found = run("zero3", SCRIPT, model, tmp_path)
    assert found["zero_stage"] == 3 and found["world_size"] == 2 and found["is_cut"]
    assert abs(found["divergence"]) < 1e-4 and found["difference"] == 0.0
