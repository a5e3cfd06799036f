"""Checks of preference data before training starts: its columns, and by their tokens, which pairs say something."""

from collections import Counter
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from ..core.dataset_rows import checked_stream


logger = get_logger(__name__)

ROW = "pair_row"  # column that says which row of the user's data a prepared pair was
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REMEDY = "Filter the dataset, or set `strict_pairs=False`, which leaves such pairs out."


def check_preference_dataset(dataset: Any, name: str, tokenizer: Any = None) -> Any:
    """
    Refuses data that is no preference data.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data as TRL takes it, plain or conversational.
        name (`str`):
            Name of the dataset in messages, such as `"train"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer, which says whether it knows unusual roles and takes empty prompts.

    Returns:
        The dataset; a stream checks each row as it is read.

    Raises:
        TypeError: If it is no dataset.
        ValueError: If it is empty, lacks `chosen` or `rejected`, or a row holds neither text nor messages.
    """
    if isinstance(dataset, (Dataset, IterableDataset)) and "chosen_ids" in (dataset.column_names or ()):
        return dataset
    use = "SparsePO trains on preference pairs: rename or add the columns `prompt`, `chosen` and `rejected`."
    return checked_stream(
        dataset, name, required=("chosen", "rejected"), optional=("prompt",), tokenizer=tokenizer, needs_prompt=True,
        use=use,
    )  # fmt: skip


def pair_fault(
    prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int], max_length: int | None, keep_end: bool
) -> str | None:
    """
    Says why a pair has no signal, or `None`.

    Args:
        prompt_ids (`list[int]`):
            Tokens of the prompt.
        chosen_ids (`list[int]`):
            Tokens of the chosen completion.
        rejected_ids (`list[int]`):
            Tokens of the rejected completion.
        max_length (`int` or `None`):
            Tokens that prompt and completion are cut to.
        keep_end (`bool`):
            Whether the end is kept, and not the start.
    """
    for side, ids in (("chosen", chosen_ids), ("rejected", rejected_ids)):
        if not ids:
            return f"`{side}` has no token"
    if chosen_ids == rejected_ids:
        return "`chosen` equals `rejected`"
    if max_length is None:
        return None
    kept = slice(-max_length, None) if keep_end else slice(max_length)
    first, second = ((prompt_ids + ids)[kept] for ids in (chosen_ids, rejected_ids))
    # What is left of equal length is equally split into prompt and completion, unless the end of a prompt is left
    same_split = not keep_end or min(len(chosen_ids), max_length) == min(len(rejected_ids), max_length)
    return "`chosen` equals `rejected` within `max_length`" if first == second and same_split else None


def pairs_without_signal(dataset: Dataset, max_length: int | None, keep_end: bool = False) -> dict[int, str]:
    """
    Finds the tokenised pairs that say nothing (see [`pair_fault`]).

    Args:
        dataset ([`~datasets.Dataset`]):
            With the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        max_length (`int` or `None`):
            Tokens that prompt and completion are cut to.
        keep_end (`bool`, *optional*, defaults to `False`):
            Whether the end is kept, and not the start.

    Returns:
        `dict[int, str]`: rows, and what is wrong with each.
    """
    found: dict[int, str] = {}
    start = 0
    for table in dataset.select_columns(list(_IDS)).with_format("arrow").iter(1000):
        columns = [table.column(name).combine_chunks() for name in _IDS]
        prompt, chosen, rejected = (column.value_lengths().to_numpy(zero_copy_only=False) for column in columns)
        lengths = [prompt + completion for completion in (chosen, rejected)]
        if max_length is not None:
            lengths = [np.minimum(length, max_length) for length in lengths]
        # Only completions that end up equally long can be equal: few rows are looked at token by token
        for row in np.flatnonzero((chosen == 0) | (rejected == 0) | (lengths[0] == lengths[1])).tolist():
            prompt_ids, chosen_ids, rejected_ids = (column[row].as_py() for column in columns)
            fault = pair_fault(prompt_ids, chosen_ids, rejected_ids, max_length, keep_end)
            if fault is not None:
                found[start + row] = fault
        start += len(table)
    return found


def drop_pairs_without_signal(
    prepared: Dataset | IterableDataset,
    name: str,
    max_length: int | None,
    keep_end: bool = False,
    strict: bool = False,
) -> Dataset | IterableDataset:
    """
    Leaves out the tokenised pairs that say nothing (see [`pair_fault`]), with one warning that counts them.

    Args:
        prepared ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            With the columns `prompt_ids`, `chosen_ids` and `rejected_ids`. An iterable dataset is judged as it is
            read, and its pairs are not counted.
        name (`str`):
            Name of the dataset in messages, such as `"train"`.
        max_length (`int` or `None`):
            Tokens that prompt and completion are cut to.
        keep_end (`bool`, *optional*, defaults to `False`):
            Whether the end is kept, and not the start.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to refuse such pairs. The column `pair_row`, where there is one, names the row.

    Returns:
        The dataset, without the dropped pairs.

    Raises:
        ValueError: If no pair is left, or, with `strict`, at the first pair without a signal.
    """
    if isinstance(prepared, IterableDataset):
        options = {"max_length": max_length, "keep_end": keep_end, "name": name, "strict": strict}
        prepared = prepared.filter(_has_signal, with_indices=True, fn_kwargs=options)
        if strict:
            next(iter(prepared), None)
        return prepared
    faults = pairs_without_signal(prepared, max_length, keep_end)
    if not faults:
        return prepared.remove_columns([ROW] if ROW in prepared.column_names else [])
    if strict:
        row, fault = next(iter(faults.items()))
        row = prepared[row].get(ROW, row)
        raise ValueError(
            f"{len(faults)} pairs of the {name} dataset say nothing; the first is row {row}: {fault}. {_REMEDY}"
        )
    counts = ", ".join(f"in {count} {fault}" for fault, count in Counter(faults.values()).items())
    if len(faults) == len(prepared):
        raise ValueError(
            f"No pair of the {name} dataset says anything: {counts}. Check columns, tokenizer and chat template."
        )
    logger.warning(
        f"{len(faults)} of {len(prepared)} pairs of the {name} dataset say nothing ({counts}) and are left out. "
        "`strict_pairs=True` refuses them."
    )
    return prepared.select([row for row in range(len(prepared)) if row not in faults])


def _has_signal(
    pair: dict[str, Any], row: int, max_length: int | None, keep_end: bool, name: str, strict: bool
) -> bool:
    fault = pair_fault(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"], max_length, keep_end)
    if fault is not None and strict:
        raise ValueError(f"A pair of the {name} dataset says nothing; it is row {row}: {fault}. {_REMEDY}")
    return fault is None


def check_prepared_dataset(before: Dataset, after: Dataset, name: str, max_length: int | None) -> None:
    """
    Tells of the pairs that TRL dropped because their prompt alone fills `max_length`.

    Raises:
        ValueError: If none is left.
    """
    num_dropped = len(before) - len(after)
    if num_dropped == 0:
        return
    message = (
        f"{num_dropped} of {len(before)} prompts of the {name} dataset are `max_length={max_length}` tokens or longer"
    )
    if len(after) == 0:
        raise ValueError(f"{message}, so no pair is left. Raise `max_length`, or set `max_length=None` to keep all.")
    logger.warning(f"{message} and were dropped.")
