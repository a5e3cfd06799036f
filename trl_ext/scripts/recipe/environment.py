"""The `env` of a recipe: which environment variables it may set, and the precision that it wins over a launcher's."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from typing import Any

from ...core.checks import shown
from .reading import Lines, RecipeError


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What makes a process load or run other code than it says
_LOADERS = re.compile(
    r"LD_\w+|DYLD_\w+|PYTHON\w*|GCONV_PATH|GLIBC_TUNABLES|PATH|BASH_ENV|ENV|IFS|CC|CXX|CFLAGS|LDFLAGS|"
    r"TRL_EXT_HUB_KERNELS|LOCAL_KERNELS"
)
_HARMLESS = {"PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"}
PRECISION = "ACCELERATE_MIXED_PRECISION"


def checked_environment(environment: Any, path: str | None, lines: Lines) -> dict[str, str]:
    """
    The variables that a recipe sets.

    Args:
        environment (`Any`):
            The recipe's `env`.
        path (`str` or `None`):
            The recipe's file.
        lines (`dict`):
            Lines of its keys.

    Returns:
        `dict[str, str]`

    Raises:
        RecipeError: If a name or a value is none, or a variable decides what code a process loads.
    """
    if environment is None:
        return {}
    if not isinstance(environment, Mapping):
        raise RecipeError(
            f"`env` in the recipe {path} must map names to values, got {shown(environment)}. Write `NAME: value` "
            "below it, each in a line of its own."
        )
    return {_name(name, path, lines): _value(name, value, path, lines) for name, value in environment.items()}


def _where(name: Any, path: str | None, lines: Lines) -> str:
    line = lines.get(("env", str(name)))
    return f"`env.{name}` in the recipe {path}" + (f", line {line}," if line else "")


def _name(name: Any, path: str | None, lines: Lines) -> str:
    where = _where(name, path, lines)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RecipeError(f"{where} is no name of a variable. Use letters, digits and underscores.")
    if _LOADERS.fullmatch(name) and name not in _HARMLESS:
        raise RecipeError(
            f"{where} decides what code a process loads, which a recipe may not. Set {name} in the shell."
        )
    return name


def _value(name: Any, value: Any, path: str | None, lines: Lines) -> str:
    where = _where(name, path, lines)
    if value is None:
        raise RecipeError(f'{where} has no value. Write `{name}: ""` for an empty one, or remove it.')
    if isinstance(value, (bool, date)):
        raise RecipeError(f"{where} is read by YAML as {value!r}. Quote the value.")
    if not isinstance(value, (str, int, float)):
        raise RecipeError(f"{where} must be a text or a number, got {shown(value)}.")
    text = str(value)
    if "\0" in text or not _encodes(text):
        raise RecipeError(f"{where} has a sign that no environment variable can hold. Remove it.")
    return text


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def stated_precision(stated: Mapping[str, Any]) -> str | None:
    """
    The mixed precision that `bf16` and `fp16` ask for, as accelerate names it; `None` where neither is stated.

    transformers takes a launcher's precision, such as that of the shipped `ddp.yaml`, wherever both are false.

    Args:
        stated (`Mapping[str, Any]`):
            `bf16` and `fp16`, as far as a recipe or a command line states them.

    Returns:
        `str` or `None`
    """
    if stated.get("fp16"):
        return "fp16"
    if stated.get("bf16"):
        return "bf16"
    return "no" if stated.get("bf16") is False else None


@contextmanager
def environment_kept_on_success(environment: Mapping[str, str]) -> Iterator[None]:
    """Sets variables, and takes them back where the block fails."""
    previous = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    except BaseException:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        raise
