"""Averages over the iterates of a run, which the theory of the saddle point speaks of, and how much it swings."""

from collections import deque
from collections.abc import Mapping
from typing import Any


class IterateStatistics:
    """
    Running means of what the policy reached at each rollout, and how often violations change their sign.

    Args:
        window (`int`, *optional*, defaults to `20`):
            Number of last rollouts over which the changes of sign are counted.
    """

    def __init__(self, window: int = 20):
        self._sums: dict[str, float] = {}
        self._count = 0
        self._violations: dict[str, deque[float]] = {}
        self._window = window

    def add(self, values: Mapping[str, float], violations: Mapping[str, float]) -> None:
        """
        Takes one rollout in.

        Args:
            values (`Mapping[str, float]`):
                Means over the rollout, such as those of the rewards.
            violations (`Mapping[str, float]`):
                Signed violation of each constraint.
        """
        self._count += 1
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        for name, violation in violations.items():
            self._violations.setdefault(name, deque(maxlen=self._window)).append(violation)

    def averages(self) -> dict[str, float]:
        """Mean of each value over all rollouts."""
        return {name: total / self._count for name, total in self._sums.items()}

    def oscillation(self, name: str) -> float:
        """Share of the last rollouts at which the violation had turned its sign, in `[0, 1]`."""
        violations = list(self._violations.get(name, ()))
        pairs = list(zip(violations[:-1], violations[1:], strict=True))
        return sum(before * after < 0 for before, after in pairs) / len(pairs) if pairs else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        violations = {name: list(values) for name, values in self._violations.items()}
        return {"sums": self._sums, "count": self._count, "violations": violations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        self._sums, self._count = dict(state["sums"]), state["count"]
        self._violations = {name: deque(values, maxlen=self._window) for name, values in state["violations"].items()}
