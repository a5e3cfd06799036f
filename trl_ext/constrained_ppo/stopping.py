"""When a run ends before its last step, and why."""

import math
from typing import Any


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite; raised before any parameter moves."""


class StoppingRules:
    """
    Ends a run on too large a divergence or a gold metric that no longer rises.

    Args:
        kl_ceiling (`float`, *optional*):
            KL of a response from the reference, in nats, above which the run ends.
        gold_patience (`int`, *optional*):
            Evaluations without a better gold metric after which the run ends.
    """

    def __init__(self, kl_ceiling: float | None = None, gold_patience: int | None = None):
        self.kl_ceiling, self.gold_patience = kl_ceiling, gold_patience
        self.best_gold = -math.inf
        self.evaluations_since_best = 0
        self.num_gold_evaluations = 0

    def check_divergence(self, divergence: float) -> str | None:
        """
        Args:
            divergence (`float`):
                Mean KL of a response of the last rollout, in nats.

        Returns:
            `str` or `None`: why to end.
        """
        if self.kl_ceiling is None or divergence <= self.kl_ceiling:
            return None
        return (
            f"The KL of a response from the reference is {divergence:.3g} nats, above "
            f"`kl_ceiling={self.kl_ceiling:g}`."
        )

    def check_gold(self, gold: float) -> str | None:
        """
        Args:
            gold (`float`):
                Gold metric of an evaluation, higher is better.

        Returns:
            `str` or `None`: why to end.
        """
        self.num_gold_evaluations += 1
        if gold > self.best_gold:
            self.best_gold, self.evaluations_since_best = gold, 0
            return None
        self.evaluations_since_best += 1
        if self.gold_patience is None or self.evaluations_since_best < self.gold_patience:
            return None
        return (
            f"The gold metric has not risen above {self.best_gold:.4g} for {self.evaluations_since_best} evaluations "
            f"(`gold_patience={self.gold_patience}`); it is {gold:.4g} now."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; JSON has no infinity, so a gold metric never seen is `None`."""
        return {
            "best_gold": self.best_gold if math.isfinite(self.best_gold) else None,
            "evaluations_since_best": self.evaluations_since_best,
            "num_gold_evaluations": self.num_gold_evaluations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        self.best_gold = -math.inf if state["best_gold"] is None else state["best_gold"]
        self.evaluations_since_best = state["evaluations_since_best"]
        self.num_gold_evaluations = state["num_gold_evaluations"]
