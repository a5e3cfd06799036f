"""Starts a training script in one process or in several, as a test reads what it wrote."""

import functools
import json
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from filelock import FileLock

import trl_ext
from tests.helpers.fork_server import ForkServer


CONFIGS = Path(trl_ext.__file__).parent / "accelerate_configs"
ROOT = Path(trl_ext.__file__).parents[1]
CHAINS = {
    "ddp": ["DistributedDataParallel", "AcceleratedOptimizer", "AdamW"],
    "zero1": ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer", "AdamW"],
    "zero2": ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer", "AdamW"],
    "zero3": ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer_Stage3", "AdamW"],
    "zero2_offload": [
        "DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer", "DeepSpeedCPUAdam",
    ],
    "zero3_offload": [
        "DeepSpeedEngine", "DeepSpeedOptimizerWrapper", "DeepSpeedZeroOptimizer_Stage3", "DeepSpeedCPUAdam",
    ],
    # Sharded by torch's `fully_shard`: accelerate turns FSDP2 on for GPUs only
    "fsdp2": ["FSDPLlamaForCausalLM", "AcceleratedOptimizer", "AdamW"],
}  # fmt: skip
STAGES = {"ddp": None, "fsdp2": None, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@functools.cache
def fork_server() -> ForkServer:
    """The one of this process, started when it is first needed."""
    return ForkServer()


def rank_environments(world_size: int) -> list[dict[str, str]]:
    """What a launcher tells each process of a node."""
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def deepspeed_environment(config: str, script: str, *options: str) -> dict[str, str]:
    """What `accelerate launch` adds to the environment for a DeepSpeed configuration."""
    arguments = ["--config_file", str(CONFIGS / config), *options, script]
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    parsed.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    environment = prepare_deepspeed_cmd_env(parsed)[1]
    return {name: value for name, value in environment.items() if os.environ.get(name) != value}


def launch(argv: list[str], environments: list[dict[str, str]]) -> str:
    """Runs a script in forked processes; returns what they wrote to the standard output."""
    with tempfile.TemporaryDirectory() as folder:
        status, printed, errors = fork_server().run([str(part) for part in argv], environments, folder)
    assert status == 0, f"exit status {status}; {errors[-4000:]}"
    return printed


def run(launcher, script, model, output, *options, processes=2):
    """Runs a training script alone, or in two processes; returns what it found."""
    environments = [{}] if launcher == "single" else rank_environments(processes)
    if launcher.startswith("zero"):
        stage = STAGES[launcher]
        settings = ["--zero_stage", str(stage)]
        if launcher.endswith("offload"):
            settings += ["--offload_optimizer_device", "cpu"]
        # There is no configuration of stage 1
        deepspeed = deepspeed_environment(f"cpu_zero{max(stage, 2)}.yaml", script, *settings)
        environments = [{**deepspeed, **environment} for environment in environments]
    if launcher == "fsdp2":
        options = (*options, "--fully_shard")
    launch([script, "--model", model, "--output", output, *options], environments)
    return json.loads((Path(output) / "found.json").read_text())


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled, by whichever process of the test run needed it first."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_TESTRUNUID" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder


def run_once(tmp_path_factory: pytest.TempPathFactory, name: str, script: str, model: str, *options: str):
    """Folder and findings of a training script that runs alone, [`once`]."""
    folder = once(tmp_path_factory, name, lambda folder: run("single", script, model, folder, *options))
    return folder, json.loads((folder / "found.json").read_text())


def assert_same_numbers(found, expected, tolerance, count=12):
    """Two runs of constrained PPO logged the same."""
    keys = found.keys() & expected.keys() - {"world_size", "chain", "multipliers", "states", "resumed"}
    assert len(keys) == count
    for key in keys:
        assert found[key] and found[key] == pytest.approx(expected[key], abs=tolerance, rel=tolerance), key
