"""Tables and pictures of a comparison of methods: what each run of `runs.jsonl` reached."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.core.figures import line_style, new_axes, save_figure

from .runner import markdown_table


Results = Sequence[dict[str, Any]]


def methods_of(results: Results) -> list[str]:
    """Methods in the order of their first runs, those of the tuning left out."""
    return list(dict.fromkeys(result["name"] for result in results if not result["name"].startswith("tuning ")))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error of a single value is NaN."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return float(np.mean(values)), error


def method_table(results: Results, reward_names: Sequence[str]) -> str:
    """
    The table of the experiment, Markdown: mean and standard error over seeds. Gold, rewards and KL at the end are
    those of the test split; the best gold and the average over a run are those of the validation split.
    """
    columns = ["method", "gold at the end", "best gold", "gold, average of the run", *reward_names, "KL", "seeds"]
    rows = []
    for name in methods_of(results):
        own = [result for result in results if result["name"] == name]
        cells = [
            [result["test"]["gold"] for result in own],
            [max(point["gold"] for point in result["curve"]) for result in own],
            [np.mean([point["gold"] for point in result["curve"][1:]]) for result in own],
            *([result["test"][reward] for result in own] for reward in reward_names),
        ]
        shown = [_cell(values, 3) for values in cells] + [_cell([result["test"]["kl"] for result in own], 1)]
        rows.append([name, *shown, str(len(own))])
    return markdown_table(columns, rows)


def _cell(values: Sequence[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" if np.isnan(error) else f"{mean:.{digits}f} ± {error:.{digits}f}"


def paired_differences(results: Results, method: str) -> str:
    """
    Gold at the end of every method minus that of `method`, seed by seed, Markdown: mean and standard error of the
    differences, and on how many seeds the method is above.
    """
    gold = {(result["name"], result["seed"]): result["test"]["gold"] for result in results}
    rows = []
    for name in methods_of(results):
        seeds = [seed for other, seed in gold if other == name and (method, seed) in gold]
        differences = [gold[name, seed] - gold[method, seed] for seed in seeds]
        if name != method and differences:
            above = sum(difference > 0 for difference in differences)
            rows.append([name, _cell(differences, 3), f"{above} of {len(seeds)} seeds"])
    return markdown_table(["method", f"gold minus that of {method}", "above it on"], rows)


def compute_used(results: Results, num_processes: int) -> str:
    """One sentence on the processor time of all runs."""
    seconds = sum(result["cpu_seconds"] for result in results)
    return (
        f"{len(results)} runs, {seconds / 60:.1f} minutes of CPU time: {seconds / 60 / num_processes:.1f} minutes "
        f"on {num_processes} free cores; {np.mean([result['cpu_seconds'] for result in results]):.0f} s for a run."
    )


def write_report(results: Results, names: dict[str, str], folder: Path, gold: str, cost: str) -> str:
    """
    Writes `overoptimization.png`, `methods.png` and `results.md` and returns the text of the last. `names` leads from
    each reward to the name of the runs that maximise it, `gold` is the gold metric's name, `cost` the last paragraph.
    """
    draw_overoptimization(results, names, folder / "overoptimization.png", gold)
    draw_methods(results, folder / "methods.png", gold)
    text = "\n\n".join([method_table(results, list(names)), paired_differences(results, "ppo"), cost])
    (folder / "results.md").write_text(text + "\n")
    return text


def draw_overoptimization(results: Results, names: dict[str, str], path: Path, gold: str) -> None:
    """Every reward and the gold metric of the runs that maximise one reward, mean over seeds with its error."""
    figure, axes = new_axes(1, len(names), width=10 / len(names), height=4.4)
    for axis, (reward, method) in zip(axes, names.items(), strict=True):
        own = [result for result in results if result["name"] == method]
        for position, (key, label) in enumerate([("gold", gold), *zip(names, names, strict=True)]):
            _band(axis, own, key, line_style(position), label)
        axis.set_title(f"only {reward} is maximised, without KL", loc="left", fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_ylabel("value of the metric, mean and standard error")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def draw_methods(results: Results, path: Path, gold: str) -> None:
    """The gold metric of every method as training goes on, mean over seeds, and at its end, seed by seed."""
    figure, (by_step, at_end) = new_axes(1, 2, width=5.2, height=5.4)
    for position, name in enumerate(methods_of(results)):
        own, style = [result for result in results if result["name"] == name], line_style(position)
        color = style["color"]
        if len({len(result["curve"]) for result in own}) == 1:
            _band(by_step, own, "gold", style, name)
        else:
            for number, result in enumerate(own):
                points = [(point["step"], point["gold"]) for point in result["curve"]]
                label: dict[str, Any] = {"label": f"{name}, a line a seed"} if number == 0 else {}
                by_step.plot(*zip(*points, strict=True), **style, **label, linewidth=0.6, alpha=0.6, markersize=3)
        values = [result["test"]["gold"] for result in own]
        mean, error = mean_and_error(values)
        at_end.errorbar(mean, -position, xerr=error, color=color, marker=style["marker"], capsize=3)
        at_end.plot(values, [-position - 0.22] * len(values), ".", color=color, markersize=4, alpha=0.7)
    by_step.set_xlabel("optimizer step")
    by_step.set_ylabel(gold)
    by_step.set_title("validation prompts:\nmean and standard error over seeds", loc="left", fontsize=10)
    by_step.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    at_end.set_yticks([-position for position in range(len(methods_of(results)))], methods_of(results), fontsize=8)
    at_end.set_xlabel(gold)
    at_end.set_title("test prompts at the end:\nmean, standard error, seeds (dots)", loc="left", fontsize=10)
    save_figure(figure, path)


def _band(axis: Any, results: Results, key: str, style: dict[str, Any], label: str) -> None:
    steps = [point["step"] for point in results[0]["curve"]]
    values = np.array([[point[key] for point in result["curve"]] for result in results])
    mean = values.mean(axis=0)
    axis.plot(steps, mean, label=label, linewidth=1.6, markersize=4, **style)
    if len(results) > 1:
        error = values.std(axis=0, ddof=1) / len(results) ** 0.5
        axis.fill_between(steps, mean - error, mean + error, color=style["color"], alpha=0.12, linewidth=0)
