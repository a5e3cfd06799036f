"""The demo's second part: GRPO over-optimises two proxies, and under constraints holds them where they still mean
something. Without a critic: what most people train today, and one line of difference in their script."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .work import Part, Task


if TYPE_CHECKING:
    from ..constrained_ppo.constrained_grpo import ConstrainedGRPOTrainer


PROXIES = ("positive_word_share", "reference_similarity")
# Four times as many as the best gold takes: it is then that the difference shows
NUM_STEPS = 128
# Chosen as the best of ten trials of PPO
WEIGHTS = [0.9, 0.1]
NUM_VALIDATION_PROMPTS = 64
# A gold metric below which the name of a line stands above it in the picture
_LOW = 0.3
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 2 * NUM_VALIDATION_PROMPTS,
    "num_generations": 8,
    "num_generations_eval": 2,
    "beta": 0.05,
    "max_completion_length": 48,
    "optim": "sgd",
    "learning_rate": 0.8,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "constant",
    "calibration_samples": 64,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 1,
}


@dataclass(frozen=True)
class Point:
    """
    A policy, measured on validation prompts.

    Attributes:
        name (`str`): What it is.
        step (`int`): Step of training.
        proxies (`tuple[float, ...]`): Mean of each proxy.
        gold (`float`): Mean of the gold metric.
        divergence (`float`): KL from the base model, in nats for a response.
    """

    name: str
    step: int
    proxies: tuple[float, ...]
    gold: float
    divergence: float


def constrained_ppo_part(output_dir: Path, console: Console, max_steps: int | None = None) -> Part:
    """
    Trains with GRPO on two proxies, takes as thresholds the values of both where the gold metric was highest, and
    trains with constraints at these, four times as long as the best gold takes. Prints one table and draws one
    picture, `overoptimization.png`; the dashboard of the constrained run is `dashboard.png` in its folder.

    Args:
        output_dir (`Path`):
            Folder; the runs are `grpo` and `xi` below it, and the table `results.json`.
        console ([`~rich.console.Console`]):
            Console to print on.
        max_steps (`int`, *optional*):
            Steps of each run, to try it quickly.

    Returns:
        [`Part`], which shows a list of [`Point`]: base model, GRPO at its best gold metric and at its end, constrained
            GRPO at its end.
    """
    arguments = (output_dir, NUM_STEPS if max_steps is None else max_steps)
    tasks = [Task("both runs", output_dir / "runs.log", train_both, arguments)]

    def show(results: list[tuple[list[Point], list[Point]]]) -> list[Point]:
        course, held = results[0]
        peak = best_gold(course)
        points = [
            _renamed(course[0], "base model"),
            _renamed(peak, "GRPO, gold at its highest"),
            _renamed(course[-1], "GRPO at its end"),
            _renamed(held[-1], "constrained GRPO at its end"),
        ]
        console.print(comparison_table(points))
        (output_dir / "results.json").write_text(json.dumps([vars(point) for point in points], indent=1))
        picture, dashboard = output_dir / "overoptimization.png", output_dir / "xi" / "dashboard.png"
        draw_courses(course, held, peak.proxies, picture)
        console.print(f"Picture: {picture}. Dashboard: {dashboard}.", soft_wrap=True)
        return points

    return Part("GRPO with and without constraints", tasks, show)


def train_both(output_dir: Path, num_steps: int) -> tuple[list[Point], list[Point]]:
    """Trains without constraints, then with them at the best gold metric; the evaluations of both."""
    course = _measured(_train(output_dir / "grpo", num_steps, reward_weights=WEIGHTS, dashboard=False), "GRPO")
    proxies = best_gold(course).proxies
    constraints = [{"reward": name, "threshold": value} for name, value in zip(PROXIES, proxies, strict=True)]
    return course, _measured(_train(output_dir / "xi", num_steps, method="xi", constraints=constraints), "xi")


def best_gold(course: Sequence[Point]) -> Point:
    """Where the gold metric was highest."""
    return max(course, key=lambda point: point.gold)


def _train(folder: Path, num_steps: int, **settings: Any) -> "ConstrainedGRPOTrainer":
    from .. import ConstrainedGRPOConfig, ConstrainedGRPOTrainer, ConstraintDashboardCallback, playground

    shutil.rmtree(folder, ignore_errors=True)
    policy = playground.BaseModelSettings.of_one_mind()
    trainer = ConstrainedGRPOTrainer(
        model=str(playground.base_model_path(settings=policy, show_progress=False)),
        reward_funcs=[getattr(playground, name) for name in PROXIES],
        args=ConstrainedGRPOConfig(
            output_dir=str(folder),
            max_steps=num_steps,
            logging_steps=max(1, num_steps // 16),
            eval_steps=max(1, num_steps // 16),
            **SETTINGS,
            **settings,
        ),
        train_dataset=playground.preference_dataset(2000),
        eval_dataset=playground.preference_dataset(NUM_VALIDATION_PROMPTS, split="validation"),
        gold_reward=playground.playground_gold,
    )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ConstraintDashboardCallback):
            callback.show_table = False  # the picture will do beside the lines of the log
    trainer.train()
    trainer.save_model()
    return trainer


def _measured(trainer: "ConstrainedGRPOTrainer", name: str) -> list[Point]:
    """The evaluations of a run; the first is of the base model."""
    return [
        Point(
            name=name,
            step=entry["step"],
            proxies=tuple(entry[f"eval_rewards/{proxy}/mean"] for proxy in PROXIES),
            gold=entry["eval_gold"],
            divergence=entry["eval_kl/per_response"],
        )
        for entry in trainer.state.log_history
        if "eval_gold" in entry
    ]


def _renamed(point: Point, name: str) -> Point:
    return Point(**{**vars(point), "name": name})


def comparison_table(points: Sequence[Point]) -> Table:
    """The points as one table."""
    table = Table(
        title="Two proxies and the gold metric",
        caption=f"Means over {2 * NUM_VALIDATION_PROMPTS} responses to validation prompts. gold: grammaticality * "
        "(1 + sentiment) / 2; KL: nats per response",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in ("policy", "step", "positive\nwords (share)", "similarity to\nreference", "gold", "KL"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for point in points:
        words, similarity = point.proxies
        table.add_row(
            point.name, str(point.step), f"{words:.3f}", f"{similarity:.3f}", f"{point.gold:.3f}",
            f"{point.divergence:.1f}",
        )  # fmt: skip
    return table


def draw_courses(
    plain: Sequence[Point], constrained: Sequence[Point], thresholds: Sequence[float], path: str | Path
) -> None:
    """
    Draws both runs against updates: the gold metric, and each proxy with its threshold.

    Args:
        plain (`Sequence[Point]`):
            Evaluations of GRPO.
        constrained (`Sequence[Point]`):
            Evaluations of constrained GRPO.
        thresholds (`Sequence[float]`):
            Threshold of each proxy.
        path (`str` or `Path`):
            Picture.
    """
    from ..core.figures import COLORS, new_axes, save_figure

    figure, panels = new_axes(1, 1 + len(PROXIES), width=4.4, height=4.0)
    runs = (("GRPO", plain, COLORS[1], "--", "s"), ("constrained GRPO", constrained, COLORS[0], "-", "o"))
    for name, points, color, line, marker in runs:
        courses = [[point.gold for point in points]]
        courses += [[point.proxies[index] for point in points] for index in range(len(PROXIES))]
        for axes, course in zip(panels, courses, strict=True):
            axes.plot(
                [point.step for point in points], course, color=color, linestyle=line, marker=marker, markersize=5,
                linewidth=2.4, label=name,
            )  # fmt: skip
        # Each line is named at its end: below what it has done of late, or above where it lies at the bottom
        lowest = min(point.gold for point in points[len(points) // 2 :])
        is_low = points[-1].gold < _LOW
        panels[0].annotate(
            f"{name}\nends at {points[-1].gold:.2f}", (points[-1].step, points[-1].gold if is_low else lowest),
            xytext=(0, 12 if is_low else -12), textcoords="offset points", ha="right",
            va="bottom" if is_low else "top", color=color, fontsize=10, fontweight="bold",
        )  # fmt: skip
    for axes, proxy, threshold in zip(panels[1:], PROXIES, thresholds, strict=True):
        axes.axhline(threshold, color="black", linewidth=1.2, linestyle=":", label="threshold")
        axes.set_title(f"What is rewarded: {proxy.replace('_', ' ')}", loc="left", fontsize=11)
        axes.set_ylabel(f"{proxy.replace('_', ' ')}, mean")
    panels[0].set_title("What matters: gold (no run sees it)", loc="left", fontsize=11)
    panels[0].set_ylabel("gold, mean of the validation prompts")
    panels[1].legend(frameon=False, fontsize=9)
    for axes in panels:
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("update")
    save_figure(figure, path)
