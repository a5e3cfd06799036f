"""The gold metric: what the rewards stand in for, measured in evaluation only."""

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer

from .adaptation import RolloutController


def gold_dataset(args: Any, eval_dataset: Any) -> str | None:
    """
    With several sets in `eval_dataset`, the one whose gold metric chooses the best model and ends the run: the one
    that `metric_for_best_model` names (`"eval_<name>_..."`), or the first. `None` with one set.
    """
    if not isinstance(eval_dataset, dict) or not eval_dataset:
        return None
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    # The longest first: one name may begin with another
    named = [name for name in sorted(eval_dataset, key=len, reverse=True) if metric.startswith(f"{name}_")]
    return named[0] if named else next(iter(eval_dataset))


def check_gold(args: Any, gold_reward: Any, eval_dataset: Any) -> None:
    """Refuses a gold metric that is no function or has no data, and settings that need one where there is none."""
    if gold_reward is not None:
        _check_function(gold_reward)
    needs_gold = ["gold_patience"] if args.gold_patience else []
    if args.search_config is not None and args.search_config.gold_metric == "eval_gold":
        needs_gold.append("search")
    if gold_reward is None and needs_gold:
        raise ValueError(
            f"`{needs_gold[0]}={getattr(args, needs_gold[0])}` needs a gold metric. Give `gold_reward`, a function "
            "like a reward function, and `eval_dataset`."
        )
    if gold_reward is not None and eval_dataset is None:
        raise ValueError(
            "`gold_reward` is measured in evaluation and there is no `eval_dataset`. Give a validation split."
        )


def _check_function(gold_reward: Any) -> None:
    if isinstance(gold_reward, (str, nn.Module)) or not callable(gold_reward):
        given = repr(gold_reward) if isinstance(gold_reward, str) else f"a `{type(gold_reward).__name__}`"
        raise TypeError(
            f"`gold_reward` must be a function with the signature of a reward function, async or not, got {given}. "
            "Load the model yourself and give a function that scores `completions` with it."
        )
    if inspect.isasyncgenfunction(gold_reward) or inspect.isgeneratorfunction(gold_reward):
        raise TypeError("`gold_reward` is a generator. Give a function that returns one number for every completion.")


class GoldMetricMixin(GRPOTrainer):
    """What [`ConstrainedPPOTrainer`], whose base this is, does with `gold_reward`."""

    controller: RolloutController
    end_training: Any
    # With several sets to evaluate on, the one that `eval_gold` speaks of, and the one that is evaluated now
    gold_dataset: str | None
    _evaluated: str | None = None

    @property
    def num_gold_evaluations(self) -> int:
        """How often the gold metric was measured while training."""
        return self.controller.stopping.num_gold_evaluations

    def _measure_gold(
        self, gold_reward: Callable, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> None:
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        gold: Any = gold_reward(
            prompts=prompts, completions=completions, completion_ids=completion_ids_list, trainer_state=self.state,
            **columns,
        )  # fmt: skip
        if inspect.iscoroutine(gold):
            # In a thread: a notebook's own loop runs in this one
            with ThreadPoolExecutor(1) as executor:
                gold = executor.submit(asyncio.run, gold).result()
        if len(gold) != len(completions) or not all(value is not None and value == value for value in gold):
            raise ValueError(
                f"`gold_reward` returned {list(gold)[:4]} for {len(completions)} completions. Return one number for "
                "every completion."
            )
        local = torch.tensor(gold, dtype=torch.float32, device=self.accelerator.device)
        self._metrics["eval"]["gold"].extend(self.accelerator.gather(local).tolist())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        # With several sets `Trainer` calls this again for each, as `eval_<name>`
        self._evaluated = prefix.removeprefix("eval_") if prefix.startswith("eval_") else None
        try:
            metrics = super().evaluate(*args, **kwargs)
        finally:
            self._evaluated = None
        if self.is_in_train and prefix == "eval" and "eval_gold" in metrics:
            reason = self.controller.stopping.check_gold(metrics["eval_gold"])
            if reason is not None:
                self.end_training(reason)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics, name = self._metrics["eval"], self._evaluated
        if name is not None and not self.model.training:
            # TRL logs every set under the same names. Those of the set with the gold metric stay, too
            named = {f"{name}_{key}": values for key, values in metrics.items()}
            if name != self.gold_dataset:
                metrics.clear()
            metrics.update(named)
        super().log(logs, start_time)
