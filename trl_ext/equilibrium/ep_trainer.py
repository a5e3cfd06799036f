from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from .card import method_section, write_card
from .ep_reward_config import check_head_learning_rate, check_homeostasis_coef
from .head_access import HeadMetrics, equilibrium_model, use_head_learning_rate, use_homeostasis_coef


@dataclass
class EPTrainingArguments(TrainingArguments):
    r"""
    Configuration of [`EPTrainer`]: [`~transformers.TrainingArguments`] with two fields more.

    Parameters:
        homeostasis_coef (`float`, *optional*):
            Weight of the Jacobian homeostasis objective. Defaults to the model's own, `config.homeostasis_coef`.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head. Defaults to `learning_rate`.
    """

    homeostasis_coef: float | None = field(
        default=None, metadata={"help": "Weight of the homeostasis objective. Defaults to the model's."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the head. Defaults to `learning_rate`."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_homeostasis_coef(self.homeostasis_coef)
        check_head_learning_rate(self.head_learning_rate)


class EPTrainer(Trainer):
    """
    [`~transformers.Trainer`] for classifiers with an equilibrium-propagation head
    (https://huggingface.co/papers/2309.02214): the head's metrics in the log and its settings in the model card. The
    homeostasis objective is part of the model's own loss, so transformers' trainer, unmodified, minimises it too.

    Args:
        model ([`EPModelForSequenceClassification`] or `PeftModel` on one):
            Model.
        args ([`EPTrainingArguments`]):
            Configuration.
        kwargs (`Any`):
            The other arguments of [`~transformers.Trainer`], by name.

    Raises:
        TypeError: If `args` is not an [`EPTrainingArguments`], or the model has no equilibrium head.
    """

    args: EPTrainingArguments

    def __init__(self, model: Any, args: EPTrainingArguments, **kwargs: Any):
        if not isinstance(args, EPTrainingArguments):
            raise TypeError(f"`args` must be an `EPTrainingArguments`, got `{type(args).__name__}`.")
        use_homeostasis_coef(equilibrium_model(model), args.homeostasis_coef)
        super().__init__(model=model, args=args, **kwargs)
        self._head_metrics = HeadMetrics(self)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self._head_metrics.record(outputs)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        use_head_learning_rate(optimizer, self.model if model is None else model, self.args.head_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self._head_metrics.pop()
        super().log(logs, start_time)

    def create_model_card(self, **kwargs: Any) -> None:
        kwargs["tags"] = [*(kwargs.get("tags") or ()), "trl_ext", "equilibrium-propagation"]
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().create_model_card(**kwargs)
        if self.is_world_process_zero():
            model, model_id = equilibrium_model(self.model), self.hub_model_id or str(self.args.output_dir)
            section = method_section(model.config, self.state.log_history, model_id)
            write_card(self.args.output_dir, model_id, model.config.name_or_path, section)
