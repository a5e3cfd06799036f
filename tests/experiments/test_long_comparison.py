"""The long comparison on the playground: equal tuning, what its table says, and one measurement by hand."""

import pytest

from recipes.experiments.constrained_ppo_playground import long_run, long_run_report
from recipes.experiments.constrained_ppo_playground.arms import (
    ARMS,
    BEFORE,
    CONTROLLERS,
    NUM_TRIALS,
    Arm,
    proxy_ensemble,
    share_deviations,
)
from recipes.experiments.constrained_ppo_playground.long_run import GoldCurve, LongRunArguments, chosen_trial
from recipes.experiments.method_comparison import Task
from tests.helpers.tiny import save_tiny_model, tiny_pairs


def good(completions, **columns):
    return [float(text.split().count("good")) for text in completions]


def config(folder, **settings):
    path = "recipes/experiments/constrained_ppo_playground/long_run.yaml"
    arguments = ["--config", path, "--output_dir", str(folder)]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return long_run.make_parser().parse_args_and_config(arguments)[0]


def test_every_method_has_as_many_trials_and_a_valid_configuration(tmp_path):
    base = config(tmp_path)
    for name, arm in {**ARMS, **CONTROLLERS}.items():
        has_choice = name in ARMS and name != "ppo, equal weights"
        assert len(arm.trials) == (NUM_TRIALS if has_choice else 1)
        for trial in arm.trials:
            args = long_run.configured(arm.config, base, 3, trial, group_size=8)
            assert (args.seed, args.max_steps, args.learning_rate, args.warmup_steps) == (3, 128, 0.8, 8)
            has_group = name in ("GRPO", "GDPO", "constrained GRPO")
            assert args.num_generations == (8 if has_group else 1)
    with pytest.raises(ValueError, match="`trials` must be 4, or 1"):
        Arm(object, object, ({}, {}))


def test_the_ensemble_is_as_cautious_as_its_worse_member():
    """With the weights 1 and -1 of mean and disagreement, two members count as the lower of them."""
    both, disagreement = proxy_ensemble()
    given = {"prompts": ["a"] * 2, "completions": ["superb superb plot", "the plot"], "chosen": ["the plot"] * 2}
    shares = share_deviations(given["completions"])
    assert shares == pytest.approx([(2 / 3 - BEFORE[0][0]) / BEFORE[0][1], -BEFORE[0][0] / BEFORE[0][1]])
    scores = both.scores(**given)
    cautious = [mean - error for mean, error in zip(both(**given), disagreement(**given), strict=True)]
    assert cautious == pytest.approx(scores.min(dim=1).values.tolist(), abs=1e-5)


def test_the_trial_is_chosen_on_validation_prompts_of_the_tuning_seed():
    def result(seed, trial, validation, test):
        points = [
            {"step": step, "validation/gold": value, "test/gold": test}
            for step, value in zip((0, 32, 128), validation, strict=True)
        ]
        return {"name": "xi", "seed": seed, "trial": trial, "curve": points}

    results = [result(100, 0, (9, 0.7, 0.0), 0.9), result(100, 1, (0, 0.5, 0.4), 0.1), result(0, 2, (9, 9, 9), 0.9)]
    assert [chosen_trial(results, "xi", 100, horizon) for horizon in (32, 128)] == [0, 1]
    assert chosen_trial(results, "mu", 100, 128) == 0
    arguments = LongRunArguments(num_trials=2)
    assert long_run.trials_of("xi", arguments) == [("xi", 100, 0), ("xi", 100, 1)]
    assert long_run.trials_of("ppo, equal weights", arguments) == []


def test_one_run_serves_both_horizons_where_they_choose_the_same(tmp_path, monkeypatch):
    done = []

    def train(task, config, arguments, name, seed, trial, steps):
        done.append((name, seed, trial, steps))
        # At 32 updates the second trial is better, at 128 the first; of mu the first at both
        early = trial if name == "xi" else -trial
        points = [{"step": step, "validation/gold": gold} for step, gold in ((0, 0), (32, early), (128, -5.0 * trial))]
        return {"name": name, "seed": seed, "trial": trial, "steps": steps, "curve": points}

    monkeypatch.setattr(long_run, "train", train)
    arguments = LongRunArguments(arms=["xi", "mu"], num_trials=2, seeds=[0])
    long_run.run_missing(None, None, arguments, tmp_path)
    assert done[:4] == [(name, 100, trial, 128) for name in ("xi", "mu") for trial in (0, 1)]
    assert done[4:] == [("xi", 0, 0, 128), ("xi", 0, 1, 32), ("mu", 0, 0, 128)]
    long_run.run_missing(None, None, arguments, tmp_path)
    assert len(done) == 7


def run(name, seed, gold, trial=0):
    steps = (0, 32, 64, 96, 128)[: len(gold)]
    points = [
        {
            "step": step, "test/gold": value, "validation/gold": value, "test/positive_word_share": 0.2,
            "test/reference_similarity": 0.8, "test/kl": 10.0,
        }
        for step, value in zip(steps, gold, strict=True)
    ]  # fmt: skip
    found = {"name": name, "seed": seed, "trial": trial, "steps": steps[-1], "settings": {}, "curve": points}
    return {**found, "cpu_seconds": 20.0}


def test_report(tmp_path):
    """Tuned weights fall to nothing after update 64; what was kept of them does not."""
    results = [run("xi", 0, [0.5, 0.6, 0.7, 0.8, 0.6]), run("xi", 1, [0.5, 0.8, 0.7, 0.7, 0.8])]
    results += [run("xi", seed, [0.5, 0.85], trial=1) for seed in (0, 1)]
    results += [run("tuned", seed, [0.5, 0.8, 0.75, 0.0, 0.0]) for seed in (0, 1)]
    chosen = {("xi", 32): 1, ("xi", 128): 0, ("tuned", 32): 0, ("tuned", 128): 0}
    trials = [run("xi", 100, [0.5] * 5)]
    text = long_run_report.write_report(results, trials, chosen, [32, 128], tmp_path, long_run.mean_gold)
    assert "| xi | 0.850 ± 0.000 | 0.700 ± 0.100 | 0.717 ± 0.017 | 0.600 | 0.800 ± 0.000 |" in text
    assert "| tuned | 0.800 ± 0.000 | 0.000 ± 0.000 | 0.250 ± 0.000 | 0.000 | 0.800 ± 0.000 |" in text
    assert "| 0.500 | **0.500** |" in text
    assert (tmp_path / "long_run.png").stat().st_size > 1000


def test_both_splits_are_measured_on_the_policy_as_it_is(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    data = tiny_pairs(8)
    task = Task(model, data, data.select(range(3)), data.select(range(3, 8)), (good,), lambda completions, **_: [
        float(len(text)) for text in completions
    ])  # fmt: skip
    curve = GoldCurve(task, every=2, length=4)
    for step in (0, 1, 2):
        curve.measure(curve.reference, step) if step == 0 else curve.on_step_end(
            None, type("State", (), {"global_step": step}), None, model=curve.reference
        )
    assert [point["step"] for point in curve.points] == [0, 2]
    assert set(curve.points[0]) == {
        "step", *(f"{split}/{name}" for split in ("validation", "test") for name in ("gold", "kl", "good"))
    }  # fmt: skip
    assert curve.points[0]["test/kl"] == pytest.approx(0.0, abs=1e-6)
