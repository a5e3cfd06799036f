"""The equilibrium critic, shared and separate, trains in two processes as in one, and resumes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.launching import CHAINS, assert_same_numbers, run, run_once


pytestmark = pytest.mark.distributed
SCRIPT = str(Path(__file__).with_name("train_equilibrium_critic.py"))


def critic_of(folder):
    return load_file(folder / "final" / "critic.safetensors")


def assert_same_critic(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerances, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    return run_once(tmp_path_factory, "equilibrium_critic_alone", SCRIPT, model, "--batch_size", "8")


@pytest.mark.parametrize("launcher", ["ddp", "zero2", "zero3"])
def test_two_processes_equal_one_and_resume(launcher, model, alone, tmp_path):
    single, expected = alone
    found = run(launcher, SCRIPT, model, tmp_path, "--batch_size", "4", "--resume")
    for critic, count in (("shared", 14), ("separate", 12)):
        whole, resumed = found[critic], found[critic]["resumed"]
        assert whole["world_size"] == 2 and whole["chain"] == CHAINS[launcher]
        assert_same_numbers(whole, expected[critic], 1e-3, count)
        trained = critic_of(tmp_path / critic)
        assert_same_critic(trained, critic_of(single / critic), rtol=1e-2, atol=2e-3)
        earlier = load_file(tmp_path / critic / "checkpoint-3" / "critic.safetensors")
        for name, tensor in trained.items():
            if name.endswith(("weight", "weight_1", "bias", "bias_2")):
                assert (tensor - earlier[name]).abs().max() > 1e-3, name  # whole, and trained by the fourth update

        assert (tmp_path / critic / "checkpoint-3" / "rollout_1.pt").is_file()
        assert_same_numbers(resumed, whole, 1e-6, count)
        # Once a rollout, on weights that are gathered
        angles = whole.get("ep/weight_angle", [60.0, 0.0])
        assert len(angles) == 2 and angles[0] == pytest.approx(60.0, abs=0.1) and angles[1] < 55
        assert resumed["multipliers"] == whole["multipliers"] and resumed["states"] == whole["states"]
        assert_same_critic(critic_of(tmp_path / critic / "resumed"), trained, rtol=1e-5, atol=1e-6)
