"""Constraints on means, shares and prompts: signals, names in logs, and streams of their own."""

import logging
from collections import defaultdict

import pytest
import torch

from tests.helpers.constrained_ppo import length, low_ids, make, rollout
from trl_ext.constrained_ppo.adaptation import FeasibilityWatch, RolloutController, SignalSpreads, standard_errors
from trl_ext.constrained_ppo.advantages import mix_normalized, policy_advantages
from trl_ext.constrained_ppo.calibration import cap_warnings, needed_tilt
from trl_ext.constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
from trl_ext.constrained_ppo.constraints import Constraint, constraint_from_dict, constraint_keys, unique_names


REWARDS = torch.tensor([1.0, 5.0, 2.0, 8.0])
SHARE = {"reward": "length", "threshold": 0.6, "kind": "<=", "probability": 0.05}


def config(**settings):
    return ConstrainedPPOConfig("out", use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("constraint", "signal", "violation"),
    [
        (Constraint("x", 4.0, "<="), [1.0, 5.0, 2.0, 8.0], 0.0),
        (Constraint("x", 4.0, "<=", probability=0.25), [0.0, 1.0, 0.0, 1.0], 0.25),
        (Constraint("x", 4.0, ">=", probability=0.25), [1.0, 0.0, 1.0, 0.0], 0.25),
        # Two prompts, with means 3 and 5
        (Constraint("x", 4.0, ">=", per_prompt=True), [-3.0, 1.0, 0.0, 0.0], 0.5),
        (Constraint("x", 4.0, "<=", per_prompt=True), [0.0, 0.0, 2.0, -4.0], 0.5),
        (Constraint("x", 4.0, "==", per_prompt=True), [-3.0, 1.0, 2.0, -4.0], 1.0),
        (Constraint("x", 4.0, ">=", per_prompt=True, tolerance=0.6), [-3.0, 1.0, 0.0, 0.0], -0.1),
        (Constraint("x", 4.0, ">=", per_prompt=True, probability=0.2), [1.0, 1.0, 0.0, 0.0], 0.3),
    ],
)
def test_signals_by_hand(constraint, signal, violation):
    found = constraint.signal(REWARDS, 2)
    assert found.tolist() == signal
    assert constraint.violation(float(found.mean())) == pytest.approx(violation)


def test_gradient_of_a_prompts_hinge():
    """With probability p of reward 1, the policy gradient of the hinge's signal is that of min(p - threshold, 0)."""
    constraint = Constraint("x", 0.6, ">=", per_prompt=True)
    one, zero = (float(constraint.signal(torch.tensor([value, 0.0, 0.0]), 3)[0]) for value in (1.0, 0.0))
    assert one - zero == pytest.approx(1.0)
    assert constraint.signal(torch.tensor([1.0, 1.0, 0.0]), 3).tolist() == [0.0, 0.0, 0.0]


def test_keys_and_unique_names():
    both = [Constraint("a", 0.2, ">="), Constraint("a", 0.8, "<="), Constraint("b", 1.0)]
    assert constraint_keys(both) == ["a.at_least", "a.at_most", "b"]
    shares = [Constraint("a", 200, "<=", probability=0.05), Constraint("a", 300, "<=", probability=0.01)]
    assert constraint_keys([*both, *shares])[3:] == ["a.at_most.share", "a.at_most.share_2"]
    assert unique_names(["x", "x", "x_2", "x"]) == ["x", "x_3", "x_2", "x_4"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"threshold": 1.0, "kind": "<=", "probability": 5},
            "`probability` .*'x' must be a number greater than 0 and smaller than 1, got 5",
        ),
        ({"threshold": 1.0, "probability": 0.5}, "`probability`.*needs the `kind` '>=' or '<='"),
        ({"threshold": 1.0, "tolerance": 0.5}, "`tolerance=0.5`.*needs `per_prompt: true`"),
        ({"threshold": 1.0, "spread": 0.0}, "`spread`.*number greater than 0, got 0.0"),
    ],
)
def test_wrong_constraints(given, message):
    with pytest.raises(ValueError, match=message):
        constraint_from_dict({"reward": "x", **given})


def test_spreads_are_given_found_or_tracked():
    spreads = SignalSpreads(["a", "b", "c"], [None, 2.0, None])
    assert spreads.values().tolist() == [1.0, 2.0, 1.0]
    spreads.observe(torch.tensor([[0.0, 0.0, 3.0], [1.0, 9.0, 3.0]]))
    assert spreads.values().tolist() == [0.5, 2.0, 1.0]  # a constant has none
    spreads.observe(torch.tensor([[0.0, 0.0, 3.0], [4.0, 9.0, 5.0]]))
    assert spreads.values().tolist() == [0.5, 2.0, 1.0]
    tracked = SignalSpreads(["c", "a"], [None, None], ema=0.75)
    tracked.load_state_dict(spreads.state_dict())
    tracked.observe(torch.tensor([[3.0, 0.0], [5.0, 4.0]]))
    assert tracked.values().tolist() == pytest.approx([1.0, (0.75 * 0.25 + 0.25 * 4) ** 0.5])


def test_standard_errors_count_prompts():
    signals = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    spread = torch.tensor([1.0])
    assert standard_errors(signals, spread).item() == pytest.approx(5**0.5 / 2)
    assert standard_errors(signals, spread, 2).item() == pytest.approx(2 / 2**0.5)
    assert standard_errors(torch.ones(4, 1), spread).item() == pytest.approx(0.5 / 2)


def test_negative_weights_never_turn_the_gradient():
    objective, rewards = torch.ones(1, 1), torch.ones(2, 1, 1)
    found = mix_normalized(objective, rewards, torch.tensor([-3.0, -2.0]), torch.ones(1, 1))
    assert found.item() == pytest.approx((1 - 5) / (1 + 5))


@pytest.mark.parametrize("whitening", ["spread", "streams"])
def test_the_kl_coefficient_reaches_the_policy(whitening):
    """As in helpful_harmless.yaml: a hundredfold coefficient must not leave advantages as they were."""
    generator = torch.Generator().manual_seed(0)
    advantages, mask = torch.randn(3, 4, 7, generator=generator), torch.ones(4, 7)
    found = []
    for coefficient in (0.05, 5.0):
        scaled = torch.cat([advantages[:2], coefficient * advantages[2:]])
        found.append(
            policy_advantages(
                scaled,
                mask,
                torch.tensor([1.0, 0.0]),
                "rewards",
                [1],
                None,
                torch.tensor([0.7]),
                "normalized",
                whitening,
                spreads=torch.tensor([2.0, 3.0]),
            )
        )
    torch.testing.assert_close(found[1] - found[0], 4.95 * advantages[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "mu", "kl_coef": 0.0}, "`kl_coef=0` leaves nothing to maximise"),
        ({"method": "xi-paper", "kl_target": 0.1}, "`kl_target=0.1` adapts `kl_coef`, which cancels"),
        ({"method": "xi", "multiplier_spread_ema": 1.0}, "`multiplier_spread_ema`.*got 1.0"),
    ],
)
def test_settings_that_could_not_act_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(constraints=[{"reward": 0, "threshold": 1.0}], **settings)


def test_two_constraints_on_one_reward_are_logged_apart():
    constraints = [
        {"reward": "a", "threshold": 0.0, "kind": ">="}, {"reward": "a", "threshold": 0.8, "kind": "<="}
    ]  # fmt: skip
    controller, metrics = RolloutController(config(constraints=constraints), ["a"]), defaultdict(list)
    controller.close_rollout(metrics, torch.tensor([[0.7], [1.1]]), None, training=True)
    assert metrics["violation/a.at_least"] == [pytest.approx(-0.9)]
    assert metrics["violation/a.at_most"] == [pytest.approx(0.1)]
    assert metrics["weight/a.at_least"] == [0.0] and metrics["weight/a.at_most"][0] > 1
    assert metrics["relative_violation/a.at_most"] == [pytest.approx(0.125)]
    # In spreads, where the threshold is zero
    assert metrics["relative_violation/a.at_least"] == [pytest.approx(-0.9 / 0.2)]
    assert "violation/a" not in metrics


def test_equal_names_are_told_apart_and_ambiguous_ones_refused():
    by_index = config(constraints=[{"reward": 1, "threshold": 0.5, "kind": ">="}])
    controller, metrics = RolloutController(by_index, ["model", "model"]), defaultdict(list)
    assert controller.reward_names == ["model", "model_2"] and controller.keys == ["model_2"]
    controller.close_rollout(metrics, torch.tensor([[9.0, 0.1], [9.0, 0.3]]), None, training=True)
    assert metrics["violation/model_2"] == [pytest.approx(0.3)] and metrics["average/model"] == [9.0]
    with pytest.raises(ValueError, match="'model' names several rewards.*use an index"):
        RolloutController(config(constraints=[{"reward": "model", "threshold": 0.5}]), ["model", "model"])


def test_state_of_the_controller_goes_by_name():
    constraints = [{"reward": "a", "threshold": 0.5}, {"reward": "b", "quantile": 0.5}]
    first = RolloutController(config(constraints=constraints), ["a", "b"])
    first.set_constraints([c.resolved(torch.tensor([2.0])) for c in first.constraints])
    first.close_rollout(defaultdict(list), torch.tensor([[0.0, 1.0], [1.0, 4.0]]), None, training=True)
    other = RolloutController(config(constraints=constraints[::-1]), ["b", "a"])
    other.load_state_dict(first.state_dict())
    assert [c.threshold for c in other.constraints] == [2.0, 0.5]
    assert other.spreads.values().tolist() == [1.5, 0.5]
    old = {name: first.state_dict()[name] for name in ("kl_coef", "thresholds", "statistics", "stopping")}
    again = RolloutController(config(constraints=constraints), ["a", "b"])
    again.load_state_dict(old)
    assert [c.threshold for c in again.constraints] == [0.5, 2.0]


def test_infeasible_constraints_are_named_once():
    watch = FeasibilityWatch(patience=3)
    said = [watch.check("a", exhausted) for exhausted in (True, True, False, True, True, True, True)]
    assert said == [False] * 5 + [True, False]
    # A policy on its way is not named: it comes nearer every other rollout, then no more
    found = [watch.check("b", True, violation) for violation in (4.0, 3.9, 3.0, 2.95, 2.0, 1.95, 1.93)]
    assert found == [False] * 6 + [True]
    again = FeasibilityWatch(patience=3)
    again.load_state_dict(watch.state_dict())
    assert again.state_dict() == watch.state_dict() and not again.check("b", True, 1.93)
    again.load_state_dict({"b": 2})  # of an earlier version
    assert again.check("a", True, 1.0) is False and again.state_dict()["counts"] == {"b": 2, "a": 1}
    message = watch.message(Constraint("a", 2.0, ">="), 5.0)
    assert "`a >= 2` has been violated for 3 rollouts" in message and "multiplier_max=5" in message


def test_a_constraint_that_no_policy_meets_is_named_in_the_log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trl_ext"), "propagate", True)
    constraints = [{"reward": "a", "threshold": 9.0, "kind": ">="}, {"reward": "b", "threshold": 0.5, "kind": ">="}]
    controller = RolloutController(config(constraints=constraints), ["a", "b"])
    with caplog.at_level(logging.WARNING):
        for _ in range(60):
            rewards = torch.tensor([[0.0, 0.4], [1.0, 0.7]])
            controller.close_rollout(defaultdict(list), rewards, None, training=True)
    assert caplog.text.count("`a >= 9` has been violated for 20 rollouts") == 1 and "`b" not in caplog.text


def test_tilt_that_a_mean_needs():
    coin = torch.tensor([0.0, 1.0])
    assert needed_tilt(coin, 0.9) == pytest.approx(torch.logit(torch.tensor(0.9)).item(), abs=1e-4)
    assert needed_tilt(coin, 1.5) == pytest.approx((1.5 - 0.5) / 0.25) and needed_tilt(torch.ones(3), 2.0) == 0.0


def test_weights_that_are_bounded_too_low_are_told():
    """A coin asked for 0.9 beside a constraint that holds: the published form settles halfway."""
    signals = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    constraints = [Constraint("a", 0.9, ">="), Constraint("b", 0.5, ">=")]
    stated = [{"reward": one.reward, "threshold": one.threshold} for one in constraints]

    def warned(**settings):
        return cap_warnings(
            constraints, ["a", "b"], signals, torch.tensor([0.5, 1.0]), config(constraints=stated, **settings)
        )

    (found,) = warned(method="mu-paper")
    assert "`a >= 0.9` may be out of reach of its weight" in found and "multiplier_squash='sigmoid'" in found
    assert warned(method="mu") == [] and warned(method="mu-paper", mixing="normalized", whitening="spread") == []
    (found,) = warned(method="mu", kl_coef=20.0)
    assert "needs about 22 " in found and "allow 2." in found
    # With both violated no weight is left to the KL
    constraints[1] = Constraint("b", 1.5, ">=")
    assert warned(method="mu-paper") == []


def test_a_share_has_a_stream_of_its_own(tmp_path, path):
    constraints = [SHARE, {"reward": "low_ids", "threshold": 0.4, "kind": "per_prompt"}]
    trainer = make(
        tmp_path, path, method="mu", constraints=constraints, num_generations=2, calibration_samples=8,
        missing_eos_penalty=0.5,
    )  # fmt: skip
    batch = rollout(trainer)
    rewards = trainer.rollout.rewards
    assert batch["state_returns"].shape[-1] == 5  # two rewards, two signals, the KL
    assert trainer.controller.stream_names == ["low_ids", "length", "length.signal", "low_ids.signal"]
    last = batch["completion_mask"].sum(dim=1) - 1
    at_end = batch["state_returns"][torch.arange(8), last] - batch["old_state_values"][torch.arange(8), last]
    assert batch["old_state_values"].abs().max() == 0
    ended = torch.isin(batch["completion_ids"], torch.tensor(trainer.eos_token_ids)).any(dim=1)
    torch.testing.assert_close(at_end[:, 1], rewards[:, 1] - 0.5 * ~ended)
    torch.testing.assert_close(at_end[:, 2], (rewards[:, 1] > 0.6).float())
    groups = rewards[:, 0].view(4, 2).mean(dim=1).repeat_interleave(2)
    torch.testing.assert_close(at_end[:, 3], torch.where(groups < 0.4, rewards[:, 0] - 0.4, 0.0))
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert {"violation/length", "weight/low_ids", "critic/length.signal/loss", "spread/length"} <= logged.keys()
    assert logged["spread/length"] == pytest.approx((0.05 * 0.95) ** 0.5)


def test_rewards_of_one_name_are_logged_apart(tmp_path, path):
    def made(scale):
        def reward(completion_ids, **columns):
            return [scale * value for value in length(completion_ids)]

        return reward

    trainer = make(tmp_path, path, rewards=[made(1.0), low_ids, made(-1.0)], max_steps=1)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert logged["rewards/reward/mean"] > 0 > logged["rewards/reward_2/mean"]
    assert logged["average/reward_2"] == pytest.approx(logged["rewards/reward_2/mean"])
