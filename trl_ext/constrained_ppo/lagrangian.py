"""Lagrange multipliers of reward constraints (https://huggingface.co/papers/2310.04373, section 4)."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


Kind = Literal[">=", "<=", "=="]
Squash = Literal["sigmoid", "tanh", "softplus", "none"]
KINDS = (">=", "<=", "==")
SQUASHES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    # Function and derivative
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "none": (lambda x: x, torch.ones_like),
}


@dataclass(frozen=True)
class Constraint:
    """
    A constraint on the mean of a reward.

    Args:
        reward (`str` or `int`):
            Name or index of the reward.
        threshold (`float`):
            Value that the mean is held to, in the reward's own units.
        kind (`str`, *optional*, defaults to `"=="`):
            `">="`, `"<="` or `"=="`.

    Raises:
        ValueError: If `kind` is unknown or `threshold` is not finite.
    """

    reward: str | int
    threshold: float
    kind: Kind = "=="

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of the constraint on {self.reward!r} must be one of {KINDS}, got {self.kind!r}.")
        if not math.isfinite(self.threshold):
            raise ValueError(
                f"`threshold` of the constraint on {self.reward!r} must be finite, got {self.threshold}. Remove the "
                "constraint to leave the reward free."
            )

    def violation(self, mean: float) -> float:
        """Signed violation: positive where more weight on the constraint is called for."""
        return mean - self.threshold if self.kind == "<=" else self.threshold - mean


class LagrangeMultipliers:
    """
    One multiplier for each constraint, moved by stochastic gradient descent on the dual with momentum.

    `l <- l + lr * buf`, `buf = momentum * buf + violation`, and the weight is `squash(l + kp * violation + kd *
    change of the violation)`. With `proportional=0` and `derivative=0` this is the paper's integral update, which does
    not settle on a toy problem; the proportional term damps it.

    Args:
        constraints (`Sequence[Constraint]`):
            Constraints, none twice on one reward in contradiction.
        squash (`str`, *optional*):
            `"sigmoid"`, `"tanh"`, `"softplus"` or `"none"`. Defaults to the paper's: `"tanh"` where a constraint is an
            equality, else `"sigmoid"`. With `"none"` the multiplier of an inequality is kept from falling below zero.
        learning_rate (`float`, *optional*, defaults to `0.1`):
            Step of the dual.
        momentum (`float`, *optional*, defaults to `0.1`):
            Momentum of the dual, in `[0, 1)`.
        proportional (`float`, *optional*, defaults to `10.0`):
            Coefficient `kp` of the violation.
        derivative (`float`, *optional*, defaults to `0.0`):
            Coefficient `kd` of the change of the violation since the last update.
        squash_gradient (`bool`, *optional*, defaults to `False`):
            Whether the dual step carries the derivative of the squashing, as in the official code.
        init (`float`, *optional*, defaults to `0.0`):
            Start of every multiplier.
        maximum (`float`, *optional*):
            Bound on the size of every multiplier.
        delay_steps (`int`, *optional*, defaults to `0`):
            Updates that only observe.
        window (`int`, *optional*, defaults to `1`):
            Number of last observations whose mean is used.

    Raises:
        ValueError: If there is no constraint, two contradict, or a setting is out of its range.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        squash: Squash | None = None,
        learning_rate: float = 0.1,
        momentum: float = 0.1,
        proportional: float = 10.0,
        derivative: float = 0.0,
        squash_gradient: bool = False,
        init: float = 0.0,
        maximum: float | None = None,
        delay_steps: int = 0,
        window: int = 1,
    ):
        self.constraints = list(constraints)
        check_constraints(self.constraints)
        has_equality = any(constraint.kind == "==" for constraint in self.constraints)
        self.squash: str = squash or ("tanh" if has_equality else "sigmoid")
        self.learning_rate, self.momentum = learning_rate, momentum
        self.proportional, self.derivative = proportional, derivative
        self.squash_gradient, self.maximum = squash_gradient, maximum
        self.delay_steps, self.window = delay_steps, window
        self._check_settings()
        count = len(self.constraints)
        self._values = torch.full((count,), float(init), dtype=torch.float64)
        self._momentum_buffer = torch.zeros(count, dtype=torch.float64)
        self._violation = torch.zeros(count, dtype=torch.float64)
        self._change = torch.zeros(count, dtype=torch.float64)
        self._observed: deque[list[float]] = deque(maxlen=window)
        self._num_updates = 0

    def _check_settings(self) -> None:
        if self.squash not in SQUASHES:
            raise ValueError(f"`multiplier_squash` must be one of {sorted(SQUASHES)}, got {self.squash!r}.")
        for name in ("learning_rate", "proportional", "derivative"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`multiplier_{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`multiplier_momentum` must lie in [0, 1), got {self.momentum}.")
        if self.maximum is not None and not self.maximum > 0:
            raise ValueError(f"`multiplier_max` must be positive, got {self.maximum}. Leave it out for no bound.")
        if self.window < 1 or self.delay_steps < 0:
            raise ValueError(
                f"`multiplier_window` must be at least 1 and `multiplier_delay_steps` at least 0, got {self.window} "
                f"and {self.delay_steps}."
            )

    def values(self) -> torch.Tensor:
        """The multipliers before squashing, `(K,)`, float64."""
        return self._values.clone()

    def weights(self) -> torch.Tensor:
        """The effective weight of each reward, `(K,)`, float64."""
        damped = self._values + self.proportional * self._violation + self.derivative * self._change
        return SQUASHES[self.squash][0](self._bounded(damped))

    def violations(self) -> torch.Tensor:
        """Signed violations at the last update, `(K,)`, float64."""
        return self._violation.clone()

    def update(self, means: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """
        One dual step.

        Args:
            means (`Sequence[float]` or `torch.Tensor` of shape `(K,)`):
                Mean of each constrained reward over the episodes of a rollout, over all processes, so that every
                process takes the same step.

        Returns:
            `torch.Tensor` of shape `(K,)`, float64: the weights after the step.

        Raises:
            ValueError: If there is not one finite mean for each constraint. The multipliers are left as they were.
        """
        observed = [float(mean) for mean in means]
        if len(observed) != len(self.constraints) or not all(map(math.isfinite, observed)):
            raise ValueError(
                f"`means` must hold one finite mean for each of the {len(self.constraints)} constraints, got "
                f"{observed}. Check the reward functions for None and NaN."
            )
        self._observed.append(observed)
        averages = torch.tensor(list(self._observed), dtype=torch.float64).mean(dim=0).tolist()
        violation = torch.tensor(
            [c.violation(mean) for c, mean in zip(self.constraints, averages, strict=True)], dtype=torch.float64
        )
        self._change = violation - self._violation if self._num_updates else torch.zeros_like(violation)
        self._violation = violation
        self._num_updates += 1
        if self._num_updates > self.delay_steps:
            slope = SQUASHES[self.squash][1](self._values) if self.squash_gradient else torch.ones_like(violation)
            self._momentum_buffer = self.momentum * self._momentum_buffer + slope * violation
            self._values = self._bounded(self._values + self.learning_rate * self._momentum_buffer)
        return self.weights()

    def _bounded(self, multipliers: torch.Tensor) -> torch.Tensor:
        if self.squash == "none":
            inequality = torch.tensor([constraint.kind != "==" for constraint in self.constraints])
            multipliers = torch.where(inequality, multipliers.clamp_min(0.0), multipliers)
        return multipliers if self.maximum is None else multipliers.clamp(-self.maximum, self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "values": self._values.tolist(),
            "momentum_buffer": self._momentum_buffer.tolist(),
            "violation": self._violation.tolist(),
            "change": self._change.tolist(),
            "observed": list(self._observed),
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restores [`state_dict`].

        Raises:
            ValueError: If it is of another number of constraints.
        """
        if len(state["values"]) != len(self.constraints):
            raise ValueError(
                f"The saved state has {len(state['values'])} multipliers and this run {len(self.constraints)} "
                "constraints. Resume with the constraints of the saved run."
            )
        self._values, self._momentum_buffer, self._violation, self._change = (
            torch.tensor(state[name], dtype=torch.float64)
            for name in ("values", "momentum_buffer", "violation", "change")
        )
        self._observed = deque(state["observed"], maxlen=self.window)
        self._num_updates = state["num_updates"]


def check_constraints(constraints: Sequence[Constraint]) -> None:
    """
    Refuses an empty list and constraints on one reward that no policy can meet together.

    Raises:
        ValueError: Naming the reward and both constraints.
    """
    if not constraints:
        raise ValueError("`constraints` is empty. Give at least one, or use `method='ppo'`.")
    for reward in {constraint.reward for constraint in constraints}:
        own = [constraint for constraint in constraints if constraint.reward == reward]
        lowest = max((c.threshold for c in own if c.kind in (">=", "==")), default=-math.inf)
        highest = min((c.threshold for c in own if c.kind in ("<=", "==")), default=math.inf)
        if lowest > highest:
            stated = " and ".join(f"{c.kind} {c.threshold}" for c in own)
            raise ValueError(
                f"The constraints on reward {reward!r} contradict each other: {stated}. Remove one of them."
            )
