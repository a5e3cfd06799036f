"""The comparison of methods: plan, runs, proxy points and report, on a tiny model."""

import json
from dataclasses import replace

import pytest

from recipes.experiments import method_comparison, method_comparison_report
from recipes.experiments.constrained_ppo_dailydialog import run as dialog_comparison
from recipes.experiments.constrained_ppo_dailydialog.evaluation import evaluation_score
from recipes.experiments.method_comparison import (
    ComparisonArguments,
    Run,
    Task,
    alone,
    best_tuning,
    compare,
    configured,
    first_runs,
    later_runs,
    proxy_points,
    run_all,
    train,
    tuning_runs,
)
from tests.helpers.tiny import save_tiny_model, tiny_pairs


def good(completions, **columns):
    return [float(text.split().count("good")) / 10 for text in completions]


def length(completions, **columns):
    return [len(text.split()) / 10 for text in completions]


def gold(completions, **columns):
    return [g - 4 * (g - 0.1) ** 2 - n / 10 for g, n in zip(good(completions), length(completions), strict=True)]


NAMES = ["good", "length"]


def make_task(arguments):
    data = tiny_pairs(16)
    return Task(arguments.model, data, data.select(range(8)), data.select(range(8, 16)), (good, length), gold)


def config(folder, **settings):
    from trl_ext import ConstrainedPPOConfig

    defaults = {
        "method": "ppo", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_steps": 2,
        "max_completion_length": 5, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "use_cpu": True,
        "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "logging_steps": 1,
        "calibration_samples": 0, "dashboard": False, "kl_coef": 0.05,
    }  # fmt: skip
    return ConstrainedPPOConfig(output_dir=str(folder), **{**defaults, **settings})


def tiny_task(tmp_path):
    arguments = ComparisonArguments(seeds=[0], weight_grid=[0.0, 0.25], kl_grid=[0.01])
    arguments.model = save_tiny_model(tmp_path / "model")
    return make_task(arguments), arguments


def result(name, seed, values, end=0.3):
    curve = [
        {"step": step, "gold": value, "kl": float(step), "length": 3.0, "good": value / 2, "length_reward": 0.1}
        for step, value in enumerate(values)
    ]
    test = {**curve[-1], "gold": end}
    return {"name": name, "seed": seed, "curve": curve, "test": test, "cpu_seconds": 6.0, "settings": {"seed": seed}}


def test_plan_has_equal_compute_and_every_method(tmp_path):
    task, arguments = tiny_task(tmp_path)
    arguments = replace(arguments, seeds=[0, 1])
    first = first_runs(task, config(tmp_path), arguments)
    names = [run.name for run in first]
    assert names.count(alone("good")) == names.count(alone("length")) == names.count("ppo") == 2
    assert sum(name.startswith("tuning") for name in names) == 2
    assert first[1].settings["reward_weights"] == [0.0, 1.0] and first[1].settings["kl_coef"] < 1e-5
    finished = [
        {**result(f"tuning {weight} 0.01", 0, [0.0, value]), "settings": {"reward_weights": [1.0 - weight, weight]}}
        for weight, value in ((0.0, 0.2), (0.25, 0.4))
    ]
    assert best_tuning(finished)["name"] == "tuning 0.25 0.01"
    later = later_runs(task, config(tmp_path), arguments, {"good": 0.2, "length": 0.4}, finished)
    by_name = {run.name: run.settings for run in later}
    assert set(by_name) == {method_comparison.TUNED, "sat", "all", "mu", "xi", "ppo-lag", "NM"}
    assert by_name[method_comparison.TUNED]["reward_weights"] == [0.75, 0.25]
    assert [tuple(one.values()) for one in by_name["xi"]["constraints"]] == [("good", 0.2), ("length", 0.4)]
    assert by_name["NM"]["method"] == "xi" and by_name["NM"]["max_steps"] == 4
    for run in later:
        settings = configured(config(tmp_path), run, tmp_path / "run")
        assert settings.seed == run.seed and settings.kl_coef == by_name[run.name].get("kl_coef", 0.05)
    assert configured(config(tmp_path), later[3], tmp_path).whitening == "spread"
    with pytest.raises(ValueError, match="equal compute"):
        tuning_runs(task, replace(arguments, weight_grid=[0.0, 0.1, 0.2, 0.3, 0.4]))


def test_a_run_is_measured_on_both_splits(tmp_path):
    task, _ = tiny_task(tmp_path)
    constraints = [{"reward": name, "threshold": 0.2} for name in NAMES]
    found = train(task, config(tmp_path), Run("xi", 3, {"method": "xi", "constraints": constraints}), tmp_path / "run")
    assert [point["step"] for point in found["curve"]] == [0, 1, 2]
    assert found["test"]["step"] == 2 and {"gold", "kl", *NAMES} <= set(found["test"])
    assert found["multipliers"]["num_updates"] == 2 and set(found["average"]) == {*NAMES, "kl"}
    again = train(task, config(tmp_path), Run("xi", 3, {"method": "xi", "constraints": constraints}), tmp_path / "run")
    assert again["curve"] == found["curve"] and again["test"] == found["test"]
    json.dumps(found)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_gold" in entry for entry in state["log_history"]) >= 3  # `trl-ext proxy-points` reads it


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    (tmp_path / "runs.jsonl").write_text(json.dumps(result("ppo", 0, [0.1, 0.2])) + "\n")

    def no_pool(*arguments, **keywords):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(method_comparison, "ProcessPoolExecutor", no_pool)
    assert run_all(make_task, None, None, [Run("ppo", 0, {})], tmp_path)[0]["name"] == "ppo"
    with pytest.raises(AssertionError, match="nothing is missing"):
        run_all(make_task, ComparisonArguments(), None, [Run("ppo", 1, {})], tmp_path)


def alone_runs():
    """Two runs on each reward alone with gold highest at 0.3 and 0.2."""
    results = []
    for seed in range(3):
        for index, name in enumerate(NAMES):
            points = []
            for step in range(12):
                rewards = [0.1, 0.1]
                rewards[index] = 0.05 * step
                rewards[1 - index] = 0.02 * ((step * 7 + seed) % 5)
                value = 1 - (rewards[0] - 0.3) ** 2 - (rewards[1] - 0.2) ** 2
                points.append(
                    {"step": step, "gold": value, "kl": 1.0 * step, **dict(zip(NAMES, rewards, strict=True))}
                )
            results.append({"name": alone(name), "seed": seed, "curve": points, "test": points[-1], "cpu_seconds": 6})
    return results


def test_proxy_points_are_where_gold_peaks(tmp_path):
    thresholds = proxy_points(alone_runs(), NAMES, tmp_path / "points", degree=2)
    assert list(thresholds) == NAMES
    assert (tmp_path / "points" / "constraints.yaml").is_file()
    report = json.loads((tmp_path / "points" / "proxy_points.json").read_text())
    assert report["independent"]["good"]["point"][0] == pytest.approx(0.3, abs=0.02)
    assert report["independent"]["length"]["point"][0] == pytest.approx(0.2, abs=0.02)


def test_whole_experiment(tmp_path, monkeypatch):
    """Later runs get the thresholds of the first ones, whose gold metric may come after them."""
    trained = []

    def instead_of_training(make_task, arguments, config, runs, folder):
        for run in runs:
            own = [found for found in alone_runs() if (found["name"], found["seed"]) == (run.name, run.seed)]
            trained.append({**result(run.name, run.seed, [0.1, 0.2]), "length": 3.0, **(own[0] if own else {})})
            trained[-1]["settings"] = run.settings
        return trained

    def rescore(folder, names):
        return [{**one, "curve": [{**p, "gold": p["gold"] + 1} for p in one["curve"]]} for one in trained]

    monkeypatch.setattr(method_comparison, "run_all", instead_of_training)
    _, arguments = tiny_task(tmp_path)
    arguments.seeds, arguments.methods = [0, 1, 2], ["xi"]
    seen = {}
    for offset, own in ((0, None), (1, rescore)):
        trained.clear()
        compare(make_task, arguments, config(tmp_path), tmp_path, "name of the metric", own)
        thresholds = json.loads((tmp_path / "thresholds.json").read_text())
        constraints = trained[-1]["settings"]["constraints"]
        assert trained[-1]["name"] == "xi" and {one["reward"]: one["threshold"] for one in constraints} == thresholds
        seen[offset] = json.loads((tmp_path / "proxy_points" / "proxy_points.json").read_text())["independent"]
        assert thresholds["good"] == pytest.approx(0.3, abs=0.02)
    assert seen[1]["good"] != seen[0]["good"]
    text = (tmp_path / "results.md").read_text()
    assert "| xi |" in text and "above it on" in text and "The runs of this call took" in text
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("methods.png", "overoptimization.png"))


def test_report_by_hand(tmp_path):
    results = [
        result("ppo", 0, [0.1, 0.5, 0.3], end=0.2), result("ppo", 1, [0.1, 0.7, 0.3], end=0.4),
        result("xi", 0, [0.1, 0.5, 0.6], end=0.5), result("xi", 1, [0.1, 0.5, 0.6], end=0.7),
        result("tuning 0 0.01", 0, [0.1, 0.2], end=0.1),
    ]  # fmt: skip
    rows = method_comparison_report.method_table(results, ["good"]).splitlines()
    assert len(rows) == 4
    # Ends 0.2 and 0.4: mean 0.3, standard error 0.1; bests 0.5 and 0.7; averages 0.4 and 0.5 without the start
    assert rows[2] == "| ppo | 0.300 ± 0.100 | 0.600 ± 0.100 | 0.450 ± 0.050 | 0.150 ± 0.000 | 2.0 ± 0.0 | 2 |"
    assert "| xi | 0.300 ± 0.000 | 2 of 2 seeds |" in method_comparison_report.paired_differences(results, "ppo")
    assert "5 runs, 0.5 minutes of CPU time: 0.2 minutes on 2" in method_comparison_report.compute_used(results, 2)
    method_comparison_report.draw_methods(results, tmp_path / "methods.png", "gold")
    method_comparison_report.draw_overoptimization(results, {"good": "ppo"}, tmp_path / "over.png", "gold")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("methods.png", "over.png"))


def test_score_of_a_set_is_normalised_over_the_runs_on_each_reward(tmp_path):
    task, _ = tiny_task(tmp_path)

    def with_references(data):
        return data.map(lambda row: {"reference": row["chosen"]})

    score = dialog_comparison.EvaluationScore(None)
    task = replace(
        task, train=with_references(task.train), validation=with_references(task.validation),
        test=with_references(task.test), gold=score,
    )  # fmt: skip
    runs = [Run(alone(name), 0, {"method": "ppo"}) for name in NAMES]
    results = [train(task, config(tmp_path), run, tmp_path / "run") for run in runs]
    # Each keeps the measures of its own evaluations: three on the validation split and one on the test split
    kept = [point["measures"] for result in results for point in (*result["curve"], result["test"])]
    assert kept == score.measured and len(kept) == 8
    assert all(point["gold"] == 0.0 for point in results[0]["curve"])
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    normalised = dialog_comparison.normalise(tmp_path, NAMES)
    ranges = json.loads((tmp_path / dialog_comparison.RANGES).read_text())
    validation = [point["measures"]["longest"] for result in results for point in result["curve"]]
    assert ranges["longest"] == [min(validation), max(validation)]
    again = dialog_comparison.EvaluationScore(ranges)
    point = normalised[1]["curve"][-1]
    assert point["gold"] == pytest.approx(evaluation_score(point["measures"], ranges))
    assert again(completions=["a good film"] * 2, reference=["a good film"] * 2) == pytest.approx(
        [evaluation_score(again.measured[0], ranges)] * 2
    )
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[1]) == normalised[1]
