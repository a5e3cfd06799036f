"""What a run says of itself: calibration before its first step, a dashboard at every log, a model card at a save."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from ..core.files import warn_of_failure
from ..core.log import LogHistory, NewestValues, best_value, last_value, reward_names
from ..core.model_card import settings_table
from ..core.reporters import is_last_log, report_image, report_table
from ..core.safe_text import as_string, for_markdown, for_markdown_code, for_terminal
from .calibration import Calibration, calibrate, cap_warnings
from .constrained_ppo_config import ConstrainedPPOConfig
from .constraints import Constraint, check_constraints, constraints_by_reward
from .critic import CRITIC_FILE, kind_of
from .dashboard import dashboard_table, draw_dashboard


logger = get_logger(__name__)
CALIBRATION_FILE = "calibration.json"
DASHBOARD_FILE = "dashboard.png"
# Share of the training time that drawing may take
_DRAWING_SHARE = 0.02
CITATION = """@inproceedings{moskovitz2024confronting,
    title     = {Confronting Reward Model Overoptimization with Constrained {RLHF}},
    author    = {Moskovitz, Ted and Singh, Aaditya K. and Strouse, DJ and Sandholm, Tuomas and Salakhutdinov, Ruslan
                 and Dragan, Anca D. and McAleer, Stephen},
    booktitle = {The Twelfth International Conference on Learning Representations},
    year      = {2024},
    url       = {https://openreview.net/forum?id=gkfUvn0fLU}
}"""
PAPER = {
    "title": "Confronting Reward Model Overoptimization with Constrained RLHF",
    "id": "2310.04373",
    "citation": CITATION,
}
_SETTINGS = (
    "method", "objective", "mixing", "whitening", "critic", "gamma", "gae_lambda", "num_iterations", "kl_coef",
)  # fmt: skip
_GROUP_SETTINGS = (
    "method", "objective", "mixing", "critic", "num_generations", "scale_rewards", "multi_objective_aggregation",
    "group_baseline", "num_iterations", "kl_coef",
)  # fmt: skip
_OPTIONAL = (
    "kl_target", "kl_ceiling", "gold_patience", "early_stop_kl", "critic_lambda", "adaptive_lambda_alpha",
)  # fmt: skip
_EQUILIBRIUM = (
    "critic_head", "critic_hidden_features", "critic_feedback", "critic_feedback_angle", "critic_homeostasis_coef",
    "critic_spectral_cap",
)  # fmt: skip
_MULTIPLIERS = ("multiplier_squash", "multiplier_learning_rate", "multiplier_proportional")


def run_section(trainer: Any, model_id: str) -> str:
    """[`method_section`] of a [`ConstrainedPPOTrainer`] as it stands."""
    return method_section(
        trainer.args,
        trainer.state.log_history,
        model_id,
        trainer.controller.named_constraints(),
        trainer.stop_reason,
        kind_of(trainer.critic),
    )


def method_section(
    config: ConstrainedPPOConfig,
    log_history: LogHistory,
    model_id: str,
    constraints: Sequence[Constraint] = (),
    stop_reason: str | None = None,
    critic: str = "shared",
) -> str:
    """Markdown of the method's section, with the newest values of the log; `critic` is its [`kind_of`]."""
    names = _GROUP_SETTINGS if config.critic == "none" else _SETTINGS
    settings: dict[str, object] = {name: getattr(config, name) for name in names}
    settings |= {name: getattr(config, name) for name in _OPTIONAL if getattr(config, name) is not None}
    if config.critic_head == "equilibrium":
        settings |= {name: getattr(config, name) for name in _EQUILIBRIUM}
    if config.learns_multipliers:
        settings |= {name: getattr(config, name) for name in _MULTIPLIERS}
    parts = ["### Rewards and constraints", settings_table(settings)]
    results = _results(log_history, constraints)
    if results:
        parts.append(results)
    parts.append(_end(log_history, stop_reason))
    derived = [
        f"{key}.signal" for own in constraints_by_reward(constraints).values() for key, one in own if one.is_derived
    ]
    parts.append(_loading(critic, model_id, [*reward_names(log_history), *derived]))
    return "\n\n".join(part for part in parts if part)


def _results(log_history: LogHistory, constraints: Sequence[Constraint]) -> str:
    """A table with one row for each reward: its constraint and the newest values."""
    grouped = constraints_by_reward(constraints)
    names = reward_names(log_history) or list(grouped)
    if not names:
        return ""
    columns = ["reward", "mean", "running average"]
    if constraints:
        columns += ["constraint", "violation", "multiplier", "weight"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        cells = [for_markdown_code(name), *_logged(log_history, f"rewards/{name}/mean", f"average/{name}")]
        if not constraints:
            lines.append(f"| {' | '.join(cells)} |")
            continue
        # A row for each constraint; the reward's own cells stand in the first
        for key, constraint in grouped.get(name, [(name, None)]):
            stated = "none" if constraint is None else str(constraint)
            own = _logged(log_history, f"violation/{key}", f"multiplier/{key}", f"weight/{key}")
            lines.append(f"| {' | '.join([*cells, stated, *own])} |")
            cells = ["", "", ""]
    objective = last_value(log_history, "weight/objective")
    if objective is not None:
        lines.append(f"| the objective |{' |' * (len(columns) - 2)} {_shown(objective)} |")
    return "\n".join(lines)


def _logged(log_history: LogHistory, *keys: str) -> list[str]:
    return [_shown(last_value(log_history, key)) for key in keys]


def _end(log_history: LogHistory, stop_reason: str | None) -> str:
    sentences = []
    step = max((entry.get("step", 0) for entry in log_history), default=0)
    if step:
        sentences.append(f"Means are those of the last rollouts logged, at step {step}.")
    per_response = last_value(log_history, "kl/per_response")
    if per_response is not None:
        per_token = _shown(last_value(log_history, "kl/per_token"))
        sentences.append(
            f"KL from the reference: {_shown(per_response)} nats for a response, {per_token} for a token."
        )
    gold, best = last_value(log_history, "eval_gold"), best_value(log_history, "eval_gold")
    if gold is not None and best is not None:
        sentences.append(f"Gold metric: {_shown(gold)} at the end, at best {_shown(best[1])} at step {best[0]}.")
    if stop_reason:
        sentences.append(f"Training stopped early: {for_markdown(stop_reason)}")
    elif step:
        sentences.append("Training was not stopped early.")
    return " ".join(sentences)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _loading(critic: str, model_id: str, names: Sequence[str]) -> str:
    streams = ", ".join([*map(for_markdown_code, names), "the KL"])
    parts = [
        "The policy is a plain model and loads without `trl_ext`.",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({as_string(model_id)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({as_string(model_id)})\n```",
    ]
    if critic == "none":
        return "\n\n".join(parts)
    parts.append(
        f"The critic lies beside it in `{CRITIC_FILE}`. At every token it has a value of {streams}, in this order"
        + {
            "shared": ", from the policy's last hidden state.",
            "separate": ", from a backbone of its own.",
            "module": ", from a module of the author's own, without which it cannot be rebuilt.",
        }[critic]
    )
    if critic != "module":
        arguments = (
            "model.base_model(**inputs).last_hidden_state"
            if critic == "shared"
            else 'inputs["input_ids"], inputs["attention_mask"]'
        )
        parts.append(
            "```python\nfrom trl_ext import critic_from_pretrained\n\n"
            f"critic = critic_from_pretrained({as_string(model_id)})\n"
            'inputs = tokenizer("Some text", return_tensors="pt")\n'
            f"values = critic({arguments})  # (batch, tokens, {len(names) + 1})\n```"
        )
    return "\n\n".join(parts)


def calibration_table(calibrations: Sequence[Calibration]) -> Table:
    """One row for each constraint, within 80 columns of characters; a name is never cut."""
    table = Table(
        title="Constraints against the reference, before training",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        leading=1,
        show_edge=False,
    )
    table.add_column("constraint", overflow="fold")
    for column in ("mean\nspread", "5%\n95%", "25%\n75%", "50%", "below it\ndeviations"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in calibrations:
        low, quarter, median, three_quarters, high = row.quantiles
        table.add_row(
            for_terminal(f"{row.reward} {row.stated}"),
            f"{row.mean:.3g}\n{row.spread:.3g}",
            f"{low:.3g}\n{high:.3g}",
            f"{quarter:.3g}\n{three_quarters:.3g}",
            f"{median:.3g}",
            f"{row.rank:.0%}\n{row.deviations:+.2f}",
        )
    return table


def _save_calibration(calibrations: Sequence[Calibration], folder: str | Path) -> None:
    """Writes `calibration.json`."""
    rows = [asdict(calibration) for calibration in calibrations]
    with warn_of_failure(f"{CALIBRATION_FILE} could not be written"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CALIBRATION_FILE).write_text(json.dumps(rows, indent=1))


class CalibrationCallback(TrainerCallback):
    """
    Compares the constraints of a run with the policy before its first step, and resolves thresholds stated relative to
    it. A resumed run keeps the thresholds of its checkpoint.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        controller = trainer.controller
        if not controller.constraints or not args.calibration_samples or trainer.resumed:
            return
        rewards = trainer.sample_rewards(args.calibration_samples).cpu()
        controller.calibrate_spreads(rewards, trainer.num_generations_eval)
        samples = [rewards[:, index] for index in controller.constrained]
        constraints = [one.resolved(own) for one, own in zip(controller.constraints, samples, strict=True)]
        check_constraints(constraints)
        controller.set_constraints(constraints)
        found = [calibrate(*row) for row in zip(constraints, controller.constrained_names(), samples, strict=True)]
        if trainer.is_world_process_zero():
            if not args.disable_tqdm:
                Console().print(calibration_table(found))
            _save_calibration(found, args.output_dir)
            columns = (
                "reward",
                "constraint",
                "mean",
                "spread",
                "5%",
                "25%",
                "50%",
                "75%",
                "95%",
                "rank",
                "deviations",
            )
            rows = [
                [one.reward, str(one.stated), one.mean, one.spread, *one.quantiles, one.rank, one.deviations]
                for one in found
            ]
            report_table(trainer, "calibration", columns, rows, state.global_step)
        warnings = [warning for calibration in found for warning in calibration.warnings]
        if controller.multipliers is not None:
            signals = controller.constrained_signals(rewards, trainer.num_generations_eval)
            warnings += cap_warnings(
                constraints, controller.constrained_names(), signals, controller.constrained_spreads(), args
            )
        for warning in warnings:
            logger.warning(warning, main_process_only=True)


class ConstraintDashboardCallback(TrainerCallback):
    """
    At every log step, prints a table and writes `dashboard.png` into the output folder, on the main process only and
    from the log alone. While training goes on the picture is drawn at most every `png_seconds`, and in at most 2% of
    the time; at the end it is always drawn.

    Args:
        trainer ([`ConstrainedPPOTrainer`]):
            Trainer that the callback is added to.
        path (`str` or `Path`, *optional*):
            PNG file. Defaults to `dashboard.png` in the trainer's output folder.
        png_seconds (`float`, *optional*, defaults to `10.0`):
            Least time between two pictures.
        show_table (`bool`, *optional*, defaults to `True`):
            Whether the table is printed.
        console ([`~rich.console.Console`], *optional*):
            Console to print on.

    Raises:
        ValueError: If `png_seconds` is negative.

    Example:

    ```python
    trainer = ConstrainedPPOTrainer(...)
    trainer.add_callback(ConstraintDashboardCallback(trainer, png_seconds=60))
    ```
    """

    def __init__(
        self,
        trainer: Any,
        path: str | Path | None = None,
        png_seconds: float = 10.0,
        show_table: bool = True,
        console: Console | None = None,
    ):
        if not png_seconds >= 0:
            raise ValueError(
                f"`png_seconds` must not be negative, got {png_seconds}. 0 draws as often as 2% of the time allows."
            )
        self.trainer = trainer
        self.path = Path(path) if path else Path(trainer.args.output_dir) / DASHBOARD_FILE
        self.png_seconds = png_seconds
        self.show_table = show_table
        self.console = console or Console()
        self._next_drawing = -math.inf
        self._newest = NewestValues("eval_gold")
        self._last_shown: tuple[str, float | None] | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if is_last_log(logs) and state.is_world_process_zero and reward_names(state.log_history):
            self._draw(state)
            report_image(self.trainer, "dashboard", self.path, state.global_step)
            self._report_multipliers(state)
        if not state.is_world_process_zero or not reward_names([logs or {}]):
            return
        if self.show_table:
            self._print(state)
        if time.monotonic() >= self._next_drawing:
            self._draw(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():
            report_image(self.trainer, "dashboard", self.path, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not reward_names(state.log_history):
            return
        if self.show_table and self._last_shown != self._shown(state):
            self._print(state)
        self._draw(state)

    def _report_multipliers(self, state: Any) -> None:
        log = self._newest.of(state.log_history)
        parts = ("threshold", "violation", "multiplier", "weight", "saturation", "oscillation")
        rows = []
        for grouped in constraints_by_reward(self.constraints()).values():
            for key, constraint in grouped:
                found = [last_value(log, f"{part}/{key}") for part in parts]
                rows.append([key, str(constraint), *("" if value is None else value for value in found)])
        if rows:
            report_table(self.trainer, "constraints", ("reward", "constraint", *parts), rows, state.global_step)

    def constraints(self) -> list[Constraint]:
        """The constraints with their thresholds of now, by name of their reward."""
        return self.trainer.controller.named_constraints()

    def _title(self, state: Any) -> str:
        method = self.trainer.args.method
        title = f"{self.trainer._name}{f' ({method})' if method else ''}, step {state.global_step}"
        reason = self.trainer.stop_reason
        return f"{title}, ended early: {reason}" if reason else title

    def _print(self, state: Any) -> None:
        self._last_shown = self._shown(state)
        with warn_of_failure("The dashboard could not be printed"):
            log = self._newest.of(state.log_history)
            table = dashboard_table(log, self.constraints(), self._title(state), self.console.width)
            self.console.print(table)

    def _shown(self, state: Any) -> tuple[str, float | None]:
        """What a table shows that may change after the log step."""
        return self._title(state), last_value(self._newest.of(state.log_history), "eval_gold")

    def _draw(self, state: Any) -> None:
        start = time.monotonic()
        with warn_of_failure(f"{self.path.name} could not be drawn"):
            draw_dashboard(
                state.log_history, self.path, self.constraints(), self._title(state), self.trainer.args.kl_ceiling
            )
        end = time.monotonic()
        self._next_drawing = end + max(self.png_seconds, (end - start) / _DRAWING_SHARE)
