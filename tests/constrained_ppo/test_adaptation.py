"""What adapts from rollout to rollout: the KL coefficient, averages, stopping, sat and the mixture."""

from collections import defaultdict

import pytest
import torch

from trl_ext.constrained_ppo.adaptation import RolloutAverages, RolloutController, StoppingRules, adapted_coefficient
from trl_ext.constrained_ppo.advantages import (
    mix_advantages,
    mix_normalized,
    policy_advantages,
    reward_streams,
    squared_distance_rewards,
    token_divergence,
    whiten,
)
from trl_ext.constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig


def config(**settings):
    return ConstrainedPPOConfig("out", use_cpu=True, bf16=False, **settings)


def streams(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(count, 4, 7, generator=generator, dtype=torch.float64)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 3:] = mask[2, 2:4] = 0
    return advantages * mask, mask


@pytest.mark.parametrize(
    ("divergence", "expected"), [(0.5, 0.2), (0.55, 0.2 * 1.01), (5.0, 0.2 * 1.02), (0.0, 0.2 * 0.98)]
)
def test_adaptive_coefficient_by_hand(divergence, expected):
    assert adapted_coefficient(0.2, divergence, target=0.5, step=0.1) == pytest.approx(expected)


def test_divergence_estimators_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    estimates = [token_divergence(policy, reference, name) for name in ("k1", "k3")]
    for estimate in estimates:
        torch.testing.assert_close((policy.exp() * estimate).sum(), exact)
    assert (estimates[1] >= 0).all() and (estimates[0] < 0).any()
    with pytest.raises(ValueError, match="'k1' or 'k3', got 'k2'"):
        token_divergence(policy, reference, "k2")


def test_averages_over_rollouts():
    statistics = RolloutAverages(window=4)
    for value, violation in [(1.0, 1.0), (2.0, -1.0), (6.0, -2.0), (3.0, 1.0)]:
        statistics.add({"a": value}, {"a": violation})
    assert statistics.averages() == {"a": 3.0}
    assert statistics.oscillation("a") == pytest.approx(2 / 3) and statistics.oscillation("b") == 0
    other = RolloutAverages(window=4)
    other.load_state_dict(statistics.state_dict())
    statistics.add({"a": 1.0}, {"a": 1.0}), other.add({"a": 1.0}, {"a": 1.0})
    assert other.state_dict() == statistics.state_dict()


def test_stopping_rules():
    rules = StoppingRules(kl_ceiling=2.0, gold_patience=2)
    assert rules.check_divergence(2.0) is None
    assert "2.5 nats, above `kl_ceiling=2`" in rules.check_divergence(2.5)
    found = [rules.check_gold(gold) for gold in (0.1, 0.3, 0.2, 0.25, 0.4)]
    assert [reason is None for reason in found] == [True, True, True, False, True]
    assert "0.3 for 2 evaluations" in found[3] and rules.num_gold_evaluations == 5
    assert StoppingRules().check_gold(-1.0) is None and StoppingRules().check_divergence(1e9) is None


def test_reward_streams_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]])
    rewards = torch.tensor([[2.0, -1.0], [3.0, 5.0], [7.0, 7.0]])
    found = reward_streams(rewards, torch.full((3, 4), 0.5), mask)
    assert found[0].tolist() == [[0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]
    assert found[1].tolist() == [[0, -1, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0]]
    assert found[2].tolist() == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0.5], [0, 0, 0, 0]]


@pytest.mark.parametrize("objective", ["kl", "rewards"])
@pytest.mark.parametrize("mixing", ["paper", "normalized"])
def test_mixture_of_objective_and_constraints(objective, mixing):
    (advantages, mask), weights = streams(4), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    multipliers, signs = torch.tensor([0.3, 1.2], dtype=torch.float64), torch.tensor([1.0, -1.0])
    found = policy_advantages(
        advantages, mask, weights, objective, [2, 0], signs, multipliers, mixing, whitening="none"
    )
    weighted, kl = 0.5 * advantages[0] + 2 * advantages[1] + advantages[2], advantages[3]
    bounded = 0.3 * advantages[2] - 1.2 * advantages[0]
    if mixing == "paper":
        expected = (2 - 1.5) * (kl if objective == "kl" else weighted + kl) + bounded
    elif objective == "kl":
        expected = (kl + bounded) / 2.5
    else:
        expected = (weighted + bounded) / 2.5 + kl
    torch.testing.assert_close(found, expected * mask)
    white = policy_advantages(advantages, mask, weights, objective, [2, 0], signs, multipliers, mixing, "mixture")
    torch.testing.assert_close(white, whiten(expected * mask, mask))


def test_lambda_at_zero_is_plain_ppo_bit_for_bit():
    (advantages, mask), weights = streams(3), torch.ones(2)
    advantages = advantages.float()
    plain = policy_advantages(advantages, mask, weights, whitening="mixture")
    for mixing, constrained in (("paper", [0]), ("normalized", [0]), ("normalized", [0, 1])):
        zero = torch.zeros(len(constrained), dtype=torch.float64)
        found = policy_advantages(
            advantages, mask, weights, "rewards", constrained, None, zero, mixing, whitening="mixture"
        )
        assert torch.equal(found, plain)


def test_moments_over_two_processes_are_those_of_one():
    advantages, mask = streams(1)
    halves = [(advantages[0][:2], mask[:2]), (advantages[0][2:], mask[2:])]
    parts = []
    for own, other in (halves, halves[::-1]):
        sums = []

        def reduce(tensor, other=other, sums=sums):
            values, keep = other
            if not sums:
                extra = torch.cat([(values * keep).sum().view(1), keep.sum().view(1)])
            else:
                mean = sums[0][0] / sums[0][1]
                extra = ((values - mean) * keep).square().sum().view(tensor.shape)
            sums.append(tensor + extra)
            return sums[-1]

        parts.append(whiten(own[0], own[1], reduce=reduce))
    torch.testing.assert_close(torch.cat(parts), whiten(advantages[0], mask))


def test_a_sample_target_is_met_by_failing_and_a_mean_target_is_not():
    """The official PPO-SAT, on a binary reward with a threshold below one half, is best off with accuracy 0."""
    threshold = torch.tensor([0.48])
    always, never = torch.ones(100, 1), torch.zeros(100, 1)
    assert squared_distance_rewards(never, threshold).mean() > squared_distance_rewards(always, threshold).mean()
    mixed = (torch.arange(100) < 48).float().unsqueeze(1)
    means = {name: x.mean(dim=0) for name, x in {"never": never, "mixed": mixed, "always": always}.items()}
    assert squared_distance_rewards(mixed, threshold, means["mixed"]).mean().abs() < 1e-6
    for name, rewards in (("never", never), ("always", always)):
        assert squared_distance_rewards(rewards, threshold, means[name]).mean() < -0.2


def test_gradient_of_the_mean_target():
    """With probability p of reward 1, the policy gradient of the surrogate is that of -(p - threshold)^2."""
    p, threshold = torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.6], dtype=torch.float64)
    rewards = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    surrogate = squared_distance_rewards(rewards, threshold, p.view(1)).squeeze(1)
    # d/dp sum_x p(x) f(x) with f held fixed
    torch.testing.assert_close(surrogate[0] - surrogate[1], -2 * (p - threshold[0]))


@pytest.mark.parametrize(("kind", "sign"), [(">=", 1.0), ("<=", -1.0), ("==", 1.0)])
def test_controller_mixes_as_its_settings_say(kind, sign):
    controller = RolloutController(
        config(
            constraints=[{"reward": "b", "threshold": 1.0, "kind": kind}], multiplier_squash="sigmoid", mixing="paper",
            whitening="streams",
        ), ["a", "b"],
    )  # fmt: skip
    advantages, mask = streams(3)
    found = controller.mix(advantages, mask, torch.ones(2), lambda tensor: tensor)
    weights = torch.tensor([0.5], dtype=torch.float64)
    torch.testing.assert_close(found, mix_advantages(advantages[2], sign * advantages[1:2], weights, mask))
    normalized = RolloutController(
        config(method="ppo-lag", constraints=[{"reward": "b", "threshold": 1.0, "kind": kind}]), ["a", "b"]
    )
    found = normalized.mix(advantages, mask, torch.ones(2), lambda tensor: tensor)
    base, weights = advantages[0] + advantages[1], torch.ones(1, dtype=torch.float64)  # exp(0)
    mixed = mix_normalized(base, sign * advantages[1:2], weights, mask) + advantages[2]
    torch.testing.assert_close(found, whiten(mixed, mask))


def test_names_not_positions_decide_which_threshold_is_whose():
    """The official code's search hands thresholds over in another order than that of the rewards."""
    constraints = [{"reward": "intent", "threshold": 0.48}, {"reward": "meteor", "threshold": 0.23}]
    controller = RolloutController(config(method="xi-paper", constraints=constraints), ["meteor", "intent", "other"])
    metrics = defaultdict(list)
    controller.close_rollout(metrics, torch.tensor([[0.2, 0.5, 9.0]]), (0.1, 1.0), training=True)
    assert metrics["violation/meteor"] == [pytest.approx(0.03)]
    assert metrics["violation/intent"] == [pytest.approx(-0.02)]
    assert metrics["relative_violation/meteor"] == [pytest.approx(0.03 / 0.23)]
    assert metrics["weight/meteor"][0] > 0 > metrics["weight/intent"][0]
    assert metrics["weight/objective"] == [
        pytest.approx(2 - metrics["weight/meteor"][0] - metrics["weight/intent"][0])
    ]
    assert metrics["average/other"] == [9.0] and metrics["kl/per_response"] == [1.0]


def test_episodes_and_not_tokens_are_averaged():
    """The official violation weights episodes by their length: lengths 20, 5, 2 give 0.167 in place of 0.3."""
    lengths, rewards = torch.tensor([20.0, 5.0, 2.0]), torch.tensor([0.1, 0.3, 0.5])
    assert float((lengths * rewards).sum() / lengths.sum()) == pytest.approx(0.167, abs=1e-3)
    controller = RolloutController(config(method="xi", constraints=[{"reward": "r", "threshold": 0.3}]), ["r"])
    metrics = defaultdict(list)
    controller.close_rollout(metrics, rewards.unsqueeze(1), None, training=True)
    assert metrics["violation/r"] == [pytest.approx(0.0, abs=1e-7)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_of_constraints(count):
    names = ["a", "b", "c"][:count]
    constraints = [{"reward": name, "threshold": 0.5, "kind": ">="} for name in names]
    controller = RolloutController(config(constraints=constraints, multiplier_squash="none"), names)
    controller.close_rollout(defaultdict(list), torch.full((1, count), 0.4), None, training=True)
    weights = controller.multipliers.weights()
    assert weights.shape == (count,) and torch.equal(weights, weights[:1].expand(count)) and weights[0] > 0
    advantages, mask = streams(count + 1)
    found = controller.mix(advantages, mask, torch.ones(count), lambda tensor: tensor)
    assert found.shape == mask.shape and found.isfinite().all()


def test_presets_only_fill():
    filled = config(method="mu", constraints=[{"reward": 0, "threshold": 1.0}])
    assert filled.constraints[0]["kind"] == ">=" and filled.objective == "kl" and filled.multiplier_squash == "none"
    assert (filled.multiplier_units, filled.multiplier_max, filled.mixing) == ("spread", 2.0, "normalized")
    paper = config(method="mu-paper", constraints=[{"reward": 0, "threshold": 1.0}], multiplier_max=3.0)
    assert (paper.multiplier_squash, paper.multiplier_units, paper.multiplier_max) == ("sigmoid", "raw", 3.0)
    assert (paper.mixing, paper.whitening, paper.multiplier_drift) == ("paper", "streams", 0.0)
    assert not paper.multiplier_anti_windup and paper.multiplier_proportional == 10.0
    averaged = config(method="xi", constraints=[{"reward": 0, "threshold": 1.0}], multiplier_window=3)
    assert averaged.multiplier_drift == 0.0
    stated = config(
        method="mu", objective="rewards", multiplier_squash="softplus", whitening="none", mixing="normalized",
        constraints=[{"reward": 0, "threshold": 1.0, "kind": "<="}],
    )  # fmt: skip
    assert (stated.objective, stated.multiplier_squash, stated.whitening) == ("rewards", "softplus", "none")
    assert stated.constraints[0]["kind"] == "<=" and stated.mixing == "normalized"
    free = config(objective="rewards")
    assert not free.learns_multipliers and free.whitening == "spread"
    assert not config(method="sat", constraints=[{"reward": 0, "threshold": 1.0}]).learns_multipliers


def test_value_loss_weights():
    assert config(method="ppo").vf_coefs(3) == [0.5] * 3
    assert config(method="ppo", vf_coef=[1.0, 2.0]).vf_coefs(2) == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"`vf_coef=\[1.0, 2.0\]` has 2.*3 rewards"):
        config(method="ppo", vf_coef=[1.0, 2.0]).vf_coefs(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "xi"}, "`constraints` is empty and `method='xi'`"),
        ({"method": "ppo", "kl_target": 0.5, "kl_coef": 0.0}, "`kl_target` needs.*kl_coef"),
        ({"method": "ppo", "kl_ceiling": -1.0}, "`kl_ceiling` must be a number greater than 0, got -1.*Leave it out"),
        (
            {"method": "ppo", "gold_patience": 0},
            "`gold_patience` must be a whole number of at least 1, got 0.*Leave it out",
        ),
        ({"method": "ppo", "gamma": 1.5}, "`gamma` must be a number of at least 0 and of at most 1, got 1.5"),
        ({"method": "ppo", "kl_step": 0.0}, "`kl_step`.*got 0"),
        ({"method": "ppo", "critic_model_name_or_path": "x"}, "'x'.*needs `critic='separate'`"),
        (
            {"method": "ppo", "early_stop_kl": 0.1, "lr_scheduler_type": "greedy", "eval_strategy": "epoch"},
            "early_stop_kl",
        ),
        (
            {"method": "xi", "calibration_samples": 0, "constraints": [{"reward": 0, "quantile": 0.9}]},
            "calibration_samples=0",
        ),
        ({"method": "xi", "constraints": [{"threshold": 0.9}]}, "look at .*reward"),
        ({"method": "xi", "constraints": [{"reward": 0, "threshold": 1.0, "quantile": 0.5}]}, "exactly one"),
        ({"method": "never"}, "`method` must be one of"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
