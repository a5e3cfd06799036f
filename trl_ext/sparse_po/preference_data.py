"""Checks of preference data before training starts."""

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset


logger = get_logger(__name__)


def check_preference_dataset(
    dataset: Dataset | IterableDataset, name: str, drop_invalid_pairs: bool = False
) -> Dataset | IterableDataset:
    """
    Refuses, or drops, the pairs that say nothing: an empty completion, or a chosen equal to the rejected.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Preference data as TRL takes it, plain or conversational. Of an iterable data set only the first example is
            read, unless `drop_invalid_pairs` is set.
        name (`str`):
            Name of the data set in messages, such as `"train"`.
        drop_invalid_pairs (`bool`, *optional*, defaults to `False`):
            Whether to drop such pairs instead of raising.

    Returns:
        The data set, without the dropped pairs.

    Raises:
        ValueError: If it is empty, lacks `chosen` or `rejected`, or has an invalid pair.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty. Give at least one pair with `chosen` and `rejected`.")
    if "chosen_ids" in first:
        return dataset
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise ValueError(
            f"The {name} dataset has no column {' and '.join(map(repr, missing))}; its columns are {sorted(first)}. "
            "SparsePO trains on preference pairs: rename or add the columns `prompt`, `chosen` and `rejected`."
        )
    if isinstance(dataset, IterableDataset):
        if drop_invalid_pairs:
            return dataset.filter(lambda pair: invalid_pair_reason(pair) is None)
        _refuse([(0, invalid_pair_reason(first))], name)
        return dataset
    columns = dataset.select_columns([c for c in ("prompt", "chosen", "rejected") if c in dataset.column_names])
    invalid: list[tuple[int, str | None]]
    invalid = [(row, reason) for row, pair in enumerate(columns) if (reason := invalid_pair_reason(pair)) is not None]
    if not drop_invalid_pairs:
        _refuse(invalid, name)
        return dataset
    if invalid:
        logger.warning(f"Dropping {len(invalid)} of {len(dataset)} pairs of the {name} dataset, which say nothing.")
        dropped = {row for row, _ in invalid}
        dataset = dataset.select([row for row in range(len(dataset)) if row not in dropped])
    if len(dataset) == 0:
        raise ValueError(f"Every pair of the {name} dataset has an empty completion or equal completions.")
    return dataset


def invalid_pair_reason(pair: dict[str, Any]) -> str | None:
    """Says what is wrong with a pair, or `None`."""
    for side in ("chosen", "rejected"):
        if not _text_of_last_turn(pair[side]).strip():
            return f"`{side}` is empty"
    if pair["chosen"] == pair["rejected"]:
        return "`chosen` equals `rejected`"
    return None


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


def _refuse(invalid: list[tuple[int, str | None]], name: str) -> None:
    found = [(row, reason) for row, reason in invalid if reason is not None]
    if found:
        row, reason = found[0]
        raise ValueError(
            f"{len(found)} pairs of the {name} dataset say nothing; the first is row {row}: {reason}. Set "
            "`drop_invalid_pairs=True` to leave them out, or filter the dataset."
        )


def _text_of_last_turn(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "image") for part in content)
    return content or ("tool calls" if completion and completion[-1].get("tool_calls") else "")
