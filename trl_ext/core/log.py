"""Queries of a trainer's log, as in `trainer.state.log_history` or `trainer_state.json`."""

from collections.abc import Sequence
from typing import Any


LogHistory = Sequence[dict[str, Any]]


def series(log_history: LogHistory, key: str) -> tuple[list[int], list[float]]:
    """
    Steps and values of one logged quantity.

    Args:
        log_history (`Sequence[dict]`):
            The trainer's log.
        key (`str`):
            Key of the quantity.

    Returns:
        `tuple[list[int], list[float]]`: steps, and values of the same length; entries that lack the key are left out.
    """
    entries = [entry for entry in log_history if entry.get(key) is not None]
    return [int(entry.get("step", 0)) for entry in entries], [float(entry[key]) for entry in entries]


def last_value(log_history: LogHistory, key: str) -> float | None:
    """
    The newest value of a quantity.

    Args:
        log_history (`Sequence[dict]`):
            The trainer's log.
        key (`str`):
            Key of the quantity.

    Returns:
        `float` or `None`: `None` where it was never logged.
    """
    return next((float(entry[key]) for entry in reversed(log_history) if entry.get(key) is not None), None)
