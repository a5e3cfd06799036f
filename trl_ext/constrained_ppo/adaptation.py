"""What adapts once a rollout beside the policy: multipliers, the KL coefficient, averages, and whether to go on.

    coefficient <- coefficient * (1 + step * clip((KL - target) / target, -0.2, 0.2))        (appendix B)

of https://huggingface.co/papers/2310.04373 is [`adapted_coefficient`], which runs in
[`RolloutController.close_rollout`]; `tests/constrained_ppo/test_adaptation.py` holds it against numbers by hand.
"""

import dataclasses
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate.logging import get_logger

from ..core.status import RunError
from .advantages import Reduce, policy_advantages, squared_distance_rewards
from .constrained_ppo_config import ConstrainedPPOConfig
from .constraints import Constraint, constraint_keys, unique_names
from .group_relative import group_advantages, kl_share, mix_groups
from .multipliers import LagrangeMultipliers


Metrics = dict[str, list[float]]
# Largest relative error of the KL that one step of the coefficient answers to (appendix B)
_CLIP = 0.2
# A limit that is smaller than this share of the spread makes a share of it meaningless; the spread takes its place
_SMALL_LIMIT = 0.1
# Spreads by which a violation must have fallen to count as progress: far more than the noise of a batch
_PROGRESS = 0.5
# A spread below this share of the mean's size is rounding: the signal is a constant
_SPREAD_ROUNDING = 1e-6
logger = get_logger(__name__)


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
        self._counts: dict[str, int] = {}
        self._violations: dict[str, deque[float]] = {}
        self._window = window

    def add(self, means: Mapping[str, float], violations: Mapping[str, float]) -> None:
        """Takes in one rollout: its means, such as those of the rewards, and the signed violations, by name."""
        for name, mean in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean
            self._counts[name] = self._counts.get(name, 0) + 1
        for name, violation in violations.items():
            self._violations.setdefault(name, deque(maxlen=self._window)).append(violation)

    def averages(self) -> dict[str, float]:
        """Average of each mean over all rollouts that had it."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def oscillation(self, name: str) -> float:
        """Share of the last rollouts at which the violation had turned its sign, in `[0, 1]`."""
        pairs = list(itertools.pairwise(self._violations.get(name, ())))
        return sum(before * after < 0 for before, after in pairs) / len(pairs) if pairs else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        violations = {name: list(values) for name, values in self._violations.items()}
        return {"sums": self._sums, "counts": self._counts, "violations": violations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]."""
        self._sums = dict(state["sums"])
        # Older checkpoints have one count for all
        self._counts = dict(state["counts"]) if "counts" in state else dict.fromkeys(self._sums, state["count"])
        self._violations = {name: deque(values, maxlen=self._window) for name, values in state["violations"].items()}


class SignalSpreads:
    """
    The spread of each signal over responses: given, or that of the first samples with any, which may then be tracked.

    Args:
        names (`Sequence[str]`):
            Name of each signal, by which a checkpoint keeps its spread.
        given (`Sequence[float | None]`):
            Spreads that stay as they are.
        ema (`float`, *optional*, defaults to `0.0`):
            Decay of the exponential moving average of variances over rollouts; 0 keeps the first spread.
    """

    def __init__(self, names: Sequence[str], given: Sequence[float | None], ema: float = 0.0):
        self.names, self.ema = list(names), ema
        self._is_given = torch.tensor([spread is not None for spread in given])
        # 0 where not known yet
        self._spreads = torch.tensor([spread or 0.0 for spread in given], dtype=torch.float64)

    def observe(self, signals: torch.Tensor) -> None:
        """Takes in the signals `(N, S)` of a rollout, or of samples of the policy before training."""
        signals = signals.double().cpu()
        found = signals.std(dim=0, unbiased=False)
        found = torch.where(found > _SPREAD_ROUNDING * signals.mean(dim=0).abs(), found, 0.0)
        is_known = self._spreads > 0
        tracked = (self.ema * self._spreads.square() + (1 - self.ema) * found.square()).sqrt()
        # A rollout without any spread says nothing of the scale
        kept = tracked if self.ema else self._spreads
        updated = torch.where(is_known, torch.where(found > 0, kept, self._spreads), found)
        self._spreads = torch.where(self._is_given, self._spreads, updated)

    def values(self) -> torch.Tensor:
        """The spreads `(S,)`, float64, 1 where none is known yet."""
        return torch.where(self._spreads > 0, self._spreads, 1.0)

    def state_dict(self) -> dict[str, float]:
        """All that a resumed run needs, by name; 0 where not known."""
        return dict(zip(self.names, self._spreads.tolist(), strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]; a signal that it lacks, and one whose spread is given, keep their own."""
        current = self.state_dict()
        found = torch.tensor([state.get(name, current[name]) for name in self.names], dtype=torch.float64)
        self._spreads = torch.where(self._is_given, self._spreads, found)


def standard_errors(signals: torch.Tensor, spreads: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
    """
    Standard errors of the means of a rollout's signals, `(S,)`, float64.

    Responses to one prompt are not independent, so the deviation is that of the means of prompts and their number is
    what counts. A rollout may by chance show no spread at all: half of `spreads` is the least deviation.

    Args:
        signals (`torch.Tensor` of shape `(N, S)`):
            Signals of all responses, those of one prompt next to each other.
        spreads (`torch.Tensor` of shape `(S,)`):
            Standard deviations of the signals over responses.
        num_generations (`int`, *optional*, defaults to `1`):
            Responses of each prompt.

    Returns:
        `torch.Tensor`
    """
    means = signals.double().cpu().view(-1, num_generations, signals.size(1)).mean(dim=1)
    least = 0.5 * spreads / num_generations**0.5
    return torch.maximum(means.std(dim=0, unbiased=False), least) / len(means) ** 0.5


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


class FeasibilityWatch:
    """
    Names a constraint that stays violated while its weight is at its bound, once each time that begins. While the
    violation still falls, the policy is on its way.
    """

    def __init__(self, patience: int = 20):
        self.patience = patience
        self._counts: dict[str, int] = {}
        # The violation that progress is measured from
        self._least: dict[str, float] = {}

    def check(self, key: str, is_exhausted: bool, violation: float = 0.0) -> bool:
        """
        Whether to name a constraint after a rollout at which its weight was exhausted, or not, and the size of its
        violation was `violation`, in spreads.
        """
        count = self._counts.get(key, 0) + 1 if is_exhausted else 0
        if count == 1 or (count and violation < self._least.get(key, math.inf) - _PROGRESS):
            count, self._least[key] = 1, violation
        self._counts[key] = count
        return count == self.patience

    def message(self, constraint: Constraint, maximum: float | None = None) -> str:
        """What to say of it."""
        bound = "its bound" if maximum is None else f"its bound (`multiplier_max={maximum:g}`)"
        return (
            f"The constraint `{constraint.reward} {constraint}` has been violated for {self.patience} rollouts with "
            f"its weight at {bound} and comes no nearer: it may be infeasible, alone or beside the other "
            "constraints. Move its threshold towards the mean, or raise the bound or lower `kl_coef` if the policy "
            "should go further."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"counts": dict(self._counts), "least": dict(self._least)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]; that of an earlier version is the counts alone."""
        is_new = set(state) == {"counts", "least"}
        self._counts, self._least = (dict(state["counts"]), dict(state["least"])) if is_new else (dict(state), {})


class RolloutController:
    """
    Holds the state of the dual problem and what else changes once for each rollout.

    Attributes:
        reward_names (`list[str]`): Names of the rewards, told apart by a number where functions share one.
        stream_names (`list[str]`): The rewards, then the constraints whose signal is not the reward itself: what the
            critic and the advantages have a stream for, beside the KL.
        constraints (`list[Constraint]`): The constraints; thresholds may be open until they are calibrated.
        keys (`list[str]`): Name of each constraint in logs and checkpoints.
        constrained (`list[int]`): Index of the reward of each constraint.
        multipliers ([`LagrangeMultipliers`] or `None`): `None` where no constraint acts through one.
        spreads ([`SignalSpreads`]): Spread of each stream.
    """

    def __init__(self, args: ConstrainedPPOConfig, reward_names: Sequence[str]):
        self.args, self.reward_names = args, unique_names(reward_names)
        self._ambiguous = {name for name, count in Counter(reward_names).items() if count > 1}
        self.constraints = args.parsed_constraints()
        self.constrained = [self._reward_index(constraint) for constraint in self.constraints]
        self._signs = torch.tensor([-1.0 if one.direction == "<=" else 1.0 for one in self.constraints])
        self.multipliers: LagrangeMultipliers | None = None
        self.keys = constraint_keys(self._named())
        derived = [index for index, constraint in enumerate(self.constraints) if constraint.is_derived]
        if derived and not args.learns_multipliers:
            raise ValueError(
                f"The constraint {args.constraints[derived[0]]} acts through a multiplier, which `method="
                f"{args.method!r}` does not have. Use 'mu', 'xi' or 'all', or constrain the mean."
            )
        # Where a constraint bounds the mean of another signal than the reward, that has a stream of its own
        self._derived = derived
        self.stream_names = unique_names([*self.reward_names, *(f"{self.keys[index]}.signal" for index in derived)])
        self._streams = [
            len(self.reward_names) + derived.index(index) if constraint.is_derived else self.constrained[index]
            for index, constraint in enumerate(self.constraints)
        ]
        if args.learns_multipliers:
            self.multipliers = self._build_multipliers()
        self.spreads = SignalSpreads(self.stream_names, self._given_spreads(), args.multiplier_spread_ema)
        self.statistics = RolloutAverages()
        self.stopping = StoppingRules(args.kl_ceiling, args.gold_patience)
        self.feasibility = FeasibilityWatch()
        self.kl_coef = args.kl_coef

    def _reward_index(self, constraint: Constraint) -> int:
        names, reward = self.reward_names, constraint.reward
        if reward not in (names if isinstance(reward, str) else range(len(names))):
            raise ValueError(
                f"The constraint on {reward!r} names no reward. The rewards are {dict(enumerate(names))}: use a name "
                "or an index."
            )
        if reward in self._ambiguous:
            raise ValueError(
                f"The constraint on {reward!r} names several rewards. They are {dict(enumerate(names))}: use an "
                "index, or give the reward functions `__name__`s of their own."
            )
        return names.index(reward) if isinstance(reward, str) else reward

    def _given_spreads(self) -> list[float | None]:
        given: list[float | None] = [None] * len(self.stream_names)
        for index, constraint in zip(self._streams, self.constraints, strict=True):
            given[index] = given[index] or constraint.known_spread
        return given

    def _build_multipliers(self) -> LagrangeMultipliers:
        args = self.args
        settings: dict[str, Any] = {
            "maximum": args.multiplier_max,
            "init": args.multiplier_init,
            "ema": args.multiplier_ema,
        }
        for name in (
            "squash", "learning_rate", "momentum", "proportional", "derivative", "squash_gradient", "delay_steps",
            "window", "drift", "anti_windup",
        ):  # fmt: skip
            settings[name] = getattr(args, f"multiplier_{name}")
        if args.multiplier_max == math.inf:
            settings["maximum"] = None
        return LagrangeMultipliers(self.constraints, names=self.keys, **settings)

    def constrained_names(self) -> list[str]:
        """Name of the reward of each constraint."""
        return [self.reward_names[index] for index in self.constrained]

    def named_constraints(self) -> list[Constraint]:
        """The constraints whose thresholds are known, by name of their reward."""
        return [constraint for constraint in self._named() if constraint.threshold is not None]

    def _named(self) -> list[Constraint]:
        return [
            dataclasses.replace(constraint, reward=name)
            for name, constraint in zip(self.constrained_names(), self._current(), strict=True)
        ]

    def _current(self) -> list[Constraint]:
        """The constraints with their thresholds of now, which a search moves in the multipliers."""
        return self.constraints if self.multipliers is None else self.multipliers.constraints

    def set_constraints(self, constraints: Sequence[Constraint]) -> None:
        """Sets the constraints with their thresholds as values, in the order of those before."""
        self.constraints = list(constraints)
        if self.multipliers is not None:
            self.multipliers.set_thresholds(self._thresholds())

    def stated_constraints(self) -> dict[str, dict[str, Any]]:
        """The constraints as the configuration states them, by name, with the name of their reward."""
        parsed = self.args.parsed_constraints()
        return {
            key: {**dataclasses.asdict(constraint), "reward": name}
            for key, constraint, name in zip(self.keys, parsed, self.constrained_names(), strict=True)
        }

    def restate_thresholds(self, keys: Sequence[str]) -> None:
        """
        Sets constraints, by name, to what the configuration states, in place of what a checkpoint has restored. One
        that is stated relative to the policy before training is refused: that policy is gone.
        """
        if not keys:
            return
        constraints = list(self.constraints)
        for index, (key, stated) in enumerate(zip(self.keys, self.args.parsed_constraints(), strict=True)):
            if key in keys and stated.threshold is None:
                raise RunError(
                    f"The constraint {key!r} is stated relative to the policy before training, and otherwise than in "
                    "the checkpoint. Give its `threshold` as a number, or leave it as it was."
                )
            if key in keys:
                constraints[index] = stated
        self.set_constraints(constraints)

    def _thresholds(self) -> list[float]:
        return [float(cast(float, constraint.threshold)) for constraint in self.constraints]

    def signals(self, rewards: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
        """Rewards `(N, K)` and, behind them, the signals of constraints that need one of their own, `(N, S)`."""
        if not self._derived:
            return rewards
        constraints = self._current()
        own = [
            constraints[index].signal(rewards[:, self.constrained[index]], num_generations) for index in self._derived
        ]
        return torch.cat([rewards, torch.stack(own, dim=1)], dim=1)

    def calibrate_spreads(self, rewards: torch.Tensor, num_generations: int = 1) -> None:
        """Takes the spreads from rewards `(N, K)` of the policy before training."""
        self.spreads.observe(self._spread_signals(rewards, num_generations))

    def _spread_signals(self, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
        """As [`signals`], but a hinge, which is mostly 0, is measured in the spread of its reward."""
        signals = self.signals(rewards, num_generations).clone()
        for stream, index in enumerate(self._derived, start=len(self.reward_names)):
            signals[:, stream] = rewards[:, self.constrained[index]]
        return signals

    def trained_rewards(self, rewards: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
        """
        What stands for the rewards `(N, K)` of a rollout in training, `(N, S)`: [`signals`], and for `"sat"` distances
        to the thresholds.
        """
        if self.args.method != "sat":
            return self.signals(rewards, num_generations)
        own = rewards[:, self.constrained]
        means = own.mean(dim=0) if self.args.sat_target == "batch_mean" else None
        rewards = rewards.clone()
        rewards[:, self.constrained] = squared_distance_rewards(own, rewards.new_tensor(self._thresholds()), means)
        return rewards

    def directions(self, reward_weights: torch.Tensor) -> torch.Tensor:
        """
        Of the streams `(S,)` that training sees, given the rewards' weights `(K,)`: 1 where more is better, -1 where
        less is, 0 for signals that only a constraint reads.
        """
        directions = torch.ones_like(reward_weights)
        if self.args.method != "sat":
            bounded = dict.fromkeys(self._streams, True)
            for stream, sign in zip(self._streams, self._signs.tolist(), strict=True):
                bounded[stream] &= sign < 0
            from_above = [stream for stream, is_above in bounded.items() if is_above and stream < len(directions)]
            directions[from_above] = -1.0
            weighed = reward_weights if self.args.objective != "kl" else torch.zeros_like(reward_weights)
            directions = torch.where(weighed != 0, weighed.sign(), directions)
        return torch.cat([directions, directions.new_zeros(len(self._derived))])

    def mix(
        self, advantages: torch.Tensor, mask: torch.Tensor, reward_weights: torch.Tensor, reduce: Reduce
    ) -> torch.Tensor:
        """[`policy_advantages`], `(B, T)`, of streams `(S+1, B, T)`, with the multipliers as they are now."""
        return policy_advantages(
            advantages,
            mask,
            torch.cat([reward_weights, reward_weights.new_zeros(len(self._derived))]),
            objective=self.args.objective or "kl",
            constrained=self._streams,
            signs=self._signs,
            multiplier_weights=self.multipliers.weights() if self.multipliers is not None else None,
            mixing=self.args.mixing or "normalized",
            whitening=self.args.whitening or "spread",
            reduce=reduce,
            # Scores are in units of their spread already
            spreads=None if self.args.use_score_scaling else self.spreads.values(),
        )

    def group_streams(self, signals: torch.Tensor, num_generations: int) -> torch.Tensor:
        """
        Advantages `(N, C)` of the constraints without a critic, from trained signals `(N, S)`: relative to the group,
        scaled as `whitening` says, with the sign turned for an upper bound.
        """
        args, scale = self.args, "none"
        if args.whitening == "streams":
            scale = args.scale_rewards if args.multi_objective_aggregation == "sum_then_normalize" else "group"
        streams = group_advantages(signals[:, self._streams], num_generations, scale)
        if args.whitening == "spread":
            streams = streams / self.spreads.values()[self._streams].to(streams)
        signs = [-1.0 if constraint.direction == "<=" else 1.0 for constraint in self.constraints]
        return streams * streams.new_tensor(signs)

    def mix_groups(self, objective: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
        """
        Advantages `(N,)` without a critic, from those of the objective `(N,)` and [`group_streams`] `(N, C)`, with the
        multipliers as they are now.
        """
        if self.multipliers is None:
            return objective
        mixed = mix_groups(objective, streams, self.multipliers.weights(), self.args.mixing or "normalized")
        if self.args.whitening != "mixture":
            return mixed
        return group_advantages(mixed.unsqueeze(1), len(mixed), "group").squeeze(1)

    def kl_loss_coef(self) -> float:
        """The coefficient of the KL in the loss without a critic, with `kl_coef` and the multipliers as they are."""
        if self.multipliers is None:
            return self.kl_coef
        weights, mixing = self.multipliers.weights(), self.args.mixing or "normalized"
        return self.kl_coef * kl_share(weights, mixing, self.args.objective or "kl")

    def close_rollout(
        self,
        metrics: Metrics,
        rewards: torch.Tensor,
        divergences: tuple[float, float] | None,
        training: bool,
        num_generations: int = 1,
        adapts: bool = True,
    ) -> str | None:
        """
        Takes the dual step of a training rollout and adapts the KL coefficient; records both, and for an evaluation
        batch the violations. `rewards` `(N, K)` are those of all processes, `divergences` the KL for each token and
        for each response. Without `adapts` it only records. Returns why the run is to end, or `None`.
        """
        reason = None
        if divergences is not None:
            reason = self.take_divergences(metrics, divergences, training and adapts)
        signals = self.signals(rewards, num_generations)
        if training:
            self.spreads.observe(self._spread_signals(rewards, num_generations))
        means = signals.mean(dim=0)[self._streams].tolist()
        if self.multipliers is not None and training and adapts and self.args.multiplier_update == "rollout":
            errors = standard_errors(signals, self.spreads.values(), num_generations)[self._streams]
            self.step_multipliers(means, errors)
        violations: dict[str, float] = {}
        if self.multipliers is not None:
            violations = dict(zip(self.keys, self.multipliers.signed_violations(means).tolist(), strict=True))
        if training:
            # Without a critic a reward may say nothing of some completions, or of all
            found = rewards.nanmean(dim=0) if self.args.critic == "none" else rewards.mean(dim=0)
            reached = dict(zip(self.reward_names, found.tolist(), strict=True))
            known = {name: mean for name, mean in reached.items() if math.isfinite(mean)}
            self._add_to_averages(metrics, known, violations)
        if self.multipliers is not None:
            self._record_violations(metrics, self.multipliers, violations)
            if training:
                self._record_multipliers(metrics, self.multipliers)
        return reason

    def step_multipliers(self, means: Sequence[float], errors: torch.Tensor | None = None) -> None:
        """One dual step on the means of the constraints' signals and their standard errors, `(N,)` each."""
        multipliers = cast(LagrangeMultipliers, self.multipliers)
        if self.args.multiplier_units == "spread":
            multipliers.set_spreads(self.constrained_spreads())
        multipliers.update(means, errors)
        sizes = multipliers.violations().abs().tolist()
        for index, is_exhausted in enumerate(multipliers.exhausted()):
            if self.feasibility.check(self.keys[index], is_exhausted, sizes[index]):
                message = self.feasibility.message(self._named()[index], multipliers.maximum)
                logger.warning(message, main_process_only=True)

    def constrained_signals(self, rewards: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
        """What the constraints bound the means of, `(N, C)`, of rewards `(N, K)`."""
        return self.signals(rewards, num_generations)[:, self._streams]

    def constrained_spreads(self) -> torch.Tensor:
        """Spread of each constraint's signal, `(C,)`, float64."""
        return self.spreads.values()[self._streams]

    def _add_to_averages(
        self, metrics: Metrics, means: Mapping[str, float], violations: Mapping[str, float] | None = None
    ) -> None:
        self.statistics.add(means, violations or {})
        averages = self.statistics.averages()
        for name in means:
            metrics[f"average/{name}"].append(averages[name])

    def take_divergences(self, metrics: Metrics, divergences: tuple[float, float], training: bool) -> str | None:
        """
        Records the KL of a rollout, for each token and for each response, and in training adapts the coefficient.
        Returns why the run is to end, or `None`.
        """
        per_token, per_response = divergences
        metrics["kl/per_token"].append(per_token)
        metrics["kl/per_response"].append(per_response)
        metrics["kl/coef"].append(self.kl_coef)
        if not training:
            return None
        self._add_to_averages(metrics, {"kl": per_response})
        if self.args.kl_target is not None:
            self.kl_coef = adapted_coefficient(self.kl_coef, per_token, self.args.kl_target, self.args.kl_step)
        return self.stopping.check_divergence(per_response)

    def _record_violations(
        self, metrics: Metrics, multipliers: LagrangeMultipliers, violations: Mapping[str, float]
    ) -> None:
        limits, spreads = multipliers.limits().abs().tolist(), self.constrained_spreads().tolist()
        for key, limit, spread in zip(self.keys, limits, spreads, strict=True):
            scale = limit if limit > _SMALL_LIMIT * spread else spread
            metrics[f"violation/{key}"].append(violations[key])
            metrics[f"relative_violation/{key}"].append(violations[key] / scale)

    def _record_multipliers(self, metrics: Metrics, multipliers: LagrangeMultipliers) -> None:
        weights, unsquashed, saturated = multipliers.weights(), multipliers.values(), multipliers.saturated()
        filtered, spreads = multipliers.violations(), self.constrained_spreads()
        for index, (key, constraint) in enumerate(zip(self.keys, multipliers.constraints, strict=True)):
            metrics[f"multiplier/{key}"].append(float(unsquashed[index]))
            metrics[f"weight/{key}"].append(float(weights[index]))
            metrics[f"saturation/{key}"].append(float(saturated[index]))
            metrics[f"oscillation/{key}"].append(self.statistics.oscillation(key))
            metrics[f"threshold/{key}"].append(float(constraint.threshold or 0.0))
            metrics[f"spread/{key}"].append(float(spreads[index]))
            metrics[f"filtered_violation/{key}"].append(float(filtered[index]))
        objective = len(weights) - float(weights.sum()) if self.args.mixing == "paper" else 1.0
        scale = 1.0 if self.args.mixing == "paper" else 1.0 + float(weights.abs().sum())
        metrics["weight/objective"].append(objective / scale)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the multipliers, which have a file of their own."""
        return {
            "kl_coef": self.kl_coef,
            "names": self.keys,
            "thresholds": [constraint.threshold for constraint in self.constraints],
            "spreads": self.spreads.state_dict(),
            "statistics": self.statistics.state_dict(),
            "stopping": self.stopping.state_dict(),
            "feasibility": self.feasibility.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`], of as many constraints; that of an earlier version goes by their order."""
        names, thresholds = state.get("names", self.keys), state["thresholds"]
        if len(thresholds) != len(self.constraints) or sorted(names) != sorted(self.keys):
            raise ValueError(
                f"The saved state has {len(thresholds)} constraints, {names}, and this run {len(self.constraints)}, "
                f"{self.keys}. Resume with the constraints of the saved run."
            )
        own = dict(zip(names, thresholds, strict=True))
        self.constraints = [
            constraint if own[key] is None else constraint.with_threshold(own[key])
            for key, constraint in zip(self.keys, self.constraints, strict=True)
        ]
        self.kl_coef = state["kl_coef"]
        self.spreads.load_state_dict(state.get("spreads", {}))
        self.statistics.load_state_dict(state["statistics"])
        self.stopping.load_state_dict(state["stopping"])
        self.feasibility.load_state_dict(state.get("feasibility", {}))
