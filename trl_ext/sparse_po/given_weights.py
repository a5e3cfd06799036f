"""Token weights that come with the data: `chosen_token_weights` and `rejected_token_weights`, for `mask_type="given"`.

Each is a list of one number for each token of the tokenised completion, or of spans `[start, end, weight]` in
characters of its text; tokens outside every span weigh one. `chosen_divergence_weights` and
`rejected_divergence_weights`, where the data has them, weight the divergences, and the former the rewards only.
"""

import sys
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from ..core.checks import shown
from .preference_data import ROW


SIDES = ("chosen", "rejected")
TERMS = ("reward", "divergence")
_LARGEST = sys.float_info.max
# Of a prepared pair: one list of numbers for each side and term
WEIGHT_COLUMNS = tuple(f"{side}_{term}_mask" for side in SIDES for term in TERMS)


def attach_token_weights(
    prepared: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase
) -> Dataset | IterableDataset:
    """
    Turns the weights of a tokenised data set into one number for each token of a completion.

    Args:
        prepared ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            As TRL prepared it, with the columns of the user's data beside the tokens.
        name (`str`):
            Name of the data set in messages, such as `"train"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer; spans need a fast one.

    Returns:
        The data set with the columns [`WEIGHT_COLUMNS`].

    Raises:
        ValueError: If a column is missing, or weights of a row do not fit its tokens; the message names the row.
    """
    columns = next(iter(prepared)).keys()
    missing = [f"{side}_token_weights" for side in SIDES if f"{side}_token_weights" not in columns]
    if missing:
        raise ValueError(
            f"`mask_type='given'` reads {' and '.join(map(repr, missing))} of the {name} dataset, which has none. Add "
            "lists of one number for each token, or of spans `[start, end, weight]` in characters."
        )
    return prepared.map(_weigh, with_indices=True, fn_kwargs={"tokenizer": tokenizer, "name": name})


def _weigh(pair: dict[str, Any], place: int, tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, list[float]]:
    weights: dict[str, list[float]] = {}
    for side in SIDES:
        for term, column in zip(TERMS, (f"{side}_token_weights", f"{side}_divergence_weights"), strict=True):
            if term == "divergence" and pair.get(column) is None:
                weights[f"{side}_divergence_mask"] = weights[f"{side}_reward_mask"]
                continue
            try:
                weights[f"{side}_{term}_mask"] = completion_weights(pair, side, pair[column], tokenizer)
            except ValueError as error:
                raise ValueError(f"Row {pair.get(ROW, place)} of the {name} dataset, `{column}`: {error}") from error
    return weights


def completion_weights(
    pair: dict[str, Any], side: str, weights: Any, tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """
    One weight for each token of a completion.

    Args:
        pair (`dict`):
            Pair with its texts or messages, and with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        side (`str`):
            `"chosen"` or `"rejected"`.
        weights (`list`):
            Numbers, or spans `[start, end, weight]`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the pair.

    Returns:
        `list[float]`

    Raises:
        ValueError: If they are missing, too many or too few, negative or not finite, or a span does not map.
    """
    num_tokens = len(pair[f"{side}_ids"])
    if weights is None:
        raise ValueError("there are no weights. Fill them in, or filter the row.")
    if not isinstance(weights, list | tuple):
        raise ValueError(f"{shown(weights)} is no list. Give numbers, or spans `[start, end, weight]`.")
    spans = [span for span in weights if isinstance(span, list | tuple)]
    numbers = [span[-1] if isinstance(span, list | tuple) and span else span for span in weights]
    for number in numbers:
        if not isinstance(number, int | float) or not 0 <= number <= _LARGEST:
            raise ValueError(f"{shown(number)} is no weight. Weights are finite and not negative.")
    if spans:
        offsets, length = _token_offsets(pair, side, tokenizer)
        return span_weights(list(weights), offsets, length)
    if len(numbers) != num_tokens:
        raise ValueError(
            f"there are {len(numbers)} weights, and the completion has {num_tokens} tokens, template and end token "
            "included. Give one for each token, or spans `[start, end, weight]` in characters."
        )
    return [float(number) for number in numbers]


def span_weights(spans: list[Any], offsets: list[tuple[int, int]], length: int) -> list[float]:
    """
    Weights of tokens from spans of characters: a token that a span overlaps has its weight, the last span's of
    several, and any other token weighs one.

    Args:
        spans (`list`):
            Spans `[start, end, weight]`, `end` not included.
        offsets (`list[tuple[int, int]]`):
            First character of each token and the one after its last.
        length (`int`):
            Characters of the text.

    Returns:
        `list[float]`

    Raises:
        ValueError: If a span is no such triple, lies outside the text, or meets no token.
    """
    weights = [1.0] * len(offsets)
    for span in spans:
        if not isinstance(span, list | tuple) or len(span) != 3:
            raise ValueError(f"{shown(span)} is no span `[start, end, weight]`.")
        start, end, weight = span
        if not (_is_place(start) and _is_place(end) and 0 <= start < end <= length):
            raise ValueError(f"the span {shown(list(span))} does not lie in the text, which has {length} characters.")
        met = [place for place, (first, last) in enumerate(offsets) if max(first, start) < min(last, end)]
        if not met:
            raise ValueError(f"no token meets the span {list(span)}. Widen it to whole words.")
        for place in met:
            weights[place] = float(weight)
    return weights


def _is_place(value: Any) -> bool:
    """Whether a value counts characters; Arrow makes 3.0 of a 3 beside a weight."""
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def _token_offsets(
    pair: dict[str, Any], side: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[tuple[int, int]], int]:
    """Characters of each token of a completion, counted from its text's first, and how many that has."""
    if not tokenizer.is_fast:
        raise ValueError("spans need a fast tokenizer, which knows the characters of a token. Give a number a token.")
    completion = pair[side]
    if isinstance(completion, str):
        text, start, length = pair["prompt"] + completion, len(pair["prompt"]), len(completion)
        encoded = tokenizer(text, return_offsets_mapping=True)
    else:
        tools, options = pair.get("tools"), pair.get("chat_template_kwargs") or {}
        text = tokenizer.apply_chat_template(pair["prompt"] + completion, tools=tools, tokenize=False, **options)
        content = completion[-1].get("content")
        start = text.rfind(content) if isinstance(content, str) and content else -1
        if start < 0:
            raise ValueError(
                "the chat template does not show the last message's `content` as it is. Give a number a token."
            )
        length = len(content)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != pair["prompt_ids"] + pair[f"{side}_ids"]:
        raise ValueError("tokenised once more, the text has other tokens, so spans do not map. Give a number a token.")
    offsets = encoded["offset_mapping"][len(pair["prompt_ids"]) :]
    return [(first - start, last - start) for first, last in offsets], length


class TokenWeightsCollator:
    """
    TRL's collator, and the token weights of its batches, cut and padded as it cuts and pads tokens.

    Args:
        collator ([`~trl.trainer.dpo_trainer.DataCollatorForPreference`]):
            TRL's.

    Raises:
        ValueError: If it is another collator, whose way of cutting is not known.
    """

    def __init__(self, collator: Any):
        if not isinstance(collator, DataCollatorForPreference):
            raise ValueError(
                f"`mask_type='given'` lays its weights beside the tokens of TRL's collator, and `data_collator` is a "
                f"`{type(collator).__name__}`. Leave it out."
            )
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Adds `reward_weights` and `divergence_weights`, each `(2B, T)` float32, zero outside the completion."""
        batch = self.collator(examples)
        longest, width = self.collator.max_length, batch["input_ids"].size(1)
        kept = slice(-longest, None) if longest and self.collator.truncation_mode == "keep_end" else slice(longest)
        for term in TERMS:
            rows = [
                ([0.0] * len(example["prompt_ids"]) + example[f"{side}_{term}_mask"])[kept]
                for side in SIDES
                for example in examples
            ]
            batch[f"{term}_weights"] = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
        return batch
