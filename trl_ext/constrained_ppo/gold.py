"""The gold metric that rewards stand in for, and the evaluation sets that it is measured on."""

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import Trainer


def check_gold_reward(gold_reward: Any) -> None:
    """Refuses what cannot be called as a reward function, such as a model or its id, before anything is trained."""
    if isinstance(gold_reward, (str, nn.Module)) or not callable(gold_reward):
        given = repr(gold_reward) if isinstance(gold_reward, str) else f"a `{type(gold_reward).__name__}`"
        raise TypeError(
            f"`gold_reward` must be a function with the signature of a reward function, async or not, got {given}. "
            "Load the model yourself and give a function that scores `completions` with it."
        )


def check_gold(args: Any, gold_reward: Any, eval_dataset: Any) -> None:
    """Refuses a gold metric that is no function or has no data, and settings that need one where there is none."""
    if gold_reward is not None:
        check_gold_reward(gold_reward)
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


def gold_dataset(metric_for_best_model: str | None = None, eval_dataset: Any = None) -> str | None:
    """
    With several evaluation sets, the one that chooses the best model and ends the run.

    Args:
        metric_for_best_model (`str`, *optional*, defaults to `None`):
            `"eval_<name>_..."` or `"<name>_..."` names a set; otherwise it is the first.
        eval_dataset (`Any`, *optional*, defaults to `None`):
            What the trainer evaluates on: a `dict` of several sets, or one.

    Returns:
        `str` or `None`: name of the set, `None` with one.
    """
    if not isinstance(eval_dataset, dict) or not eval_dataset:
        return None
    metric = (metric_for_best_model or "").removeprefix("eval_")
    # The longest first: one name may begin with another
    named = [name for name in sorted(eval_dataset, key=len, reverse=True) if metric.startswith(f"{name}_")]
    return named[0] if named else next(iter(eval_dataset))


class GoldMetricMixin(Trainer):
    """
    Base of [`ConstrainedPPOTrainer`], before TRL's: measures `gold_reward` in evaluation, and keeps several evaluation
    sets apart, which TRL logs under the same names.

    Attributes:
        gold_reward (`Callable` or `None`): The metric.
        gold_dataset (`str` or `None`): The set whose metrics are also logged without its name.
    """

    gold_reward: Callable[..., Any] | None = None
    gold_dataset: str | None = None
    _metrics: dict[str, Any]
    # The set that is evaluated now, with several
    _evaluated: str | None = None

    def _measure_gold(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> None:
        assert self.gold_reward is not None
        columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
        gold: Any = self.gold_reward(
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        # With several sets `Trainer` calls this again for each, as `eval_<name>`
        is_named = metric_key_prefix.startswith("eval_")
        self._evaluated = metric_key_prefix.removeprefix("eval_") if is_named else None
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._evaluated = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics, name = self._metrics["eval"], self._evaluated
        if name is not None and not self.model.training:
            named = {f"{name}_{key}": values for key, values in metrics.items()}
            if name != self.gold_dataset:
                metrics.clear()
            metrics.update(named)
        super().log(logs, start_time)
