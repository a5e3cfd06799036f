import io
import json
import os
import re
from types import SimpleNamespace

import matplotlib.image
import pytest
from rich.console import Console

from tests.helpers.constrained_ppo import XI, make
from trl_ext.constrained_ppo import dashboard, report
from trl_ext.constrained_ppo.adaptation import RolloutController
from trl_ext.constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
from trl_ext.constrained_ppo.dashboard import dashboard_table, draw_dashboard
from trl_ext.constrained_ppo.multipliers import Constraint
from trl_ext.constrained_ppo.report import ConstraintDashboardCallback
from trl_ext.core.log import NewestValues


CONSTRAINTS = [Constraint("brevity", 0.5, "=="), Constraint("_help", 0.25, ">=")]


def log(steps=5):
    entries = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 0.5, "kl/per_response": 1.5 * step, "kl/per_token": 0.125, "kl/coef": 0.2}
        for name, mean in (("brevity", 0.1 * step), ("_help", 0.25), ("$free_x$", float(step))):
            entry |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": 0.0625, f"critic/{name}/loss": 1 / step}
        for constraint in CONSTRAINTS:
            name = constraint.reward
            violation = constraint.violation(entry[f"rewards/{name}/mean"])
            entry |= {
                f"violation/{name}": violation, f"relative_violation/{name}": violation / constraint.threshold,
                f"multiplier/{name}": -0.75, f"weight/{name}": -0.625, f"saturation/{name}": 0.375,
                f"oscillation/{name}": 0.0, f"average/{name}": 0.875,
            }  # fmt: skip
        entries += [entry | {"weight/objective": 3.25}, {"step": step, "eval_gold": [0.25, 0.75, 0.5][step % 3]}]
    return entries


def printed(table, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_table_has_every_quantity():
    text = printed(dashboard_table(log(), CONSTRAINTS, "xi", width=120))
    row = next(line for line in text.splitlines() if "brevity" in line)
    # mean ± std, average, threshold, violation, multiplier, weight, saturation, oscillation
    expected = ["brevity", "0.5", "±", "0.0625", "0.875", "==", "0.5", "+0", "(+0%)", "-0.75", "-0.625", "0.375", "0"]
    assert row.split() == expected
    assert next(line for line in text.splitlines() if "_help" in line).split()[5:7] == [">=", "0.25"]
    assert next(line for line in text.splitlines() if "$free_x$" in line).split() == ["$free_x$", "5", "±", "0.0625"]
    assert next(line for line in text.splitlines() if "objective" in line).split() == ["objective", "3.25"]
    assert "KL 7.5 nats per response (0.125 per token, coefficient 0.2)" in text
    assert "gold 0.5 (best 0.75 at step 1)" in text


def test_table_takes_the_sign_of_the_violation_and_moved_thresholds():
    entries = log(2)
    row = next(
        line for line in printed(dashboard_table(entries, CONSTRAINTS, width=120)).splitlines() if "brevity" in line
    )
    assert "+0.3 (+60%)" in row
    entries[-2]["threshold/brevity"] = 0.375
    assert "== 0.375" in printed(dashboard_table(entries, CONSTRAINTS))


def test_a_range_has_two_thresholds(tmp_path, monkeypatch):
    own = {"violation/a.at_least": -0.25, "relative_violation/a.at_least": -1.0, "threshold/a.at_least": 0.25,
           "violation/a.at_most": 0.1, "relative_violation/a.at_most": 1e7, "threshold/a.at_most": 0.75}  # fmt: skip
    entries = [{"step": s, "rewards/a/mean": 0.5, **own} for s in (1, 2)]
    constraints = [Constraint("a", 0.25, ">="), Constraint("a", 0.75, "<=")]
    text = " ".join(printed(dashboard_table(entries, constraints, width=120)).split())
    assert "a 0.5 >= 0.25 -0.25 (-100%) <= 0.75 +0.1 " in text
    figures = drawn(monkeypatch)
    draw_dashboard(entries, tmp_path / "d.png", constraints)
    labels = [line.get_label() for line in figures[0].axes[0].get_lines()]
    assert labels == ["rollouts", "threshold (>= 0.25)", "threshold (<= 0.75)"]
    violations = figures[0].axes[1].get_lines()
    assert [line.get_label() for line in violations[:2]] == ["a.at_least", "a.at_most"]
    assert violations[0].get_linestyle() != violations[1].get_linestyle()


def shown(name, text):
    """Whether a name stands in a table, on one line or folded: each part of it at the start of the next line."""
    signs = ("(?: |(?=[^\n]*\n))" if sign == " " else re.escape(sign) for sign in name)
    return re.search("(?:[^\n]*\n)?".join(signs), text) is not None


LONG = ["helpfulness_of_the_reward_model_of_the_second_round", "length", "[/x]", "verbosity penalty, in tokens" * 2]


@pytest.mark.parametrize("values", [(0.5, 0.25), (-1.23456e-5, 1.23456e-5), (-123456.0, 123456.0)])
def test_table_fits_eighty_columns_without_cutting_a_name(values):
    """Of any length of names and numbers, with one constraint for each reward and a range for one."""
    mean, std = values
    own = {f"{part}/{name}{tail}": value for name in LONG for part, tail, value in (
        ("rewards", "/mean", mean), ("rewards", "/std", std), ("average", "", mean), ("violation", "", mean),
        ("relative_violation", "", -0.995), ("multiplier", "", mean), ("weight", "", mean), ("saturation", "", 0.375),
        ("oscillation", "", 0.125),
    )}  # fmt: skip
    constraints = [Constraint(name, mean, ">=") for name in LONG] + [Constraint("length", abs(mean) * 2, "<=")]
    text = printed(dashboard_table([{"step": 1, **own}], constraints, "a long title " * 9), width=80)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert all(shown(name, text) for name in LONG) and not shown("helpfulness_of_another", text)
    for number in (f"{mean:.3g} ± {std:.3g}", f"{mean:+.3g} (-100%)", f">= {mean:.4g}", "0.375", "0.125"):
        assert number in text.replace("-99%", "-100%")


def test_a_table_that_fits_stays_on_one_line_for_each_reward():
    text = printed(dashboard_table(log(), width=80), width=80)
    (row,) = [line for line in text.splitlines() if "brevity" in line]
    assert row.split() == ["brevity", "0.5", "±", "0.0625", "0.875"]
    assert "coefficient 0.2)\n" in text.replace(" \n", "\n")
    narrow = printed(dashboard_table(log(), CONSTRAINTS[:1], width=60), width=60)
    assert max(map(len, narrow.splitlines())) <= 60 and "average" in narrow and "oscillation" in narrow


def test_table_without_constraints_and_without_anything():
    text = printed(dashboard_table(log(), title="ppo"))
    assert "threshold" not in text and "objective" not in text and "mean ± std" in text
    assert dashboard_table([]).row_count == 0
    assert "nan" in printed(dashboard_table([{"rewards/a/mean": float("nan")}]))


def drawn(monkeypatch):
    """Axes of the next pictures."""
    from matplotlib.figure import Figure

    kept, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    return kept


def test_picture_shows_every_panel(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    draw_dashboard(log(), tmp_path / "new" / "d.png", CONSTRAINTS, "title with $math", kl_ceiling=9.0)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["d.png"]
    assert matplotlib.image.imread(tmp_path / "new" / "d.png").shape[1] > 1000
    axes = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert list(axes) == [
        "reward: brevity", "reward: _help", "reward: $free_x$", "violation (positive asks for more weight)",
        "multiplier, before squashing", "effective weight", "KL(policy || reference), nats per response",
        "gold metric, validation", "critic loss",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in axes["reward: brevity"].get_lines()}
    assert list(lines["rollouts"].get_ydata()) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert set(lines["threshold (== 0.5)"].get_ydata()) == {0.5} and "running average" in lines
    assert [line.get_label() for line in axes["effective weight"].get_lines()] == ["brevity", "help", "objective"]
    assert set(axes["KL(policy || reference), nats per response"].get_lines()[1].get_ydata()) == {9.0}
    assert [line.get_label() for line in axes["critic loss"].get_lines()] == ["brevity", "help", "$free_x$"]
    assert axes["critic loss"].get_yscale() == "log"


def test_picture_of_moving_thresholds_long_logs_and_odd_values(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    entries = [
        {"step": s, "rewards/a/mean": float("nan") if s == 7 else 1.0, "threshold/a": 0.5 + (s > 2500),
         "critic/a/loss": float(s % 2), "eval_rewards/a/mean": 0.25}
        for s in range(5000)
    ]  # fmt: skip
    draw_dashboard(entries, tmp_path / "d.png", [Constraint("a", 1.5)])
    panel, critic = figures[0].axes
    rollouts, validation, threshold = panel.get_lines()
    assert len(rollouts.get_xdata()) <= dashboard.MAX_POINTS and set(threshold.get_ydata()) == {0.5, 1.5}
    assert validation.get_label() == "validation" and critic.get_yscale() == "linear"
    draw_dashboard(entries[:1], tmp_path / "d.png")
    assert figures[1].axes[0].get_lines()[0].get_marker() == "o"
    draw_dashboard([], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_of_many_rewards_the_constrained_ones_are_drawn(tmp_path, monkeypatch):
    assert dashboard.MAX_REWARDS == 15
    monkeypatch.setattr(dashboard, "MAX_REWARDS", 2)
    figures = drawn(monkeypatch)
    names = [f"r{index}" for index in range(50)]
    own = {f"{key}/{name}{tail}": 0.5 for name in names for key, tail in (("rewards", "/mean"), ("critic", "/loss"))}
    draw_dashboard([{"step": 1, **own, "violation/r49": 0.1}], tmp_path / "d.png", [Constraint("r49", 0.5)], "run")
    headings = [axes.get_title(loc="left") for axes in figures[0].axes]
    rewards = [heading for heading in headings if heading.startswith("reward")]
    assert len(rewards) == dashboard.MAX_REWARDS and rewards[:2] == ["reward: r49", "reward: r0"]
    assert len(headings) == len(rewards) + 2 and len(figures[0].axes[-1].get_lines()) == dashboard.MAX_REWARDS
    assert figures[0].get_suptitle() == f"run ({dashboard.MAX_REWARDS} of 50 rewards)"


def test_the_table_of_a_long_log_takes_as_long_as_that_of_a_short_one():
    entries, newest = log(40), NewestValues("eval_gold")
    for end in (7, 8, 40, 80, 20):  # the last as after a return to an earlier checkpoint
        short = newest.of(entries[:end])
        assert len(short) <= 2
        assert printed(dashboard_table(short, CONSTRAINTS)) == printed(dashboard_table(entries[:end], CONSTRAINTS))


def callback_and_state(tmp_path, **settings):
    constraints = [
        {"reward": 0, "threshold": 0.5},
        {"reward": "_help", "threshold": 0.25, "kind": ">="},
        {"reward": 2, "quantile": 0.5},
    ]
    args = ConstrainedPPOConfig(
        str(tmp_path), method="sat", constraints=constraints, use_cpu=True, bf16=False, report_to="none"
    )
    controller = RolloutController(args, ["brevity", "_help", "$free_x$"])
    trainer = SimpleNamespace(args=args, controller=controller, stop_reason=None, _name="Constrained PPO")
    state = SimpleNamespace(is_world_process_zero=True, log_history=log(), global_step=5)
    console = Console(file=io.StringIO(), width=140)
    return ConstraintDashboardCallback(trainer, console=console, **settings), state


def test_callback_prints_and_draws_at_log_steps_and_at_the_end(tmp_path, monkeypatch):
    callback, state = callback_and_state(tmp_path, png_seconds=1000)
    assert callback.constraints() == [Constraint("brevity", 0.5), Constraint("_help", 0.25, ">=")]
    calls = []
    monkeypatch.setattr(report, "draw_dashboard", lambda *arguments: calls.append(arguments))
    for _ in range(3):
        callback.on_log(None, state, None, logs=state.log_history[-2])
    assert len(calls) == 1 and callback.console.file.getvalue().count("Constrained PPO (sat), step 5") == 3
    callback.on_log(None, state, None, logs={"eval_gold": 0.5})
    callback.on_train_end(None, state, None)
    assert callback.console.file.getvalue().count("Constrained PPO") == 3 and len(calls) == 2
    # A gold metric measured after the last log step is shown at the end
    state.log_history.append({"step": 5, "eval_gold": 0.875})
    callback.on_train_end(None, state, None)
    assert "gold 0.875" in callback.console.file.getvalue()
    callback.trainer.stop_reason = "KL ceiling"
    callback.on_train_end(None, state, None)
    assert (
        len(calls) == 4
        and calls[1][1] == tmp_path / "dashboard.png"
        and calls[3][3].endswith("ended early: KL ceiling")
    )


def test_callback_leaves_drawing_a_small_share_of_the_time(tmp_path, monkeypatch):
    callback, state = callback_and_state(tmp_path, png_seconds=0, show_table=False)
    now, calls = [100.0], []

    def draw(*arguments):
        calls.append(now[0])
        now[0] += 1.0

    monkeypatch.setattr(report, "draw_dashboard", draw)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    for _ in range(100):
        callback.on_log(None, state, None, logs=state.log_history[-2])
        now[0] += 1.0
    assert len(calls) == 2 and calls[1] - calls[0] >= 50


def test_callback_only_on_the_main_process(tmp_path):
    callback, state = callback_and_state(tmp_path)
    state.is_world_process_zero = False
    callback.on_log(None, state, None, logs=state.log_history[-2])
    callback.on_train_end(None, state, None)
    assert not list(tmp_path.iterdir()) and not callback.console.file.getvalue()


def test_an_interrupted_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    draw_dashboard(log(), tmp_path / "d.png", CONSTRAINTS)
    before = (tmp_path / "d.png").read_bytes()

    def interrupted(source, target):
        raise OSError("interrupted")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(OSError, match="interrupted"):
        draw_dashboard(log(9), tmp_path / "d.png", CONSTRAINTS)
    assert (tmp_path / "d.png").read_bytes() == before


def test_negative_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`png_seconds`.*-1"):
        callback_and_state(tmp_path, png_seconds=-1)


def test_dashboard_of_a_run(tmp_path, path, capsys):
    trainer = make(tmp_path, path, **XI, max_steps=3, dashboard=True)
    console = Console(file=io.StringIO(), width=140)
    trainer.add_callback(ConstraintDashboardCallback(trainer, tmp_path / "other.png", console=console))
    trainer.train()
    text = console.file.getvalue()
    assert text.count("Constrained PPO (xi), step") == 3 and "== 0.7" in text and "length" in text
    logged = next(entry for entry in trainer.state.log_history if entry["step"] == 3)
    assert f"{logged['violation/low_ids']:+.3g}" in text and "KL " in text
    assert (tmp_path / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "other.png").is_file() and capsys.readouterr().out.count("multi-") == 0
    # The log alone is enough to draw a finished run
    entries = json.loads(json.dumps(trainer.state.log_history))
    draw_dashboard(entries, tmp_path / "again.png", trainer.controller.named_constraints())
    assert entries[0]["threshold/low_ids"] == 0.7 and entries[0]["saturation/length"] in (0.0, 1.0)
    assert make(tmp_path, path).callback_handler.callback_list.count("ConstraintDashboardCallback") == 0
