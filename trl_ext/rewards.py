"""Reward functions for constraints, as [`~trl.GRPOTrainer`] calls them."""

import re
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


def distinct_words(completions: Sequence[Any], **columns: Any) -> list[float]:
    """
    Share of the words of each completion that are no repetitions, to keep a policy from one word again and again:
    weight 0 in `reward_weights`, and a constraint `{"reward": "distinct_words", "threshold": 0.9, "kind": ">="}`.

    Args:
        completions (`Sequence[Any]`):
            Texts, or conversations whose last messages are read.
        columns (`Any`):
            The other arguments of reward functions; not used.

    Returns:
        `list[float]`: in `[0, 1]`; 0 without a word.
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    found = [re.findall(r"\w+", text.lower()) for text in texts]
    return [len(set(words)) / len(words) if words else 0.0 for words in found]
