"""Lagrange multipliers of reward constraints (https://huggingface.co/papers/2310.04373, section 4).

    buf <- momentum buf + violation,    l <- l + lr buf,    w = squash(l + kp violation + kd change of the violation)

[`LagrangeMultipliers.update`] is this dual step and what runs, called by `RolloutController.close_rollout`. A plain
form stands in `recipes/experiments/minimal/constrained_ppo.py`; `tests/constrained_ppo/test_minimal.py` holds the two
equal.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch


Kind = Literal[">=", "<=", "=="]
Squash = Literal["sigmoid", "tanh", "softplus", "exp", "none"]
KINDS = (">=", "<=", "==")
# A weight within this share of its squashing's range of a bound counts as saturated: the squashing is flat there
_NEAR_BOUND = 0.02
# Rounding of a multiplier that is clamped to its maximum, relative
_ROUNDING = 1e-9
SQUASHES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]] = {
    # Function and derivative
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "softplus": (torch.nn.functional.softplus, torch.sigmoid),
    "exp": (torch.exp, torch.exp),
    "none": (lambda x: x, torch.ones_like),
}


@dataclass(frozen=True)
class Constraint:
    """
    A constraint on the mean of a reward. Its threshold is stated as a value, or relative to samples of the policy
    before training, and is then open until [`resolved`].

    Args:
        reward (`str` or `int`):
            Name or index of the reward.
        threshold (`float`, *optional*):
            Value that the mean is held to, in the reward's own units.
        kind (`str`, *optional*, defaults to `"=="`):
            `">="`, `"<="` or `"=="`.
        quantile (`float`, *optional*):
            Threshold as a quantile, in `[0, 1]`, of the reward before training.
        relative_gain (`float`, *optional*):
            Threshold as `mean + relative_gain * |mean|` of the reward before training.

    Raises:
        ValueError: If `kind` is unknown, or not exactly one finite threshold is stated.
    """

    reward: str | int
    threshold: float | None = None
    kind: Kind = "=="
    quantile: float | None = None
    relative_gain: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of the constraint on {self.reward!r} must be one of {KINDS}, got {self.kind!r}.")
        stated = {name: getattr(self, name) for name in ("threshold", "quantile", "relative_gain")}
        stated = {name: value for name, value in stated.items() if value is not None}
        if len(stated) != 1:
            raise ValueError(
                f"The constraint on {self.reward!r} must state exactly one of `threshold`, `quantile` and "
                f"`relative_gain`, got {stated}."
            )
        name, value = next(iter(stated.items()))
        if isinstance(value, str) or not math.isfinite(value):
            raise ValueError(
                f"`{name}` of the constraint on {self.reward!r} must be a finite number, got {value!r}. Remove the "
                "constraint to leave the reward free."
            )
        if name == "quantile" and not 0 <= value <= 1:
            raise ValueError(f"`quantile` of the constraint on {self.reward!r} must lie in [0, 1], got {value}.")

    def resolved(self, samples: torch.Tensor) -> "Constraint":
        """
        The constraint with its threshold as a value.

        Args:
            samples (`torch.Tensor` of shape `(N,)`):
                The reward of samples before training.

        Returns:
            [`Constraint`]
        """
        if self.threshold is not None:
            return self
        samples = samples.double()
        if self.quantile is not None:
            threshold = float(samples.quantile(self.quantile))
        else:
            mean = float(samples.mean())
            threshold = mean + float(self.relative_gain or 0.0) * abs(mean)
        return self.with_threshold(threshold)

    def with_threshold(self, threshold: float) -> "Constraint":
        """The constraint with another threshold, as a value."""
        return Constraint(self.reward, float(threshold), self.kind)

    def violation(self, mean: float) -> float:
        """
        Signed violation: positive where more weight on the constraint is called for.

        Raises:
            ValueError: If the threshold is open.
        """
        if self.threshold is None:
            raise ValueError(
                f"The threshold of the constraint on {self.reward!r} is open until it is calibrated. Start training "
                "with `calibration_samples` above 0, or state `threshold`."
            )
        return mean - self.threshold if self.kind == "<=" else self.threshold - mean


class LagrangeMultipliers:
    """
    One multiplier for each constraint, moved by stochastic gradient descent on the dual with momentum.

    `l <- l + lr * buf`, `buf <- momentum * buf + violation`, and the weight is `squash(l + kp * violation + kd *
    change of the violation)`. With `proportional=0` and `derivative=0` this is the paper's integral update, which does
    not settle on a toy problem; the proportional term damps it.

    Args:
        constraints (`Sequence[Constraint]`):
            Constraints, none twice on one reward in contradiction.
        squash (`str`, *optional*):
            `"sigmoid"`, `"tanh"`, `"softplus"`, `"exp"` or `"none"`. Defaults to the paper's: `"tanh"` where a
            constraint is an equality, else `"sigmoid"`. With `"none"` the multiplier of an inequality is kept from
            falling below zero.
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
            Bound on the size of every multiplier before squashing; of the weight with `"exp"`, as in safe-rlhf.
        delay_steps (`int`, *optional*, defaults to `0`):
            Updates that only observe.
        window (`int`, *optional*, defaults to `1`):
            Number of last observations whose mean is used.
        ema (`float`, *optional*, defaults to `0.0`):
            Decay of a bias-corrected exponential moving average of the observations, used in place of a window.

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
        ema: float = 0.0,
    ):
        self.constraints = list(constraints)
        check_constraints(self.constraints)
        has_equality = any(constraint.kind == "==" for constraint in self.constraints)
        self.squash: str = squash or ("tanh" if has_equality else "sigmoid")
        self.learning_rate, self.momentum = learning_rate, momentum
        self.proportional, self.derivative = proportional, derivative
        self.squash_gradient, self.maximum = squash_gradient, maximum
        self.delay_steps, self.window, self.ema = delay_steps, window, ema
        self._check_settings()
        count = len(self.constraints)
        self._multipliers = torch.full((count,), float(init), dtype=torch.float64)
        self._momentum_buffer = torch.zeros(count, dtype=torch.float64)
        self._violation = torch.zeros(count, dtype=torch.float64)
        self._change = torch.zeros(count, dtype=torch.float64)
        self._observed: deque[list[float]] = deque(maxlen=window)
        self._averages = torch.zeros(count, dtype=torch.float64)
        self._num_averaged = 0
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
        if not 0 <= self.ema < 1 or (self.ema and self.window > 1):
            raise ValueError(
                f"`multiplier_ema` must lie in [0, 1) and excludes `multiplier_window` above 1, got {self.ema} and "
                f"{self.window}."
            )

    def values(self) -> torch.Tensor:
        """The multipliers before squashing, `(K,)`, float64."""
        return self._multipliers.clone()

    def weights(self) -> torch.Tensor:
        """The effective weight of each reward, `(K,)`, float64."""
        damped = self._multipliers + self.proportional * self._violation + self.derivative * self._change
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
        averages = self._averaged(observed)
        violation = torch.tensor(
            [c.violation(mean) for c, mean in zip(self.constraints, averages, strict=True)], dtype=torch.float64
        )
        self._change = violation - self._violation if self._num_updates else torch.zeros_like(violation)
        self._violation = violation
        self._num_updates += 1
        if self._num_updates > self.delay_steps:
            slope = SQUASHES[self.squash][1](self._multipliers) if self.squash_gradient else torch.ones_like(violation)
            self._momentum_buffer = self.momentum * self._momentum_buffer + slope * violation
            self._multipliers = self._bounded(self._multipliers + self.learning_rate * self._momentum_buffer)
        return self.weights()

    def _averaged(self, observed: list[float]) -> list[float]:
        self._observed.append(observed)
        if not self.ema:
            return torch.tensor(list(self._observed), dtype=torch.float64).mean(dim=0).tolist()
        self._num_averaged += 1
        self._averages = self.ema * self._averages + (1 - self.ema) * torch.tensor(observed, dtype=torch.float64)
        return (self._averages / (1 - self.ema**self._num_averaged)).tolist()

    def set_thresholds(self, thresholds: Sequence[float]) -> None:
        """
        Replaces the thresholds and forgets the averaged observations; the multipliers stay.

        Args:
            thresholds (`Sequence[float]`):
                One for each constraint, in their order.

        Raises:
            ValueError: If there is not one finite threshold for each constraint, or two constraints then contradict.
        """
        constraints = [
            constraint.with_threshold(threshold)
            for constraint, threshold in zip(self.constraints, thresholds, strict=True)
        ]
        check_constraints(constraints)
        self.constraints = constraints
        self._observed.clear()
        self._averages, self._num_averaged = torch.zeros_like(self._averages), 0

    def saturated(self) -> list[bool]:
        """Whether each weight is within 2% of a bound of its squashing, or its multiplier at `maximum`."""
        weights, values = self.weights(), self._multipliers
        if self.squash in ("sigmoid", "tanh"):
            low = 0.0 if self.squash == "sigmoid" else -1.0
            margin = _NEAR_BOUND * (1 - low)
            at_bound = (weights > 1 - margin) | (weights < low + margin)
        else:
            at_bound = torch.zeros_like(weights, dtype=torch.bool)
        if self.maximum is not None:
            at_bound |= values.abs() >= self._largest() * (1 - _ROUNDING)
        return at_bound.tolist()

    def _largest(self) -> float:
        assert self.maximum is not None
        return math.log(self.maximum) if self.squash == "exp" else self.maximum

    def _bounded(self, multipliers: torch.Tensor) -> torch.Tensor:
        if self.squash == "none":
            inequality = torch.tensor([constraint.kind != "==" for constraint in self.constraints])
            multipliers = torch.where(inequality, multipliers.clamp_min(0.0), multipliers)
        if self.maximum is None:
            return multipliers
        if self.squash == "exp":
            return multipliers.clamp(max=self._largest())
        return multipliers.clamp(-self.maximum, self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "values": self._multipliers.tolist(),
            "momentum_buffer": self._momentum_buffer.tolist(),
            "violation": self._violation.tolist(),
            "change": self._change.tolist(),
            "observed": list(self._observed),
            "averages": self._averages.tolist(),
            "num_averaged": self._num_averaged,
            "num_updates": self._num_updates,
            "thresholds": [constraint.threshold for constraint in self.constraints],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`], of as many constraints."""
        if len(state["values"]) != len(self.constraints):
            raise ValueError(
                f"The saved state has {len(state['values'])} multipliers and this run {len(self.constraints)} "
                "constraints. Resume with the constraints of the saved run."
            )
        if None not in state["thresholds"]:
            self.set_thresholds(state["thresholds"])
        self._multipliers, self._momentum_buffer, self._violation, self._change, self._averages = (
            torch.tensor(state[name], dtype=torch.float64)
            for name in ("values", "momentum_buffer", "violation", "change", "averages")
        )
        self._observed = deque(state["observed"], maxlen=self.window)
        self._num_averaged, self._num_updates = state["num_averaged"], state["num_updates"]


def check_constraints(constraints: Sequence[Constraint]) -> None:
    """Refuses an empty list, and constraints on one reward that no policy can meet together."""
    if not constraints:
        raise ValueError("`constraints` is empty. Give at least one, or use `method='ppo'`.")
    for reward in {constraint.reward for constraint in constraints}:
        own = [constraint for constraint in constraints if constraint.reward == reward]
        stated = [(c.threshold, c.kind) for c in own if c.threshold is not None]
        lowest = max((threshold for threshold, kind in stated if kind in (">=", "==")), default=-math.inf)
        highest = min((threshold for threshold, kind in stated if kind in ("<=", "==")), default=math.inf)
        if lowest > highest:
            listed = " and ".join(f"{kind} {threshold}" for threshold, kind in stated)
            raise ValueError(
                f"The constraints on reward {reward!r} contradict each other: {listed}. Remove one of them."
            )


def constraints_by_reward(constraints: Sequence[Constraint]) -> dict[str, list[Constraint]]:
    """The constraints of each reward, by its name; a range has two."""
    grouped: dict[str, list[Constraint]] = {}
    for constraint in constraints:
        grouped.setdefault(str(constraint.reward), []).append(constraint)
    return grouped
