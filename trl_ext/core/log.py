"""Queries of a trainer's log, as in `trainer.state.log_history` or `trainer_state.json`."""

import math
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


def best_value(log_history: LogHistory, key: str) -> tuple[int, float] | None:
    """
    Where a quantity was highest.

    Args:
        log_history (`Sequence[dict]`):
            The trainer's log.
        key (`str`):
            Key of the quantity.

    Returns:
        `tuple[int, float]` or `None`: step and value, the first of equals; `None` where no finite value was logged.
    """
    points = [point for point in zip(*series(log_history, key), strict=True) if math.isfinite(point[1])]
    return max(points, key=lambda point: point[1], default=None)


class NewestValues:
    """
    The newest value of every quantity, and the highest of some: a short log in the place of a long one, for what is
    shown at every step and would else take longer with each.

    Args:
        highest (`str`):
            Keys of the quantities whose highest value is kept too.
    """

    def __init__(self, *highest: str):
        self._highest = highest
        self._newest: dict[str, Any] = {}
        self._best: dict[str, tuple[int, float]] = {}
        self._read = 0

    def of(self, log_history: LogHistory) -> list[dict[str, Any]]:
        """
        Reads what a log has got since the last call.

        Args:
            log_history (`Sequence[dict]`):
                The trainer's log; a shorter one than before is read anew.

        Returns:
            `list[dict]`: a log in which [`last_value`], [`reward_names`] and, for `highest`, [`best_value`]
            find what they find in the whole.
        """
        if len(log_history) < self._read:
            self._read, self._newest, self._best = 0, {}, {}
        for entry in log_history[self._read :]:
            self._newest.update({key: value for key, value in entry.items() if value is not None})
            for key in self._highest:
                found = best_value([entry], key)
                if found is not None and (key not in self._best or found[1] > self._best[key][1]):
                    self._best[key] = found
        self._read = len(log_history)
        return [*({"step": step, key: value} for key, (step, value) in self._best.items()), dict(self._newest)]


def reward_names(log_history: LogHistory) -> list[str]:
    """
    Names of the rewards that TRL logs as `rewards/<name>/mean`.

    Args:
        log_history (`Sequence[dict]`):
            The trainer's log.

    Returns:
        `list[str]`: those of the newest entry that has any, in its order.
    """
    for entry in reversed(log_history):
        keys = [key for key in entry if key.startswith("rewards/") and key.endswith("/mean")]
        if keys:
            return [key[len("rewards/") : -len("/mean")] for key in keys]
    return []
