"""Tables and picture of the finished runs."""

from pathlib import Path
from typing import Any

import numpy as np

from trl_ext.core.figures import COLORS, MARKERS, new_axes, save_figure

from ..runner import markdown_table


TASKS = ("imdb", "hh")
TITLES = {"imdb": "IMDB sentiment", "hh": "HH harmless preference"}
HEADS = ("linear", "perceptron", "EP", "EP, 90 degrees", "EP, 90 degrees, homeostasis")


def at_best_setting(rows: list[dict[str, Any]], **setting: Any) -> list[dict[str, Any]]:
    """
    The runs of an arm, one a seed, at its best setting.

    Args:
        rows (`list[dict]`):
            Finished runs.
        setting (`Any`):
            What the arm's runs have in common.

    Returns:
        `list[dict]`: those at the rate and normalisation of the highest mean validation accuracy, the first one on
        equality, by seed; runs without validation had one setting only.
    """
    own = [row for row in rows if setting.items() <= row.items()]
    choices = dict.fromkeys((row["learning_rate"], row["input_norm"]) for row in own)

    def of(choice: tuple[float, str]) -> list[dict[str, Any]]:
        return [row for row in own if (row["learning_rate"], row["input_norm"]) == choice]

    best = max(choices, key=lambda choice: np.mean([row.get("validation_accuracy", 0.0) for row in of(choice)]))
    return sorted(of(best), key=lambda row: row["seed"])


def difference(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], draws: int = 2000
) -> tuple[float, float, float]:
    """
    Mean difference of accuracy, and the 95% interval of a bootstrap over test answers and seeds, which are paired.

    Args:
        rows (`list[dict]`):
            Runs.
        others (`list[dict]`):
            Those of another head with the same seeds.
        draws (`int`, *optional*, defaults to `2000`):
            Draws of the bootstrap.

    Returns:
        `tuple[float, float, float]`: mean, lower and upper end.
    """
    gaps = np.array(
        [
            np.array(list(row["right"]), dtype=float) - np.array(list(other["right"]), dtype=float)
            for row, other in zip(rows, others, strict=True)
        ]
    )
    generator = np.random.default_rng(0)
    answers = generator.multinomial(gaps.shape[1], np.full(gaps.shape[1], 1 / gaps.shape[1]), size=draws)
    seeds = generator.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), size=draws)
    means = np.einsum("da,sa,ds->d", answers, gaps, seeds, optimize=True) / gaps.size
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def arms(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Head and depth of every arm that was run, by depth; a linear head has no layers."""
    found = {(row["head"], row["depth"]) for row in rows}
    return [
        (name, depth) for depth in sorted({depth for _, depth in found}) for name in HEADS if (name, depth) in found
    ]


def accuracies_table(rows: list[dict[str, Any]]) -> str:
    """Runs of one task and backbone as Markdown: each arm at its best setting, held against the perceptron."""
    lines = []
    perceptrons = [depth for name, depth in arms(rows) if name == "perceptron"]
    for name, depth in arms(rows):
        own = at_best_setting(rows, head=name, depth=depth)
        against = "-"
        if name != "perceptron" and perceptrons:
            # A linear head is held against the shallowest perceptron
            same = at_best_setting(rows, head="perceptron", depth=depth if depth in perceptrons else perceptrons[0])
            mean, low, high = difference(own, same)
            against = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        accuracies = [row["test_accuracy"] for row in own]
        angle = f"{np.mean([row['weight_angle'] for row in own]):.0f}" if "weight_angle" in own[0] else "-"
        lines.append([
            name, str(depth or "-"), f"{own[0]['learning_rate']:g}", own[0]["input_norm"],
            f"{np.mean(accuracies):.3f}", ", ".join(f"{accuracy:.3f}" for accuracy in accuracies), against,
            f"{np.mean([row['train_accuracy'] for row in own]):.3f}" if "train_accuracy" in own[0] else "-", angle,
            f"{np.mean([row['seconds'] for row in own]):.1f}",
        ])  # fmt: skip
    columns = ["head", "layers", "rate", "input", "test accuracy", "by seed", "against the perceptron",
               "training accuracy", "angle at the end", "s"]  # fmt: skip
    return markdown_table(columns, lines)


def norms_table(rows: list[dict[str, Any]]) -> str:
    """Frozen runs of one task as Markdown: test accuracy of each arm with each normalisation, at its best rate."""
    norms = list(dict.fromkeys(row["input_norm"] for row in rows))
    lines = []
    for name, depth in arms(rows):
        cells = []
        for norm in norms:
            if not any((row["head"], row["depth"], row["input_norm"]) == (name, depth, norm) for row in rows):
                cells.append("")
                continue
            own = at_best_setting(rows, head=name, depth=depth, input_norm=norm)
            values = [row["test_accuracy"] for row in own]
            deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{deviation} ({own[0]['learning_rate']:g})")
        lines.append([name, str(depth or "-"), *cells])
    return markdown_table(["head", "layers", *norms], lines)


def tables(rows: list[dict[str, Any]]) -> str:
    """All tables of the experiment as Markdown."""
    parts = []
    for backbone in dict.fromkeys(row["backbone"] for row in rows):
        for task in [task for task in TASKS if any(row["task"] == task for row in rows)]:
            own = [row for row in rows if (row["task"], row["backbone"]) == (task, backbone)]
            if own:
                parts.append(f"**{TITLES[task]}, {backbone}**\n\n{accuracies_table(own)}")
            if backbone == "frozen" and len({row["input_norm"] for row in own}) > 1:
                parts.append(f"**{TITLES[task]}, frozen: normalisation of the input** (rate)\n\n{norms_table(own)}")
    return "\n\n".join(parts)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy of every head, a panel for each task, a marker for each backbone and depth, a dot for each run."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    kinds = dict.fromkeys((row["backbone"], row["depth"]) for row in rows if row["depth"])
    figure, panels = new_axes(1, len(tasks), width=5, height=3.6)
    for axes, task in zip(panels, tasks, strict=True):
        for place, (backbone, depth) in enumerate(kinds):
            label = f"encoder {backbone}, heads of {depth} layers"
            for line, name in enumerate(reversed(HEADS)):
                setting = {"task": task, "backbone": backbone, "head": name, "depth": 0 if name == "linear" else depth}
                if not any(setting.items() <= row.items() for row in rows):
                    continue
                values = [row["test_accuracy"] for row in at_best_setting(rows, **setting)]
                height = line + 0.2 * (len(kinds) / 2 - place)
                axes.plot(values, [height] * len(values), ".", color=COLORS[place], alpha=0.5)
                axes.plot(np.mean(values), height, MARKERS[place], color=COLORS[place], label=label, markersize=7)
                label = "_" + label  # one entry of the legend for each kind
        axes.set(xlabel="test accuracy (dots: seeds)", title=TITLES[task])
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(HEADS)), list(reversed(HEADS)) if axes is panels[0] else [""] * len(HEADS))
    panels[-1].legend(frameon=False, fontsize=8)
    save_figure(figure, path)
