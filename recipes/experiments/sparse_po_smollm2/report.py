"""Table and picture of the runs: reward against KL, with 95% intervals over the seeds in the table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from trl_ext.core.figures import line_style, new_axes, save_figure

from ..runner import markdown_table
from ..sparse_po_sentiment.run import METHODS


REWARDS = {"sentiment": "P(positive sentiment)", "harmless": "accuracy on held-out pairs"}
_COLUMNS = (
    "method",
    "beta",
    "learning rate x",
    "reward",
    "KL",
    "mean of m_u",
    "sparsity m_u / m_d",
    "lexicon AUC",
    "seeds",
)


def interval(values: list[float]) -> tuple[float, float]:
    """
    Mean, and half the width of its 95% interval by Student's t; `nan` for a single value.

    Args:
        values (`list[float]`):
            One value for each seed.

    Returns:
        `tuple[float, float]`
    """
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return float(np.mean(values)), half


def standard_error(values: list[float]) -> float:
    """The standard error of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def mean(rows: list[dict[str, Any]], key: str) -> str:
    return f"{np.mean([row[key] for row in rows]):.2f}"


def write_report(rows: list[dict[str, Any]], facts: dict[str, Any], task: str, folder: Path) -> str:
    """
    Writes `results.md` and `frontier.png`.

    Args:
        rows (`list[dict]`):
            Finished runs.
        facts (`dict`):
            What all runs share.
        task (`str`):
            Name of the task.
        folder (`Path`):
            Where to.

    Returns:
        `str`: the table, Markdown.
    """
    cells = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method and not row["tuning"]]
        for beta in sorted({row["beta"] for row in own}):
            runs = [row for row in own if row["beta"] == beta]
            values = [[run[key] for run in runs] for key in ("reward", "divergence")]
            reward, divergence = map(interval, values)
            auc = [run["lexicon_auc"] for run in runs if "lexicon_auc" in run]
            cells.append([
                method, f"{beta:g}", f"{runs[0]['factor']:g}", f"{reward[0]:.3f} ± {reward[1]:.3f}",
                f"{divergence[0]:.2f} ± {divergence[1]:.2f}", mean(runs, "mean_reward"),
                f"{mean(runs, 'sparsity_reward')} / {mean(runs, 'sparsity_divergence')}",
                f"{np.mean(auc):.3f}" if auc else "", str(len(runs)),
            ])  # fmt: skip
    draw_frontier(rows, task, folder / "frontier.png")
    table = markdown_table(_COLUMNS, cells)
    (folder / "results.md").write_text(f"{table}\n\nShared by all runs: `{json.dumps(facts)}`\n")
    return table


def draw_frontier(rows: list[dict[str, Any]], task: str, path: Path) -> None:
    """Reward against KL, a line for each method and a point for each beta."""
    figure, (axes,) = new_axes(width=8, height=5.2)
    for place, method in enumerate(METHODS):
        points = []
        own = [row for row in rows if row["method"] == method and not row["tuning"]]
        for beta in sorted({row["beta"] for row in own}):
            divergences, rewards = (
                [row[key] for row in own if row["beta"] == beta] for key in ("divergence", "reward")
            )
            points.append(
                (np.mean(divergences), np.mean(rewards), standard_error(divergences), standard_error(rewards))
            )
        if points:
            x, y, dx, dy = np.array(sorted(points)).T
            axes.errorbar(x, y, xerr=dx, yerr=dy, capsize=2, elinewidth=0.8, label=method, **line_style(place))
    axes.set_xlabel("KL(policy || reference), nats per response; bars: standard errors over seeds")
    axes.set_xlim(left=0)
    axes.set_ylabel(REWARDS[task])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    save_figure(figure, path)
