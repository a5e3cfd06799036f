"""Tables and picture of the long comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.core.figures import line_style, new_axes, save_figure

from ..method_comparison_report import mean_and_error
from ..runner import markdown_table


Results = Sequence[dict[str, Any]]
# The trial that was chosen for a method and a number of updates
Chosen = Mapping[tuple[str, int], int]
# The gold metric over the second half says whether a method keeps what it has gained
TAIL = (64, 128)
PER_PANEL = 4


def at(curve: Sequence[dict[str, float]], step: int, key: str = "test/gold") -> float:
    """A measurement at one step."""
    return next(point[key] for point in curve if point["step"] == step)


def tail(curve: Sequence[dict[str, float]], key: str = "test/gold") -> list[float]:
    """The measurements of the second half."""
    return [point[key] for point in curve if TAIL[0] <= point["step"] <= TAIL[1]]


def best_kept(curve: Sequence[dict[str, float]], key: str = "test/gold") -> float:
    """What the policy with the best gold on validation prompts has, which stopping early would keep."""
    return max(curve, key=lambda point: point["validation/gold"])[key]


def runs_for(results: Results, name: str, horizon: int, chosen: Chosen) -> list[dict[str, Any]]:
    """The runs of a method with what was chosen for a number of updates, one for each seed, cut there."""
    own = [r for r in results if r["name"] == name and r["trial"] == chosen[name, horizon] and r["steps"] >= horizon]
    by_seed = {r["seed"]: {**r, "curve": [p for p in r["curve"] if p["step"] <= horizon]} for r in own}
    return [by_seed[seed] for seed in sorted(by_seed)]


def summary_table(results: Results, chosen: Chosen, horizons: Sequence[int]) -> str:
    """Gold on test prompts of every method, Markdown: mean and standard error over seeds, and the least of all."""
    early, late = min(horizons), max(horizons)
    columns = [
        "method", f"gold at {early}", f"gold at {late}", f"{TAIL[0]} to {TAIL[1]}: mean", "least of all seeds",
        "best policy kept", "share", "similarity", "KL", "seeds",
    ]  # fmt: skip
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        short = [run["curve"] for run in runs_for(results, name, early, chosen)]
        curves = [run["curve"] for run in runs_for(results, name, late, chosen)]
        final = [curve[-1] for curve in curves]
        rows.append(
            [
                name,
                _cell([at(curve, early) for curve in short]),
                _cell([at(curve, late) for curve in curves]),
                _cell([float(np.mean(tail(curve))) for curve in curves]),
                f"{min(min(tail(curve)) for curve in curves):.3f}",
                _cell([best_kept(curve) for curve in curves]),
                _cell([point["test/positive_word_share"] for point in final]),
                _cell([point["test/reference_similarity"] for point in final], 2),
                _cell([point["test/kl"] for point in final], 1),
                str(len(curves)),
            ]
        )
    return markdown_table(columns, rows)


def _cell(values: Sequence[float], digits: int = 3) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def tuning_table(
    trials: Results, chosen: Chosen, horizons: Sequence[int], judge: Callable[[dict[str, Any], int], float]
) -> str:
    """Every trial of the tuning, Markdown, with its mean gold up to each horizon; what was chosen is bold."""
    rows = []
    for result in trials:
        cells = []
        for horizon in horizons:
            marks = "**" if chosen[result["name"], horizon] == result["trial"] else ""
            cells.append(f"{marks}{judge(result, horizon):.3f}{marks}")
        rows.append([result["name"], f"`{_shown(result['settings'])}`", *cells])
    return markdown_table(["method", "settings", *(f"up to {horizon}" for horizon in horizons)], rows)


def _shown(settings: dict[str, Any]) -> str:
    hidden = ("method", "constraints", "eval_strategy", "eval_steps", "save_strategy", "save_total_limit")
    shown = {name: value for name, value in settings.items() if name not in (*hidden, "per_device_eval_batch_size")}
    if "search" in shown:
        shown["search"] = list(shown["search"]["initial_range"].values())
    elif "constraints" in settings:
        shown = {"thresholds": [constraint["threshold"] for constraint in settings["constraints"]], **shown}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def draw(results: Results, chosen: Chosen, horizon: int, path: Path) -> None:
    """The gold metric against updates, mean over seeds and, thin, the least of them; a few methods a panel."""
    names = list(dict.fromkeys(result["name"] for result in results))
    num_panels = math.ceil(len(names) / PER_PANEL)
    groups = [list(group) for group in np.array_split(names, num_panels)]
    columns = min(2, num_panels)
    figure, panels = new_axes(
        math.ceil(num_panels / columns), columns, width=4.8, height=3.6, sharex=True, sharey=True
    )
    for unused in panels[num_panels:]:
        unused.set_visible(False)
    for axes, group in zip(panels, groups, strict=False):
        for position, name in enumerate(group):
            curves = [run["curve"] for run in runs_for(results, name, horizon, chosen)]
            steps = [point["step"] for point in curves[0]]
            values = np.array([[point["test/gold"] for point in curve] for curve in curves])
            style = line_style(position)
            axes.plot(steps, values.mean(axis=0), label=name, linewidth=2.0, markersize=5, **style)
            axes.plot(steps, values.min(axis=0), linewidth=0.7, alpha=0.7, **{**style, "marker": None})
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.supxlabel("update", fontsize=11)
    figure.supylabel("gold on test prompts", fontsize=11)
    figure.suptitle("Thick: mean over seeds; thin: the least of them", x=0.01, ha="left", fontsize=10)
    save_figure(figure, path)


def write_report(
    results: Results,
    trials: Results,
    chosen: Chosen,
    horizons: Sequence[int],
    folder: Path,
    judge: Callable[[dict[str, Any], int], float],
) -> str:
    """Writes `long_run.png` and `results.md`, the text of which it returns."""
    draw(results, chosen, max(horizons), folder / "long_run.png")
    long = [result["cpu_seconds"] for result in (*results, *trials) if result["steps"] == max(horizons)]
    cost = f"{len(trials)} runs of the tuning; {np.mean(long):.0f} s of one core for a run of {max(horizons)} updates."
    tuning = tuning_table(trials, chosen, horizons, judge)
    text = "\n\n".join([summary_table(results, chosen, horizons), tuning, cost])
    (folder / "results.md").write_text(text + "\n")
    return text
