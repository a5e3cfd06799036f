"""What adapts from rollout to rollout beside the policy: multipliers, the KL coefficient, statistics and stopping."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from .advantages import Reduce, policy_advantages, squared_distance_rewards
from .constrained_ppo_config import ConstrainedPPOConfig
from .iterates import IterateStatistics
from .kl_controller import adapted_coefficient
from .lagrangian import Constraint, LagrangeMultipliers
from .rollout_metrics import Metrics, record_violations
from .stopping import StoppingRules


class RolloutController:
    """
    Holds the state of the dual problem and what else changes once for each rollout.

    Args:
        args ([`ConstrainedPPOConfig`]):
            Configuration.
        reward_names (`Sequence[str]`):
            Names of the rewards.

    Attributes:
        constrained (`list[int]`): Index of the reward of each constraint.
        targets (`list[Constraint]`): Constraints; their thresholds are open until they are calibrated.
        multipliers ([`LagrangeMultipliers`] or `None`): Multipliers, where constraints act through them.
        statistics ([`IterateStatistics`]): Averages over the iterates.
        stopping ([`StoppingRules`]): When the run ends.
        kl_coef (`float`): Coefficient of the KL as it is now.

    Raises:
        ValueError: If a constraint names no reward.
    """

    def __init__(self, args: ConstrainedPPOConfig, reward_names: Sequence[str]):
        self.args, self.reward_names = args, list(reward_names)
        self.targets = args.parsed_constraints()
        self.constrained = [self._reward_index(target) for target in self.targets]
        self.multipliers = self._build_multipliers() if args.learns_multipliers else None
        self.statistics = IterateStatistics()
        self.stopping = StoppingRules(args.kl_ceiling, args.gold_patience)
        self.kl_coef = args.kl_coef

    def _reward_index(self, constraint: Constraint) -> int:
        names, reward = self.reward_names, constraint.reward
        if reward not in (names if isinstance(reward, str) else range(len(names))):
            raise ValueError(
                f"The constraint on {reward!r} names no reward. The rewards are {dict(enumerate(names))}: use a "
                f"name or "
                "an index."
            )
        return names.index(reward) if isinstance(reward, str) else reward

    def _build_multipliers(self) -> LagrangeMultipliers:
        args = self.args
        return LagrangeMultipliers(
            self.targets,
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

    def set_targets(self, targets: Sequence[Constraint]) -> None:
        """
        Sets the constraints with their thresholds as values.

        Args:
            targets (`Sequence[Constraint]`):
                One for each constraint, in their order.
        """
        self.targets = list(targets)
        if self.multipliers is not None:
            self.multipliers.set_thresholds([float(cast(float, target.threshold)) for target in targets])

    def trained_rewards(self, rewards: torch.Tensor) -> torch.Tensor:
        """
        What the policy is trained on in place of the rewards: for `"sat"` the distance to the thresholds.

        Args:
            rewards (`torch.Tensor` of shape `(N, K)`):
                Rewards of a rollout, of all processes.

        Returns:
            `torch.Tensor` of shape `(N, K)`.
        """
        if self.args.method != "sat":
            return rewards
        thresholds = rewards.new_tensor([float(cast(float, target.threshold)) for target in self.targets])
        own = rewards[:, self.constrained]
        means = own.mean(dim=0) if self.args.sat_target == "batch_mean" else None
        rewards = rewards.clone()
        rewards[:, self.constrained] = squared_distance_rewards(own, thresholds, means)
        return rewards

    def policy_advantages(
        self, advantages: torch.Tensor, mask: torch.Tensor, reward_weights: torch.Tensor, reduce: Reduce
    ) -> torch.Tensor:
        """[`policy_advantages`] with the settings of the run and the multipliers as they are now."""
        kinds = [constraint.kind for constraint in self.targets]
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
        self, metrics: Metrics, means: dict[str, float], divergences: tuple[float, float] | None, training: bool
    ) -> str | None:
        """
        Takes the dual step of a training rollout and adapts the KL coefficient; records both, and for an evaluation
        batch the violations.

        Args:
            metrics (`dict[str, list[float]]`):
                Metrics of the mode, added to.
            means (`dict[str, float]`):
                Mean of each reward over the episodes of all processes.
            divergences (`tuple[float, float]`, *optional*):
                KL for each token and for each response, in nats, where there is a reference.
            training (`bool`):
                Whether this is a rollout that is trained on.

        Returns:
            `str` or `None`: why the run is to end.
        """
        reason = self._take_divergences(metrics, divergences, training) if divergences is not None else None
        violations: dict[str, float] = {}
        names = self.constrained_names()
        if self.multipliers is not None:
            observed = [means[name] for name in names]
            if training and self.args.multiplier_update == "rollout":
                self.multipliers.update(observed)
            violations = {
                name: constraint.violation(means[name])
                for name, constraint in zip(names, self.multipliers.constraints, strict=True)
            }
        if training:
            values = means if divergences is None else {**means, "kl": divergences[1]}
            self.statistics.add(values, violations)
            for name, average in self.statistics.averages().items():
                metrics[f"average/{name}"].append(average)
        if self.multipliers is not None:
            record_violations(metrics, names, self.multipliers, observed, self.statistics if training else None)
            if training and self.args.mixing == "paper":
                weights = self.multipliers.weights()
                metrics["weight/objective"].append(len(weights) - float(weights.sum()))
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

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the multipliers, which have a file of their own."""
        return {
            "kl_coef": self.kl_coef,
            "thresholds": [target.threshold for target in self.targets],
            "statistics": self.statistics.state_dict(),
            "stopping": self.stopping.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Restores [`state_dict`].

        Raises:
            ValueError: If it is of another number of constraints.
        """
        thresholds = state["thresholds"]
        if len(thresholds) != len(self.targets):
            raise ValueError(
                f"The saved state has {len(thresholds)} constraints and this run {len(self.targets)}. Resume with the "
                "constraints of the saved run."
            )
        self.targets = [
            target if threshold is None else target.with_threshold(threshold)
            for target, threshold in zip(self.targets, thresholds, strict=True)
        ]
        self.kl_coef = state["kl_coef"]
        self.statistics.load_state_dict(state["statistics"])
        self.stopping.load_state_dict(state["stopping"])
