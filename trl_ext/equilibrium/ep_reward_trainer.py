from pathlib import Path
from typing import Any

import torch
from trl import RewardTrainer

from .card import CITATION, method_section, write_card
from .ep_reward_config import EPRewardConfig
from .head_access import (
    HeadMetrics,
    active_head,
    equilibrium_model,
    restore_float32,
    use_head_learning_rate,
    use_homeostasis_coef,
)
from .modeling import EPModelForSequenceClassification


class EPRewardTrainer(RewardTrainer):
    """
    [`~trl.RewardTrainer`] for reward models with an equilibrium-propagation head
    (https://huggingface.co/papers/2309.02214): with the homeostasis objective in the loss, the head's metrics in the
    log and its settings in the model card.

    TRL's own trainer, unmodified, trains these models too, but its loss leaves the homeostasis objective out.

    Args:
        model (`str`, [`EPModelForSequenceClassification`] or `PeftModel` on one):
            Model with `num_labels=1`. Of a model id or folder without an equilibrium head, the backbone is taken and
            gets a new head; `args.model_init_kwargs` may then hold fields of [`EPConfig`].
        args ([`EPRewardConfig`], *optional*):
            Configuration.
        kwargs (`Any`):
            The other arguments of [`~trl.RewardTrainer`], by name.

    Raises:
        TypeError: If `args` is not an [`EPRewardConfig`], or the model has no equilibrium head.

    Example:

    ```python
    from datasets import load_dataset
    from trl_ext import EPRewardConfig, EPRewardTrainer

    trainer = EPRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        args=EPRewardConfig(output_dir="Qwen3-0.6B-EP-Reward"),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "trl_ext", "equilibrium-propagation", "reward-trainer"]
    _name = "Equilibrium Propagation"
    _paper = {
        "title": "Improving equilibrium propagation without weight symmetry through Jacobian homeostasis",
        "id": "2309.02214",
        "citation": CITATION,
    }

    args: EPRewardConfig

    def __init__(self, model: Any, args: EPRewardConfig | None = None, **kwargs: Any):
        if args is None:
            args = EPRewardConfig("EPReward")
        if not isinstance(args, EPRewardConfig):
            raise TypeError(f"`args` must be an `EPRewardConfig`, got `{type(args).__name__}`.")
        if isinstance(model, str):
            options: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {})}
            model = EPModelForSequenceClassification.from_pretrained(model, **options, num_labels=1)
            args.model_init_kwargs = None
        use_homeostasis_coef(equilibrium_model(model), args.homeostasis_coef)
        super().__init__(model=model, args=args, **kwargs)
        # TRL casts all that trains on a quantized backbone to bf16
        restore_float32(active_head(self.model))
        self._head_metrics = HeadMetrics(self)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if outputs.homeostasis_loss is not None:
            loss = loss + equilibrium_model(self.model).config.homeostasis_coef * outputs.homeostasis_loss.mean()
        self._head_metrics.record(outputs)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        use_head_learning_rate(optimizer, self.model if model is None else model, self.args.head_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self._head_metrics.pop()
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            model, model_id = equilibrium_model(self.model), self.hub_model_id or str(self.args.output_dir)
            section = method_section(model.config, self.state.log_history, model_id)
            write_card(self.args.output_dir, model_id, model.config.name_or_path, section)
