"""Every picture that the code draws, read as a stranger would."""

import numpy as np
import pytest
import torch

from tests.helpers.figures import faults, kept_figures
from trl_ext.core.figures import COLORS, LINES, MARKERS, line_style, new_axes


STEPS = [1, 2, 3, 4]


def rising(factor=1.0):
    return [factor * step for step in STEPS]


def test_faults_are_seen():
    figure, (left, right) = new_axes(1, 2)
    left.plot([1, 2], [1, 2], color=COLORS[0], label="a")
    left.plot([1, 2], [2, 1], color=COLORS[1], label="b")
    left.set_xlabel("KL, nats")
    right.set_xlabel("step")
    right.set_ylabel("loss", fontsize=5)
    assert faults(figure) == [
        "panel 1: no name of the upright axis", "panel 1: not in a legend: ['a', 'b']",
        "panel 1: a and b differ by colour alone", "letters of 5 points in a picture 13.2 inches wide",
        "which KL: KL, nats",
    ]  # fmt: skip


def test_twenty_lines_differ_in_grey():
    styles = [line_style(position) for position in range(20)]
    assert len({(style["marker"], str(style["linestyle"])) for style in styles}) == 20
    assert len(COLORS) == len(MARKERS) == len(LINES)


@pytest.mark.parametrize("name", [
    "adamp_language_models", "adamp_scale_invariance", "constrained_ppo_dailydialog_methods",
    "constrained_ppo_playground_long", "constrained_ppo_playground_methods",
    "constrained_ppo_playground_overoptimization", "constrained_ppo_playground_proxy_points",
    "constrained_ppo_playground_warmup", "constrained_ppo_smollm2", "equilibrium_critic", "equilibrium_depth",
    "equilibrium_homeostasis", "equilibrium_minilm", "equilibrium_playground_alignment",
    "sparse_po_playground_frontier", "sparse_po_smollm2", "sparse_po_sentiment",
])  # fmt: skip
def test_pictures_of_kept_runs(name, tmp_path, monkeypatch):
    from recipes.experiments import pictures

    figures = kept_figures(monkeypatch)
    pictures.draw(name, tmp_path)
    assert (tmp_path / f"{name}.png").is_file()
    assert figures and [faults(figure) for figure in figures] == [[]] * len(figures)


def test_numbers_of_the_sentiment_frontier_do_not_collide(tmp_path, monkeypatch):
    from matplotlib.text import Annotation

    from recipes.experiments import pictures

    figures = kept_figures(monkeypatch)
    pictures.draw("sparse_po_sentiment", tmp_path)
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        boxes = [text.get_window_extent() for text in axes.texts if isinstance(text, Annotation)]
        assert len(boxes) == 4 and not any(
            one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place]
        )


def test_pictures_of_the_optimizers(tmp_path, monkeypatch):
    from recipes.experiments.adamp_language_models import run as language_models
    from recipes.experiments.adamp_scale_invariance import run as scale_invariance

    figures = kept_figures(monkeypatch)
    toys = {name: {key: rising() for key in ("norm", "angle", "gap")} for name in scale_invariance.STYLES}
    rows = [
        {"name": name, "schedule": "constant", "learning_rate": rate, "seed": 0, "accuracy": 0.97, "step": STEPS,
         "growth": rising(), "angle": rising()}
        for name in toys
        for rate in (0.01, 0.1)
    ]  # fmt: skip
    scale_invariance.plot(toys, rows, tmp_path / "scale.png")
    runs = [
        language_models.Run("llama", name, rate, 0, 4.0, 4.0, 1.0, 0.5, 1.0)
        for name in language_models.STYLES
        for rate in (0.01, 0.1)
    ]
    traces = [
        {"family": "llama", "optimizer": run.optimizer, "learning_rate": run.learning_rate,
         "trace": [{"step": step, "angle": 0.1 * step} for step in STEPS]}
        for run in runs
    ]  # fmt: skip
    language_models.plot(runs, traces, tmp_path / "models.png")
    assert len(figures) == 2 and [faults(figure) for figure in figures] == [[], []]


def test_pictures_of_the_head(tmp_path, monkeypatch):
    from tests.benchmarks import equilibrium_gradients, equilibrium_homeostasis
    from trl_ext.equilibrium.relaxation_plot import draw_relaxation

    figures = kept_figures(monkeypatch)
    draw_relaxation(torch.rand(9, 5), 0.1, tmp_path / "relaxation.png")
    errors = {name: [radius**2 for radius in equilibrium_gradients.RADII] for name in ("one-sided", "N=2", "N=4")}
    equilibrium_gradients.plot_errors(dict.fromkeys("abcd", errors), tmp_path / "errors.png")
    cosines = [dict.fromkeys(("layer 1", "layer 2", "parameters", "input"), 1.0) for _ in equilibrium_gradients.ANGLES]
    equilibrium_gradients.plot_cosines(dict.fromkeys("abc", cosines), tmp_path / "cosines.png")
    run = [dict.fromkeys(equilibrium_homeostasis.MEASURES, 0.5)] * 3
    arms = {arm: [run, run] for arm in equilibrium_homeostasis.ARMS}
    equilibrium_homeostasis.plot(arms, tmp_path / "homeostasis.png")
    assert len(figures) == 4 and [faults(figure) for figure in figures] == [[], [], [], []]


def test_pictures_of_proxy_points(tmp_path, monkeypatch):
    from trl_ext.constrained_ppo.proxy_points.figures import draw_curve, draw_joint
    from trl_ext.constrained_ppo.proxy_points.fit import Peak
    from trl_ext.constrained_ppo.proxy_points.logged_runs import Measurements

    def peak(size):
        at = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * size), axis=-1).reshape(-1, size)
        fitted = at.sum(axis=1)
        ends = np.stack([at[0], at[-1]])
        return Peak(at[4], 0.5, ends, False, np.zeros(size), 0.0, 10, at, fitted, np.stack([fitted, fitted]))

    figures = kept_figures(monkeypatch)
    rewards = np.random.default_rng(0).random((20, 2))
    measurements = Measurements(
        ["share", "similarity"], rewards, rewards[:, 0], rewards[:, 1], np.zeros(20, int), np.arange(20)
    )
    draw_curve(rewards[:, 0], measurements, peak(1), "share", tmp_path / "share.png", "eval_gold")
    draw_joint(measurements, peak(2), [0.5, 0.5], tmp_path / "joint.png", "eval_gold")
    assert len(figures) == 2 and [faults(figure) for figure in figures] == [[], []]


def test_pictures_of_comparisons_and_reports(tmp_path, monkeypatch):
    from recipes.experiments.method_comparison_report import draw_overoptimization
    from trl_ext.demo.constrained_ppo import PROXIES, Point, draw_courses
    from trl_ext.pipeline.findings import draw_curves

    figures = kept_figures(monkeypatch)
    curve = [{"step": step, "gold": 0.1 * step, "share": 0.2, "similarity": 0.3} for step in STEPS]
    results = [{"name": name, "curve": curve} for name in ("first", "second") for _ in range(2)]
    draw_overoptimization(results, {"share": "first", "similarity": "second"}, tmp_path / "over.png", "gold")
    points = [Point("", step, (0.1,) * len(PROXIES), 0.1 * step, 1.0) for step in STEPS]
    draw_courses(points, points, [0.5] * len(PROXIES), tmp_path / "demo.png")
    assert [name for name, _ in draw_curves([{"step": step, "loss": 1.0} for step in STEPS], ["loss"])] == ["loss"]
    assert len(figures) == 3 and [faults(figure) for figure in figures] == [[], [], []]


def test_dashboard_of_ten_rewards(tmp_path, monkeypatch):
    from trl_ext.constrained_ppo.constraints import Constraint
    from trl_ext.constrained_ppo.dashboard import draw_dashboard

    names = [f"r{index}" for index in range(10)]
    keys = ("violation", "multiplier", "weight")
    entries = [
        {"step": step, "kl/per_response": 1.0, "eval_gold": 0.5, "weight/objective": 1.0,
         **{f"rewards/{name}/mean": 0.1 * step for name in names}, **{f"critic/{name}/loss": 1.0 for name in names},
         **{f"{key}/{name}": 0.5 for key in keys for name in names}}
        for step in STEPS
    ]  # fmt: skip
    figures = kept_figures(monkeypatch)
    draw_dashboard(entries, tmp_path / "d.png", [Constraint(name, 0.5) for name in names])
    assert faults(figures[0], headings_name_axes=True) == []


def test_the_colour_bar_of_weights_has_zero_beside_its_white_box(tmp_path, monkeypatch):
    from trl_ext.core.token_colors import WeightedText, color_scale, save_png

    figures = kept_figures(monkeypatch)
    save_png([WeightedText("t", ["a", " b", " c"], [float("nan"), 0.0, 4.0])], "heading", tmp_path / "a.png")
    bar = figures[0].axes[1]
    figures[0].draw_without_rendering()
    (zero,) = bar.texts
    assert zero.get_text() == "0" and zero.get_position()[1] < 0 < min(bar.get_yticks())
    assert color_scale()(-0.1) == (1.0, 1.0, 1.0, 1.0) != color_scale()(0.0)
