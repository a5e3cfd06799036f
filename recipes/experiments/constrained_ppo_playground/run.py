# /// script
# dependencies = ["trl-ext[proxy-points]"]
# ///
"""
Overoptimisation on the playground: two rewards that can be hacked, the exact gold metric they stand for, and every
method of constrained PPO, over seeds.

python -m trl_ext.scripts.overoptimization --config recipes/constrained_ppo/overoptimization.yaml
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .method_comparison import ComparisonArguments, Task, compare


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


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
    from ..playground import playground_gold, positive_word_share, preference_dataset, reference_similarity
    from ..playground.base_model import BaseModelSettings, base_model_path

    settings = BaseModelSettings(
        steps=400, learning_rate=8e-3, hidden_size=arguments.hidden_size, intermediate_size=3 * arguments.hidden_size,
        num_layers=arguments.num_layers, num_drafts=4,
    )  # fmt: skip
    validation, test = (preference_dataset(arguments.num_prompts, split=name) for name in ("validation", "test"))
    return Task(
        model=str(base_model_path(settings=settings, show_progress=False)),
        train=preference_dataset(2000),
        validation=validation,
        test=test,
        rewards=(positive_word_share, reference_similarity),
        gold=playground_gold,
    )


def main(training_args: Any, arguments: OveroptimizationArguments) -> None:
    """Runs what is missing and writes the report into the output folder."""
    folder = Path(training_args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    compare(playground_task, arguments, training_args, folder, "playground_gold")


def make_parser(prog: str | None = None) -> "StrictParser":
    """The strict parser of the experiment's arguments."""
    from ..constrained_ppo.constrained_ppo_config import ConstrainedPPOConfig
    from .recipe.strict_parser import StrictParser

    return StrictParser((ConstrainedPPOConfig, OveroptimizationArguments), prog=prog)


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser(), main)
