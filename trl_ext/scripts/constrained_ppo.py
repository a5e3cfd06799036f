# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train a policy with PPO, plain or constrained.

# The playground, on a CPU
python -m trl_ext.scripts.constrained_ppo --config recipes/constrained_ppo/playground.yaml

# Plain PPO
python -m trl_ext.scripts.constrained_ppo --config recipes/constrained_ppo/ppo.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.checks import Range, check_fields, check_value
from .recipe.tokenizer import TOKENIZER_RANGES, TokenizerArguments


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


@dataclass
class ConstrainedPPOScriptArguments(TokenizerArguments):
    """
    Arguments of the script beyond TRL's.

    Args:
        tokenizer_name_or_path (`str`, *optional*):
            Name or folder of the tokenizer. Defaults to the model's own.
        reward_funcs (`list[str]`):
            Rewards: reward functions by dotted path, such as `trl_ext.playground.sentiment_reward`, or sequence
            classifiers by model id or folder.
        gold_reward (`str`, *optional*):
            Metric that the rewards stand in for, a function by dotted path, measured on the evaluation split.
    """

    reward_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Reward functions by dotted path, or reward models by id or folder."}
    )
    gold_reward: str | None = field(
        default=None, metadata={"help": "Metric that the rewards stand in for, a function by dotted path."}
    )

    def __post_init__(self) -> None:
        check_fields(self, {"gold_reward": Range(empty=False), **TOKENIZER_RANGES})
        for name in self.reward_funcs:
            check_value("reward_funcs", name, str, Range(empty=False), label="an entry of `{}`")


def load_reward(name: str, key: str = "reward_funcs") -> Any:
    """
    A reward as [`~trl.GRPOTrainer`] takes it: the function of a dotted path, or else the name itself, of a model.

    Raises:
        RecipeError: If there is no such function, or its module cannot be imported.
    """
    from .recipe.named_code import is_dotted_path, load_function

    if not is_dotted_path(name) or Path(name).exists():
        return name
    return load_function(name, key)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, reward_args: Any) -> None:
    """Trains, evaluates and saves as the parsed arguments say; their configuration's class chooses the trainer."""
    from trl import get_peft_config, get_quantization_config

    from ..constrained_ppo.constrained_grpo import ConstrainedGRPOConfig, ConstrainedGRPOTrainer
    from ..constrained_ppo.constrained_ppo_trainer import ConstrainedPPOTrainer
    from .recipe.loading import (
        last_checkpoint,
        load_datasets,
        model_init_kwargs,
        require_model_and_data,
        resolve_model,
        split_of,
        train_and_save,
    )
    from .recipe.required import require_files, require_rewards
    from .recipe.strict_parser import RecipeError
    from .recipe.tokenizer import load_tokenizer

    require_rewards(reward_args.reward_funcs)
    require_files(reward_args, training_args)
    require_model_and_data(model_args, script_args, dataset_args)
    rewards = [load_reward(name) for name in reward_args.reward_funcs]
    gold_reward = load_reward(reward_args.gold_reward, "gold_reward") if reward_args.gold_reward else None
    if isinstance(gold_reward, str):
        raise RecipeError(f"`gold_reward: {gold_reward}` must be a function by dotted path, such as `mymetric.score`.")
    checkpoint = last_checkpoint(training_args)
    training_args.model_init_kwargs = model_init_kwargs(model_args, training_args)
    model = resolve_model(model_args.model_name_or_path)
    dataset = load_datasets(script_args, dataset_args)
    evaluate = training_args.eval_strategy != "no" or gold_reward is not None
    train_dataset = split_of(dataset, "dataset_train_split", script_args)
    eval_dataset = split_of(dataset, "dataset_test_split", script_args) if evaluate else None
    tokenizer = load_tokenizer(
        model, model_args, training_args, reward_args, truncation_side="left", padding_side="left"
    )
    without_critic = isinstance(training_args, ConstrainedGRPOConfig)
    trainer_class = ConstrainedGRPOTrainer if without_critic else ConstrainedPPOTrainer
    trainer = trainer_class(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        gold_reward=gold_reward,
        processing_class=tokenizer if reward_args.tokenizer_name_or_path else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    saved = "Model" if trainer.critic is None else "Model and critic"
    train_and_save(trainer, checkpoint, saved, script_args.dataset_name)


def make_parser(prog: str | None = None, config: type | None = None) -> "StrictParser":
    """The strict parser of the script's arguments; `config` is a [`ConstrainedPPOConfig`] by default."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from ..constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
    from ..optim import register
    from .recipe.strict_parser import StrictParser

    register()  # before the parser lists the choices of `optim`
    config = config or ConstrainedPPOConfig
    return StrictParser(
        (ScriptArguments, config, ModelConfig, DatasetMixtureConfig, ConstrainedPPOScriptArguments), prog=prog
    )


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser, main)
