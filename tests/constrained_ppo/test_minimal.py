"""The minimal script's equations are the trainer's, on one batch that the policy has moved away from."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

import trl_ext
from tests.helpers.constrained_ppo import XI, make, rollout


SCRIPT = Path(trl_ext.__file__).parents[1] / "recipes" / "experiments" / "minimal" / "constrained_ppo.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal_constrained_ppo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perturb(module, seed, size):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def plain_copy(policy):
    """The policy without its value heads, and those as a linear layer."""
    policy = copy.deepcopy(policy.to("cpu"))
    heads = torch.nn.Linear(policy.value_heads.weight.size(1), policy.value_heads.weight.size(0))
    heads.load_state_dict(policy.value_heads.state_dict())
    del policy.value_heads
    policy.forward = type(policy).forward.__get__(policy)
    return policy, heads


def test_script_is_short_and_has_no_trainer():
    source = SCRIPT.read_text()
    assert source.count("\n") < 150
    assert "import trl" not in source and "from trl" not in source and "Trainer(" not in source


def test_rollout_loss_gradients_and_multipliers_equal_the_trainer(minimal, tmp_path, path):
    # Two iterations: the trainer then keeps the log-probabilities at generation, which the ratio is taken from
    trainer = make(tmp_path, path, num_iterations=2, multiplier_init=0.2, **{**XI, "method": "xi-paper"})
    perturb(trainer.model, 0, 0.05)
    with torch.no_grad():
        trainer.model.lm_head.weight[1] *= 4  # ends early about as often as not
    policy, heads = plain_copy(trainer.model)
    reference = copy.deepcopy(trainer.ref_model)
    batch = rollout(trainer)

    mask = batch["completion_mask"]
    own = {
        "ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention": torch.cat([batch["prompt_mask"], mask], dim=1),
        "mask": mask.float(),
        "rewards": trainer.rollout.rewards,
    }
    assert (mask == 0).sum() > 0 and (batch["prompt_mask"] == 0).any()  # responses and prompts differ in length
    settings = minimal.Settings(torch.tensor([0.7, 0.5]))
    dual = minimal.Dual(torch.full((2,), 0.2))
    fixed = minimal.estimate(policy, reference, heads, own, dual, settings)
    keep = mask.unsqueeze(-1)
    torch.testing.assert_close(fixed["values"] * keep, batch["old_state_values"] * keep, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed["returns"], batch["state_returns"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed["advantages"], batch["advantages"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dual.multipliers.double(), trainer.multipliers.values(), rtol=1e-6, atol=1e-6)

    # Far enough that ratios and values are clipped
    for module in (trainer.model.model, policy.model):
        perturb(module, 1, 0.05)
    log_probs, values = minimal.score(policy, heads, own)
    ratio = (log_probs - fixed["log_probs"]).exp()[mask.bool()]
    moved = (values - fixed["values"]).abs()[mask.bool()]
    assert 0.1 < ((ratio - 1).abs() > 0.2).float().mean() < 0.9 and 0.1 < (moved > 0.2).float().mean() < 0.9

    batch["num_items_in_batch"] = mask.sum().float()
    loss = trainer.compute_loss(trainer.model, batch)
    expected = minimal.loss_of(policy, heads, own, fixed, settings)
    torch.testing.assert_close(expected, loss, rtol=1e-4, atol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for name, parameter in [*policy.named_parameters(), *heads.named_parameters(prefix="value_heads")]:
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-3, atol=1e-4, msg=name)
    assert not gradients


def test_its_run_reaches_the_threshold(minimal, capsys):
    minimal.main(num_rollouts=40)
    rewards = [float(line.split("reward ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 40 and abs(rewards[0] - 0.5) < 0.08
    assert abs(sum(rewards[-10:]) / 10 - 0.7) < 0.08
