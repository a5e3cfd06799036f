"""What a trainer prints of its log by default: one short line for each entry, and one bar."""

import sys
from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback


WIDTH = 80
# Logged quantities of a line, in order, and how they are called there; what does not fit is left to the log
_SHOWN = {
    "loss": "loss", "reward": "reward", "gold": "gold", "rewards/accuracies": "accuracy", "accuracy": "accuracy",
    "mean_token_accuracy": "token accuracy", "kl/per_response": "KL", "kl": "KL", "kl/chosen": "KL chosen",
    "optimizer/projected/share": "projected", "grad_norm": "gradient", "learning_rate": "rate",
}  # fmt: skip


class ShortLogCallback(ProgressCallback):
    """
    One line of at most 80 columns for each log, and on a terminal one bar for the training. The whole log is in
    `trainer_state.json` and with the reporters.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = 0
        if state.is_world_process_zero:
            from tqdm.auto import tqdm

            hidden = True if args.disable_tqdm else None  # `None` shows it on terminals alone
            self.training_bar = tqdm(total=state.max_steps, dynamic_ncols=True, delay=0.0, disable=hidden)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        from tqdm.auto import tqdm

        tqdm.write(short_line(logs, state.global_step, state.max_steps))


def short_line(logs: Mapping[str, Any], step: int, num_steps: int) -> str:
    """
    A log entry as one line.

    Args:
        logs (`Mapping[str, Any]`):
            What is logged; keys that begin with `eval_` are of an evaluation.
        step (`int`):
            Step of the training.
        num_steps (`int`):
            Steps of the whole training.

    Returns:
        `str`: at most 80 columns; what does not fit is left out.
    """
    line = f"{step:>{len(str(num_steps))}}/{num_steps}"
    if "train_runtime" in logs:
        minutes, seconds = divmod(round(logs["train_runtime"]), 60)
        rate = logs.get("train_samples_per_second")
        speed = f", {rate:.3g} rows a second" if isinstance(rate, float) and rate > 0 else ""
        return f"{line}  trained in {minutes}:{seconds:02d} minutes{speed}"
    evaluated = any(key.startswith("eval_") for key in logs)
    if evaluated:
        line += "  evaluation"
    written: set[str] = set()
    for key, name in _SHOWN.items():
        value = logs.get(f"eval_{key}" if evaluated else key)
        if not isinstance(value, (int, float)) or name in written:
            continue
        part = f"  {name} {value:.4g}"
        if len(line) + len(part) <= WIDTH:
            line, written = line + part, {*written, name}
    return line
