"""Constrained PPO without a critic, and GRPO, which it is without constraints."""

import itertools
import json
from dataclasses import MISSING, fields

import pytest
import torch
from safetensors.torch import save_file
from trl import GRPOConfig, GRPOTrainer

from tests import glossary
from tests.helpers.constrained_grpo import BOUNDS, make, rollout
from tests.helpers.constrained_ppo import assert_same, length, low_ids, prompts
from trl_ext import ConstrainedGRPOConfig, ConstrainedPPOConfig
from trl_ext.constrained_ppo.group_relative import (
    group_advantages,
    kl_share,
    leave_one_out,
    mix_groups,
    reward_advantages,
)


def sometimes(completion_ids, **columns):
    """Says nothing of every third completion."""
    return [None if index % 3 == 0 else len(set(ids)) / 8 for index, ids in enumerate(completion_ids)]


@pytest.mark.parametrize(
    "settings",
    [
        {"scale_rewards": "group"},
        {"beta": 0.04, "num_iterations": 2, "steps_per_generation": 2, "loss_type": "grpo", "scale_rewards": "batch",
         "reward_weights": [0.3, 2.0]},
        {"beta": 0.1, "gradient_accumulation_steps": 2, "loss_type": "dr_grpo", "scale_rewards": "none",
         "per_device_train_batch_size": 4, "max_steps": 2},
        {"multi_objective_aggregation": "normalize_then_sum", "loss_type": "cispo", "epsilon_high": 5.0,
         "rewards": [low_ids, length, sometimes], "top_entropy_quantile": 0.5, "num_iterations": 2},
        {"loss_type": "bnpo", "importance_sampling_level": "sequence", "num_iterations": 2, "beta": 0.04,
         "entropy_coef": 0.01, "mask_truncated_completions": True, "sync_ref_model": True,
         "ref_model_sync_steps": 1, "rewards": [sometimes]},
        {"loss_type": "sapo", "off_policy_mask_threshold": 0.1, "num_iterations": 2, "method": "ppo"},
    ],
    ids=["defaults", "epochs-batch-weights", "accumulation-none", "gdpo-cispo", "sequence-bnpo-none-rewards", "sapo"],
)  # fmt: skip
def test_without_constraints_equals_grpo_bit_for_bit(settings, tmp_path, path):
    plain = {name: value for name, value in settings.items() if name != "method"}
    expected = make(tmp_path / "grpo", path, trainer=GRPOTrainer, config=GRPOConfig, **plain)
    expected.train()
    found = make(tmp_path / "ours", path, **settings)
    found.train()
    assert len(expected.state.log_history) == expected.args.max_steps + 1
    for there, here in zip(expected.state.log_history, found.state.log_history, strict=True):
        timing = {name for name in there if "time" in name or "per_second" in name}
        assert {name: here[name] for name in there if name not in timing} == {
            name: value for name, value in there.items() if name not in timing
        }
    weights = dict(found.model.named_parameters())
    assert weights.keys() == dict(expected.model.named_parameters()).keys()
    for name, weight in expected.model.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert expected._logs["advantages"] == found._logs["advantages"]


def test_every_default_is_grpos():
    ours = {own.name: own for own in fields(ConstrainedGRPOConfig)}
    for field in fields(GRPOConfig):
        own = ours[field.name]
        assert own.default == field.default, field.name
        if field.default_factory is not MISSING:
            assert own.default_factory() == field.default_factory(), field.name
    assert ConstrainedGRPOConfig("x", use_cpu=True, bf16=False, beta=0.1).kl_coef == 0.1
    assert ConstrainedGRPOConfig("x", use_cpu=True, bf16=False, kl_coef=0.1).beta == 0.1
    of_ppo = {"use_cpu": True, "bf16": False, "critic": "none", "method": "ppo", "num_generations": 2}
    args = ConstrainedPPOConfig("x", **of_ppo)
    assert args.beta == args.kl_coef == 0.2
    args = ConstrainedPPOConfig("x", **of_ppo, beta=0.1)
    assert args.beta == args.kl_coef == 0.1


def grouped(rewards, groups, scale):
    """Advantages in plain float64 loops."""
    found = torch.zeros(len(rewards), dtype=torch.float64)
    deviation = rewards.std()
    for start in range(0, len(rewards), groups):
        own = rewards[start : start + groups]
        divisor = {"group": own.std() + 1e-4, "batch": deviation + 1e-4, "none": 1.0}[scale]
        found[start : start + groups] = (own - own.mean()) / divisor
    return found


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups(scale, aggregation, tmp_path, path):
    rewards = torch.randn(12, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    expected = torch.stack([grouped(column, 4, scale) for column in rewards.t()], dim=1)
    torch.testing.assert_close(group_advantages(rewards, 4, scale), expected)
    weights = torch.tensor([0.5, 0.1, 2.0], dtype=torch.float64)
    if aggregation == "sum_then_normalize":
        expected = grouped(rewards @ weights, 4, scale)
    else:
        total = torch.stack([grouped(column, 4, "group") for column in rewards.t()], dim=1) @ weights
        expected = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(reward_advantages(rewards, weights, 4, scale, aggregation), expected)


def test_reward_advantages_are_trls(tmp_path, path):
    """Of three rewards, of which one does not apply to every completion."""
    plain = make(tmp_path, path, rewards=[low_ids, length, sometimes], beta=0.1)
    plain.reward_weights = torch.tensor([1.0, 0.5, 2.0])
    for scale, aggregation in itertools.product(
        ("group", "batch", "none"), ("sum_then_normalize", "normalize_then_sum")
    ):
        plain.scale_rewards, plain.multi_objective_aggregation = scale, aggregation
        batch = rollout(plain)
        rewards = plain.rollout.rewards
        assert rewards.isnan().sum() == 3
        found = reward_advantages(rewards, plain.reward_weights, 4, scale, aggregation)
        torch.testing.assert_close(found, batch["advantages"], msg=lambda text: f"{scale}, {aggregation}: {text}")  # noqa: B023


def test_a_completion_without_any_reward_has_no_advantage():
    rewards = torch.tensor([[1.0], [torch.nan], [3.0], [5.0]])
    found = reward_advantages(rewards, torch.ones(1), 4, "none")
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.0, 0.0, 2.0]))
    # Three completions count, so the others' mean is 3/2 as far away
    torch.testing.assert_close(leave_one_out(found, rewards, 4), 1.5 * found)


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 2.0], [2.0, 2.0], [6.0, 8.0], [0.0, 3.0], [3.0, 5.0], [6.0, 4.0]])
    expected = torch.zeros(6, 2)
    for row in range(6):
        others = [other for other in range(row // 3 * 3, row // 3 * 3 + 3) if other != row]
        expected[row] = rewards[row] - rewards[others].mean(dim=0)
    torch.testing.assert_close(leave_one_out(group_advantages(rewards, 3, "none"), rewards, 3), expected)


def test_limits_of_the_mixture():
    rewards = torch.randn(8, 2)
    streams, ones = group_advantages(rewards, 4, "none"), torch.ones(2)
    # mu with both weights at 1: no KL is left, and the policy follows GRPO's advantage of the sum
    found = mix_groups(torch.zeros(8), streams, ones, "paper")
    torch.testing.assert_close(found, reward_advantages(rewards, ones, 4, "none"))
    assert kl_share(ones, "paper", "kl") == 0.0
    # The same, each reward scaled in its group: GDPO's, before that scales the sum over the batch
    total = mix_groups(torch.zeros(8), group_advantages(rewards, 4, "group"), ones, "paper")
    scaled = (total - total.mean()) / (total.std() + 1e-4)
    torch.testing.assert_close(scaled, reward_advantages(rewards, ones, 4, "none", "normalize_then_sum"))
    # No weight: GRPO's own
    objective = torch.randn(8)
    assert torch.equal(mix_groups(objective, streams, torch.zeros(2), "normalized"), objective)
    weights = torch.tensor([0.5, 1.5])
    assert kl_share(weights, "normalized", "rewards") == 1.0
    assert kl_share(weights, "normalized", "kl") == pytest.approx(1 / 3)
    assert kl_share(weights, "paper", "kl") == kl_share(3 * weights, "paper", "kl") == 0.0
    assert kl_share(weights / 2, "paper", "rewards") == 1.0
    by_hand = (objective + 0.5 * streams[:, 0] + 1.5 * streams[:, 1]) / 3
    torch.testing.assert_close(mix_groups(objective, streams, weights, "normalized"), by_hand)
    with pytest.raises(ValueError, match="no whole number of groups of 3"):
        group_advantages(rewards, 3, "none")
    with pytest.raises(ValueError, match="`scale_rewards`.*'std'"):
        group_advantages(rewards, 4, "std")


MU = {"method": "mu", "constraints": [{"reward": "low_ids", "threshold": 0.7}, {"reward": 1, "threshold": 0.5}]}


@pytest.mark.parametrize(
    "settings",
    [
        {**MU, "kl_coef": 0.3},
        {**MU, "method": "mu-paper", "kl_coef": 0.3, "scale_rewards": "batch"},
        {**BOUNDS, "kl_coef": 0.3, "reward_weights": [0.0, 1.0], "whitening": "mixture"},
        {**BOUNDS, "objective": "kl", "beta": 0.3, "multi_objective_aggregation": "normalize_then_sum",
         "scale_rewards": "batch", "whitening": "streams"},
        {**BOUNDS, "kl_coef": 0.3, "multiplier_update": "minibatch", "group_baseline": "leave_one_out",
         "whitening": "none"},
        {"method": "sat", "constraints": MU["constraints"], "kl_coef": 0.3, "missing_eos_penalty": 0.5},
    ],
    ids=["mu", "mu-paper", "bounds-mixture", "kl-streams", "minibatch-leave-one-out", "sat-penalty"],
)  # fmt: skip
def test_rollout_and_loss_equal_the_formulas(settings, tmp_path, path):
    trainer = make(tmp_path, path, **settings)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    if settings.get("multiplier_update") == "minibatch":
        trainer.multipliers.update([0.6, 0.6])  # else they would stand where they start
    batch = rollout(trainer)
    mask = batch["completion_mask"].double()
    rewards = trainer.rollout.rewards.double()
    args = trainer.args
    weights = torch.tensor(args.reward_weights or [1.0, 1.0], dtype=torch.float64)
    factor = 4 / 3 if args.group_baseline == "leave_one_out" else 1.0
    if args.method == "sat":
        gaps = rewards.mean(dim=0) - torch.tensor([0.7, 0.5], dtype=torch.float64)
        trained = -gaps.square() - 2 * gaps * (rewards - rewards.mean(dim=0))
        ends = [set(row.tolist()) & set(trainer.eos_token_ids) for row in batch["completion_ids"]]
        trained = trained - 0.5 * torch.tensor([[not end] for end in ends])
        expected, kl = grouped(trained @ weights, 4, args.scale_rewards), 0.3
    else:
        w = trainer.multipliers.weights()
        assert (w > 0).any()
        scale = "none"
        if args.whitening == "streams":
            scale = "group" if "multi_objective_aggregation" in settings else args.scale_rewards
        divisors = torch.ones(2)
        if args.whitening == "spread":
            divisors = rewards.std(dim=0, unbiased=False)
            divisors[divisors == 0] = 1.0
        streams = [factor * grouped(column, 4, scale) / d for column, d in zip(rewards.t(), divisors, strict=True)]
        if args.method is None:
            streams[1] = -streams[1]
        objective = torch.zeros(8) if args.objective == "kl" else factor * grouped(rewards @ weights, 4, "group")
        if args.mixing == "paper":
            expected, kl = (2 - w.sum()) * objective + w[0] * streams[0] + w[1] * streams[1], 0.3 * (2 - w.sum())
        else:
            expected = (objective + w[0] * streams[0] + w[1] * streams[1]) / (1 + w.sum())
            kl = 0.3 / (1 + w.sum()) if args.objective == "kl" else 0.3
        if args.whitening == "mixture":
            expected = (expected - expected.mean()) / (expected.std() + 1e-4)
    torch.testing.assert_close(batch["advantages"].double(), expected, rtol=1e-4, atol=1e-5)
    assert list(trainer._logs["advantages"]) == batch["advantages"].tolist()

    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    start = batch["prompt_ids"].size(1) - 1
    log_probs = []
    for model in (trainer.model, trainer.ref_model):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention).logits[:, start:-1].double().log_softmax(-1)
        log_probs.append(logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1))
    gap = log_probs[1] - log_probs[0]
    penalty = (gap.exp() - gap - 1) * mask
    assert penalty.sum() / mask.sum() > 1e-4
    loss = trainer._compute_loss(trainer.model, batch)
    wanted = (-(expected.unsqueeze(1) * mask).sum() + kl * penalty.sum()) / mask.sum()
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-4, atol=1e-6)
    # Generation and loss are aligned, so the KL is known with the loss
    logged = trainer._metrics["train"]
    total = float((-gap * mask).sum())
    assert logged["kl/per_token"] == [pytest.approx(total / float(mask.sum()), rel=1e-3)]
    assert logged["kl/per_response"] == logged["average/kl"] == [pytest.approx(total / 8, rel=1e-3)]


def gold(completion_ids, **columns):
    return [1.0 - value for value in low_ids(completion_ids)]


def test_a_run_under_constraints_shows_and_keeps_what_one_with_a_critic_does(tmp_path, path):
    constraints = [{"reward": "low_ids", "quantile": 0.9, "kind": ">="}, BOUNDS["constraints"][1]]
    trainer = make(
        tmp_path, path, rewards=[low_ids, length, sometimes], constraints=constraints, beta=0.1, kl_target=1e-4,
        calibration_samples=16, dashboard=True, max_steps=4, save_strategy="steps", save_steps=2,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, num_iterations=2,
        trainer_arguments={"eval_dataset": prompts(8), "gold_reward": gold},
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("kl/per_response", "kl/loss_coef", "average/kl", "violation/low_ids", "weight/length",
                 "average/sometimes", "kl/update"):  # fmt: skip
        assert any(name in entry for entry in logged), name
    assert not any("critic" in name for entry in logged for name in entry)
    assert len({entry["kl/coef"] for entry in logged if "kl/coef" in entry}) == 2
    evaluated = [entry for entry in trainer.state.log_history if "eval_gold" in entry]
    assert len(evaluated) == 2 and "eval_kl/per_response" in evaluated[0]
    assert glossary.unknown(trainer.state.log_history) == set()
    assert trainer.args.metric_for_best_model == "gold" and trainer.state.best_model_checkpoint is not None
    assert trainer.critic is None and not list(tmp_path.rglob("critic.safetensors"))
    assert (tmp_path / "dashboard.png").stat().st_size > 1000
    rows = json.loads((tmp_path / "calibration.json").read_text())
    assert [row["reward"] for row in rows] == ["low_ids", "length"]
    threshold = trainer.controller.constraints[0].threshold
    assert threshold == rows[0]["threshold"] and 0 < threshold < 1
    assert json.loads((tmp_path / "multipliers.json").read_text())["num_updates"] == 2
    card = (tmp_path / "README.md").read_text()
    assert "Constrained GRPO" in card and "constrained-grpo" in card and "2310.04373" in card
    assert "| `num_generations` | 4 |" in card and "critic.safetensors" not in card and "`gae_lambda`" not in card


def test_the_search_moves_its_thresholds(tmp_path, path):
    trainer = make(
        tmp_path, path, **BOUNDS, max_steps=5, save_strategy="steps", save_steps=2,
        search={"max_gold_evaluations": 4, "steps_per_threshold": 1, "rollout_window": 1},
        trainer_arguments={"eval_dataset": prompts(8), "gold_reward": gold},
    )  # fmt: skip
    trainer.train()
    tried = [trial.thresholds for trial in trainer.search_callback.search.history]
    assert len(tried) >= 2 and tried[0] != tried[1] and trainer.num_gold_evaluations >= 2


RESUMED = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "beta": 0.1, **BOUNDS}


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_target": 1e-4, "num_iterations": 1},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "kl_target": 1e-4},
        {"num_iterations": 3, "multiplier_update": "minibatch"},
    ],
    ids=["aligned", "epochs", "minibatch"],
)
def test_resumed_equals_uninterrupted(settings, tmp_path, path):
    whole = make(tmp_path / "a", path, **RESUMED, **settings)
    whole.train()
    resumed = make(tmp_path / "b", path, **RESUMED, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(whole, resumed)


def test_early_ends(tmp_path, path):
    trainer = make(tmp_path, path, beta=0.1, kl_ceiling=1e-6, kl_estimator="k3", max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 2 and "kl_ceiling" in trainer.stop_reason
    trainer = make(tmp_path, path, num_iterations=4, early_stop_kl=1e-9, max_steps=4)
    trainer.train()
    assert [entry["skipped_updates"] for entry in trainer.state.log_history[:-1]] == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"critic": "shared"}, "`critic='shared'`.*ConstrainedPPOConfig"),
        ({"num_generations": 1}, "`num_generations=1`.*2 or more"),
        ({"gamma": 0.9}, "`gamma=0.9` needs a critic"),
        ({"critic_detach": True}, "`critic_detach=True` needs a critic"),
        ({"vf_coef": [0.1, 0.2]}, r"`vf_coef=\[0.1, 0.2\]` needs a critic"),
        ({"whitening": "mixture"}, "`whitening='mixture'`.*scale_rewards"),
        ({**MU, "beta": 0.1, "whitening": "mixture"}, "weights would cancel: use `whitening='spread'`"),
        ({**BOUNDS, "whitening": "mixture", "multiplier_update": "minibatch"}, "no rollout"),
        ({"constraints": [{"reward": 0, "threshold": 0.5, "kind": "per_prompt", "probability": 0.1}]}, "no advantage"),
        ({"beta": 0.1, "kl_coef": 0.2}, "`beta=0.1` and `kl_coef=0.2`"),
        (MU, "`kl_coef=0` leaves nothing to maximise"),
        ({"group_baseline": "median"}, "`group_baseline`.*'median'"),
        ({"group_baseline": "leave_one_out", "multi_objective_aggregation": "normalize_then_sum"}, "takes out again"),
        ({"kl_ceiling": 1.0}, "`kl_ceiling` needs the divergence"),
        ({"trainer_arguments": {"critic_model": torch.nn.Linear(32, 3)}}, "`critic_model` is given"),
        ({"rewards": [sometimes], "constraints": [{"reward": 0, "threshold": 0.5}]}, "'sometimes'.*constraint"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_wrong_settings(settings, message, tmp_path, path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path, **settings).train()


def test_wrong_arguments(tmp_path, path):
    with pytest.raises(TypeError, match="ConstrainedGRPOConfig.*GRPOConfig"):
        make(tmp_path, path, config=GRPOConfig)
    with pytest.raises(ValueError, match="`group_baseline='leave_one_out'` needs `critic='none'`"):
        ConstrainedPPOConfig(str(tmp_path), use_cpu=True, bf16=False, method="ppo", group_baseline="leave_one_out")
    (tmp_path / "checkpoint-1").mkdir()
    for name in ("model", "critic"):
        save_file({"weight": torch.zeros(1)}, tmp_path / "checkpoint-1" / f"{name}.safetensors")
    state = {"global_step": 1, "log_history": [], "train_batch_size": 8}
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has a critic and this run has `critic='none'`"):
        make(tmp_path, path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
