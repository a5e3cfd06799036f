"""Tables and picture of the long comparison."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.core.figures import COLORS, MARKERS, new_axes, save_figure

from ..method_comparison_report import mean_and_error
from ..runner import markdown_table


Results = Sequence[dict[str, Any]]
TUNED = "ppo, tuned weights"
KEPT = ", best policy kept"
EARLY, LATE = 32, 128
# The gold metric over the second half says whether a method keeps what it has gained
TAIL = (64, 128)
LINES = ("-", "--", "-.", ":")


def at(curve: Sequence[dict[str, float]], step: int, key: str = "test/gold") -> float:
    """A measurement at one step."""
    return next(point[key] for point in curve if point["step"] == step)


def tail(curve: Sequence[dict[str, float]], key: str = "test/gold") -> list[float]:
    """The measurements of the second half."""
    return [point[key] for point in curve if TAIL[0] <= point["step"] <= TAIL[1]]


def stopped_early(result: dict[str, Any]) -> dict[str, Any]:
    """A run that keeps, from each step on, the policy with the best gold on validation prompts so far."""
    kept: list[dict[str, float]] = []
    for point in result["curve"]:
        best = point if not kept or point["validation/gold"] > kept[-1]["validation/gold"] else kept[-1]
        kept.append({**best, "step": point["step"]})
    return {**result, "name": result["name"] + KEPT, "curve": kept}


def summary_table(results: Results) -> str:
    """Gold on test prompts of every method, Markdown: mean and standard error over seeds, and the least of all."""
    columns = [
        "method", "gold at 32", "gold at 128", "64 to 128: mean", "64 to 128: least of all seeds", "share",
        "similarity", "KL", "seeds",
    ]  # fmt: skip
    rows = []
    for name in dict.fromkeys(result["name"] for result in results):
        curves = [result["curve"] for result in results if result["name"] == name]
        final = [curve[-1] for curve in curves]
        rows.append(
            [
                name,
                _cell([at(curve, EARLY) for curve in curves]),
                _cell([at(curve, LATE) for curve in curves]),
                _cell([float(np.mean(tail(curve))) for curve in curves]),
                f"{min(min(tail(curve)) for curve in curves):.3f}",
                _cell([point["test/positive_word_share"] for point in final]),
                _cell([point["test/reference_similarity"] for point in final]),
                _cell([point["test/kl"] for point in final], 1),
                str(len(curves)),
            ]
        )
    return markdown_table(columns, rows)


def _cell(values: Sequence[float], digits: int = 3) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def tuning_table(results: Results, chosen: Callable[[str], int]) -> str:
    """Every trial of the tuning, Markdown, with its mean gold on validation prompts; what was chosen is bold."""
    rows = []
    for result in results:
        value = np.mean([point["validation/gold"] for point in result["curve"][1:]])
        marks = "**" if chosen(result["name"]) == result["trial"] else ""
        rows.append([result["name"], f"`{_shown(result['settings'])}`", f"{marks}{value:.3f}{marks}"])
    return markdown_table(["method", "settings", "mean gold on validation prompts"], rows)


def _shown(settings: dict[str, Any]) -> str:
    shown = {name: value for name, value in settings.items() if name not in ("method", "constraints")}
    if "constraints" in settings:
        shown = {"thresholds": [constraint["threshold"] for constraint in settings["constraints"]], **shown}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def draw(results: Results, path: Path) -> None:
    """The gold metric against updates, mean over seeds and, thin, its least; one panel for four methods."""
    names = list(dict.fromkeys(result["name"] for result in results))
    groups = [names[start : start + 4] for start in range(0, len(names), 4)]
    figure, panels = new_axes(1, len(groups), width=4.6, height=4.2, sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        for position, name in enumerate(group):
            curves = [result["curve"] for result in results if result["name"] == name]
            steps = [point["step"] for point in curves[0]]
            values = np.array([[point["test/gold"] for point in curve] for curve in curves])
            style: dict[str, Any] = {
                "color": COLORS[position],
                "marker": MARKERS[position],
                "linestyle": LINES[position],
            }
            axes.plot(steps, values.mean(axis=0), label=name, linewidth=2.0, markersize=5, **style)
            axes.plot(steps, values.min(axis=0), linewidth=0.7, alpha=0.7, **{**style, "marker": None})
        axes.set_xlabel("update")
        axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    panels[0].set_ylabel("gold on test prompts (thin: the worst seed)")
    save_figure(figure, path)


def write_report(results: Results, trials: Results, chosen: Callable[[str], int], folder: Path) -> str:
    """Writes `long_run.png` and `results.md`, the text of which it returns."""
    order = list(dict.fromkeys(result["name"] for result in results))
    results = [*results, *(stopped_early(result) for result in results if result["name"] == TUNED)]
    results.sort(key=lambda result: order.index(result["name"].removesuffix(KEPT)))
    draw(results, folder / "long_run.png")
    seconds = np.mean([result["cpu_seconds"] for result in (*results, *trials)])
    cost = f"{len(trials)} runs of the tuning; {seconds:.0f} s of one core for a run."
    text = "\n\n".join([summary_table(results), tuning_table(trials, chosen), cost])
    (folder / "results.md").write_text(text + "\n")
    return text
