"""Two CPU processes train as one does, by DDP, every stage of ZeRO and `fully_shard`; what they save loads back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.launching import CHAINS, STAGES, run, run_once
from tests.helpers.sparse_po import LOG2


pytestmark = pytest.mark.distributed
SCRIPT = str(Path(__file__).with_name("train.py"))


def launch(launcher, model, output, *options, settings=None):
    arguments = ["--batch_size", "4" if launcher == "single" else "2", "--settings", json.dumps(settings or {})]
    return run(launcher, SCRIPT, model, output, *arguments, *options)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return run_once(tmp_path_factory, "sparse_po_alone", SCRIPT, model, "--batch_size", "4")[1]


def assert_same_training(found, expected, launcher):
    assert found["world_size"] == 2
    assert found["chain"] == CHAINS[launcher]
    assert found["zero_stage"] == STAGES[launcher]
    assert found["losses"][0] == expected["losses"][0] == LOG2
    for name in ("losses", "eval_losses", "mask_means"):
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(expected["weights"]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_two_processes_equal_one_and_resume(launcher, model, alone, tmp_path):
    found = launch(launcher, model, tmp_path)
    assert_same_training(found, alone, launcher)

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masks = load_file(tmp_path / "final" / "token_masks.safetensors")
    assert masks["common.layer_weight"].shape == (2, 32)
    assert (masks["common.layer_bias"] - 1).abs().max() > 1e-3  # trained, and gathered whole

    resumed = launch(launcher, model, tmp_path / "resumed", "--resume", str(tmp_path / "checkpoint-2"))
    assert resumed["losses"] == pytest.approx(found["losses"], abs=1e-6)
    again = load_file(tmp_path / "resumed" / "final" / "token_masks.safetensors")
    for name, tensor in masks.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6)
    if launcher == "ddp":
        options = ["--batch_size", "4", "--resume", str(tmp_path / "checkpoint-2")]
        taken_up = run("single", SCRIPT, model, tmp_path / "one", *options)
        assert taken_up["world_size"] == 1 and taken_up["losses"][:2] == found["losses"][:2]
        assert taken_up["losses"] == pytest.approx(alone["losses"], abs=2e-4)


@pytest.mark.parametrize("launcher", ["zero1", "zero2_offload", "fsdp2"])
def test_two_processes_equal_one(launcher, model, alone, tmp_path):
    assert_same_training(launch(launcher, model, tmp_path), alone, launcher)


@pytest.mark.parametrize(("launcher", "before", "after"), [("zero2", 2, 1), ("zero3", 1, 2)])
def test_a_checkpoint_under_zero_is_taken_up_by_another_number_of_processes(
    launcher, before, after, model, tmp_path, tmp_path_factory
):
    """With the rows that one process had: its losses, masks and adapters, with the averages of AdamP."""
    settings, lora = {"optim": "adamp"}, ("--lora", "--batch_size")
    options = [*lora, "4", "--settings", json.dumps(settings)]
    expected = run_once(tmp_path_factory, "sparse_po_adapters_alone", SCRIPT, model, *options)[1]

    def train(processes, steps, *options):
        options = [*lora, str(4 // processes), "--settings", json.dumps({**settings, "max_steps": steps}), *options]
        return run(launcher, SCRIPT, model, tmp_path, *options, processes=processes)

    train(before, 2)
    found = train(after, 4, "--resume", "true")
    states = tmp_path / "checkpoint-4" / "global_step4"
    assert len(list(states.glob("*optim_states.pt"))) == after and not (tmp_path / ".recut").exists()
    assert found["world_size"] == after and found["losses"][0] == LOG2
    for name in ("losses", "eval_losses", "mask_means"):
        assert found[name] == pytest.approx(expected[name], abs=2e-4), name
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(expected["weights"]), rtol=2e-3, atol=2e-3)


def test_lora_and_shared_prompts_under_zero3(model, tmp_path):
    """The same with a row for each answer in one process, and a row for each pair in two."""
    settings = {"independent_masks": True}
    expected = launch("single", model, tmp_path / "single", "--lora", settings=settings)
    found = launch("zero3", model, tmp_path / "zero3", "--lora", settings={**settings, "share_prompt": True})
    assert_same_training(found, expected, "zero3")


def test_adamp_under_zero2(model, tmp_path):
    """Policy and masks in groups of their own, cut by shard borders."""
    settings = {"optim": "adamp", "optim_args": "delta=0.5", "weight_decay": 0.1}
    expected = launch("single", model, tmp_path / "single", settings=settings)
    found = launch("zero2", model, tmp_path / "zero2", settings=settings)
    assert expected["chain"][-1] == "AdamP" and found["chain"] == [*CHAINS["zero2"][:-1], "AdamP"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)


def test_activation_masks_under_zero3(model, tmp_path):
    settings = {"mask_type": "activation"}
    expected = launch("single", model, tmp_path / "single", settings=settings)
    found = launch("zero3", model, tmp_path / "zero3", settings=settings)
    assert_same_training(found, expected, "zero3")


@pytest.mark.parametrize("launcher", ["ddp", "zero2"])
def test_first_step_in_mixed_precision(launcher, model, tmp_path):
    """The reference is the policy to the last bit, under every kind of mask."""
    found = run(launcher, str(Path(__file__).with_name("train_first_step.py")), model, tmp_path)
    assert found["world_size"] == 2 and found["zero_stage"] == {"ddp": None, "zero2": 2}[launcher]
    for mask_type in ("activation", "ones", "learned"):
        assert found[mask_type] == [LOG2, 0.0, 0.0, 0.0], mask_type
