"""Starts a training script in one process or in two, as a test reads what it wrote."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import trl_ext


CONFIGS = Path(trl_ext.__file__).parent / "accelerate_configs"
ROOT = Path(trl_ext.__file__).parents[1]
LAUNCHERS = {
    "single": [],
    "ddp": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "zero2": ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_zero2.yaml")],
    "zero3": ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_zero3.yaml")],
}
CHAINS = {
    "ddp": ["DistributedDataParallel", "AcceleratedOptimizer", "AdamW"],
    "zero2": ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer", "AdamW"],
    "zero3": ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer_Stage3", "AdamW"],
}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(launcher, script, model, output, *options):
    command = [sys.executable, *LAUNCHERS[launcher]]
    if launcher.startswith("zero"):
        command += ["--main_process_port", free_port()]
    result = subprocess.run(
        [*command, script, "--model", model, "--output", str(output), *options],
        capture_output=True, text=True, timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((Path(output) / "found.json").read_text())


def assert_same_numbers(found, expected, tolerance, count=12):
    """Two runs of constrained PPO logged the same."""
    keys = found.keys() & expected.keys() - {"world_size", "chain", "multipliers", "states", "resumed"}
    assert len(keys) == count
    for key in keys:
        assert found[key] and found[key] == pytest.approx(expected[key], abs=tolerance, rel=tolerance), key
