"""
Overoptimisation on the playground: two rewards that can be hacked, the exact gold metric they stand for, and every
method of constrained PPO, over seeds.

python -m recipes.experiments.constrained_ppo_playground.run \
    --config recipes/experiments/constrained_ppo_playground/config.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path

from trl_ext import ConstrainedPPOConfig
from trl_ext.playground import (
    BaseModelSettings,
    base_model_path,
    playground_gold,
    positive_word_share,
    preference_dataset,
    reference_similarity,
)
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..method_comparison import ComparisonArguments, Task, compare


@dataclass
class OveroptimizationArguments(ComparisonArguments):
    """
    Arguments of the experiment, beside those of [`ComparisonArguments`].

    Args:
        num_prompts (`int`):
            Prompts on which the gold metric is measured while training, and as many others at the end.
        hidden_size (`int`):
            Width of the policy, a smaller playground model.
        num_layers (`int`):
            Its layers.
    """

    num_prompts: int = field(default=128, metadata={"help": "Prompts of one evaluation."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the policy."})
    num_layers: int = field(default=2, metadata={"help": "Layers of the policy."})


def playground_task(arguments: OveroptimizationArguments) -> Task:
    """The policy, the prompts with their references, both rewards and the gold metric."""
    settings = BaseModelSettings.of_one_mind(arguments.hidden_size, arguments.num_layers)
    validation, test = (preference_dataset(arguments.num_prompts, split=name) for name in ("validation", "test"))
    return Task(
        model=str(base_model_path(settings=settings, show_progress=False)),
        train=preference_dataset(2000),
        validation=validation,
        test=test,
        rewards=(positive_word_share, reference_similarity),
        gold=playground_gold,
    )


def main(training_args: ConstrainedPPOConfig, arguments: OveroptimizationArguments) -> None:
    """Runs what is missing and writes the report into the output folder."""
    compare(playground_task, arguments, training_args, Path(training_args.output_dir), "playground_gold")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, OveroptimizationArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
