"""A reward model with an equilibrium head trains in two processes as in one: DDP, ZeRO, offloaded too, FSDP2."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import launching
from tests.helpers.launching import CHAINS, STAGES, rank_environments, run_once
from trl_ext import EPModelForSequenceClassification


pytestmark = pytest.mark.distributed
SCRIPT = str(Path(__file__).with_name("train_equilibrium.py"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return run_once(tmp_path_factory, "equilibrium_alone", SCRIPT, model, "--batch_size", "4", "--everything")


def launch(launcher, model, output, *options):
    return launching.run(launcher, SCRIPT, model, output, "--batch_size", "2", *options)


def assert_same_weights(folder, expected, file="model.safetensors"):
    found, wanted = load_file(folder / file), load_file(expected / file)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # The bias of a reward cancels in every pair: its gradient is rounding
        if not name.endswith("readout_bias"):
            torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-3, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("launcher", ["ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"])
def test_two_processes_equal_one(launcher, model, alone, tmp_path):
    single, expected = alone
    everything = ["--everything"] if launcher in ("ddp", "zero3") else []
    found = launch(launcher, model, tmp_path, *everything)
    assert found["world_size"] == 2 and found["zero_stage"] == STAGES[launcher]
    wrapped = "LlamaForCausalLM", "EPModelForSequenceClassification"
    assert found["chain"] == [name.replace(*wrapped) for name in CHAINS[launcher]]
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)
    assert found["angles"] == pytest.approx(expected["angles"], abs=0.1)
    assert found["angles"][-1] < found["angles"][0] < 60
    if launcher == "fsdp2":
        return
    assert_same_weights(tmp_path / "final", single / "final")
    loaded, info = EPModelForSequenceClassification.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not any(info.values()) and loaded.score.forward_weight_1.shape == (8, 8)
    if everything:
        assert found["resumed"] == pytest.approx(found["losses"], abs=1e-6)
        assert_same_weights(tmp_path / "resumed" / "final", tmp_path / "final")
        assert found["lora"] == pytest.approx(expected["lora"], abs=2e-4)
        assert_same_weights(tmp_path / "lora", single / "lora", "adapter_model.safetensors")
        assert found["reward_model"] == "EPModelForSequenceClassification"
        assert len(found["rewards"]) == 2 and all(abs(reward) < 10 for reward in found["rewards"])
    if launcher == "ddp":
        options = ["--batch_size", "4", "--resume", str(tmp_path / "checkpoint-2")]
        taken_up = launching.run("single", SCRIPT, model, tmp_path / "one", *options)
        assert taken_up["world_size"] == 1 and taken_up["losses"][:2] == found["losses"][:2]
        assert taken_up["losses"] == pytest.approx(expected["losses"], abs=2e-4)
        assert_same_weights(tmp_path / "one" / "final", single / "final")


@pytest.mark.parametrize(("launcher", "before", "after"), [("zero2", 2, 1), ("zero3", 1, 2)])
def test_a_checkpoint_is_taken_up_by_another_number_of_processes(launcher, before, after, model, alone, tmp_path):
    def train(processes, *options):
        options = ["--batch_size", str(4 // processes), *options]
        return launching.run(launcher, SCRIPT, model, tmp_path, *options, processes=processes)

    single, expected = alone
    train(before, "--max_steps", "2")
    found = train(after, "--resume", str(tmp_path / "checkpoint-2"))
    assert found["world_size"] == after and found["zero_stage"] == STAGES[launcher]
    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)
    assert found["angles"] == pytest.approx(expected["angles"], abs=0.1)
    assert_same_weights(tmp_path / "final", single / "final")


def test_fsdp2(model):
    script = str(Path(__file__).with_name("fully_shard_equilibrium.py"))
    assert launching.launch([script, model], rank_environments(2)).count("agrees") == 2
