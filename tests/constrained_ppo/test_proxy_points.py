import json
import math
import re
import sys

import numpy as np
import pytest
import yaml

from trl_ext import ConstrainedPPOConfig, cli
from trl_ext.constrained_ppo.proxy_points import fit
from trl_ext.constrained_ppo.proxy_points.fit import DensityMask, NoJointSurface, find_peak
from trl_ext.constrained_ppo.proxy_points.logged_runs import read_runs
from trl_ext.constrained_ppo.proxy_points.surrogates import GaussianProcess, Polynomial


PEAK = np.array([0.23, 0.48])


def gold_of(rewards):
    """A hill at `PEAK`, whose ridge is not along the axes: along one reward it is highest elsewhere."""
    x, y = ((rewards - PEAK) / [0.1, 0.2]).T
    return 1 - x**2 - y**2 + 0.8 * x * y


def run_points(seed, toward, count=25, noise=0.0):
    """Rewards of a run that starts at (0.15, 0.35) and goes `toward` a point, with its gold metric."""
    generator = np.random.default_rng(seed)
    share = np.linspace(0, 1, count)[:, None]
    rewards = np.array([0.15, 0.35]) + share * (np.array(toward) - [0.15, 0.35])
    rewards = rewards + 0.015 * generator.standard_normal((count, 2)) * [1, 2]
    return rewards, gold_of(rewards) + noise * generator.standard_normal(count)


def write_run(folder, rewards, gold, names=("meteor", "intent"), kl=True, **state):
    history = [{"loss": 0.1, "step": 1}]
    for index, (row, value) in enumerate(zip(rewards, gold, strict=True)):
        step = 10 * index
        entry = {f"eval_rewards/{name}/mean": float(v) for name, v in zip(names, row, strict=True)}
        history.append({**entry, **({"eval_kl/per_response": 0.5 * index} if kl else {}), "step": step})
        history.append({"eval_gold": float(value), "step": step})
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": 10 * len(gold), "log_history": history, **state}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


TARGETS = [(0.35, 0.45), (0.22, 0.72), (0.32, 0.66), (0.3, 0.35), (0.15, 0.6), (0.25, 0.5)]


def pooled(noise=0.0):
    parts = [run_points(seed, toward, noise=noise) for seed, toward in enumerate(TARGETS)]
    run = np.repeat(np.arange(len(parts)), [len(gold) for _, gold in parts])
    return np.vstack([rewards for rewards, _ in parts]), np.concatenate([gold for _, gold in parts]), run


@pytest.fixture
def folders(tmp_path):
    return [
        write_run(tmp_path / f"run_{seed}", *run_points(seed, toward, noise=0.03))
        for seed, toward in enumerate(TARGETS)
    ]


@pytest.mark.parametrize("surrogate", [Polynomial(2), Polynomial(3), Polynomial(10), GaussianProcess()], ids=str)
def test_joint_peak_of_a_known_surface(surrogate):
    points, gold, run = pooled()
    peak = find_peak(points, gold, run, surrogate, DensityMask(points), num_resamples=0)
    np.testing.assert_allclose(peak.point, PEAK, atol=0.008)
    assert peak.gold == pytest.approx(1.0, abs=0.02) and not peak.at_edge and math.isnan(peak.edge_share)


def test_polynomial_equals_numpy_and_the_formula():
    generator = np.random.default_rng(0)
    x = generator.random((40, 1)) * 3 - 7
    values = np.sin(x[:, 0]) + 0.1 * generator.standard_normal(40)
    at = np.linspace(-7, -4, 9)[:, None]
    expected = np.polynomial.Polynomial.fit(x[:, 0], values, 4)(at[:, 0])
    np.testing.assert_allclose(Polynomial(4).fit(x, values)(at), expected, atol=1e-10)
    points = generator.random((60, 2))
    values = generator.standard_normal(60)
    monomials = [lambda p, i=i, j=j: p[:, 0] ** i * p[:, 1] ** j for i in range(4) for j in range(4 - i)]
    assert len(monomials) == Polynomial(3).num_coefficients(2) == 10
    design = np.stack([m(points) for m in monomials], axis=1)
    solution = np.linalg.lstsq(design, values, rcond=None)[0]
    at = generator.random((7, 2))
    expected = np.stack([m(at) for m in monomials], axis=1) @ solution
    np.testing.assert_allclose(Polynomial(3).fit(points, values)(at), expected, atol=1e-9)
    assert Polynomial(10).num_coefficients(2) == 66


def test_joint_peak_differs_from_independent_ones():
    """Figure 3.1 of the paper: the rewards are correlated, and gold along one reward mixes in the other."""
    points, gold, run = pooled()
    joint = find_peak(points, gold, run, Polynomial(3), DensityMask(points), num_resamples=0).point
    low = points[:, 1] > 0.45  # runs in which intent is high have their best METEOR higher
    one = find_peak(points[low][:, :1], gold[low], run[low], Polynomial(3), DensityMask(points[low][:, :1]), 0).point
    assert one[0] > joint[0] + 0.01


def test_mask_never_extrapolates():
    generator = np.random.default_rng(0)
    bend = np.vstack([np.column_stack([np.linspace(0, 1, 60), np.zeros(60)]),
                      np.column_stack([np.zeros(60), np.linspace(0, 1, 60)])])  # fmt: skip
    points = bend + 0.02 * generator.standard_normal(bend.shape)
    mask = DensityMask(points)
    assert mask(np.array([[0.5, 0.0], [0.0, 0.5]])).all()
    outside = np.array([[0.9, 0.9], [0.45, 0.45], [1.2, 0.0], [-0.2, 0.0]])  # (0.45, 0.45) is within the hull
    assert not mask(outside).any()
    assert mask.at_edge(points[[np.argmax(points[:, 0])]]).all()
    rising = points.sum(axis=1)
    peak = find_peak(points, rising, np.zeros(120), Polynomial(2), mask, num_resamples=0)
    assert mask(peak.point[None]).all() and peak.at_edge
    assert (
        np.isnan(peak.fitted[~mask(peak.candidates)]).all() and np.isfinite(peak.fitted[mask(peak.candidates)]).all()
    )


def test_absolute_density():
    points = np.random.default_rng(0).random((400, 2)) * [0.1, 0.2]  # 20,000 for each unit of area
    assert DensityMask(points, density=50)(points).all()
    assert 0.2 < DensityMask(points, density=20_000)(points).mean() < 0.9
    with pytest.raises(ValueError, match="`density=60000` is reached nowhere: the highest"):
        DensityMask(points, density=60_000)


@pytest.mark.parametrize(("slope", "edge"), [(0.0, False), (4.0, True)])
def test_peak_at_the_edge_is_flagged(slope, edge):
    x = np.linspace(0, 1, 60)[:, None]
    gold = -((x[:, 0] - 0.5) ** 2) + slope * x[:, 0]
    peak = find_peak(x, gold, np.zeros(60), Polynomial(3), DensityMask(x), num_resamples=50)
    assert peak.at_edge == edge and peak.edge_share == float(edge)
    assert peak.point[0] == pytest.approx(1.0 if edge else 0.5, abs=0.01)


def test_bootstrap_interval_covers_the_peak_and_counts_runs():
    covered, widths = 0, []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        run = np.repeat(np.arange(5), 16)
        peaks = 0.5 + 0.05 * generator.standard_normal(5)[run]  # the runs differ, so points alone would not do
        x = np.tile(np.linspace(0, 1, 16), 5)[:, None]
        gold = -((x[:, 0] - peaks) ** 2) + 0.02 * generator.standard_normal(80)
        by_run = find_peak(x, gold, run, Polynomial(2), DensityMask(x), 100, seed=seed)
        by_point = find_peak(x, gold, np.zeros(80), Polynomial(2), DensityMask(x), 100, seed=seed)
        covered += by_run.interval[0, 0] <= 0.5 <= by_run.interval[1, 0]
        widths.append(np.ptp(by_run.interval) / np.ptp(by_point.interval))
    assert covered >= 15 and np.mean(widths) > 1.2


def test_resample():
    run = np.array([0, 0, 0, 1, 1, 2])
    seen = set()
    for seed in range(60):
        rows = fit.resample(run, np.random.default_rng(seed))
        drawn = run[rows]
        sizes = {0: 3, 1: 2, 2: 1}
        assert all((drawn == one).sum() % sizes[one] == 0 for one in set(drawn))
        assert sum((drawn == one).sum() // sizes[one] for one in sizes) == 3
        seen.add(tuple(sorted(rows)))
    assert len(seen) > 30


@pytest.mark.parametrize("num_rewards", [3, 4, 5])
def test_more_rewards(num_rewards):
    generator = np.random.default_rng(0)
    points = generator.random((400, num_rewards))
    gold = -((points - 0.45) ** 2).sum(axis=1)
    peak = find_peak(points, gold, np.zeros(400), Polynomial(2), DensityMask(points), num_resamples=3)
    np.testing.assert_allclose(peak.point, 0.45, atol=0.1)
    assert not peak.at_edge


def test_correlations_by_hand():
    points = np.array([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0], [4.0, 16.0]])
    ((pair, (pearson, spearman)),) = fit.correlations(["a", "b"], points).items()
    assert pair == ("a", "b") and spearman == pytest.approx(1.0) and pearson == pytest.approx(0.98437404)


def test_block_is_a_recipe(tmp_path):
    block = fit.constraints_block(["meteor", "intent"], [0.234567, 0.48], comments=["from\nruns"])
    assert block.startswith("# from\n# runs\nconstraints:\n")
    parsed = yaml.safe_load(block)
    assert parsed["constraints"][0] == {"reward": "meteor", "threshold": 0.2346}
    config = ConstrainedPPOConfig(output_dir=str(tmp_path), method="xi", use_cpu=True, bf16=False, **parsed)
    assert [constraint.threshold for constraint in config.parsed_constraints()] == [0.2346, 0.48]
    assert yaml.safe_load(fit.constraints_block(["a"], [1.0], ">="))["constraints"][0]["kind"] == ">="


def test_the_command(folders, tmp_path, capsys):
    out = tmp_path / "out"
    status = cli.main(["proxy-points", "--runs", *folders, "--output_dir", str(out), "--num_resamples", "40"])
    printed = capsys.readouterr().out
    assert status == 0 and "Correlation of meteor and intent" in printed and "constraints:" in printed
    for name in ("meteor", "intent", "kl", "joint_surface"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "proxy_points.json").read_text())
    np.testing.assert_allclose(summary["joint"]["point"], PEAK, atol=0.03)
    assert summary["num_measurements"] == 150 and summary["joint"]["num_resamples"] == 40
    for axis in (0, 1):
        assert summary["joint"]["interval"][0][axis] <= summary["joint"]["point"][axis]
    written = yaml.safe_load((out / "constraints.yaml").read_text())["constraints"]
    assert [entry["threshold"] for entry in written] == pytest.approx(summary["joint"]["point"], rel=1e-3)
    assert "joint" in printed and "independent" in printed


def test_the_command_with_a_gaussian_process_and_assigned_runs(folders, tmp_path, capsys):
    out = tmp_path / "out"
    runs = [f"meteor={folders[0]}", f"intent={folders[1]}", *folders[2:]]
    options = ["--surrogate", "gaussian-process", "--num_resamples", "5", "--kind", ">="]
    assert cli.main(["proxy-points", "--runs", *runs, "--output_dir", str(out), *options]) == 0
    summary = json.loads((out / "proxy_points.json").read_text())
    np.testing.assert_allclose(summary["joint"]["point"], PEAK, atol=0.03)
    rewards, _ = run_points(0, TARGETS[0], noise=0.03)
    assert rewards[:, 0].min() <= summary["independent"]["meteor"]["point"][0] <= rewards[:, 0].max()
    assert yaml.safe_load((out / "constraints.yaml").read_text())["constraints"][0]["kind"] == ">="


def test_one_reward_and_rewards_that_move_together(tmp_path, capsys):
    rewards, gold = run_points(0, (0.35, 0.45))
    single = write_run(tmp_path / "single", rewards[:, :1], gold, names=("meteor",), kl=False)
    out = tmp_path / "out"
    assert cli.main(["proxy-points", "--runs", single, "--output_dir", str(out), "--num_resamples", "5"]) == 0
    printed = capsys.readouterr().out
    assert "No joint surface. A joint surface takes at least two rewards, and the runs have ['meteor']" in printed
    assert "One run" in printed and not (out / "joint_surface.png").exists() and not (out / "kl.png").exists()
    assert yaml.safe_load((out / "constraints.yaml").read_text())["constraints"][0]["reward"] == "meteor"
    with pytest.raises(NoJointSurface, match="at least two"):
        fit.check_joint(["meteor"])
    together = np.column_stack([rewards[:, 0], 2 * rewards[:, 0] + 1])
    run = write_run(tmp_path / "together", together, gold)
    assert cli.main(["proxy-points", "--runs", run, "--output_dir", str(out), "--num_resamples", "5"]) == 0
    assert "No joint surface. The 25 points of 2 rewards lie on a line" in capsys.readouterr().out


def test_reading_prefers_the_furthest_state_and_other_keys(tmp_path):
    rewards, gold = run_points(0, (0.35, 0.45), count=6)
    for count, name in ((3, "checkpoint-30"), (6, "checkpoint-60")):
        write_run(tmp_path / "run" / name, rewards[:count], gold[:count])
    measured = read_runs([tmp_path / "run"])
    np.testing.assert_allclose(measured.rewards, rewards)
    np.testing.assert_allclose(measured.gold, gold)
    assert measured.names == ["meteor", "intent"] and measured.step.tolist() == [0, 10, 20, 30, 40, 50]
    np.testing.assert_allclose(measured.kl, 0.5 * np.arange(6))
    assert len(read_runs([tmp_path / "run" / "checkpoint-30"]).gold) == 3
    state = json.loads((tmp_path / "run" / "checkpoint-30" / "trainer_state.json").read_text())
    state["log_history"] = [
        {"eval_score": 1.0, "eval_m": 0.2, "step": 1}, {"eval_score": math.nan, "eval_m": 0.3, "step": 2}
    ]  # fmt: skip
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 99}))
    measured = read_runs([tmp_path / "run"], ["m"], gold_key="eval_score", reward_key="eval_{}")
    assert measured.rewards.tolist() == [[0.2]] and np.isnan(measured.kl).all()


def test_wrong_input(folders, tmp_path, capsys):
    rewards, gold = run_points(0, (0.35, 0.45), count=6)
    flat = rewards.copy()
    flat[:, 1] = 0.4
    few = write_run(tmp_path / "few", rewards, gold)
    no_gold = write_run(tmp_path / "no_gold", rewards, gold)
    text = (tmp_path / "no_gold" / "trainer_state.json").read_text().replace("eval_gold", "eval_loss")
    (tmp_path / "no_gold" / "trainer_state.json").write_text(text)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "trainer_state.json").write_text(text[:100])
    (tmp_path / "empty").mkdir()
    other = write_run(tmp_path / "other", rewards, gold, names=("bleu", "rouge"))
    part = write_run(tmp_path / "part", rewards[:, :1], gold, names=("meteor",))
    for arguments, message in (
        ([str(tmp_path / "empty")], r"empty has no trainer_state.json.*save_strategy"),
        ([str(tmp_path / "cut")], "no whole trainer state"),
        ([no_gold], "no evaluation with the gold metric `eval_gold`.*gold_key.*eval_loss"),
        ([few, few], "names a folder twice"),
        ([few, other], "no reward in common"),
        ([folders[0], part, "--rewards", "intent"], r"part has no rewards \['intent'\].*\['meteor'\]"),
        ([few], r"`degree=3` has 10 coefficients for 2 rewards, and there are 6 distinct points.*Lower the degree"),
        ([*folders, "--degree", "20"], r"`degree=20` has 231 coefficients .*150 distinct points"),
        ([write_run(tmp_path / "flat", flat, gold)], r"\['intent'\] do not vary over the 6 evaluations"),
        ([*folders, "--degree", "1"], "`degree` must be at least 2.*got 1"),
        ([*folders, "--relative_density", "1.0"], r"`relative_density` must lie in \[0, 1\).*1.0"),
        ([*folders, "--confidence", "95"], r"`confidence` must lie in \(0, 1\).*95"),
        ([*folders, "--reward_key", "eval_rewards"], "`reward_key` must have one pair of braces"),
        ([f"bleu={folders[0]}"], r"assigns runs to \['bleu'\], and the rewards are \['meteor', 'intent'\]"),
    ):
        assert cli.main(["proxy-points", "--output_dir", str(tmp_path / "out"), "--runs", *arguments]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`runs` is empty"):
        read_runs([])
    with pytest.raises(SystemExit):
        cli.main(["proxy-points"])
    assert "--runs" in capsys.readouterr().err


def test_without_scikit_learn(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    arguments = ["--runs", *folders, "--surrogate", "gaussian-process", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["proxy-points", *arguments]) == 2
    assert 'pip install "trl-ext[proxy-points]"' in capsys.readouterr().err
