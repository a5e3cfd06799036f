"""Preference pairs and prompts of the playground, in TRL's formats."""

import random
from typing import Any

from datasets import Dataset, DatasetDict

from .grammar import generate_body, generate_opening
from .rewards import sentiment


MINIMUM_GAP = 0.3


def preference_dataset(num_pairs: int, seed: int = 0, split: str = "train", conversational: bool = False) -> Dataset:
    """
    Pairs of completions of one prompt, both drawn from the grammar with the same number of sentences; the chosen has
    the higher exact sentiment, by at least 0.3.

    Args:
        num_pairs (`int`):
            Number of pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed.
        split (`str`, *optional*, defaults to `"train"`):
            Part of the seed, so that splits differ.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether the columns hold messages instead of text.

    Returns:
        [`~datasets.Dataset`] with the columns `prompt`, `chosen` and `rejected`.

    Raises:
        ValueError: If `num_pairs` is below 1.
    """
    if num_pairs < 1:
        raise ValueError(f"`num_pairs` must be at least 1, got {num_pairs}.")
    generator = random.Random(f"pairs-{split}-{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < num_pairs:
        prompt, domain = generate_opening(generator)
        num_sentences = generator.randint(2, 4)
        bodies = [generate_body(domain, num_sentences, generator) for _ in range(2)]
        rejected, chosen = sorted(bodies, key=sentiment)
        if sentiment(chosen) - sentiment(rejected) >= MINIMUM_GAP:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    if conversational:
        rows = [_as_messages(row) for row in rows]
    return Dataset.from_list(rows)


def prompts(num_prompts: int, seed: int = 0, split: str = "train") -> list[str]:
    """
    Opening sentences.

    Args:
        num_prompts (`int`):
            Number of prompts.
        seed (`int`, *optional*, defaults to `0`):
            Seed.
        split (`str`, *optional*, defaults to `"train"`):
            Part of the seed, so that splits differ.

    Returns:
        `list[str]`

    Raises:
        ValueError: If `num_prompts` is below 1.
    """
    if num_prompts < 1:
        raise ValueError(f"`num_prompts` must be at least 1, got {num_prompts}.")
    generator = random.Random(f"prompts-{split}-{seed}")
    return [generate_opening(generator)[0] for _ in range(num_prompts)]


def load_playground_dataset(num_train: int = 2000, num_test: int = 200, seed: int = 0) -> DatasetDict:
    """
    Preference pairs in two splits, for recipes with `dataset_name: playground`.

    Args:
        num_train (`int`, *optional*, defaults to `2000`):
            Training pairs.
        num_test (`int`, *optional*, defaults to `200`):
            Test pairs.
        seed (`int`, *optional*, defaults to `0`):
            Seed.

    Returns:
        [`~datasets.DatasetDict`] with `train` and `test`.
    """
    return DatasetDict(
        train=preference_dataset(num_train, seed, "train"), test=preference_dataset(num_test, seed, "test")
    )


def _as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }
