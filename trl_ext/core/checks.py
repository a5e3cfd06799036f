"""Checks of configuration fields: each error names the field, its value and the remedy."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any


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
            raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.{_sentence(remedy)}")


def check_number(
    owner: Any,
    *fields: str,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    optional: bool = False,
    remedy: str = "",
) -> None:
    """
    Refuses fields that are no finite number in a range.

    Args:
        owner (`Any`):
            Object that has the fields.
        fields (`str`):
            Names of the fields.
        above (`float`, *optional*):
            Number that they must be greater than.
        at_least (`float`, *optional*):
            Smallest number allowed.
        below (`float`, *optional*):
            Number that they must be smaller than.
        at_most (`float`, *optional*):
            Greatest number allowed.
        optional (`bool`, *optional*, defaults to `False`):
            Whether `None` is allowed.
        remedy (`str`, *optional*):
            Sentence added to the error.

    Raises:
        ValueError: If a field has another value.
    """
    for name in fields:
        value = getattr(owner, name)
        if value is None and optional:
            continue
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        if not (number and above < value < below and at_least <= value <= at_most):
            wanted = _range(above, at_least, below, at_most)
            raise ValueError(f"`{name}` must be a number{wanted}, got {value!r}.{_sentence(remedy)}")


def _range(above: float, at_least: float, below: float, at_most: float) -> str:
    """The bounds in words, with a space before them; nothing without bounds."""
    bounds = [
        *([f"greater than {above:g}"] if above > -math.inf else []),
        *([f"of at least {at_least:g}"] if at_least > -math.inf else []),
        *([f"smaller than {below:g}"] if below < math.inf else []),
        *([f"of at most {at_most:g}"] if at_most < math.inf else []),
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _sentence(remedy: str) -> str:
    return f" {remedy}" if remedy else ""
