"""A constrained run at a glance, from the trainer's log alone: a table for the terminal, and one picture."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..core.figures import COLORS, line_style, new_figure, save_figure, tidy
from ..core.log import LogHistory, best_value, last_value, reward_names, series
from ..core.safe_text import for_terminal, one_line
from .constraints import Constraint, constraints_by_reward


if TYPE_CHECKING:
    from matplotlib.axes import Axes


_OBJECTIVE_COLOR = "#444444"
_THRESHOLD_COLOR = "#c1272d"
_GOLD_COLOR = "#b8860b"
_STYLES = ("-", "--", ":", "-.")
_COLUMNS = 3
# More points than pixels of a panel only cost time and space
MAX_POINTS = 1000
# A panel takes about a fifth of a second, and of more nobody reads any
MAX_REWARDS = 15


def dashboard_table(
    log_history: LogHistory, constraints: Sequence[Constraint] = (), title: str = "", width: int = 80
) -> Table:
    """
    The newest values of a run, one row for each reward and one for the objective. Where a row on one line is wider
    than `width` columns of characters, its numbers stand in pairs, one above the other; a name is never cut.
    """
    rows = _rows(log_history, constraints)
    columns = ["reward", "mean ± std", "average"]
    if constraints:
        columns += ["threshold", "violation", "multi-\nplier", "weight", "satu-\nrated", "oscil-\nlation"]
    caption = _caption(log_history)
    flat = _table(columns, rows, caption, title, width)
    if Console(width=10 * width).measure(flat).maximum <= width:
        return flat
    columns = ["reward", "mean ± std\naverage"]
    if constraints:
        columns += ["threshold\nviolation", "multiplier\nweight", "saturated\noscillation"]
    pairs = [[name, *map("\n".join, zip(cells[::2], cells[1::2], strict=True))] for name, *cells in rows]
    return _table(columns, pairs, caption, title, width, leading=1)


def _rows(log_history: LogHistory, constraints: Sequence[Constraint]) -> list[list[str]]:
    """The cells of each row: a reward's own, then those of a constraint on it."""
    grouped = constraints_by_reward(constraints)
    none, rows = [""] * 6 if constraints else [], []
    for name in reward_names(log_history):
        own = [for_terminal(name), _with_spread(log_history, name), _shown(last_value(log_history, f"average/{name}"))]
        for key, constraint in grouped.get(name, []):
            rows.append([*own, *_constraint_cells(log_history, key, constraint)])
            own = ["", "", ""]
        if name not in grouped:
            rows.append([*own, *none])
    if constraints:
        rows.append(["objective", *[""] * 5, _shown(last_value(log_history, "weight/objective")), "", ""])
    return rows


def _table(columns: list[str], rows: list[list[str]], caption: str, title: str, width: int, leading: int = 0) -> Table:
    table = Table(
        title=for_terminal(title) or None,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        leading=leading,
        show_edge=False,
        # Lines of the caption are broken where the table ends
        min_width=min(width, max(map(len, caption.splitlines()), default=0)),
    )
    for column in columns:
        # Numbers keep their line; of a name that is longer than what they leave, every sign is shown, on several
        is_name = column == "reward"
        table.add_column(column, justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for row in rows:
        if row[0] == "objective" and row is rows[-1] and not leading:
            table.add_section()
        table.add_row(*row)
    return table


def _constraint_cells(log_history: LogHistory, key: str, constraint: Constraint) -> list[str]:
    relative = last_value(log_history, f"relative_violation/{key}")
    violation = _shown(last_value(log_history, f"violation/{key}"), "+")
    # Relative to a threshold of nearly zero it says nothing
    if relative is not None and abs(relative) < 100:
        violation += f" ({relative:+.0%})"
    logged = last_value(log_history, f"threshold/{key}")
    stated = constraint if logged is None else constraint.with_threshold(float(f"{logged:.3g}"))
    return [
        str(stated),
        violation,
        _shown(last_value(log_history, f"multiplier/{key}"), "+"),
        *(_shown(last_value(log_history, f"{part}/{key}")) for part in ("weight", "saturation", "oscillation")),
    ]


def _with_spread(log_history: LogHistory, name: str) -> str:
    mean, std = (last_value(log_history, f"rewards/{name}/{part}") for part in ("mean", "std"))
    return _shown(mean) if std is None else f"{_shown(mean)} ± {_shown(std)}"


def _caption(log_history: LogHistory) -> str:
    parts = []
    per_response = last_value(log_history, "kl/per_response")
    if per_response is not None:
        details = [f"{_shown(last_value(log_history, 'kl/per_token'))} per token"]
        coefficient = last_value(log_history, "kl/coef")
        if coefficient is not None:
            details.append(f"coefficient {_shown(coefficient)}")
        parts.append(f"KL {_shown(per_response)} nats per response ({', '.join(details)})")
    gold, best = last_value(log_history, "eval_gold"), best_value(log_history, "eval_gold")
    if gold is not None:
        parts.append(f"gold {_shown(gold)}" + (f" (best {_shown(best[1])} at step {best[0]})" if best else ""))
    return "\n".join(parts)


def _shown(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3g}"


def _shortened(name: str, length: int) -> str:
    name = one_line(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def draw_dashboard(
    log_history: LogHistory,
    path: str | Path,
    constraints: Sequence[Constraint] = (),
    title: str = "Constrained PPO",
    kl_ceiling: float | None = None,
) -> None:
    """
    Draws a run: each reward against its threshold, violations, multipliers, weights, KL, the gold metric and the
    critic's losses. A panel without data is left out. Of more than `MAX_REWARDS` rewards, those that are constrained
    come first, and the title says how many are left out. The file is replaced in one move, so that a viewer never sees
    half of it.

    Args:
        log_history (`Sequence[dict]`):
            The trainer's log.
        path (`str` or `Path`):
            PNG file to write.
        constraints (`Sequence[Constraint]`, *optional*):
            Constraints, by name of their reward. Where the log has `threshold/<reward>`, that is drawn.
        title (`str`, *optional*):
            Title of the picture.
        kl_ceiling (`float`, *optional*):
            KL, in nats per response, that ends training.
    """
    names = reward_names(log_history)
    grouped = constraints_by_reward(constraints)
    drawn = [*(name for name in names if name in grouped), *(name for name in names if name not in grouped)]
    if len(names) > MAX_REWARDS:
        title += f" ({MAX_REWARDS} of {len(names)} rewards)"
    panels = _panels(log_history, drawn[:MAX_REWARDS] if len(names) > MAX_REWARDS else names, grouped, kl_ceiling)
    rows = max(1, math.ceil(len(panels) / _COLUMNS))
    columns = min(_COLUMNS, max(1, len(panels)))
    figure = new_figure(4.6 * columns, 2.9 * rows + 0.5, dpi=110)
    steps = [step for _, lines in panels for line in lines for step in line.points[0]]
    figure.suptitle(
        textwrap.fill(one_line(title), 44 * columns),
        x=0.01,
        ha="left",
        fontsize=13,
        fontweight="bold",
        parse_math=False,
    )
    for index, (heading, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(heading, loc="left", fontsize=10.5, parse_math=False)
        tidy(axes)
        axes.tick_params(labelsize=8.5)
        if index >= len(panels) - columns:
            axes.set_xlabel("step", fontsize=9)
        for line in lines:
            line.draw(axes)
        if len(set(steps)) > 1:
            margin = 0.02 * (max(steps) - min(steps))
            axes.set_xlim(min(steps) - margin, max(steps) + margin)
        _add_legend(axes)
    save_figure(figure, path)


class _Line:
    """One curve, or one level across the panel."""

    def __init__(self, points: tuple[list[int], list[float]], label: str, color: str, **style: Any):
        self.points, self.label, self.color, self.style = points, label, color, style

    def draw(self, axes: "Axes") -> None:
        steps, values = self.points
        # matplotlib leaves labels with a leading underscore out of legends
        options = {"color": self.color, "label": self.label.lstrip("_"), "linewidth": 1.6, **self.style}
        scale = options.pop("yscale", None)
        if not steps:
            axes.axhline(values[0], **options)
            return
        stride = math.ceil(len(steps) / MAX_POINTS)
        if "num_markers" in options:
            options["markevery"] = max(1, len(steps) // stride // options.pop("num_markers"))
        if len(steps) == 1:
            options.setdefault("marker", "o")
        axes.plot(steps[::stride], values[::stride], **options)
        if scale == "log" and all(value > 0 for value in values):
            axes.set_yscale("log")


Panel = tuple[str, list[_Line]]


def _panels(
    log_history: LogHistory,
    names: list[str],
    grouped: dict[str, list[tuple[str, Constraint]]],
    kl_ceiling: float | None,
) -> list[Panel]:
    colors = {name: COLORS[index % len(COLORS)] for index, name in enumerate(names)}
    panels = [_reward_panel(log_history, name, grouped.get(name, []), colors[name]) for name in names]
    marks = {name: _mark(index) for index, name in enumerate(names)}
    # A curve for each constraint: those on one reward share its color and marker
    styles = {
        key: {**marks[name], **({"linestyle": _STYLES[index % len(_STYLES)]} if index else {})}
        for name in names
        for index, (key, _) in enumerate(grouped.get(name) or [(name, None)])
    }
    violations = _per_constraint(log_history, styles, "violation")
    if violations:
        violations.append(_Line(([], [0.0]), "", "#999999", linewidth=1.0, linestyle=":", zorder=1))
    panels.append(("violation (positive asks for more weight)", violations))
    panels.append(("multiplier, before squashing", _per_constraint(log_history, styles, "multiplier")))
    weights = _per_constraint(log_history, styles, "weight")
    objective = series(log_history, "weight/objective")
    if objective[0]:
        weights.append(_Line(objective, "objective", _OBJECTIVE_COLOR, linestyle="--"))
    panels.append(("effective weight", weights))
    panels.append(_kl_panel(log_history, kl_ceiling))
    panels.append(_gold_panel(log_history))
    critics = [
        _Line(series(log_history, f"critic/{name}/loss"), _shortened(name, 26), yscale="log", **mark)
        for name, mark in {**marks, "kl": {"color": _OBJECTIVE_COLOR, "linestyle": "--"}}.items()
    ]
    panels.append(("critic loss", [line for line in critics if line.points[0]]))
    return [panel for panel in panels if panel[1]]


def _mark(position: int) -> dict[str, Any]:
    """How a reward is drawn wherever it shares a panel with others."""
    return {**line_style(position), "markersize": 4, "num_markers": 8}


def _per_constraint(log_history: LogHistory, styles: dict[str, dict[str, Any]], part: str) -> list[_Line]:
    lines = [
        _Line(series(log_history, f"{part}/{key}"), _shortened(key, 26), **style) for key, style in styles.items()
    ]
    return [line for line in lines if line.points[0]]


def _reward_panel(log_history: LogHistory, name: str, constraints: list[tuple[str, Constraint]], color: str) -> Panel:
    lines = [_Line(series(log_history, f"rewards/{name}/mean"), "rollouts", color)]
    average = series(log_history, f"average/{name}")
    if average[0]:
        lines.append(_Line(average, "running average", color, linestyle="--", linewidth=1.2, alpha=0.6))
    validation = series(log_history, f"eval_rewards/{name}/mean")
    if validation[0]:
        lines.append(_Line(validation, "validation", color, marker="D", markersize=4, linestyle="none"))
    style: dict[str, Any] = {"linewidth": 1.2, "linestyle": "-."}
    for key, constraint in constraints:
        logged = series(log_history, f"threshold/{key}")
        if len(set(logged[1])) > 1:
            label = f"threshold ({constraint.kind})"
            lines.append(_Line(logged, label, _THRESHOLD_COLOR, drawstyle="steps-post", **style))
        elif constraint.threshold is not None:
            label = f"threshold ({constraint.kind} {constraint.threshold:.3g})"
            lines.append(_Line(([], [constraint.threshold]), label, _THRESHOLD_COLOR, **style))
    return f"reward: {_shortened(name, 40)}", lines


def _kl_panel(log_history: LogHistory, kl_ceiling: float | None) -> Panel:
    per_response = series(log_history, "kl/per_response")
    if not per_response[0]:
        return "", []
    lines = [_Line(per_response, "per response", _OBJECTIVE_COLOR)]
    if kl_ceiling is not None:
        lines.append(
            _Line(([], [kl_ceiling]), f"ceiling {kl_ceiling:.3g}", _THRESHOLD_COLOR, linewidth=1.2, linestyle="-.")
        )
    return "KL(policy || reference), nats per response", lines


def _gold_panel(log_history: LogHistory) -> Panel:
    points, best = series(log_history, "eval_gold"), best_value(log_history, "eval_gold")
    if not points[0]:
        return "", []
    lines = [_Line(points, "gold", _GOLD_COLOR, marker="o", markersize=3.5)]
    if best is not None:
        label = f"best: {best[1]:.3g} at step {best[0]}"
        lines.append(_Line(([best[0]], [best[1]]), label, _GOLD_COLOR, marker="*", markersize=13, linestyle="none"))
    return "gold metric, validation", lines


def _add_legend(axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) < 2 and not (labels and labels[0] not in ("rollouts", "per response", "gold")):
        return
    legend = axes.legend(fontsize=8, frameon=True, framealpha=0.75, edgecolor="none", borderpad=0.3)
    for text in legend.get_texts():
        text.set_parse_math(False)
