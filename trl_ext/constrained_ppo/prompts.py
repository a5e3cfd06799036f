"""Which prompts are drawn: at random for a calibration, and from where on by a run that is resumed on a stream."""

import itertools
import math
from typing import Any

import torch
from datasets import IterableDataset
from transformers import TrainerState

from ..core.dataset_rows import check_rows


# Rows of a stream that its shuffle draws from, as many as a reader waits for
_SHUFFLE_BUFFER = 10_000


def check_prompts(dataset: Any, name: str, tokenizer: Any = None) -> None:
    """
    Refuses data without prompts, before a model generates from it.

    Args:
        dataset (`~datasets.Dataset`, `~datasets.IterableDataset`, `dict` of them or `None`):
            The data; of a stream its first rows are read.
        name (`str`):
            Name of the dataset in messages, such as `"train"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, which says whether it knows unusual roles and takes empty prompts.

    Raises:
        TypeError: If it is no dataset.
        ValueError: If it is empty, has no column `prompt`, or a row of it is neither text nor messages.
    """
    for key, each in (dataset if isinstance(dataset, dict) else {"": dataset}).items():
        if each is not None:
            label = " ".join(filter(None, (name, repr(key) if key else "")))
            use = "A policy is trained on prompts: rename or add the column `prompt`."
            check_rows(each, label, required=("prompt",), tokenizer=tokenizer, needs_prompt=True, use=use)


def random_rows(dataset: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """
    Rows drawn at random without touching the global generators: the same on all processes, each row once before any
    comes again.

    Args:
        dataset (`~datasets.Dataset` or `~datasets.IterableDataset`):
            The data. Of a stream, rows are drawn from shuffled shards and a buffer of the first 10,000 rows.
        count (`int`):
            Number of rows.
        seed (`int`):
            Seed of the draw.

    Returns:
        `list[dict]`: `count` rows, none if the data have none.
    """
    if isinstance(dataset, IterableDataset):
        shuffled = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        found = list(itertools.islice(shuffled, count))
        return list(itertools.islice(itertools.cycle(found), count))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return [dataset[index] for index in itertools.islice(itertools.cycle(order), count)]


def stream_position(state: TrainerState, gradient_accumulation_steps: int) -> tuple[int, int]:
    """
    Where a run on a stream stood: passes over the data before the current one, and micro-batches taken in that.

    A stream does not know its length, so [`~transformers.Trainer`] counts `max_steps` steps as one epoch and a new
    pass as the next; a resumed run would skip all its steps in the first pass.

    Args:
        state ([`~transformers.TrainerState`]):
            State of the checkpoint.
        gradient_accumulation_steps (`int`):
            Micro-batches of a step.

    Returns:
        `tuple[int, int]`
    """
    epoch = float(state.epoch or 0.0)
    # A whole number is the end of a pass of `max_steps` steps: every pass that was begun has taken a step
    passes = max(math.ceil(epoch) - 1, 0)
    return passes, round((epoch - passes) * state.max_steps * gradient_accumulation_steps)
