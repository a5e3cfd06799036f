from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.launching import CHAINS, run


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("launcher", ["ddp", "zero3"])
def test_search_is_the_same_on_both_processes(launcher, model, tmp_path):
    found = run(launcher, str(Path(__file__).with_name("train_search.py")), model, tmp_path)
    assert found["world_size"] == 2 and found["chain"] == CHAINS[launcher]
    first, second = found["searches"]
    assert first == second and len(first["history"]) >= 3 and first["num_gold_evaluations"] <= 6
    assert found["multipliers"][0] == found["multipliers"][1]
    assert found["multipliers"][0]["thresholds"] == first["best"]["thresholds"]
    best = Path(found["best_model_checkpoint"])
    assert best.name == f"checkpoint-{first['best']['step']}"
    applied, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "final", best))
    assert all(torch.allclose(applied[name], tensor, atol=1e-6) for name, tensor in saved.items())
