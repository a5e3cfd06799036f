"""Lagrange multipliers of reward constraints (https://huggingface.co/papers/2310.04373, section 4).

    buf <- momentum buf + violation,    l <- l + lr buf,    w = squash(l + kp violation' + kd change of violation')

[`LagrangeMultipliers.update`] is this dual step and what runs, called by `RolloutController.close_rollout`. Violations
are in units of each signal's spread, and violation' is that of the filtered mean, or, in the paper's form, raw and
unfiltered. A plain form stands in `recipes/experiments/minimal/constrained_ppo.py`;
`tests/constrained_ppo/test_minimal.py` holds the two equal.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from ..core.checks import Range, check_value
from .constraints import Constraint, check_constraints, constraint_keys


Squash = Literal["sigmoid", "tanh", "softplus", "exp", "none"]
# Of the settings that are numbers; users know them with the prefix `multiplier_`
RANGES: dict[str, Range] = {
    "learning_rate": Range(at_least=0),
    "momentum": Range(at_least=0, below=1),
    "proportional": Range(at_least=0),
    "derivative": Range(at_least=0),
    "init": Range(),
    "maximum": Range(above=0, infinite=True, remedy="Give `inf` for no bound."),
    "delay_steps": Range(at_least=0),
    "window": Range(at_least=1),
    "ema": Range(at_least=0, below=1),
    "drift": Range(at_least=0),
}
_PUBLIC = {"maximum": "max"}
# A weight within this share of its squashing's range of a bound counts as saturated: the squashing is flat there
_NEAR_BOUND = 0.02
# Standard deviations between a mean and the prediction of it beyond which the filter does not hold them for noise
_SURPRISE = 3.0
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
# Entries of the saved state that are one number for each constraint, and the attributes they are
_STATE = {
    "values": "multipliers",
    "momentum_buffer": "momentum_buffer",
    "violation": "violation",
    "change": "change",
    "averages": "averages",
    "spreads": "spreads",
    "filtered_means": "filtered_means",
    "filtered_variances": "filtered_variances",
}


class LagrangeMultipliers:
    """
    One multiplier for each constraint, moved by stochastic gradient descent on the dual with momentum.

    `l <- l + lr * buf`, `buf <- momentum * buf + violation`, and the weight is `squash(l + kp * violation' + kd *
    change of violation')`. With `proportional=0` and `derivative=0` this is the paper's integral update, which does
    not settle on a toy problem; the proportional term damps it.

    Violations are in units of [`set_spreads`], so that one set of gains fits rewards of every scale. With `drift`, the
    noise of a batch is kept from the weights: violation' is that of a scalar Kalman filter of the mean, a random walk
    of step `drift` spreads that is observed with the batch's standard error; a mean three standard deviations from the
    prediction is taken for a faster walk and followed at once. The integral takes the mean as observed:
    it averages noise by itself. With `anti_windup`, a multiplier does not move on where its weight is at a bound that
    the step pushes against, so that it acts again as soon as the violation turns.

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
        drift (`float`, *optional*, defaults to `0.0`):
            Step, in spreads, by which a mean is expected to move from update to update; 0 for no filter.
        anti_windup (`bool`, *optional*, defaults to `False`):
            Whether a multiplier waits while its weight is at a bound.
        names (`Sequence[str]`, *optional*):
            Name of each constraint, by which [`state_dict`] keeps its state. Defaults to [`constraint_keys`].

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
        drift: float = 0.0,
        anti_windup: bool = False,
        names: Sequence[str] | None = None,
    ):
        self.constraints = list(constraints)
        check_constraints(self.constraints)
        self.names = list(names or constraint_keys(self.constraints))
        has_equality = any(constraint.direction == "==" for constraint in self.constraints)
        self.squash: str = squash or ("tanh" if has_equality else "sigmoid")
        self.learning_rate, self.momentum = learning_rate, momentum
        self.proportional, self.derivative = proportional, derivative
        self.squash_gradient, self.maximum = squash_gradient, maximum
        self.delay_steps, self.window, self.ema = delay_steps, window, ema
        self.drift, self.anti_windup, self.init = drift, anti_windup, init
        self._check_settings()
        count = len(self.constraints)
        self._signs = torch.tensor([-1.0 if c.direction == "<=" else 1.0 for c in self.constraints]).double()
        self._limits = self._known_limits()
        self._is_inequality = torch.tensor([constraint.direction != "==" for constraint in self.constraints])
        self._spreads = torch.ones(count, dtype=torch.float64)
        self._multipliers = torch.full((count,), float(init), dtype=torch.float64)
        self._momentum_buffer = torch.zeros(count, dtype=torch.float64)
        self._violation = torch.zeros(count, dtype=torch.float64)
        self._change = torch.zeros(count, dtype=torch.float64)
        self._observed: deque[list[float]] = deque(maxlen=window)
        self._averages = torch.zeros(count, dtype=torch.float64)
        self._num_averaged = 0
        self._num_updates = 0
        # Of the filter: the mean of each signal and its variance, negative before the first observation
        self._filtered_means = torch.zeros(count, dtype=torch.float64)
        self._filtered_variances = torch.full((count,), -1.0, dtype=torch.float64)

    def _check_settings(self) -> None:
        hints = {"window": int, "delay_steps": int, "maximum": float | None}
        for name, within in RANGES.items():
            check_value(f"multiplier_{_PUBLIC.get(name, name)}", getattr(self, name), hints.get(name, float), within)
        check_value("multiplier_squash", self.squash, Squash)
        if self.ema and self.window > 1:
            raise ValueError(
                f"`multiplier_ema={self.ema}` excludes `multiplier_window={self.window}` above 1. Leave out one of "
                "them."
            )
        if self.drift and (self.ema or self.window > 1):
            raise ValueError(
                f"`multiplier_drift={self.drift}` filters what `multiplier_ema={self.ema}` or "
                f"`multiplier_window={self.window}` has averaged already. Set `multiplier_drift: 0`, or leave those "
                "out."
            )

    def set_spreads(self, spreads: Sequence[float] | torch.Tensor) -> None:
        """
        Sets the units of violations.

        Args:
            spreads (`Sequence[float]` or `torch.Tensor` of shape `(K,)`):
                Standard deviation of each constraint's signal over responses, positive.
        """
        self._spreads = torch.as_tensor(spreads, dtype=torch.float64).clone()

    def limits(self) -> torch.Tensor:
        """
        What the mean of each constraint's signal is held to, `(K,)`, float64.

        Raises:
            ValueError: If a threshold is open.
        """
        if self._limits is None:
            # Names the constraint that is open
            self._limits = torch.tensor([constraint.limit for constraint in self.constraints], dtype=torch.float64)
        return self._limits

    def _known_limits(self) -> torch.Tensor | None:
        if any(constraint.threshold is None for constraint in self.constraints):
            return None
        return torch.tensor([constraint.limit for constraint in self.constraints], dtype=torch.float64)

    def signed_violations(self, means: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """[`Constraint.violation`] of the mean of each signal, in its own units, `(K,)`, float64."""
        return self._signs * (self.limits() - torch.as_tensor(means, dtype=torch.float64))

    def values(self) -> torch.Tensor:
        """The multipliers before squashing, `(K,)`, float64."""
        return self._multipliers.clone()

    def weights(self) -> torch.Tensor:
        """The effective weight of each reward, `(K,)`, float64."""
        return SQUASHES[self.squash][0](self._bounded(self._damped()))

    def violations(self) -> torch.Tensor:
        """Signed violations at the last update, filtered and in spreads, `(K,)`, float64."""
        return self._violation.clone()

    def update(
        self, means: Sequence[float] | torch.Tensor, standard_errors: Sequence[float] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        One dual step.

        Args:
            means (`Sequence[float]` or `torch.Tensor` of shape `(K,)`):
                Mean of each constraint's signal over the episodes of a rollout, over all processes, so that every
                process takes the same step.
            standard_errors (`Sequence[float]` or `torch.Tensor` of shape `(K,)`, *optional*):
                Standard errors of the means, for the filter. Without them nothing is filtered.

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
        averages = torch.tensor(self._averaged(observed), dtype=torch.float64)
        seen = self.signed_violations(averages) / self._spreads
        violation = self.signed_violations(self._filtered(averages, standard_errors)) / self._spreads
        self._change = violation - self._violation if self._num_updates else torch.zeros_like(violation)
        self._violation = violation
        self._num_updates += 1
        if self._num_updates > self.delay_steps:
            slope = SQUASHES[self.squash][1](self._multipliers) if self.squash_gradient else torch.ones_like(violation)
            buffer = self.momentum * self._momentum_buffer + slope * seen
            self._momentum_buffer = self._without_windup(buffer) if self.anti_windup else buffer
            self._multipliers = self._bounded(self._multipliers + self.learning_rate * self._momentum_buffer)
        return self.weights()

    def _averaged(self, observed: list[float]) -> list[float]:
        self._observed.append(observed)
        if not self.ema:
            return torch.tensor(list(self._observed), dtype=torch.float64).mean(dim=0).tolist()
        self._num_averaged += 1
        self._averages = self.ema * self._averages + (1 - self.ema) * torch.tensor(observed, dtype=torch.float64)
        return (self._averages / (1 - self.ema**self._num_averaged)).tolist()

    def _filtered(self, means: torch.Tensor, standard_errors: Sequence[float] | torch.Tensor | None) -> torch.Tensor:
        """A scalar Kalman filter of each mean, with random walks of `drift` spreads an update."""
        if not self.drift or standard_errors is None:
            return means
        noise = torch.as_tensor(standard_errors, dtype=torch.float64).square()
        predicted = self._filtered_variances + (self.drift * self._spreads).square()
        is_first = self._filtered_variances < 0
        innovation = means - self._filtered_means
        # A policy that moves faster than `drift` shows by what noise does not explain: it is then as fast as it looks
        surprising = innovation.square() > _SURPRISE**2 * (predicted + noise)
        predicted = torch.where(surprising, innovation.square() - noise, predicted)
        gain = torch.where(is_first, 1.0, predicted / (predicted + noise))
        self._filtered_means = self._filtered_means + gain * innovation
        self._filtered_variances = torch.where(is_first, noise, (1 - gain) * predicted)
        return self._filtered_means

    def _damped(self) -> torch.Tensor:
        return self._multipliers + self.proportional * self._violation + self.derivative * self._change

    def _without_windup(self, buffer: torch.Tensor) -> torch.Tensor:
        """No step where it would push a weight further past a bound."""
        damped, (low, high) = self._damped(), self._range()
        return torch.where(((damped >= high) & (buffer > 0)) | ((damped <= low) & (buffer < 0)), 0.0, buffer)

    def _range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Arguments of the squashing, `(K,)` each, beyond which the weight hardly moves."""
        low, high = -math.inf, math.inf
        if self.squash == "sigmoid":
            high = math.log(1 / _NEAR_BOUND - 1)
            low = -high
        elif self.squash == "tanh":
            high = math.atanh(1 - 2 * _NEAR_BOUND)
            low = -high
        elif self.squash in ("softplus", "exp"):
            low = math.log(_NEAR_BOUND)
        if self.maximum is not None:
            high = min(high, self._largest())
            # The multiplier of an inequality without squashing is projected to zero, which is no windup
            low = max(low, -self.maximum) if self.squash != "exp" else low
        return torch.full_like(self._multipliers, low), torch.full_like(self._multipliers, high)

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
        # The filter keeps the mean of a reward, and forgets that of a signal which the threshold defines
        changed = torch.tensor(
            [new.is_derived and new != old for new, old in zip(constraints, self.constraints, strict=True)]
        )
        self._filtered_variances = torch.where(changed, -1.0, self._filtered_variances)
        self.constraints = constraints
        self._limits = self._known_limits()
        self._observed.clear()
        self._averages, self._num_averaged = torch.zeros_like(self._averages), 0

    def saturated(self) -> list[bool]:
        """Whether each weight is within 2% of a bound of its squashing, or it or its multiplier at `maximum`."""
        weights, values = self.weights(), self._multipliers
        if self.squash in ("sigmoid", "tanh"):
            low = 0.0 if self.squash == "sigmoid" else -1.0
            margin = _NEAR_BOUND * (1 - low)
            at_bound = (weights > 1 - margin) | (weights < low + margin)
        else:
            at_bound = torch.zeros_like(weights, dtype=torch.bool)
        if self.maximum is not None:
            largest = self._largest() * (1 - _ROUNDING)
            for reached in (values, self._bounded(self._damped())):
                at_bound |= (reached if self.squash == "exp" else reached.abs()) >= largest
        return at_bound.tolist()

    def exhausted(self) -> list[bool]:
        """Whether each weight is at the bound that its violation pushes it to: the most that it can do."""
        damped, (low, high) = self._damped(), self._range()
        pushed = ((self._violation > 0) & (damped >= high)) | (
            (self._violation < 0) & (damped <= low) & ~self._is_inequality
        )
        return pushed.tolist()

    def _largest(self) -> float:
        assert self.maximum is not None
        return math.log(self.maximum) if self.squash == "exp" else self.maximum

    def _bounded(self, multipliers: torch.Tensor) -> torch.Tensor:
        if self.squash == "none":
            multipliers = torch.where(self._is_inequality, multipliers.clamp_min(0.0), multipliers)
        if self.maximum is None:
            return multipliers
        if self.squash == "exp":
            return multipliers.clamp(max=self._largest())
        return multipliers.clamp(-self.maximum, self.maximum)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; each list in the order of `names`."""
        return {
            "names": self.names,
            **{name: getattr(self, f"_{attribute}").tolist() for name, attribute in _STATE.items()},
            "observed": list(self._observed),
            "num_averaged": self._num_averaged,
            "num_updates": self._num_updates,
            "thresholds": [constraint.threshold for constraint in self.constraints],
            "drift": self.drift,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restores [`state_dict`], of the same constraints in any order.

        Raises:
            ValueError: If the constraints are others, or the state is of raw violations and this run's are filtered.
        """
        count = len(self.constraints)
        if len(state["values"]) != count:
            raise ValueError(
                f"The saved state has {len(state['values'])} multipliers and this run {count} constraints. Resume "
                "with the constraints of the saved run."
            )
        names = state.get("names", self.names)
        if sorted(names) != sorted(self.names):
            raise ValueError(
                f"The saved state has multipliers of {names} and this run of {self.names}. Resume with the "
                "constraints of the saved run."
            )
        if "names" not in state and self.drift:
            raise ValueError(
                "The saved state is of an earlier version, whose multipliers were in the rewards' raw units and not "
                "filtered. Resume with `method` 'mu-paper', 'xi-paper' or 'all-paper', or with "
                "`multiplier_units: raw, multiplier_drift: 0, multiplier_anti_windup: false` and that run's gains."
            )
        order = [names.index(name) for name in self.names]
        thresholds = [state["thresholds"][index] for index in order]
        if None not in thresholds:
            self.set_thresholds(thresholds)
        for name, attribute in _STATE.items():
            if name in state:
                found = torch.tensor(state[name], dtype=torch.float64)[order]
                setattr(self, f"_{attribute}", found)
        observed = [[row[index] for index in order] for row in state["observed"]]
        self._observed = deque(observed, maxlen=self.window)
        self._num_averaged, self._num_updates = state["num_averaged"], state["num_updates"]
