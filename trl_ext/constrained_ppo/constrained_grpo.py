"""GRPO under constraints: constrained PPO without a critic, with [`~trl.GRPOConfig`]'s defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig

from ..core.checks import shown
from .constrained_ppo_config import ConstrainedPPOConfig, Preset
from .constrained_ppo_trainer import ConstrainedPPOTrainer


@dataclass
class ConstrainedGRPOConfig(ConstrainedPPOConfig):
    r"""
    Configuration of [`ConstrainedGRPOTrainer`]: [`ConstrainedPPOConfig`] with `critic="none"`. Every field of
    [`~trl.GRPOConfig`] has its default and its meaning.

    Where `method` names no preset, the weighted rewards are maximised (`objective="rewards"`) under the constraints
    (`mixing="normalized"`); without constraints that is GRPO.

    Parameters:
        critic (`str`, *optional*, defaults to `"none"`):
            No other value is taken.
        num_generations (`int`, *optional*, defaults to `8`):
            Completions of each prompt, at least 2.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Other name of `beta`.
        beta (`float`, *optional*, defaults to `0.0`):
            Coefficient of the KL term in the loss. The presets with `objective="kl"`, `"mu"` and `"xi"`, need it.
        disable_dropout (`bool`, *optional*, defaults to `False`):
            Whether to disable dropout.
    """

    critic: Literal["shared", "separate", "none"] = field(
        default="none", metadata={"help": "No other value than 'none' is taken."}
    )
    num_generations: int | None = field(default=8, metadata={"help": "Completions of each prompt, at least 2."})
    kl_coef: float = field(default=0.0, metadata={"help": "Other name of `beta`."})
    beta: float = field(default=0.0, metadata={"help": "Coefficient of the KL term in the loss."})
    disable_dropout: bool = field(default=GRPOConfig.disable_dropout, metadata={"help": "Whether to disable dropout."})

    _no_method = Preset("rewards")

    def __post_init__(self):
        if self.critic != "none":
            raise ValueError(
                f"`critic={shown(self.critic)}` in a `ConstrainedGRPOConfig`, which has none. Use "
                "`ConstrainedPPOConfig`."
            )
        super().__post_init__()


class ConstrainedGRPOTrainer(ConstrainedPPOTrainer):
    """
    GRPO that holds rewards at thresholds with learned Lagrange multipliers; without constraints,
    [`~trl.GRPOTrainer`] bit for bit.

    A preset of [`ConstrainedPPOTrainer`], with its calibration, dashboard, gold metric, threshold search, early ends
    and checkpoints. In a script for GRPO one line changes: `from trl_ext import ConstrainedGRPOConfig as GRPOConfig,
    ConstrainedGRPOTrainer as GRPOTrainer`.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Policy.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Rewards, as [`~trl.GRPOTrainer`] takes them; one under a constraint gives every completion a number.
        args ([`ConstrainedGRPOConfig`], *optional*):
            Configuration. Defaults to GRPO's.
        train_dataset (`~datasets.Dataset` or `~datasets.IterableDataset`, *optional*):
            Prompts to train on.
        eval_dataset (`~datasets.Dataset`, `~datasets.IterableDataset` or `dict`, *optional*):
            Prompts to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor. Defaults to the policy's.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list`, *optional*):
            Tokenizers of reward models.
        gold_reward (`Callable`, *optional*):
            The metric that the rewards stand in for, measured on `eval_dataset`.
        kwargs (`Any`):
            The other arguments of [`~trl.GRPOTrainer`], by name.

    Raises:
        TypeError: If `args` is not a [`ConstrainedGRPOConfig`].

    Example:

    ```python
    from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer

    trainer = ConstrainedGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=[helpfulness, length],
        args=ConstrainedGRPOConfig(
            constraints=[{"reward": "length", "threshold": 200, "kind": "<="}], reward_weights=[1.0, 0.0]
        ),
        train_dataset=dataset,
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "grpo", "trl_ext", "constrained-grpo"]
    _name = "Constrained GRPO"

    args: ConstrainedGRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ConstrainedGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        gold_reward: Callable[..., list[float]] | None = None,
        **kwargs: Any,
    ):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = ConstrainedGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")
        if not isinstance(args, ConstrainedGRPOConfig):
            raise TypeError(
                f"`args` must be a `ConstrainedGRPOConfig`, got `{type(args).__name__}`. It takes every field of a "
                "`GRPOConfig`."
            )
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            gold_reward=gold_reward,
            reward_processing_classes=reward_processing_classes,
            **kwargs,
        )
