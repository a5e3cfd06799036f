"""What a trainer is told of its optimizer: that it is the one asked for, and what its projection does."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback

from .. import _upstream
from ..core.files import warn_of_failure
from ..core.reporters import report_table
from .names import named_optimizer
from .step import ProjectedOptimizer


REPORT_FILE = "optimizer_report.json"
# A weight that is projected on more than half of the steps is hit for its architecture's sake, not by chance
OFTEN = 0.5


class OptimizerCheckCallback(TrainerCallback):
    """
    Raises at the start of training if the optimizer under all wrappers is not the one asked for. Three replacements
    happen without a word: where DeepSpeed offloads the optimizer, accelerate puts `DeepSpeedCPUAdam` in its place;
    under DeepSpeed, Trainer puts AdamW in the place of what was passed as `optimizers=`; and an `optimizer` block in a
    DeepSpeed config wins over everything.

    [`register`] adds it to every trainer made afterwards, [`OptimizerMixin`] to its own, and this package's trainers
    have it.

    Args:
        expected (`type`, *optional*):
            Class asked for. Defaults to the class of the trainer's `optimizers=`, for which the callback must be among
            the constructor's `callbacks`, or else to the one that `args.optim` names, if it is one of ours.

    Example:

    ```python
    from trl_ext.optim import AdamP, OptimizerCheckCallback

    trainer.add_callback(OptimizerCheckCallback(AdamP))
    ```
    """

    def __init__(self, expected: type[Optimizer] | None = None):
        self.expected = expected
        self._passed: type[Optimizer] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._passed = None if optimizer is None else type(optimizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """
        Raises:
            RuntimeError: If the optimizer was replaced.
        """
        expected = self.expected or self._passed or named_optimizer(args.optim)
        chain = [type(wrapper) for wrapper in optimizer_chain(optimizer)]
        if expected is None or issubclass(chain[-1], expected):
            return
        names = " -> ".join(cls.__name__ for cls in chain)
        raise RuntimeError(
            f"Training would run {chain[-1].__name__} instead of {expected.__name__} ({names}): "
            f"{self._cause(args, chain)}"
        )

    def _cause(self, args: Any, chain: list[type]) -> str:
        deepspeed = getattr(args.hf_deepspeed_config, "config", None) if args.deepspeed_plugin else None
        if deepspeed and "optimizer" in deepspeed:
            return "the `optimizer` block of the DeepSpeed config wins. Remove that block."
        if chain[-1].__name__.startswith("DeepSpeedCPU"):
            return (
                "accelerate replaces every optimizer where DeepSpeed offloads the optimizer's state. Add "
                '`"zero_force_ds_cpu_optimizer": false` to the top level of the DeepSpeed config.'
            )
        if deepspeed is not None and self._passed is not None:
            return (
                "Trainer drops `optimizers=` under DeepSpeed. Remove `optimizers=` and set "
                "`trainer.optimizer_cls_and_kwargs = optimizer_factory(...)` before `trainer.train()`, or call "
                "`trl_ext.optim.register()` and set `optim` in the configuration."
            )
        return "something else was given to the trainer. Remove its `optimizers=` or `optimizer_cls_and_kwargs=`."


def optimizer_chain(optimizer: Any) -> list[Any]:
    """An optimizer's wrappers, outermost first, and the optimizer itself, last."""
    chain = [optimizer]
    while getattr(chain[-1], "optimizer", None) is not None:
        chain.append(chain[-1].optimizer)
    return chain


def bottom_optimizer(optimizer: Any) -> Any:
    """The optimizer under all wrappers of accelerate and DeepSpeed."""
    return optimizer_chain(optimizer)[-1]


class OptimizerReportCallback(TrainerCallback):
    """
    Adds what `report()` of [`AdamP`] or [`SGDP`] says to each training log, and writes the whole of it, weight by
    weight, to `optimizer_report.json` in the output folder at the end. The metrics are those of [`report_metrics`].

    With another optimizer it does nothing. A callback sees a log after those before it in the list; [`attach`] puts it
    first, so that reporters and the progress bar have the numbers too.

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
        callback.trainer = trainer
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def __init__(self) -> None:
        self._learning_rates: list[Any] = []
        self.trainer: Any = None  # whose reporters get the report as a table, where it is known

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._learning_rates = [group["lr"] for group in bottom_optimizer(optimizer).param_groups]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, optimizer: Any = None, **kwargs: Any):
        if logs and "loss" in logs:
            metrics = report_metrics(self._report(optimizer))
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        report = self._report(optimizer)  # All processes call it, since sharded weights need an exchange
        if report and state.is_world_process_zero:
            with warn_of_failure(f"{REPORT_FILE} could not be written"):
                Path(args.output_dir).mkdir(parents=True, exist_ok=True)
                (Path(args.output_dir) / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
            if self.trainer is not None:
                columns = sorted({column for row in report.values() for column in row})
                rows = [[name, *(row.get(column, "") for column in columns)] for name, row in report.items()]
                report_table(self.trainer, "optimizer_report", ("weight", *columns), rows, state.global_step)

    def _report(self, optimizer: Any) -> dict[str, dict[str, Any]]:
        bottom = None if optimizer is None else bottom_optimizer(optimizer)
        if not isinstance(bottom, ProjectedOptimizer):
            return {}
        # The schedule has moved on since the step
        next_rates = [group["lr"] for group in bottom.param_groups]
        _set_learning_rates(bottom, self._learning_rates)
        try:
            return bottom.report()
        finally:
            _set_learning_rates(bottom, next_rates)


def _set_learning_rates(optimizer: ProjectedOptimizer, learning_rates: list[Any]) -> None:
    for group, learning_rate in zip(optimizer.param_groups, learning_rates, strict=False):
        group["lr"] = learning_rate


def report_metrics(report: dict[str, dict[str, Any]]) -> dict[str, float]:
    """
    Sums a report up.

    Args:
        report (`dict[str, dict]`):
            What `report()` of an optimizer returns.

    Returns:
        `dict[str, float]`: over the weights of at least two dimensions, `optimizer/projected/share`, the mean share of
        steps that were projected, and `optimizer/projected/weights`, the number of weights that were on more than half
        of their steps; of these and of the others the means `optimizer/projected/weight_norm`,
        `optimizer/projected/effective_step_size` (radians), `optimizer/other/weight_norm` and
        `optimizer/other/effective_step_size`. Weights of norm 0 are left out of the means,
        and a mean over no weights is left out.
    """
    if not report:
        return {}
    shares = {name: row["channel"] + row["layer"] for name, row in report.items()}
    often = [name for name, share in shares.items() if share > OFTEN]
    metrics = {
        "optimizer/projected/share": float(np.mean(list(shares.values()))),
        "optimizer/projected/weights": float(len(often)),
    }
    for title, chosen in (("projected", often), ("other", [name for name in report if name not in often])):
        for key in ("weight_norm", "effective_step_size"):
            values = [report[name][key] for name in chosen if report[name]["weight_norm"] > 0]
            if values:
                metrics[f"optimizer/{title}/{key}"] = float(np.mean(values))
    return metrics


@contextmanager
def default_callback(callback: TrainerCallback) -> Iterator[None]:
    """Gives the callback to every trainer made until the context ends, before its reporters."""
    _upstream.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        _upstream.DEFAULT_CALLBACKS.remove(callback)
