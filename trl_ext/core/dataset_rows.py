"""Checks of a trainer's data before anything is tokenised: rows without text or messages are named, with the column.

Columns of plain text and of messages are judged as Arrow holds them, without a Python object for each row; other
types, and streams, row by row.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from .checks import shown


# Rows that are looked at together
_BATCH = 10_000
# Rows of a stream that are read ahead where its rows are not passed through the check
_AHEAD = 64
# What chat templates know; others are tried on the template at hand
_ROLES = {"system", "user", "assistant", "tool", "developer"}
_REMEDY = "Fill it in, or filter the row."


def check_rows(
    dataset: Any,
    name: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    tokenizer: Any = None,
    needs_prompt: bool = False,
    use: str = "Rename or add columns.",
) -> Any:
    """
    Refuses data whose columns a trainer cannot read.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Data, plain or conversational.
        name (`str`):
            Name of the dataset in messages, such as `"train"`.
        required (`Sequence[str]`):
            Columns that there must be.
        optional (`Sequence[str]`, *optional*):
            Columns that there may be, and are checked then.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            What messages with an unknown role are tried on, and prompts without a character.
        needs_prompt (`bool`, *optional*, defaults to `False`):
            Whether a prompt needs a token: where the column is missing, `chosen` and `rejected` then begin alike.
        use (`str`, *optional*):
            What the columns are for, in the error where one is missing.

    Returns:
        The dataset; a stream passes its rows through the check as it is read.

    Raises:
        TypeError: If it is no dataset.
        ValueError: If it is empty, lacks a column, or a row holds neither text nor messages.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            f"The {name} dataset must be a `datasets.Dataset` or an `IterableDataset`, got "
            f"`{type(dataset).__name__}`. `Dataset.from_list(rows)` makes one of a list of rows."
        )
    names = dataset.column_names
    first = None if names else next(iter(dataset), None)
    if (isinstance(dataset, Dataset) and len(dataset) == 0) or (first is None and not names):
        raise ValueError(f"The {name} dataset is empty. Give at least one row with {_quoted(required)}.")
    names = list(names or first or ())
    missing = [column for column in required if column not in names]
    if missing:
        found = sorted(map(str, names))
        raise ValueError(f"The {name} dataset has no column {_quoted(missing)}; its columns are {found}. {use}")
    columns = [*required, *(column for column in optional if column in names)]
    check = _RowCheck(name, columns, tokenizer, needs_prompt)
    if isinstance(dataset, IterableDataset):
        for row, values in enumerate(itertools.islice(dataset, _AHEAD)):
            check(values, row)
        return dataset
    check.whole(dataset)
    return dataset


def checked_stream(dataset: Any, name: str, **options: Any) -> Any:
    """[`check_rows`] of a dataset, or, of a stream, a stream that checks each row as it is read."""
    dataset = check_rows(dataset, name, **options)
    if not isinstance(dataset, IterableDataset):
        return dataset
    names = list(dataset.column_names or next(iter(dataset)))
    columns = [*options["required"], *(column for column in options.get("optional", ()) if column in names)]
    check = _RowCheck(name, columns, options.get("tokenizer"), options.get("needs_prompt", False))
    return dataset.map(check, with_indices=True, features=dataset.features)


def value_fault(value: Any) -> str | None:
    """
    Says why a value is neither a text nor messages.

    Args:
        value (`Any`):
            Value of a row.

    Returns:
        `str` or `None`: what is wrong with it, to follow the column's name; `None` where nothing is.
    """
    if isinstance(value, str):
        return None
    if value is None:
        return "is missing (None)"
    if not isinstance(value, list):
        return f"holds a `{type(value).__name__}`, {shown(value)}, in place of a text or a list of messages"
    if not value:
        return "is an empty list of messages"
    for place, message in enumerate(value):
        if not isinstance(message, dict):
            return f"holds a `{type(message).__name__}`, {shown(message)}, in place of message {place}"
        if not isinstance(message.get("role"), str) or not message["role"]:
            return f"has a message {place} without a `role`"
        fault = _content_fault(message, place)
        if fault is not None:
            return fault
    return None


def _content_fault(message: dict[str, Any], place: int) -> str | None:
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else f"has a message {place} without `content`"
    if isinstance(content, list):
        wrong = next((part for part in content if not isinstance(part, dict) or "type" not in part), None)
        return None if wrong is None else f"has a message {place} whose `content` has {shown(wrong)} for a part"
    return None if isinstance(content, str) else f"has a message {place} whose `content` is {shown(content)}"


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


class _RowCheck:
    """What one row, or all rows of a dataset, must hold; called on a row it returns it."""

    def __init__(self, name: str, columns: list[str], tokenizer: Any, needs_prompt: bool):
        self.name, self.columns, self.tokenizer, self.needs_prompt = name, columns, tokenizer, needs_prompt
        self._tried: set[str] = set()
        self._empty_is_text = tokenizer is None or bool(tokenizer("")["input_ids"])

    def __call__(self, values: dict[str, Any], row: int) -> dict[str, Any]:
        for column in self.columns:
            fault = value_fault(values.get(column))
            if fault is not None:
                raise self._error(row, column, fault)
        plain = [column for column in self.columns if isinstance(values[column], str)]
        if plain and len(plain) < len(self.columns):
            other = next(column for column in self.columns if column not in plain)
            raise self._error(row, other, f"holds messages, and `{plain[0]}` a text", "Give both as one or the other.")
        for column in self.columns:
            if isinstance(values[column], list):
                self._try_roles(values[column], row, column)
        self._check_prompt(values, row)
        return values

    def whole(self, dataset: Dataset) -> None:
        """Checks every row; Arrow's own types are judged without making Python objects of them."""
        chosen = dataset.select_columns(self.columns)
        self._check_row(chosen, 0)
        if self.needs_prompt and "prompt" not in self.columns:
            self._each(chosen)
            return
        start = 0
        for table in chosen.with_format("arrow").iter(_BATCH):
            for column in self.columns:
                found = _arrow_fault(table.column(column).combine_chunks())
                if found is NotImplemented:
                    self._each(chosen)
                    return
                if found is not None:
                    self._check_row(chosen, start + found)
            self._try_batch(table, chosen, start)
            start += len(table)

    def _each(self, dataset: Dataset) -> None:
        rows = iter(dataset)
        for row in range(len(dataset)):
            try:
                values = next(rows)
            except UnicodeDecodeError:
                self._check_row(dataset, row)
                raise
            self(values, row)

    def _check_row(self, dataset: Dataset, row: int) -> None:
        for column in self.columns:
            try:
                dataset.select_columns([column])[row]
            except UnicodeDecodeError as error:  # Arrow takes bytes for a text until somebody reads it
                raise self._error(row, column, f"holds bytes that are no text in UTF-8 ({error.reason})") from error
        self(dataset[row], row)

    def _try_batch(self, table: Any, dataset: Dataset, start: int) -> None:
        """Roles that no template is sure to know, and prompts without a character, of a batch without other faults."""
        for column in self.columns:
            values = table.column(column).combine_chunks()
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                bare = pc.equal(pc.binary_length(values), 0)
                if column == "prompt" and self.needs_prompt and not self._empty_is_text and pc.any(bare).as_py():
                    self._check_row(dataset, start + pc.index(bare, True).as_py())
                continue
            roles = pc.struct_field(pc.list_flatten(values), "role")
            for role in set(pc.unique(roles).to_pylist()) - _ROLES - self._tried:
                place = pc.index(roles, pa.scalar(role, roles.type)).as_py()
                self._check_row(dataset, start + pc.list_parent_indices(values)[place].as_py())

    def _try_roles(self, messages: list[dict[str, Any]], row: int, column: str) -> None:
        unknown = {message["role"] for message in messages} - _ROLES - self._tried
        if not unknown or self.tokenizer is None:
            return
        self._tried |= unknown
        try:
            self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever the template of a model raises
            role = sorted(unknown)[0]
            raise self._error(
                row, column, f"has the role {role!r}, which the chat template refuses ({error})",
                f"The roles are {', '.join(sorted(_ROLES))}.",
            ) from error  # fmt: skip

    def _check_prompt(self, values: dict[str, Any], row: int) -> None:
        if not self.needs_prompt:
            return
        if "prompt" in self.columns:
            if values["prompt"] == "" and not self._empty_is_text:
                raise self._error(row, "prompt", "is empty, and the tokenizer makes no token of it")
            return
        both = zip(values["chosen"], values["rejected"], strict=False)
        shared = itertools.takewhile(lambda entries: entries[0] == entries[1], both)
        if all(entry == " " for entry, _ in shared):
            raise self._error(
                row, "chosen", "begins otherwise than `rejected`, and there is no column `prompt`: what both begin "
                "with stands for it", "Add the column `prompt`.",
            )  # fmt: skip

    def _error(self, row: int, column: str, fault: str, remedy: str = _REMEDY) -> ValueError:
        return ValueError(f"Row {row} of the {self.name} dataset: `{column}` {fault}. {remedy}")


def _arrow_fault(values: Any) -> Any:
    """The first row that is neither text nor messages, `None`, or `NotImplemented` where Arrow's type does not say."""
    kind = values.type
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:  # bytes that are no text
        return NotImplemented
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _first(pc.is_null(values))
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return NotImplemented
    fields = {field.name: field.type for field in kind.value_type}
    if not all(pa.types.is_string(fields.get(part, pa.null())) for part in ("role", "content")):
        return NotImplemented
    wrong = _first(pc.fill_null(pc.equal(pc.list_value_length(values), 0), True))
    if wrong is not None:
        return wrong
    messages = pc.list_flatten(values)
    without_role = pc.fill_null(pc.equal(pc.struct_field(messages, "role"), ""), True)
    faulty = pc.or_(without_role, pc.is_null(pc.struct_field(messages, "content")))
    # A call of a tool has no content: Python looks at the messages of such data
    if "tool_calls" in fields and pc.any(faulty).as_py():
        return NotImplemented
    place = _first(faulty)
    return None if place is None else pc.list_parent_indices(values)[place].as_py()


def _first(mask: Any) -> int | None:
    place = pc.index(mask, True).as_py()
    return None if place < 0 else place
