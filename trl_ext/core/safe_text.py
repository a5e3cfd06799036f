"""Text from data, names and recipes where it is shown: escaped for its reader, without secrets or local folders."""

import html
import json
import os
import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

from rich.markup import escape


# Variables of the environment whose values are secrets
_SECRET = re.compile(r"(^|_)(TOKEN|API_?KEY|SECRET|SECRET_KEY|ACCESS_KEY|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
# Shorter values are words of a text rather than secrets
_LEAST = 8
HIDDEN = "<hidden>"


def for_terminal(text: object) -> str:
    """One line of text that [`rich`](https://rich.readthedocs.io) prints as it is, brackets included."""
    return escape(one_line(text))


def for_markdown(text: object) -> str:
    """One line of text that Markdown, in a table too, shows as it is."""
    signs = r"([\\`*|~\[\]])" if "](" in str(text) else r"([\\`*|~])"
    return re.sub(signs, r"\\\1", html.escape(one_line(text), quote=False))


def for_markdown_code(text: object) -> str:
    """One line of text as code in Markdown, in a table too."""
    return f"`{one_line(text).replace('`', chr(0x2019)).replace('|', chr(92) + '|')}`"


def as_string(text: object) -> str:
    """A text as a string literal of Python, in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def shown_folder(folder: str | Path) -> str:
    """
    A folder as others may see it: below the working folder from there, else by its last name alone.

    Args:
        folder (`str` or `Path`):
            Folder.

    Returns:
        `str`
    """
    path = Path(folder)
    if not path.is_absolute():
        return str(path)
    working = Path.cwd()
    return str(path.relative_to(working)) if path.is_relative_to(working) and path != working else path.name


def known_secrets(*more: str | None) -> list[str]:
    """
    What no file may hold: the values of the environment's tokens, keys and passwords, and others.

    Args:
        more (`str` or `None`):
            Further secrets, such as `hub_token`.

    Returns:
        `list[str]`: the longest first.
    """
    found = {value for name, value in os.environ.items() if _SECRET.search(name)} | set(filter(None, more))
    return sorted((secret for secret in found if len(secret) >= _LEAST), key=len, reverse=True)


def redacted(text: str, secrets: Iterable[str] | None = None) -> str:
    """
    A text with its secrets hidden.

    Args:
        text (`str`):
            Text.
        secrets (`Iterable[str]`, *optional*):
            Secrets. Defaults to [`known_secrets`].

    Returns:
        `str`
    """
    for secret in known_secrets() if secrets is None else secrets:
        text = text.replace(secret, HIDDEN)
    return text


def one_line(text: object) -> str:
    """A text with every run of blanks as one, and one for each sign that cannot be printed."""
    return "".join(sign if sign.isprintable() else " " for sign in " ".join(str(text).split()))


class WithoutToken:
    """Base of a configuration whose pickle, such as `training_args.bin`, has no `hub_token`; its copies have it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hub_token": None}

    def __copy__(self) -> Any:
        return self._with(dict(self.__dict__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo[id(self)] = self._with({})
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _with(self, state: dict[str, Any]) -> Any:
        copied = object.__new__(type(self))
        copied.__dict__.update(state)
        return copied
