# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train a policy with GRPO, plain or under constraints.

# The playground, on a CPU
python -m trl_ext.scripts.constrained_grpo --config recipes/constrained_ppo/grpo_playground.yaml
"""

from typing import TYPE_CHECKING

from .constrained_ppo import main
from .constrained_ppo import make_parser as make_ppo_parser


if TYPE_CHECKING:
    from .recipe.strict_parser import StrictParser


__all__ = ["main", "make_parser"]


def make_parser(prog: str | None = None) -> "StrictParser":
    """The strict parser of the script's arguments."""
    from ..constrained_ppo.constrained_grpo import ConstrainedGRPOConfig

    return make_ppo_parser(prog, ConstrainedGRPOConfig)


if __name__ == "__main__":
    from .recipe.strict_parser import run_strictly

    run_strictly(make_parser, main)
