"""Checks of configuration fields: each error names the field, its value and the remedy.

A class is checked as a whole by [`check_fields`]: the type of a field is its annotation, its range stands in one table
of the class, and what neither says anything of is refused. [`check_value`] and [`check_choice`] check single values.
"""

import functools
import json
import math
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from enum import Enum
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


# Characters of a value that an error shows
_SHOWN = 120
_NUMBERS = {int: "a whole number", float: "a number"}
_PLURALS = {
    "a whole number": "whole numbers", "a number": "numbers", "a text": "texts", "a mapping": "mappings",
}  # fmt: skip


@dataclass(frozen=True)
class Range:
    """
    What a field may hold beyond what its annotation says.

    Args:
        above (`float`, *optional*):
            Number that it must be greater than.
        at_least (`float`, *optional*):
            Smallest number allowed.
        below (`float`, *optional*):
            Number that it must be smaller than.
        at_most (`float`, *optional*):
            Greatest number allowed.
        infinite (`bool`, *optional*, defaults to `False`):
            Whether infinity is a number too.
        empty (`bool`, *optional*, defaults to `True`):
            Whether a text or a list may be empty.
        choices (`tuple`, *optional*):
            The texts allowed.
        also (`Any`, *optional*):
            Further types, where the annotation says less than the class takes; `Any` for whatever it takes.
        remedy (`str`, *optional*):
            Sentence added to the error.
    """

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    infinite: bool = False
    empty: bool = True
    choices: tuple[str, ...] = ()
    also: Any = None
    remedy: str = ""

    def holds(self, number: Any) -> bool:
        """Whether a number lies in the range."""
        if not ((self.infinite and abs(number) == math.inf) or _is_finite(number)):
            return False
        inside = self.above < number < self.below or (number == math.inf and self.infinite and self.below == math.inf)
        return bool(inside and self.at_least <= number <= self.at_most)

    def __str__(self) -> str:
        """The bounds in words, with a space before them; nothing without bounds."""
        bounds = [
            *([f"greater than {self.above:g}"] if self.above > -math.inf else []),
            *([f"of at least {self.at_least:g}"] if self.at_least > -math.inf else []),
            *([f"smaller than {self.below:g}"] if self.below < math.inf else []),
            *([f"of at most {self.at_most:g}"] if self.at_most < math.inf else []),
        ]
        return f" {' and '.join(bounds)}" if bounds else ""


ANY_NUMBER = Range()


def check_fields(owner: Any, ranges: Mapping[str, Range], label: str = "`{}`") -> None:
    """
    Refuses fields of a dataclass that do not hold what their annotations and a table say; `nan` is never allowed. A
    field at its default passes.

    Args:
        owner (`Any`):
            Instance of a dataclass.
        ranges (`Mapping[str, Range]`):
            For fields of numbers, lists and texts, what their annotations do not say.
        label (`str`, *optional*):
            How errors name a field.

    Raises:
        ValueError: If a field holds something else.
    """
    cls: Any = type(owner)
    for name, hint, default in _declared(cls):
        value = getattr(owner, name, default)
        if value is not default:
            check_value(name, value, hint, ranges.get(name, ANY_NUMBER), default, label)


def check_value(
    name: str, value: Any, hint: Any, within: Range = ANY_NUMBER, default: Any = MISSING, label: str = "`{}`"
) -> None:
    """
    Refuses a value that is not of a type or not in a range.

    Args:
        name (`str`):
            Name of the field.
        value (`Any`):
            Its value.
        hint (`Any`):
            Its annotation.
        within ([`Range`], *optional*):
            What the annotation does not say.
        default (`Any`, *optional*):
            The default, which the error names.
        label (`str`, *optional*):
            How errors name the field.

    Raises:
        ValueError: If the value is another.
    """
    if within.also is Any or (within.also is not None and fits(value, within.also)):
        return
    if fits(value, hint) and _in_range(value, within) and _is_mapping_text(name, value, hint):
        return
    remedy = _number_in_quotes(value, hint) or within.remedy
    if not remedy and default is not MISSING:
        remedy = "Leave it out for the default" + (f", {shown(default)}." if default is not None else ".")
    # The one field that is a secret
    given = f"a value of type {type(value).__name__}" if name == "hub_token" else shown(value)
    raise ValueError(f"{label.format(name)} must be {described(hint, within)}, got {given}.{_sentence(remedy)}")


def _number_in_quotes(value: Any, hint: Any) -> str:
    """The remedy where a recipe's number is a text: YAML reads `1e-3`, without a point, as one."""
    if not isinstance(value, str) or not {int, float} & {hint, *get_args(hint)}:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return "It is a text: write it without quotes, and with a point before an exponent."


def described(hint: Any, within: Range = ANY_NUMBER) -> str:
    """A type and a range in words, such as `a whole number of at least 1`; that a field may be `None` goes unsaid."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if within.choices:
        return f"one of {', '.join(map(repr, within.choices))}"
    words = []
    for member in members:
        if member is types.NoneType or (member is str and _has_enum(hint)):
            continue
        if member in _NUMBERS:
            words.append(f"{_NUMBERS[member]}{within}")
        elif get_origin(member) is Literal:
            words.append(f"one of {', '.join(repr(choice) for choice in get_args(member))}")
        elif get_origin(member) in (list, tuple) or member in (list, tuple):
            inner = described(get_args(member)[0], replace(within, empty=True)) if get_args(member) else "values"
            noun = next((many + inner[len(one) :] for one, many in _PLURALS.items() if inner.startswith(one)), inner)
            words.append(f"a list of {noun}")
        elif isinstance(member, type) and issubclass(member, Enum):
            words.append(f"one of {', '.join(repr(choice.value) for choice in member)}")
        else:
            words.append(_word(member))
    if within.also is bool:
        words.append("True or False")
    return " or ".join(dict.fromkeys(words)) + (" and not be empty" if not within.empty else "")


def _word(hint: Any) -> str:
    named = {bool: "True or False", str: "a text", dict: "a mapping", Any: "a value"}
    if get_origin(hint) in (dict, Mapping):
        return "a mapping"
    return named.get(hint) or f"a `{getattr(hint, '__name__', hint)}`"


def shown(value: Any) -> str:
    """A value in an error, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # integers of thousands of digits among them
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


@functools.cache
def _declared(cls: type) -> tuple[tuple[str, Any, Any], ...]:
    """Name, annotation and default of every field that a class is built with."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        try:
            hints |= get_type_hints(base)
        except (NameError, TypeError):  # a user's subclass with annotations that only its own module can read
            continue
    return tuple((f.name, hints.get(f.name, Any), f.default) for f in fields(cls) if f.init)


def fits(value: Any, hint: Any) -> bool:
    """
    Whether a value is of an annotated type; whole numbers are numbers, tuples are lists and paths are texts.

    Args:
        value (`Any`):
            Value.
        hint (`Any`):
            Annotation.

    Returns:
        `bool`
    """
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    origin, members = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # Beside an enumeration a text is the value of a member
        return any(fits(value, member) for member in members if not (member is str and _has_enum(hint)))
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in members)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        inner = members[0] if members else Any
        return isinstance(value, (list, tuple)) and all(fits(entry, inner) for entry in value)
    if origin in (dict, Mapping) or hint is dict:
        key, inner = members or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, inner) for k, v in value.items())
    if hint in _NUMBERS:
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ == "bool_"  # numpy's
    if hint is str:
        return isinstance(value, (str, PathLike))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint) or value in [choice.value for choice in hint]
    return isinstance(value, hint or types.NoneType) if isinstance(hint, type | None) else True


def _has_enum(hint: Any) -> bool:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    return any(isinstance(member, type) and issubclass(member, Enum) for member in members)


def _is_mapping_text(name: str, value: Any, hint: Any) -> bool:
    """Whether a text that stands for a mapping is JSON of one or, but for keywords, the name of a file."""
    origins = {get_origin(member) or member for member in get_args(hint)}
    if not isinstance(value, str) or dict not in origins or list in origins:
        return True
    if not value.lstrip().startswith("{"):
        return not name.endswith("_kwargs") and os.path.isfile(value)
    try:
        return isinstance(json.loads(value), dict)
    except ValueError:
        return False


def _in_range(value: Any, within: Range) -> bool:
    if isinstance(value, bool) or value is None:
        return True
    if isinstance(value, Real):
        return within.holds(value)
    if isinstance(value, (list, tuple)):
        return bool(value or within.empty) and all(_in_range(entry, within) for entry in value)
    if isinstance(value, str):
        return bool(value.strip() or within.empty) and (not within.choices or value in within.choices)
    return True


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond the greatest float
        return False


def check_choice(owner: Any, *fields: str, choices: Sequence[Any], remedy: str = "") -> None:
    """
    Refuses fields whose value is none of the choices.

    Args:
        owner (`Any`):
            Object that has the fields.
        fields (`str`):
            Names of the fields.
        choices (`Sequence`):
            Values allowed.
        remedy (`str`, *optional*):
            Sentence added to the error.

    Raises:
        ValueError: If a field has another value.
    """
    for name in fields:
        value = getattr(owner, name)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            allowed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"`{name}` must be one of {allowed}, got {shown(value)}.{_sentence(remedy)}")


def _sentence(remedy: str) -> str:
    return f" {remedy}" if remedy else ""
