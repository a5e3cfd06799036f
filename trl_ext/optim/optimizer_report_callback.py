"""Writes what the projection does to the log."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from .. import _compat
from .optimizer_check_callback import bottom_optimizer


REPORT_FILE = "optimizer_report.json"


class OptimizerReportCallback(TrainerCallback):
    """
    Adds to each training log what `report()` of [`AdamP`] or [`SGDP`] says, and writes the whole of it, by parameter,
    to `optimizer_report.json` in the output folder at the end of training. Logged are, over the weights of two or more
    dimensions:

    - `optimizer/projected_share`: share of steps so far on which a weight was projected, averaged over the weights
    - `optimizer/channel_weights`, `optimizer/layer_weights`: number of weights projected at that level at the last step
    - `optimizer/step_size_projected`, `optimizer/step_size_other`: mean size of the last step relative to the weight's
      norm, of the weights projected at that step and of the others
    - `optimizer/norm_projected`, `optimizer/norm_other`: mean norm of the same

    With another optimizer it does nothing. A callback sees a log after those before it have; [`attach`] puts it first,
    so that reporters and the progress bar have the numbers too.

    Example:

    ```python
    from trl_ext.optim import OptimizerReportCallback

    OptimizerReportCallback.attach(trainer)
    ```
    """

    @classmethod
    def attach(cls, trainer: Trainer) -> "OptimizerReportCallback":
        """Adds the callback to a trainer, before all others."""
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        report = self._report(**kwargs)
        if report:
            metrics = report_metrics(report)
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._report(**kwargs)
        if report and state.is_world_process_zero:
            path = Path(args.output_dir) / REPORT_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")

    def _report(self, optimizer: Any = None, model: Any = None, **kwargs: Any) -> dict[str, dict[str, Any]]:
        bottom = None if optimizer is None else bottom_optimizer(optimizer)
        return bottom.report(model) if hasattr(bottom, "report") else {}


def report_metrics(report: dict[str, dict[str, Any]]) -> dict[str, float]:
    """
    The metrics of [`OptimizerReportCallback`].

    Args:
        report (`dict[str, dict]`):
            What `report()` of an optimizer returns.

    Returns:
        `dict[str, float]`; a mean over no weights is left out.
    """
    rows = list(report.values())
    steps = [row for row in rows if row["steps"]]
    metrics = {
        "optimizer/channel_weights": float(sum(row["view"] == "channel" for row in rows)),
        "optimizer/layer_weights": float(sum(row["view"] == "layer" for row in rows)),
    }
    if steps:
        shares = [(row["channel"] + row["layer"]) / row["steps"] for row in steps]
        metrics["optimizer/projected_share"] = sum(shares) / len(shares)
    for suffix, chosen in (
        ("projected", [row for row in rows if row["view"] is not None]),
        ("other", [row for row in rows if row["view"] is None]),
    ):
        for key in ("step_size", "norm"):
            if chosen:
                metrics[f"optimizer/{key}_{suffix}"] = sum(row[key] for row in chosen) / len(chosen)
    return metrics


@contextmanager
def default_callback(callback: TrainerCallback) -> Iterator[None]:
    """Gives the callback to every trainer made until the context ends, before its reporters."""
    _compat.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        _compat.DEFAULT_CALLBACKS.remove(callback)
