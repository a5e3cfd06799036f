"""Constrained PPO, with a critic and without, on two CPU processes trains as on one, and resumes within a rollout."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.launching import CHAINS, assert_same_numbers, run, run_once


pytestmark = pytest.mark.distributed
SCRIPT = str(Path(__file__).with_name("train_ppo.py"))
GRPO_SCRIPT = str(Path(__file__).with_name("train_grpo.py"))
CRITICS = {"ddp": "shared", "zero2": "shared", "zero3": "separate"}


def launch(launcher, model, output, critic, *options):
    batch_size = "8" if launcher == "single" else "4"
    return run(launcher, SCRIPT, model, output, "--batch_size", batch_size, "--critic", critic, *options)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    def of(critic):
        options = ["--batch_size", "8", "--critic", critic]
        return run_once(tmp_path_factory, f"ppo_alone_{critic}", SCRIPT, model, *options)

    return of


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_two_processes_equal_one_and_resume(launcher, model, alone, tmp_path):
    critic = CRITICS[launcher]
    folder, expected = alone(critic)
    found = launch(launcher, model, tmp_path, critic)
    assert found["world_size"] == 2 and found["chain"] == CHAINS[launcher]
    assert_same_numbers(found, expected, 1e-3)
    assert found["multipliers"][0] == found["multipliers"][1] and found["states"][0] == found["states"][1]
    # Of the two rollouts, the first begins in the critic's warm-up
    assert found["multipliers"][0]["num_updates"] == 1

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    saved, reference = (load_file(path / "final" / "critic.safetensors") for path in (tmp_path, folder))
    assert saved.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-2, atol=2e-3, msg=name)

    # Checkpoint 3 lies between the two updates on the second rollout
    assert (tmp_path / "checkpoint-3" / "rollout_1.pt").is_file()
    resumed = launch(launcher, model, tmp_path / "resumed", critic, "--resume", str(tmp_path / "checkpoint-3"))
    assert_same_numbers(resumed, found, 1e-6)
    assert resumed["multipliers"] == found["multipliers"] and resumed["states"] == found["states"]
    if launcher == "ddp":
        return
    # One process takes up what two have ended with, and writes the same
    options = ["--batch_size", "4", "--critic", critic, "--resume", str(tmp_path / "checkpoint-4")]
    taken_up = run(launcher, SCRIPT, model, tmp_path / "one", *options, processes=1)
    assert taken_up["world_size"] == 1 and taken_up["multipliers"] == found["multipliers"][:1]
    for path in (tmp_path / "final").glob("*.safetensors"):
        saved = load_file(tmp_path / "one" / "final" / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(saved[name], tensor), (path.name, name)


@pytest.mark.parametrize(
    ("launcher", "critic"),
    [
        ("ddp", "separate"), ("zero1", "separate"), ("zero2", "separate"), ("zero3", "shared"),
        ("zero2_offload", "shared"), ("fsdp2", "shared"),
    ],
)  # fmt: skip
def test_two_processes_equal_one(launcher, critic, model, alone, tmp_path):
    found = launch(launcher, model, tmp_path, critic)
    assert found["world_size"] == 2 and found["chain"] == CHAINS[launcher]
    assert_same_numbers(found, alone(critic)[1], 1e-3)


@pytest.fixture(scope="module")
def grpo_alone(model, tmp_path_factory):
    return run_once(tmp_path_factory, "grpo_alone", GRPO_SCRIPT, model, "--batch_size", "8")[1]


@pytest.mark.parametrize("launcher", ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "fsdp2"])
def test_without_a_critic_two_processes_equal_one(launcher, model, grpo_alone, tmp_path):
    """The completions of a prompt lie on both processes. One process takes up what two have ended with."""
    found = run(launcher, GRPO_SCRIPT, model, tmp_path, "--batch_size", "4")
    assert found["world_size"] == 2 and found["chain"] == CHAINS[launcher]
    assert_same_numbers(found, grpo_alone, 1e-3, count=11)
    assert all(abs(loss) > 1e-3 for loss in found["loss"]) and len(set(found["kl/coef"])) == 2
    assert found["multipliers"][0] == found["multipliers"][1] and found["states"][0] == found["states"][1]
    if launcher == "fsdp2":
        return
    assert (tmp_path / "checkpoint-3" / "rollout_1.pt").is_file()
    if launcher not in ("ddp", "zero2"):
        return

    def taken_up_from(checkpoint):
        options = ["--batch_size", "8", "--resume", str(tmp_path / checkpoint)]
        alone = launcher.replace("ddp", "single")
        taken_up = run(alone, GRPO_SCRIPT, model, tmp_path / "one", *options, processes=1)
        assert taken_up["world_size"] == 1
        return taken_up

    if launcher == "ddp":  # Within a rollout, in place of which it makes one of its own
        taken_up = taken_up_from("checkpoint-3")
        assert len(taken_up["loss"]) == 4 and taken_up["loss"][:3] == found["loss"][:3] != [0.0] * 3
        return
    assert taken_up_from("checkpoint-4")["multipliers"] == found["multipliers"][:1]
    saved = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "final" / "model.safetensors").items():
        assert torch.equal(saved[name], tensor), name
