"""Under DeepSpeed a replaced optimizer is refused before the first step, and an allowed one is ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_ext
from tests.helpers.launching import free_port


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trl_ext.__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("deepspeed_cases.py")), str(folder)],
        capture_output=True, text=True, timeout=900, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["offload", "offload_mixin"])
def test_replacement_under_offload(case, found):
    """accelerate's own code replaces it, only the compiled class is a stand-in."""
    assert found[case].startswith("Training would run DeepSpeedCPUAdam instead of AdamP (DeepSpeedOptimizerWrapper ->")
    assert '"zero_force_ds_cpu_optimizer": false' in found[case]


@pytest.mark.distributed
def test_dropped_optimizers(found):
    assert found["optimizers"].startswith("Training would run AdamW instead of AdamP")
    assert "Remove `optimizers=`" in found["optimizers"] and "optimizer_factory" in found["optimizers"]


@pytest.mark.distributed
def test_optimizer_block_in_the_deepspeed_config(found):
    assert found["block"].startswith("Training would run AdamW instead of AdamP")
    assert "Remove that block" in found["block"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "wrapper"),
    [
        ("through_zero2", "DeepSpeedZeroOptimizer"),
        ("through_zero3", "DeepSpeedZeroOptimizer_Stage3"),
        ("through_mixin", "DeepSpeedZeroOptimizer"),
    ],
)
def test_config_that_lets_it_through(case, wrapper, found):
    assert found[case] == f"DeepSpeedOptimizerWrapper -> {wrapper} -> AdamP"
