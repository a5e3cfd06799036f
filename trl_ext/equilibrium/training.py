"""Trainers of models with an equilibrium head: transformers' and TRL's own, with the head's metrics, rate and card.

One step: `compute_loss` calls TRL's or transformers', whose forward of the model has the homeostasis objective too,
and adds that to a loss which is not the model's own; the head's statistics are taken after each forward, and `log`
hands on their means.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import Trainer, TrainingArguments, set_seed
from trl import RewardConfig, RewardTrainer

from ..core.checkpointing import WholeCheckpointsMixin
from ..core.checks import Range, check_fields
from ..core.dataset_rows import checked_stream
from ..core.four_bits import keep_four_bits_trainable
from ..core.model_card import known_of
from ..core.parameter_groups import move_to_own_groups
from ..core.run_arguments import RunArguments
from ..core.safe_text import WithoutToken, shown_folder
from ..core.tokenizer_check import check_tokenizer
from ..core.training_ranges import COUNT, NOT_NEGATIVE, TRAINING
from ..optim.install import OwnOptimizerMixin
from ..optim.names import post_init_with_own_optimizer
from .loading import save_configuration
from .modeling import EPModelForSequenceClassification, active_head, equilibrium_model
from .report import CITATION, gathered_asymmetry, method_section, write_card
from .settings import check_homeostasis


RANGES: dict[str, Range] = {
    **TRAINING,
    # Of RewardConfig
    "center_rewards_coefficient": NOT_NEGATIVE,
    "dataset_num_proc": COUNT,
    "max_length": COUNT,
    "pad_to_multiple_of": COUNT,
    # Our own
    "head_learning_rate": Range(above=0, remedy="Leave it out to use `learning_rate`."),
    "homeostasis_coef": Range(at_least=0, remedy="Set it to 0 to go without."),
}


@dataclass
class _HeadTrainingArguments(WithoutToken, RunArguments):
    """The two fields that trainers of an equilibrium head add to their arguments."""

    homeostasis_coef: float | None = field(
        default=None, metadata={"help": "Weight of the homeostasis objective. Defaults to the model's."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the head. Defaults to `learning_rate`."}
    )

    def __post_init__(self) -> None:
        check_fields(self, RANGES)
        post_init_with_own_optimizer(self, super().__post_init__)  # type: ignore[misc]


@dataclass
class EPTrainingArguments(_HeadTrainingArguments, TrainingArguments):
    r"""
    Configuration of [`EPTrainer`]: [`~transformers.TrainingArguments`] with two fields more and [`RunArguments`]'.

    Parameters:
        homeostasis_coef (`float`, *optional*):
            Weight of the Jacobian homeostasis objective, which brings asymmetric feedback weights towards the
            transposed forward ones. Defaults to the model's own, `config.homeostasis_coef`.
        head_learning_rate (`float`, *optional*):
            Learning rate of the head, whose weights are new and whose feedback, if asymmetric, has to be straightened,
            where `learning_rate` is one for fine-tuning the backbone. Defaults to `learning_rate`.
    """


@dataclass
class EPRewardConfig(_HeadTrainingArguments, RewardConfig):
    r"""
    Configuration of [`EPRewardTrainer`]: [`~trl.RewardConfig`] with two fields more and [`RunArguments`]'.

    Parameters:
        homeostasis_coef (`float`, *optional*):
            As in [`EPTrainingArguments`].
        head_learning_rate (`float`, *optional*):
            As in [`EPTrainingArguments`].
    """


class _HeadTrainer(WholeCheckpointsMixin, OwnOptimizerMixin, Trainer):
    """Base of a trainer, before transformers' or TRL's: the head's metrics, learning rate and model card."""

    def __init__(self, model: Any, args: Any, *positional: Any, **kwargs: Any):
        if model is not None:
            _set_homeostasis_coef(model, args.homeostasis_coef)
        self._head_metrics: dict[str, list[float]] = defaultdict(list)
        super().__init__(model, args, *positional, **kwargs)
        keep_four_bits_trainable(self.model)

    def call_model_init(self, trial: Any = None) -> Any:
        model = super().call_model_init(trial)
        keep_four_bits_trainable(model)
        _set_homeostasis_coef(model, self.args.homeostasis_coef)
        return model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.args.head_learning_rate is not None:
            trained = self.model if model is None else model
            heads = {id(parameter) for name, parameter in trained.named_parameters() if "score" in name.split(".")}
            groups = [
                ([parameter for parameter in group["params"] if id(parameter) in heads], group["weight_decay"])
                for group in optimizer.param_groups
            ]
            move_to_own_groups(
                optimizer, groups, self.args.head_learning_rate, tag="equilibrium_head", scheduler=self.lr_scheduler
            )
        return optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        for name, value in active_head(self.model).metrics().items():
            self._head_metrics[name].append(value)
        if outputs.homeostasis_loss is not None:
            self._head_metrics["ep/homeostasis_loss"].append(outputs.homeostasis_loss.detach().mean().item())
            if outputs.loss is None:
                # A loss of the logits: of preferences, with smoothed labels, or the user's own
                loss = loss + self._homeostasis_weight() * outputs.homeostasis_loss.mean()
        return (loss, outputs) if return_outputs else loss

    def _homeostasis_weight(self) -> float:
        """The coefficient, over the number of accumulated batches where the trainer takes the loss to be so."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # which transformers 5.5 has not
        if scaled is None:
            scaled = self.compute_loss_func is not None
        weight = equilibrium_model(self.model).config.homeostasis_coef
        return weight / self.current_gradient_accumulation_steps if scaled else weight

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        own_folder = output_dir is None or Path(output_dir).resolve() == Path(self.args.output_dir).resolve()
        if own_folder and not _internal_call:
            self.create_model_card()  # TRL writes one with each checkpoint, and a run may have none
        super().save_model(output_dir, _internal_call=_internal_call)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self.args.should_save and is_peft_model(model):
            save_configuration(equilibrium_model(model), output_dir or self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self._pop_head_metrics()
        super().log(logs, start_time)

    def _pop_head_metrics(self) -> dict[str, float]:
        """Means since the last call, of this process; counts are the last ones. All processes must call it."""
        seen, self._head_metrics = self._head_metrics, defaultdict(list)
        if not seen:
            return {}
        means = {name: values[-1] if "num_" in name else sum(values) / len(values) for name, values in seen.items()}
        if not self.model.training:
            return {f"eval_{name}": means[name] for name in ("ep/free_sweeps", "ep/free_residual")}
        head = active_head(self.model)
        return means | (gathered_asymmetry(head) if head.feedback == "asymmetric" else {})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model, model_id = equilibrium_model(self.model), self.hub_model_id or shown_folder(self.args.output_dir)
            section = method_section(model.config, self.state.log_history, is_peft_model(self.model))
            is_reward = isinstance(self, RewardTrainer)
            base_model = model.config.name_or_path
            write_card(
                self.args.output_dir,
                model_id,
                base_model,
                section,
                is_reward,
                self.args.hub_token,
                known_of(self, base_model),
            )


def _set_homeostasis_coef(model: Any, homeostasis_coef: float | None) -> None:
    """Gives a model the weight that the trainer's arguments have, if any; refuses one without a head."""
    config = equilibrium_model(model).config
    if homeostasis_coef is not None:
        check_homeostasis(homeostasis_coef, config.feedback)
        config.homeostasis_coef = homeostasis_coef


class EPTrainer(_HeadTrainer, Trainer):
    """
    [`~transformers.Trainer`] for classifiers with an equilibrium-propagation head
    (https://huggingface.co/papers/2309.02214): the head's metrics in the log and its settings in the model card. The
    homeostasis objective is part of the model's own loss, so transformers' trainer, unmodified, minimises it too, but
    not under `label_smoothing_factor` or `compute_loss_func`: this trainer adds it there.

    Args:
        model ([`EPModelForSequenceClassification`] or `PeftModel` on one, *optional*):
            Model. Without one, `model_init` builds it.
        args ([`EPTrainingArguments`], *optional*):
            Configuration. Defaults to one with the output folder `tmp_trainer`, as the parent's.
        positional, kwargs (`Any`):
            The other arguments of [`~transformers.Trainer`].

    Raises:
        TypeError: If `args` is not an [`EPTrainingArguments`], or the model has no equilibrium head.
    """

    args: EPTrainingArguments

    def __init__(self, model: Any = None, args: EPTrainingArguments | None = None, *positional: Any, **kwargs: Any):
        if args is None:
            args = EPTrainingArguments("tmp_trainer")
        if not isinstance(args, EPTrainingArguments):
            raise TypeError(f"`args` must be an `EPTrainingArguments`, got `{type(args).__name__}`.")
        super().__init__(model, args, *positional, **kwargs)

    def create_model_card(self, **kwargs: Any) -> None:
        kwargs["tags"] = [*(kwargs.get("tags") or ()), "trl_ext", "equilibrium-propagation"]
        super().create_model_card(**kwargs)


class EPRewardTrainer(_HeadTrainer, RewardTrainer):
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
        positional, kwargs (`Any`):
            The other arguments of [`~trl.RewardTrainer`].

    Raises:
        TypeError: If `args` is not an [`EPRewardConfig`], or the model has no equilibrium head.
        ValueError: If `peft_config` is for a model that generates.

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

    def __init__(self, model: Any, args: EPRewardConfig | None = None, *positional: Any, **kwargs: Any):
        if args is None:
            args = EPRewardConfig("EPReward")
        if not isinstance(args, EPRewardConfig):
            raise TypeError(f"`args` must be an `EPRewardConfig`, got `{type(args).__name__}`.")
        if isinstance(model, str):
            options: dict[str, Any] = {"dtype": "float32", **(args.model_init_kwargs or {})}
            # As TRL does: the head's first weights are part of what the seed decides
            set_seed(args.seed)
            model = EPModelForSequenceClassification.from_pretrained(model, **options, num_labels=1)
            args.model_init_kwargs = None
        for value in (*positional, *kwargs.values()):
            task = str(getattr(getattr(value, "task_type", None), "value", getattr(value, "task_type", None)))
            if hasattr(value, "peft_type") and task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
                raise ValueError(
                    f"`peft_config.task_type={task}` is not for a classifier: PEFT would look for what a model that "
                    "generates has, and leave the new head untrained. Use `task_type='SEQ_CLS'`."
                )
        super().__init__(model, args, *positional, **kwargs)
        check_tokenizer(self.processing_class, self.model)
        # TRL casts all that trains on a quantized backbone to bf16
        head = active_head(self.model)
        if head.input_weight.dtype in (torch.float16, torch.bfloat16):
            head.float()

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if not {"chosen_ids", "chosen_input_ids"} & set(getattr(dataset, "column_names", None) or ()):
            use = "A reward model trains on preference pairs: rename or add the columns `chosen` and `rejected`."
            dataset = checked_stream(
                dataset, dataset_name, required=("chosen", "rejected"), optional=("prompt",),
                tokenizer=processing_class, use=use,
            )  # fmt: skip
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(prepared, Dataset) and len(prepared) == 0:
            raise ValueError(
                f"Every pair of the {dataset_name} dataset is longer than `max_length={args.max_length}` tokens, and "
                "was dropped. Raise it."
            )
        return prepared
