"""What adapts once a rollout beside the policy: multipliers, the KL coefficient, averages, and whether to go on.

    coefficient <- coefficient * (1 + step * clip((KL - target) / target, -0.2, 0.2))        (appendix B)

of https://huggingface.co/papers/2310.04373 is [`adapted_coefficient`], which runs in
[`RolloutController.close_rollout`]; `tests/constrained_ppo/test_adaptation.py` holds it against numbers by hand.
"""

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from .advantages import Reduce, policy_advantages, squared_distance_rewards
from .constrained_ppo_config import ConstrainedPPOConfig
from .multipliers import Constraint, LagrangeMultipliers


Metrics = dict[str, list[float]]
# Largest relative error of the KL that one step of the coefficient answers to (appendix B)
_CLIP = 0.2
# A threshold nearer to zero than this makes a relative violation meaningless; it keeps the division finite
_SMALLEST_THRESHOLD = 1e-8


def adapted_coefficient(coefficient: float, divergence: float, target: float, step: float) -> float:
    """The coefficient after a rollout whose KL for each token was `divergence`, in nats; `step` lies in (0, 1)."""
    error = (divergence - target) / target
    return coefficient * (1 + step * max(-_CLIP, min(_CLIP, error)))


def mean_divergences(divergence: torch.Tensor, mask: torch.Tensor, gather: Callable) -> tuple[float, float]:
    """Means of the KL `divergence` `(B, T)`, in nats: for each token and for each response, over all processes."""
    rows = mask.new_tensor(len(mask)).float()
    sums = torch.stack([(divergence * mask).sum().float(), mask.sum().float(), rows])
    total, tokens, responses = gather(sums.unsqueeze(0)).sum(dim=0).tolist()
    return total / max(tokens, 1.0), total / responses


class RolloutAverages:
    """
    Running means over all rollouts, of which the theory of the saddle point speaks, and how often violations turned
    their sign over the last `window`.
    """

    def __init__(self, window: int = 20):
        self._sums: dict[str, float] = {}
        self._count = 0
        self._violations: dict[str, deque[float]] = {}
        self._window = window

    def add(self, means: Mapping[str, float], violations: Mapping[str, float]) -> None:
        """Takes in one rollout: its means, such as those of the rewards, and the signed violations, by name."""
        self._count += 1
        for name, mean in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean
        for name, violation in violations.items():
            self._violations.setdefault(name, deque(maxlen=self._window)).append(violation)

    def averages(self) -> dict[str, float]:
        """Average of each mean over all rollouts."""
        return {name: total / self._count for name, total in self._sums.items()}

    def oscillation(self, name: str) -> float:
        """Share of the last rollouts at which the violation had turned its sign, in `[0, 1]`."""
        pairs = list(itertools.pairwise(self._violations.get(name, ())))
        return sum(before * after < 0 for before, after in pairs) / len(pairs) if pairs else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        violations = {name: list(values) for name, values in self._violations.items()}
        return {"sums": self._sums, "count": self._count, "violations": violations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        self._sums, self._count = dict(state["sums"]), state["count"]
        self._violations = {name: deque(values, maxlen=self._window) for name, values in state["violations"].items()}


class NonFiniteLossError(ArithmeticError):
    """The loss is NaN or infinite; raised before any parameter moves."""


class StoppingRules:
    """Ends a run on too large a divergence, or after `gold_patience` evaluations without a better gold metric."""

    def __init__(self, kl_ceiling: float | None = None, gold_patience: int | None = None):
        self.kl_ceiling, self.gold_patience = kl_ceiling, gold_patience
        self.best_gold = -math.inf
        self.evaluations_since_best = 0
        self.num_gold_evaluations = 0

    def check_divergence(self, divergence: float) -> str | None:
        """Why to end after a rollout with this mean KL of a response, in nats; `None` to go on."""
        if self.kl_ceiling is None or divergence <= self.kl_ceiling:
            return None
        return (
            f"The KL of a response from the reference is {divergence:.3g} nats, above "
            f"`kl_ceiling={self.kl_ceiling:g}`."
        )

    def check_gold(self, gold: float) -> str | None:
        """Why to end after an evaluation with this gold metric, higher is better; `None` to go on."""
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


class RolloutController:
    """Holds the state of the dual problem and what else changes once for each rollout."""

    def __init__(self, args: ConstrainedPPOConfig, reward_names: Sequence[str]):
        self.args, self.reward_names = args, list(reward_names)
        # Their thresholds are open until they are calibrated
        self.constraints = args.parsed_constraints()
        # Index of the reward of each constraint
        self.constrained = [self._reward_index(constraint) for constraint in self.constraints]
        self.multipliers = self._build_multipliers() if args.learns_multipliers else None
        self.statistics = RolloutAverages()
        self.stopping = StoppingRules(args.kl_ceiling, args.gold_patience)
        self.kl_coef = args.kl_coef

    def _reward_index(self, constraint: Constraint) -> int:
        names, reward = self.reward_names, constraint.reward
        if reward not in (names if isinstance(reward, str) else range(len(names))):
            raise ValueError(
                f"The constraint on {reward!r} names no reward. The rewards are {dict(enumerate(names))}: use a name "
                "or an index."
            )
        return names.index(reward) if isinstance(reward, str) else reward

    def _build_multipliers(self) -> LagrangeMultipliers:
        args = self.args
        return LagrangeMultipliers(
            self.constraints,
            squash=args.multiplier_squash,
            learning_rate=args.multiplier_learning_rate,
            momentum=args.multiplier_momentum,
            proportional=args.multiplier_proportional,
            derivative=args.multiplier_derivative,
            squash_gradient=args.multiplier_squash_gradient,
            init=args.multiplier_init,
            maximum=args.multiplier_max,
            delay_steps=args.multiplier_delay_steps,
            window=args.multiplier_window,
            ema=args.multiplier_ema,
        )

    def constrained_names(self) -> list[str]:
        """Name of the reward of each constraint."""
        return [self.reward_names[index] for index in self.constrained]

    def named_constraints(self) -> list[Constraint]:
        """The constraints whose thresholds are known, by name of their reward."""
        constraints = self.constraints if self.multipliers is None else self.multipliers.constraints
        return [
            Constraint(name, constraint.threshold, constraint.kind)
            for name, constraint in zip(self.constrained_names(), constraints, strict=True)
            if constraint.threshold is not None
        ]

    def set_constraints(self, constraints: Sequence[Constraint]) -> None:
        """Sets the constraints with their thresholds as values, in the order of those before."""
        self.constraints = list(constraints)
        if self.multipliers is not None:
            self.multipliers.set_thresholds(self._thresholds())

    def _thresholds(self) -> list[float]:
        return [float(cast(float, constraint.threshold)) for constraint in self.constraints]

    def trained_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """What stands for the rewards `(N, K)` of a rollout in training: for `"sat"` distances to the thresholds."""
        if self.args.method != "sat":
            return rewards
        own = rewards[:, self.constrained]
        means = own.mean(dim=0) if self.args.sat_target == "batch_mean" else None
        rewards = rewards.clone()
        rewards[:, self.constrained] = squared_distance_rewards(own, rewards.new_tensor(self._thresholds()), means)
        return rewards

    def mix(
        self, advantages: torch.Tensor, mask: torch.Tensor, reward_weights: torch.Tensor, reduce: Reduce
    ) -> torch.Tensor:
        """[`policy_advantages`], `(B, T)`, of streams `(K+1, B, T)`, with the multipliers as they are now."""
        kinds = [constraint.kind for constraint in self.constraints]
        return policy_advantages(
            advantages,
            mask,
            reward_weights,
            objective=self.args.objective or "kl",
            constrained=self.constrained,
            signs=torch.tensor([-1.0 if kind == "<=" else 1.0 for kind in kinds]),
            multiplier_weights=self.multipliers.weights() if self.multipliers is not None else None,
            mixing=self.args.mixing or "paper",
            whitening=self.args.whitening or "streams",
            reduce=reduce,
        )

    def close_rollout(
        self,
        metrics: Metrics,
        means: dict[str, float],
        divergences: tuple[float, float] | None,
        training: bool,
        adapts: bool = True,
    ) -> str | None:
        """
        Takes the dual step of a training rollout and adapts the KL coefficient; records both, and for an evaluation
        batch the violations. `means` are those of the rewards over all processes, `divergences` the KL for each token
        and for each response. Without `adapts` it only records. Returns why the run is to end, or `None`.
        """
        reason = None
        if divergences is not None:
            reason = self._take_divergences(metrics, divergences, training and adapts)
        multipliers, names = self.multipliers, self.constrained_names()
        violations: dict[str, float] = {}
        if multipliers is not None:
            if training and adapts and self.args.multiplier_update == "rollout":
                multipliers.update([means[name] for name in names])
            violations = {
                name: constraint.violation(means[name])
                for name, constraint in zip(names, multipliers.constraints, strict=True)
            }
        if training:
            reached = means if divergences is None else {**means, "kl": divergences[1]}
            self.statistics.add(reached, violations)
            for name, average in self.statistics.averages().items():
                metrics[f"average/{name}"].append(average)
        if multipliers is not None:
            self._record_violations(metrics, multipliers, means)
            if training:
                self._record_multipliers(metrics, multipliers)
        return reason

    def _take_divergences(self, metrics: Metrics, divergences: tuple[float, float], training: bool) -> str | None:
        per_token, per_response = divergences
        metrics["kl/per_token"].append(per_token)
        metrics["kl/per_response"].append(per_response)
        metrics["kl/coef"].append(self.kl_coef)
        if not training:
            return None
        if self.args.kl_target is not None:
            self.kl_coef = adapted_coefficient(self.kl_coef, per_token, self.args.kl_target, self.args.kl_step)
        return self.stopping.check_divergence(per_response)

    def _record_violations(
        self, metrics: Metrics, multipliers: LagrangeMultipliers, means: Mapping[str, float]
    ) -> None:
        for name, constraint in zip(self.constrained_names(), multipliers.constraints, strict=True):
            violation = constraint.violation(means[name])
            scale = max(abs(float(constraint.threshold or 0.0)), _SMALLEST_THRESHOLD)
            metrics[f"violation/{name}"].append(violation)
            metrics[f"relative_violation/{name}"].append(violation / scale)

    def _record_multipliers(self, metrics: Metrics, multipliers: LagrangeMultipliers) -> None:
        weights, unsquashed, saturated = multipliers.weights(), multipliers.values(), multipliers.saturated()
        for index, (name, constraint) in enumerate(
            zip(self.constrained_names(), multipliers.constraints, strict=True)
        ):
            metrics[f"multiplier/{name}"].append(float(unsquashed[index]))
            metrics[f"weight/{name}"].append(float(weights[index]))
            metrics[f"saturation/{name}"].append(float(saturated[index]))
            metrics[f"oscillation/{name}"].append(self.statistics.oscillation(name))
            metrics[f"threshold/{name}"].append(float(constraint.threshold or 0.0))
        if self.args.mixing == "paper":
            metrics["weight/objective"].append(len(weights) - float(weights.sum()))

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the multipliers, which have a file of their own."""
        return {
            "kl_coef": self.kl_coef,
            "thresholds": [constraint.threshold for constraint in self.constraints],
            "statistics": self.statistics.state_dict(),
            "stopping": self.stopping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`], of as many constraints."""
        thresholds = state["thresholds"]
        if len(thresholds) != len(self.constraints):
            raise ValueError(
                f"The saved state has {len(thresholds)} constraints and this run {len(self.constraints)}. Resume with "
                "the constraints of the saved run."
            )
        self.constraints = [
            constraint if threshold is None else constraint.with_threshold(threshold)
            for constraint, threshold in zip(self.constraints, thresholds, strict=True)
        ]
        self.kl_coef = state["kl_coef"]
        self.statistics.load_state_dict(state["statistics"])
        self.stopping.load_state_dict(state["stopping"])
