"""Proxy points of a sweep of weights, and the command that makes the sweep."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import yaml

from trl_ext import cli
from trl_ext.constrained_ppo.proxy_points.fit import DensityMask
from trl_ext.constrained_ppo.proxy_points.surrogates import Polynomial
from trl_ext.scripts import sweep


BASE = np.array([0.05, 0.52])
NAMES = ("share", "similarity")


def gold_of(rewards, peak):
    """High where both rewards are; along a run that maximises one of them the other falls, and gold early with it."""
    return 0.8 - (((rewards - peak) / [0.2, 0.6]) ** 2).sum(axis=1)


def write_sweep(folder, peak, ends, noise=0.005, count=25):
    """One run to each of `ends`, on a bow, so that the runs don't lie on straight lines."""
    folders = []
    for seed, end in enumerate(ends):
        generator = np.random.default_rng(seed)
        along = np.linspace(0, 1, count)[:, None]
        rewards = BASE + along * (np.array(end) - BASE) + 0.02 * np.sin(np.pi * along) * [0.5, -1.0]
        rewards = rewards + 0.006 * generator.standard_normal((count, 2))
        gold = gold_of(rewards, peak) + noise * generator.standard_normal(count)
        run = folder / f"run_{seed}"
        run.mkdir(parents=True)
        keys = [f"eval_rewards/{name}/mean" for name in NAMES]
        history = [
            {"step": step, "eval_gold": value, **dict(zip(keys, row, strict=True))}
            for step, (row, value) in enumerate(zip(rewards.tolist(), gold.tolist(), strict=True))
        ]
        (run / "trainer_state.json").write_text(json.dumps({"global_step": count, "log_history": history}))
        folders.append(str(run))
    return folders


# From all weight on the share to all weight on the similarity
FAN = [(0.42, 0.45), (0.40, 0.62), (0.33, 0.80), (0.24, 0.95), (0.12, 1.0), (0.0, 0.9)]


def proxy_points(folders, out, capsys):
    assert cli.main(["proxy-points", "--runs", *folders, "--output_dir", str(out), "--num_resamples", "60"]) == 0
    return json.loads((out / "proxy_points.json").read_text()), capsys.readouterr().out


def test_peak_inside_the_sweep_that_single_rewards_miss(tmp_path, capsys):
    peak = np.array([0.19, 0.80])
    summary, printed = proxy_points(write_sweep(tmp_path, peak, FAN), tmp_path / "out", capsys)
    joint = summary["joint"]
    np.testing.assert_allclose(joint["point"], peak, atol=0.02)
    low, high = np.array(joint["interval"])
    assert (low <= peak).all() and (peak <= high).all() and (high - low < 0.1).all()
    assert not joint["at_edge"] and joint["rising"] == [0, 0] and "cover the peak of the joint" not in printed
    block = (tmp_path / "out" / "constraints.yaml").read_text()
    assert "Intervals over the runs: share 0." in block
    assert [one["reward"] for one in yaml.safe_load(block)["constraints"]] == list(NAMES)
    alone = [f"share={write_sweep(tmp_path / 'a', peak, FAN[:1])[0]}",
             f"similarity={write_sweep(tmp_path / 'b', peak, FAN[-1:])[0]}"]  # fmt: skip
    fan = write_sweep(tmp_path / "c", peak, FAN[1:-1])
    summary, printed = proxy_points([*alone, *fan], tmp_path / "out", capsys)
    single = summary["independent"]["similarity"]["point"][0]
    assert single < summary["joint"]["interval"][0][1]
    assert f"The peak of similarity on its own, {single:.4g}, lies below the interval where the rewards are high" in (
        printed
    )


@pytest.mark.parametrize(
    ("ends", "rising", "words"),
    [
        (FAN[:2], [0, 1], "rises towards similarity above 0.", ),
        ([(0.1, 0.8), (0.02, 0.95), (0.06, 1.0)], [1, 0], "rises towards share above 0."),
    ],
)  # fmt: skip
def test_a_sweep_that_does_not_cover_the_peak_is_told_where_it_goes_on(ends, rising, words, tmp_path, capsys):
    summary, printed = proxy_points(write_sweep(tmp_path, [0.25, 0.9], ends), tmp_path / "out", capsys)
    assert summary["joint"]["at_edge"]
    assert [summary["joint"]["rising"][i] for i in (0, 1) if rising[i]] == [1]
    line = next(one for one in printed.splitlines() if "do not cover the peak of the joint surface" in one)
    assert words in line or f"and {words.removeprefix('rises towards ')}" in line
    assert f"more weight on {NAMES[rising.index(1)]}" in line and "or train longer" in line
    assert "use the joint one" not in printed


def test_rising_beyond_by_hand():
    points = np.stack(np.meshgrid(np.linspace(0, 1, 12), np.linspace(0, 1, 12)), axis=-1).reshape(-1, 2)
    mask = DensityMask(points)
    slope = Polynomial(2).fit(points, points @ [1.0, -1.0])
    assert mask.rising_beyond(np.array([1.0, 0.0]), slope).tolist() == [1, -1]
    assert mask.rising_beyond(np.array([0.0, 1.0]), slope).tolist() == [0, 0]  # lowest: nothing rises beyond
    assert mask.rising_beyond(np.array([0.5, 0.5]), slope).tolist() == [0, 0]
    assert mask.rising_beyond(np.array([1.0, 0.5]), slope).tolist() == [1, 0]


RECIPE = {
    "method": "ppo", "reward_funcs": ["a.one", "a.two"], "gold_reward": "a.gold", "eval_strategy": "steps", "seed": 3,
}  # fmt: skip


def write_recipe(folder, **changes):
    recipe = {key: value for key, value in {**RECIPE, **changes}.items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def options_of(*arguments):
    return sweep.make_parser().parse_args(["--config", "recipe.yaml", "--output_dir", "out", *arguments])


def test_weight_grid_by_hand():
    assert sweep.weight_grid(2, 3) == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    grid = sweep.weight_grid(3, 5)
    assert len(grid) == 15 and all(sum(point) == 1 for point in grid) and (0.25, 0.25, 0.5) in grid


def test_planned_runs():
    runs = sweep.planned_runs(options_of("--num_weights", "2", "--kl_coefs", "0.001", "0.003", "--seeds", "0"), RECIPE)
    assert [str(folder) for folder in runs][:2] == [
        "out/weights_0_1-kl_coef_0.001-seed_0", "out/weights_0_1-kl_coef_0.003-seed_0",
    ]  # fmt: skip
    assert len(runs) == 4
    given = sweep.planned_runs(options_of("--reward_weights", "0.9,0.1", "1,0"), RECIPE)
    assert list(given.values()) == [{"reward_weights": ["0.9", "0.1"]}, {"reward_weights": ["1", "0"]}]
    for arguments, message in (
        (("--reward_weights", "1,0,0"), "one weight for each of the 2 rewards"),
        (("--reward_weights", "1,0", "1,0"), "asked for twice"),
        (("--num_weights", "1"), "at least two rewards and `--num_weights 2`, got 2 rewards and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep.planned_runs(options_of(*arguments), RECIPE)


def test_the_command_trains_what_is_missing_and_reads_all_runs(tmp_path, capsys, monkeypatch):
    """Training itself stands in a fake: it writes the log of a run, as the script does at its end."""
    commands, fails = [], ["1_0"]

    def launched(command, check):
        commands.append(command)
        out = command[command.index("--output_dir") + 1]
        if fails and fails[0] in out:
            return argparse.Namespace(returncode=3)
        weight = float(command[command.index("--reward_weights") + 1])
        end = (0.02 + 0.4 * weight, 0.95 - 0.5 * weight**2)
        source = write_sweep(tmp_path / "source" / f"{weight}", [0.19, 0.80], [end])[0]
        (tmp_path / "sweep").mkdir(exist_ok=True)
        shutil.copytree(source, out)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr("trl_ext.scripts.sweep.subprocess.run", launched)
    playground = {"reward_funcs": ["trl_ext.playground.count_positive_words", "trl_ext.playground.grammaticality"]}
    recipe = write_recipe(tmp_path, **playground, gold_reward="trl_ext.playground.sentiment_reward")
    command = ["sweep", "--config", recipe, "--num_weights", "3", "--output_dir", str(tmp_path / "sweep"),
               "--max_steps", "5"]  # fmt: skip
    assert cli.main(command) == 3 and len(commands) == 3
    assert "weights_1_0 ended with status 3. The same command goes on from here" in capsys.readouterr().out
    assert not (tmp_path / "sweep" / "proxy_points").exists()
    fails.clear()
    assert cli.main(command) == 0 and len(commands) == 4
    words = commands[-1]
    assert (
        words[words.index("--max_steps") + 1] == "5" and words[words.index("--resume_from_checkpoint") + 1] == "true"
    )
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 2 and "constraints:" in printed and "(3 runs)" in printed
    assert (tmp_path / "sweep" / "proxy_points" / "constraints.yaml").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "xi"}, "`method: xi`.*`method: ppo` and no"),
        ({"gold_reward": None}, "no `gold_reward`.*stand in for"),
        ({"eval_strategy": "no"}, "no `eval_strategy`.*`steps`"),
    ],
)
def test_recipes_that_no_sweep_can_use(changes, message, tmp_path, capsys):
    assert cli.main(["sweep", "--config", write_recipe(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
