"""
Sharded AdamP and SGDP make the update of one process with the authors' package, and the radial family and Muon on
`ShardedMatrices` that of one process with the equations, whatever cut the parameters.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

import trl_ext
from tests.helpers.launching import deepspeed_environment, free_port, launch, once, rank_environments


pytestmark = pytest.mark.distributed
FOLDER = Path(__file__).parent
CONFIGS = Path(trl_ext.__file__).parent / "accelerate_configs"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trl_ext.__file__).parents[1]), "DS_ACCELERATOR": "cpu"}
ZERO = {"zero1": "DeepSpeedZeroOptimizer", "zero2": "DeepSpeedZeroOptimizer", "zero3": "DeepSpeedZeroOptimizer_Stage3",
        "bf16_optimizer": "BF16_Optimizer"}  # fmt: skip
TORCH = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPToy", "hsdp": "FSDPToy",
         "tensor_parallel": "Toy", "row_parallel": "Toy"}  # fmt: skip
MODES = {
    1: ["zero2", "zero3", "fsdp2", "fsdp2_in_bf16", "fsdp1"],
    2: [
        "ddp", "zero1", "zero2", "zero3", "zero2_groups", "zero2_round_robin_groups", "zero3_small_sub_group",
        "zero2_offload", "zero3_offload", "zero2_bf16", "zero3_bf16", "bf16_optimizer", "zero2_fused", "zero2_sgdp",
        "fsdp1", "fsdp1_flat", "fsdp2_groups", "fsdp2_sgdp", "fsdp2_save", "zero2_decay", "zero3_decay",
        "tensor_parallel", "fsdp2_tensor_parallel_of_one", "row_parallel",
    ],
    3: ["zero2_universal", "zero3", "zero2_alignment_round_robin", "fsdp1", "fsdp2", "fsdp2_load"],
    4: ["hsdp", "zero3_groups", "fsdp1_groups", "fsdp2_over_tensor_parallel"],
}  # fmt: skip
# Each wrapper with one rule that measures before its moments or one that does not, each rule with each kind of wrapper
OTHERS = {
    2: [
        "zero1_adamo", "zero2_adamh", "zero3_adamo", "fsdp1_adamh", "fsdp2_adamo", "tensor_parallel_adamo",
        "row_parallel_adamh",
        "zero2_rows_adamo", "zero3_rows_adamh", "row_parallel_rows_adamo", "zero2_muon", "zero3_muon",
        "fsdp1_muon", "row_parallel_muon",
    ],
    4: ["hsdp_adamh", "fsdp2_over_tensor_parallel_adamo", "fsdp2_over_tensor_parallel_rows_adamh",
        "fsdp2_over_tensor_parallel_muon"],
}  # fmt: skip
# What is left of both, for `make kernels`
if os.environ.get("TRL_EXT_ALL_CASES") == "1":
    MODES[2] += ["zero3_groups", "zero2_alignment_round_robin", "zero3_fused", "fsdp1_groups"]
    MODES[3].insert(1, "zero1")
    OTHERS[2] += [
        "zero1_adamh", "zero2_adamo", "zero3_adamh", "fsdp1_adamo", "fsdp2_adamh", "tensor_parallel_adamh",
        "row_parallel_adamo",
    ]  # fmt: skip
    OTHERS[4] += ["hsdp_adamo", "fsdp2_over_tensor_parallel_adamh"]
if Version(version("deepspeed")) < Version("0.19.7"):  # which aligns each group's buffer, not each parameter
    for modes in MODES.values():
        modes[:] = [mode for mode in modes if "alignment" not in mode]


def run(command, output):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(output) / "found.json").read_text())


def run_all(folder):
    """Runs all modes in as many processes; what two write, three read."""
    results = []
    for world_size, modes in MODES.items():
        modes = [*modes, *OTHERS.get(world_size, [])]
        arguments = [FOLDER / "optimizer_shards.py", "--output", folder, "--modes", *modes]
        launch(arguments, rank_environments(world_size))
        result = json.loads((folder / "found.json").read_text())
        assert result["world_size"] == world_size
        results += [(world_size, mode, facts) for mode, facts in result["modes"].items()]
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return once(tmp_path_factory, "shards", run_all)


@pytest.fixture(scope="module")
def found(checkpoints):
    results = json.loads((checkpoints / "results.json").read_text())
    return {(world_size, mode): facts for world_size, mode, facts in results}


CASES = [(world_size, mode) for world_size, modes in MODES.items() for mode in modes]


@pytest.mark.parametrize(("world_size", "mode"), CASES)
def test_equals_one_process(world_size, mode, found):
    facts = found[world_size, mode]
    # AdamW is 0.04 away. bfloat16 gradients differ in their last bit with the order of sums
    assert facts["difference"] < (1e-2 if "bf16" in mode else 1e-6)
    wrapper = next(name for start, name in {**ZERO, **TORCH}.items() if mode.startswith(start))
    assert facts["chain"][0] == wrapper
    if mode.startswith(tuple(ZERO)):
        assert facts["chain"] == [wrapper, "SGDP" if mode.endswith("sgdp") else "AdamP"]


@pytest.mark.parametrize(("world_size", "mode"), CASES)
def test_one_small_all_reduce(world_size, mode, found):
    facts = found[world_size, mode]
    if mode.endswith(("universal", "save", "load")):
        return
    num_steps = 12
    calls_per_step = len(facts["calls"]) / num_steps
    if mode.startswith("ddp") or world_size == 1:
        assert not facts["calls"]
    elif mode.startswith("zero") and (mode.endswith("groups") or "sub_group" in mode):
        # DeepSpeed calls `step` once for each group, or sub-group of ZeRO-3
        assert 1 <= calls_per_step <= 4
    elif mode == "fsdp2_over_tensor_parallel":
        # Over the data mesh for the weights that it cuts alone, and over both
        assert calls_per_step == 3
    else:
        assert calls_per_step == 1
    # 5 weights: 5 numbers each, and 4 for each row that a border cuts
    assert max(facts["calls"], default=0) <= 5 * 5 + 4 * 5 * (world_size - 1)


@pytest.mark.parametrize(("world_size", "mode"), CASES)
def test_the_right_weights_are_projected(world_size, mode, found):
    if mode.endswith("load"):
        return  # torch's distributed checkpoint takes a step with zero gradients, which pass, to create the state
    report = found[world_size, mode]["report"]
    rates = sorted((weight["channel"], weight["layer"]) for weight in report.values())
    assert len(rates) == 5
    # Generic weights, hit by chance, one that is scale-invariant as a whole and two that are in each row
    assert all(channel == 0 and layer < 1 for channel, layer in rates[:-3])
    assert rates[-3:] == [(0, 1), (1, 0), (1, 0)]


@pytest.mark.parametrize(("world_size", "mode"), [(size, mode) for size, modes in OTHERS.items() for mode in modes])
def test_others_equal_one_process(world_size, mode, found):
    facts, name = found[world_size, mode], mode.rsplit("_", 1)[1]
    # What one process makes of another rule, or of AdamW, is 0.01 away and more
    assert facts["difference"] < 1e-5
    if name == "muon":
        return
    assert {(row["layer"], row["channel"]) for row in facts["report"].values()} == {
        (0.0, 1.0) if "rows" in mode else (1.0, 0.0)
    }
    assert len(facts["report"]) == 5
    # AdamO needs the radial part of the gradient before its moments
    calls = 3 if "over" in mode else 1
    assert len(facts["calls"]) / 12 == calls * (2 if name == "adamo" else 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_by_weight_decay_take_one_all_reduce(stage, found):
    """DeepSpeed steps once for each group, and that of biases and norms has nothing to project."""
    assert len(found[2, f"zero{stage}_decay"]["calls"]) == 12


@pytest.fixture(scope="module")
def trained_alone(tmp_path_factory):
    def train(folder):
        launch([FOLDER / "train_optimizer.py", "--output", folder, "--batch_size", "4"], [{}])

    folder = once(tmp_path_factory, "optimizer_alone", train)
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_accelerate_launch_and_trainer(stage, trained_alone, tmp_path):
    script = [str(FOLDER / "train_optimizer.py"), "--output", str(tmp_path), "--batch_size", "2"]
    if stage == 2:  # The real command
        launcher = [
            "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu_zero2.yaml"),
            "--main_process_port", free_port(),
        ]  # fmt: skip
        facts = run([*launcher, *script], tmp_path)
    else:
        config = f"cpu_zero{max(stage, 2)}.yaml"
        environment = deepspeed_environment(config, script[0], "--zero_stage", str(stage))
        launch(script, [{**environment, **rank} for rank in rank_environments(2)])
        facts = json.loads((tmp_path / "found.json").read_text())
    assert facts["world_size"] == 2 and facts["zero_stage"] == stage
    assert facts["chain"] == ["DeepSpeedEngine", "DeepSpeedOptimizerWrapper", ZERO[f"zero{stage}"], "AdamP"]
    assert facts["layer_share"] == {"q_proj": 1.0, "k_proj": 1.0}
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name, expected in trained_alone.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=2e-5)
