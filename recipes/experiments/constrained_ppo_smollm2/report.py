"""Table and picture: what each method gained by the proxies and what was left of it by the gold metric."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.core.figures import line_style, new_axes, save_figure

from ..method_comparison_report import mean_and_error
from ..runner import markdown_table
from .gold import distinct_pairs, fluency, gold


Results = Sequence[dict[str, Any]]
# Updates that one measurement is the mean of
WINDOW = 4


def usual_surprisal(results: Results) -> tuple[float, float]:
    """Mean and spread of the surprisal of the first update's completions, which the base model wrote, in nats."""
    first = [row["surprisal"] for result in results for row in result["observed"] if row["step"] == 0]
    return float(np.mean(first)), float(np.std(first))


def measured(result: dict[str, Any], usual: float, spread: float) -> dict[str, np.ndarray]:
    """Means of a run over windows of updates: gold, what it is made of, rewards and KL; `step` is a window's last."""
    positive, surprisal, step = (
        np.array([row[name] for row in result["observed"]]) for name in ("positive", "surprisal", "step")
    )
    texts = [row["completion"] for row in result["observed"]]
    of_texts = {
        "gold": gold(positive, surprisal, texts, usual, spread), "positive": positive, "surprisal": surprisal,
        "fluency": fluency(surprisal, usual, spread), "distinct_pairs": distinct_pairs(texts),
    }  # fmt: skip
    number = len(result["curve"]) // WINDOW
    found = {
        name: np.array([values[step // WINDOW == window].mean() for window in range(number)])
        for name, values in of_texts.items()
    }
    for name in set(result["curve"][0]) - {"step"}:
        values = np.array([point[name] for point in result["curve"]])[: number * WINDOW]
        found[name] = values.reshape(number, WINDOW).mean(axis=1)
    return {**found, "step": WINDOW * np.arange(1, number + 1)}


def summary_table(results: Results) -> str:
    """For each method the gold metric at first, at best and at the end, and the rest at the end, Markdown."""
    usual, spread = usual_surprisal(results)
    names = ("sentiment_score", "distinct_share", "positive", "distinct_pairs", "surprisal")
    columns = ["method", "gold at first", "best gold", "KL there", "gold at the end", "KL at the end", *names, "seeds"]
    rows = []
    for arm in dict.fromkeys(result["arm"] for result in results):
        runs = [measured(result, usual, spread) for result in results if result["arm"] == arm]
        best = [int(run["gold"].argmax()) for run in runs]
        cells = [
            [run["gold"][0] for run in runs],
            [run["gold"].max() for run in runs],
            [run["kl"][position] for run, position in zip(runs, best, strict=True)],
            [run["gold"][-1] for run in runs],
            [run["kl"][-1] for run in runs],
            *([run[name][-1] for run in runs] for name in names),
        ]
        rows.append([arm, *(_cell(values) for values in cells), str(len(runs))])
    return markdown_table(columns, rows)


def _cell(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.2f}" if np.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def draw(results: Results, path: Path) -> None:
    """The gold metric against the KL, and the first proxy against updates; thin lines are single seeds."""
    usual, spread = usual_surprisal(results)
    figure, (by_divergence, by_step) = new_axes(1, 2, width=5.0, height=4.2)
    for position, arm in enumerate(dict.fromkeys(result["arm"] for result in results)):
        runs = [measured(result, usual, spread) for result in results if result["arm"] == arm]
        style = line_style(position)
        for number, run in enumerate(runs):
            label = {"label": arm} if number == 0 else {}
            by_divergence.plot(run["kl"], run["gold"], linewidth=1.0, markersize=4, **style, **label)
        mean = np.mean([run["sentiment_score"] for run in runs], axis=0)
        by_step.plot(runs[0]["step"], mean, linewidth=2.0, **style, label=arm)
    by_divergence.set_xlabel("KL(policy || base model), nats per response")
    by_divergence.set_ylabel(f"gold, mean of {WINDOW} updates")
    by_divergence.set_title("what matters; a line a seed", loc="left", fontsize=10)
    by_step.set_xlabel("update")
    by_step.set_ylabel("sentiment score")
    by_step.set_title("what is rewarded; mean over seeds", loc="left", fontsize=10)
    by_divergence.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def write_report(results: Results, folder: Path) -> str:
    """Writes `gold.png` and `results.md`, the text of which it returns."""
    draw(results, folder / "gold.png")
    usual, spread = usual_surprisal(results)
    seconds = np.mean([result["cpu_seconds"] for result in results])
    facts = f"Usual surprisal {usual:.2f}, spread {spread:.2f} nats a token. {seconds:.0f} s of one core for a run."
    text = f"{summary_table(results)}\n\n{facts}"
    (folder / "results.md").write_text(text + "\n")
    return text
