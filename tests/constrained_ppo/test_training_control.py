"""How runs adapt, skip updates, end and choose their best checkpoint."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import trl_ext
from tests import glossary
from tests.helpers.constrained_ppo import XI, length, low_ids, make, prompts, rollout
from trl_ext import ConstrainedPPOConfig
from trl_ext.constrained_ppo.adaptation import RolloutController
from trl_ext.core.recorder import ForwardRecorder


ONE = [{"reward": "low_ids", "threshold": 0.7}]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sat", "constraints": ONE},
        {"method": "sat", "constraints": ONE, "sat_target": "sample"},
        {"method": "ppo-lag", "constraints": [{"reward": "length", "threshold": 0.5, "kind": "<="}]},
        {**XI, "multiplier_update": "minibatch", "num_iterations": 2},
        {**XI, "whitening": "none"},
        {"method": "ppo", "kl_target": 0.05, "kl_estimator": "k3"},
        {"method": "ppo", "missing_eos_penalty": 1.0},
        {"method": "ppo", "entropy_coef": 0.01},
    ],
    ids=["sat", "sat-sample", "ppo-lag", "minibatch", "raw", "adaptive", "missing-eos", "entropy"],
)
def test_trains(settings, tmp_path, path):
    trainer = make(tmp_path, path, max_steps=3, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert not [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert all(value == value for value in logged(trainer, "loss"))


def trained(folder, path, **settings):
    trainer = make(folder, path, max_steps=4, num_iterations=2, **settings)
    trainer.train()
    return [p.detach().clone() for p in trainer.model.parameters()]


def test_multipliers_fixed_at_zero_are_plain_ppo_bit_for_bit(tmp_path, path):
    plain = trained(tmp_path / "a", path)
    fixed = {"multiplier_learning_rate": 0.0, "multiplier_proportional": 0.0, "multiplier_squash": "none"}
    for name, settings in {
        "paper": {"method": None, "objective": "rewards", "whitening": "mixture", "constraints": [
            {"reward": "low_ids", "threshold": 0.7, "kind": ">="}]},
        "lag": {"method": "ppo-lag", "constraints": [
            {"reward": "low_ids", "threshold": 0.7, "kind": ">="},
            {"reward": "length", "threshold": 0.1, "kind": "<="}]},
    }.items():  # fmt: skip
        found = trained(tmp_path / name, path, **settings, **fixed)
        assert all(torch.equal(p, q) for p, q in zip(plain, found, strict=True)), name


def test_streams_are_those_of_separate_runs(tmp_path, path):
    """Advantages and returns of K rewards trained together are those of each reward alone."""
    together = rollout(make(tmp_path / "a", path))
    for index, reward in enumerate((low_ids, length)):
        alone = rollout(make(tmp_path / str(index), path, rewards=[reward]))
        assert torch.equal(alone["completion_ids"], together["completion_ids"])
        torch.testing.assert_close(alone["state_returns"][..., 0], together["state_returns"][..., index])
        torch.testing.assert_close(alone["state_returns"][..., 1], together["state_returns"][..., 2])


def test_minibatch_update_is_the_official_one(tmp_path, path):
    settings = {"multiplier_update": "minibatch", "multiplier_proportional": 0.0, "num_iterations": 3}
    trainer = make(tmp_path, path, **{**XI, **settings, "max_steps": 6, "steps_per_generation": 2})
    trainer.train()
    assert trainer.multipliers.state_dict()["num_updates"] == 6  # not one for each of the two rollouts
    batch = rollout(trainer)
    assert batch["episode_rewards"].shape == (8, 2) and batch["stream_advantages"].shape[-1] == 3
    lengths = batch["completion_mask"].sum(dim=1).float()
    expected = (batch["episode_rewards"] * lengths.unsqueeze(1)).sum(dim=0) / lengths.sum()
    trainer.compute_loss(trainer.model, batch)
    observed = torch.tensor(trainer.multipliers.state_dict()["observed"][-1])
    torch.testing.assert_close(observed, expected.double(), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_missing_end_of_sequence_is_punished(tmp_path, path):
    plain, punished = make(tmp_path / "a", path), make(tmp_path / "b", path, missing_eos_penalty=2.0)
    for trainer in (plain, punished):
        with torch.no_grad():
            trainer.model.lm_head.weight[1] *= 4  # ends early about as often as not
    torch.manual_seed(0)
    batches = [rollout(plain)]
    torch.manual_seed(0)
    batches.append(rollout(punished))
    ended = (batches[0]["completion_ids"] == 1).any(dim=1)
    assert ended.any() and not ended.all()
    difference = (batches[0]["state_returns"] - batches[1]["state_returns"])[..., 0]
    last = batches[0]["completion_mask"].sum(dim=1) - 1
    found = difference[torch.arange(8), last]
    torch.testing.assert_close(found, torch.where(ended, 0.0, 2.0))
    assert torch.equal(plain.rollout.rewards, punished.rollout.rewards)


@pytest.mark.parametrize(
    ("weights", "kinds", "expected"),
    [
        ([1.0, 1.0], ["<=", ">="], [1.0, 1.0, 0.0]),  # both are wanted, whatever bounds them
        ([-0.5, 0.0], [">=", "<="], [-1.0, -1.0, 0.0]),
        ([0.0, 0.0], ["<=", "=="], [-1.0, 1.0, 0.0]),
    ],
)
def test_a_penalty_counts_where_less_is_better(tmp_path, weights, kinds, expected):
    share = {"reward": "a", "threshold": 0.5, "kind": "<=", "probability": 0.1}
    bounds = [{"reward": name, "threshold": 1.0, "kind": kind} for name, kind in zip("ab", kinds, strict=True)]
    given = {"output_dir": str(tmp_path), "constraints": [*bounds, share]}
    args = ConstrainedPPOConfig(method="mu", objective="rewards", use_cpu=True, bf16=False, **given)
    controller = RolloutController(args, ["a", "b"])
    assert controller.directions(torch.tensor(weights)).tolist() == expected
    # Weights of rewards that the objective does not hold say nothing
    args = ConstrainedPPOConfig(method="mu", objective="kl", use_cpu=True, bf16=False, **given)
    bounded = [-1.0 if kind == "<=" else 1.0 for kind in kinds]
    assert RolloutController(args, ["a", "b"]).directions(torch.tensor(weights)).tolist() == [*bounded, 0.0]


def test_a_missing_end_is_no_gain_under_an_upper_bound(tmp_path, path):
    bound = [{"reward": "length", "threshold": 0.2, "kind": "<="}]
    settings = {"method": "mu", "constraints": bound, "calibration_samples": 0}
    plain, punished = (make(tmp_path / str(size), path, missing_eos_penalty=size, **settings) for size in (None, 2.0))
    batches = []
    for trainer in (plain, punished):
        torch.manual_seed(0)
        batches.append(rollout(trainer))
    ended = torch.isin(batches[0]["completion_ids"], torch.tensor(plain.eos_token_ids)).any(dim=1)
    difference = (batches[1]["state_returns"] - batches[0]["state_returns"])[..., :2]
    last = batches[0]["completion_mask"].sum(dim=1) - 1
    assert not ended.all()
    expected = torch.where(ended, 0.0, 2.0).unsqueeze(1) * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(difference[torch.arange(8), last], expected)


def test_old_values_are_free_when_the_parent_scores(tmp_path, path, monkeypatch):
    calls = []
    called = ForwardRecorder.__call__
    monkeypatch.setattr(ForwardRecorder, "__call__", lambda *a, **k: calls.append(1) or called(*a, **k))
    for settings, own_forwards in (({}, []), ({"num_iterations": 2}, [])):
        trainer = make(tmp_path, path, **settings)
        scored = []
        score = trainer._score
        monkeypatch.setattr(
            trainer, "_score", lambda output, score=score, scored=scored: scored.append(1) or score(output)
        )
        calls.clear()
        batch = rollout(trainer)
        assert len(calls) == 1
        assert len(scored) == ("old_per_token_logps" not in batch)
        own_forwards += scored


def test_adaptive_coefficient(tmp_path, path):
    trainer = make(tmp_path, path, max_steps=8, kl_target=1e-4, kl_step=0.5, learning_rate=1e-2)
    trainer.train()
    coefficients, divergences = logged(trainer, "kl/coef"), logged(trainer, "kl/per_token")
    assert coefficients[0] == 0.2
    for now, following, divergence in zip(coefficients, coefficients[1:], divergences, strict=False):
        error = max(-0.2, min(0.2, (divergence - 1e-4) / 1e-4))
        assert following == pytest.approx(now * (1 + 0.5 * error), rel=1e-4)
    assert coefficients[-1] > coefficients[1]


def test_updates_too_far_from_the_rollout_are_skipped(tmp_path, path):
    settings = {"num_iterations": 4, "max_steps": 8, "learning_rate": 2e-2, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tmp_path, path, **settings, early_stop_kl=1e-3, lr_scheduler_type="linear")
    trainer.train()
    skipped, moved = logged(trainer, "skipped_updates"), logged(trainer, "kl/update")
    assert skipped[0] == 0 and moved[0] < 1e-6 and skipped[4] == 0  # each rollout begins anew
    assert sum(skipped) >= 2
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{s}").lm_head.weight for s in range(1, 9)]
    for step in range(1, 8):
        assert torch.equal(weights[step], weights[step - 1]) == bool(skipped[step])


def test_ends_on_too_large_a_divergence(tmp_path, path):
    trainer = make(tmp_path, path, max_steps=40, learning_rate=5e-2, kl_coef=1e-4, kl_ceiling=0.5)
    trainer.train()
    assert trainer.state.global_step < 40
    record = json.loads((tmp_path / "stop_reason.json").read_text())
    assert record["step"] == trainer.state.global_step and "above `kl_ceiling=0.5`" in record["reason"]
    assert record["reason"] == trainer.stop_reason


class FallingGold:
    """Rises at the first two evaluations and falls afterwards."""

    def __init__(self):
        self.levels, self.columns = [0.1, 0.5, 0.3, 0.2, 0.1, 0.0], None
        self.calls = 0

    def __call__(self, prompts, completions, completion_ids, **columns):
        self.columns = columns
        level = self.levels[min(self.calls, 5)]
        self.calls += 1
        return [level + 0.01 * index for index in range(len(completions))]


def test_gold_metric_chooses_the_checkpoint_and_ends_the_run(tmp_path, path):
    gold = FallingGold()
    data = prompts(8).add_column("act", list(range(8)))
    trainer = make(
        tmp_path, path, max_steps=12, gold_patience=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, save_total_limit=1,
        trainer_arguments={"gold_reward": gold, "eval_dataset": data},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.num_gold_evaluations == 4
    assert logged(trainer, "eval_gold") == pytest.approx([0.135, 0.535, 0.335, 0.235])
    assert "has not risen above 0.535 for 2 evaluations" in trainer.stop_reason
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(trainer.model.lm_head.weight, best.lm_head.weight)
    assert sorted(gold.columns["act"]) == list(range(8)) and "trainer_state" in gold.columns
    assert "gold" not in json.dumps(logged(trainer, "rewards/low_ids/mean"))


def test_gold_is_measured_on_the_evaluation_data_only(tmp_path, path):
    gold = FallingGold()
    trainer = make(tmp_path, path, trainer_arguments={"gold_reward": gold, "eval_dataset": prompts(8)})
    trainer.train()
    assert gold.calls == 0
    assert trainer.evaluate()["eval_gold"] > 0 and gold.calls == 1
    assert trainer.num_gold_evaluations == 0  # none while training


def test_ends_before_a_loss_that_is_not_finite_moves_anything(tmp_path, path):
    trainer = make(tmp_path, path, max_steps=5, trainer_arguments={"eval_dataset": prompts(8)})
    mix = trainer.controller.mix

    def broken(*arguments):
        return mix(*arguments) * (float("nan") if trainer.state.global_step == 2 else 1.0)

    trainer.controller.mix = broken
    with pytest.raises(ArithmeticError, match="not finite at step 2"):
        trainer.train()
    assert trainer.state.global_step == 2 and "not finite at step 2" in trainer.stop_reason
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert "not finite" in json.loads((tmp_path / "stop_reason.json").read_text())["reason"]


def nothing(completion_ids, **columns):
    return [float("nan") for _ in completion_ids]


def short(completion_ids, **columns):
    return [0.0]


def test_constant_reward_is_no_nan(tmp_path, path):
    def constant(completion_ids, **columns):
        return [1.0 for _ in completion_ids]

    settings = {
        **XI,
        "constraints": [{"reward": "constant", "threshold": 0.5}, {"reward": "low_ids", "threshold": 0.7}],
    }
    trainer = make(tmp_path, path, rewards=[constant, low_ids], max_steps=3, **settings)
    trainer.train()
    assert all(value == value for value in logged(trainer, "loss"))
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ({"gold_reward": low_ids}, {}, "no `eval_dataset`"),
        ({}, {"gold_patience": 2}, "`gold_patience=2` needs a gold metric"),
        ({}, {"vf_coef": [1.0, 1.0, 1.0]}, "3 numbers and there are 2 rewards"),
    ],
)
def test_wrong_arguments(arguments, settings, message, tmp_path, path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path, trainer_arguments=arguments, **settings)


@pytest.mark.parametrize(("reward", "message"), [(nothing, "'nothing'.*NaN"), (short, "returned 1 rewards, but 8")])
def test_wrong_rewards(reward, message, tmp_path, path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, path, rewards=[reward]).train()


def test_wrong_gold_metric(tmp_path, path):
    trainer = make(tmp_path, path, trainer_arguments={"gold_reward": short, "eval_dataset": prompts(8)})
    with pytest.raises(ValueError, match=r"`gold_reward` returned \[0.0\] for 8 completions"):
        trainer.evaluate()


def test_everything_logged_is_a_finite_number_of_the_whole_rollout(tmp_path, path):
    """The official code logs NaN for losses that it never appends, and the violation of the last minibatch only."""
    trainer = make(
        tmp_path, path, max_steps=4, steps_per_generation=2, num_iterations=2, eval_strategy="steps", eval_steps=2,
        trainer_arguments={"eval_dataset": prompts(8)}, **XI,
    )  # fmt: skip
    trainer.train()
    for entry in trainer.state.log_history:
        numbers = {key: value for key, value in entry.items() if isinstance(value, float)}
        assert numbers and all(torch.tensor(value).isfinite() for value in numbers.values()), entry
    first = trainer.state.log_history[0]
    assert first["violation/low_ids"] == pytest.approx(0.7 - first["rewards/low_ids/mean"], abs=1e-6)
    for name in ("relative_violation", "multiplier", "weight", "saturation", "oscillation", "average"):
        assert f"{name}/low_ids" in first
    assert {"eval_violation/low_ids", "eval_kl/per_token"} <= trainer.state.log_history[2].keys()
    assert glossary.unknown(trainer.state.log_history) == set()


def test_only_a_recipe_that_says_so_searches():
    """The official recipe of one method turns on another."""
    folder = Path(trl_ext.__file__).parents[1] / "recipes" / "constrained_ppo"
    searching = [path.name for path in folder.glob("*.yaml") if yaml.safe_load(path.read_text()).get("search")]
    assert all("search" in name or "nelder" in name or "nm" in name for name in searching), searching
