"""How far a reader walks through the package to follow one call."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trl_ext


PACKAGE = Path(trl_ext.__file__).parent


class Walk(NamedTuple):
    """Files that a call entered, in the order of their first line, and how often it went from one to another."""

    files: list[str]
    changes: int


def walk(call: Callable[[], Any]) -> Walk:
    """Runs a call and follows which of the package's files it enters; code outside the package is passed over."""
    files: dict[str, None] = {}
    trail: list[str] = []

    def follow(frame: Any, event: str, _argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        file = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
        files.setdefault(file)
        if not trail or trail[-1] != file:
            trail.append(file)

    before = sys.getprofile()
    sys.setprofile(follow)
    try:
        call()
    finally:
        sys.setprofile(before)
    return Walk(list(files), len(trail) - 1)
