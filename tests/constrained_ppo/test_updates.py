"""What an update trains and what it says of itself."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.constrained_ppo import XI, make, rollout


def weights(folder):
    return load_file(folder / "model.safetensors"), load_file(folder / "critic.safetensors")


def differ(first, second):
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_warms_up_while_the_policy_stands_still(critic, tmp_path, path):
    settings = {
        **XI, "critic": critic, "critic_warmup_steps": 2, "max_steps": 3, "save_strategy": "steps", "save_steps": 1,
        "weight_decay": 0.1, "kl_target": 0.01, "num_iterations": 1,
    }  # fmt: skip
    trainer = make(tmp_path / "whole", path, **settings)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    policies, critics = zip(*(weights(tmp_path / "whole" / f"checkpoint-{step}") for step in (1, 2, 3)), strict=True)
    assert differ(policies[0], start) == differ(policies[1], start) == []
    assert differ(policies[2], start) == list(policies[2])
    assert differ(critics[1], critics[0]) == list(critics[1])
    assert trainer.multipliers.state_dict()["num_updates"] == 1
    coefficients = [entry["kl/coef"] for entry in trainer.state.log_history if "kl/coef" in entry]
    assert coefficients == [0.2, 0.2, 0.2] and trainer.controller.kl_coef != 0.2

    if critic == "shared":
        resumed = make(tmp_path / "resumed", path, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
        found = weights(tmp_path / "resumed" / "checkpoint-3")
        assert differ(found[0], policies[2]) == differ(found[1], critics[2]) == []


def test_statistics_of_an_update(tmp_path, path, monkeypatch):
    trainer = make(tmp_path, path, num_iterations=2, whitening="none", critic_lambda=1.0, adaptive_lambda_alpha=0.5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trainer.model.lm_head.weight[1] *= 4  # ends early about as often as not
        trainer.critic.weight.normal_(std=0.1, generator=generator)
    batch = rollout(trainer)
    mask = batch["completion_mask"].bool()
    batch["num_items_in_batch"] = mask.sum().float()
    with torch.no_grad():
        for parameter in trainer.model.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    seen, calls = [], []
    check, gather = trainer._check_update, trainer.accelerator.gather
    monkeypatch.setattr(trainer.accelerator, "gather", lambda *a: calls.append(1) or gather(*a))
    monkeypatch.setattr(trainer, "_check_update", lambda *a: calls.clear() or seen.append(a[1]) or check(*a))
    trainer.compute_loss(trainer.model, batch)
    assert len(calls) == 1
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    ratio = (seen[0] - batch["old_per_token_logps"])[mask].double().exp()
    expected = {"ratio/mean": ratio.mean(), "ratio/max": ratio.max(), "ratio/min": ratio.min()}
    advantages = batch["advantages"][mask].double()
    expected |= {"advantage/mean": advantages.mean(), "advantage/std": advantages.std(unbiased=False)}
    for index, name in enumerate(("low_ids", "length", "kl")):
        returns, values = (batch[key][mask][:, index].double() for key in ("state_returns", "old_state_values"))
        explained = 1 - (returns - values).var(unbiased=False) / returns.var(unbiased=False)
        expected[f"critic/{name}/explained_variance"] = explained
        expected[f"critic/{name}/return_std"] = returns.std(unbiased=False)
        expected[f"critic/{name}/return"] = returns.mean()
    assert ratio.max() > 1.1 and ratio.min() < 0.9
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name
    # Targets of a lambda of 1 are discounted sums, which the values are no part of
    steps = torch.arange(mask.size(1))
    last = mask.sum(dim=1, keepdim=True) - 1
    sums = trainer.rollout.rewards[:, :1] * 0.99 ** (last - steps) * mask
    torch.testing.assert_close(batch["state_returns"][..., 0], sums, rtol=1e-4, atol=1e-5)
