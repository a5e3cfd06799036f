"""Reward functions for constraints, as [`~trl.GRPOTrainer`] calls them."""

from collections.abc import Sequence
from typing import Any


def completion_tokens(completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
    """
    Number of tokens of each completion, to be held under a bound: weight 0 in `reward_weights`, and a constraint
    `{"reward": "completion_tokens", "threshold": 300, "kind": "<="}`.

    Args:
        completion_ids (`Sequence[Sequence[int]]`):
            Tokens of each completion, its end token among them.
        columns (`Any`):
            The other arguments of reward functions; not used.

    Returns:
        `list[float]`
    """
    return [float(len(ids)) for ids in completion_ids]
