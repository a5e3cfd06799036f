"""Constraints on rewards: on the mean, on the share of responses beyond a value, or on the mean of every prompt.

Each is a bound on the mean of a *signal*, `limit` on `E[signal]`, so that one controller serves all of them:

    mean          signal = r                                   E[signal] >= threshold, <= or ==
    probability   signal = 1 where r misses its threshold      E[signal] <= probability
    per prompt    signal = how far the mean m of the prompt's  E[signal] >= -tolerance
                  responses falls short, min(m - threshold, 0)

[`Constraint.signal`] and [`Constraint.violation`] are these lines. `RolloutController.signals` runs the first, and
`LagrangeMultipliers.signed_violations` the second for all constraints at once.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..core.checks import Range, check_fields, shown


Kind = Literal[">=", "<=", "=="]
KINDS: tuple[Kind, ...] = (">=", "<=", "==")
# What names a second constraint on one reward in logs, whose keys TensorBoard strips of other signs
_SUFFIXES = {">=": "at_least", "<=": "at_most", "==": "equal"}


_FREE = "Remove the constraint to leave the reward free."
RANGES: dict[str, Range] = {
    "probability": Range(
        above=0, below=1, remedy="It is the share of responses that may miss the threshold, such as 0.05."
    ),
    "quantile": Range(at_least=0, at_most=1),
    "relative_gain": Range(remedy=_FREE),
    "reward": Range(at_least=0, empty=False, remedy="Name a reward, or give its index."),
    "spread": Range(above=0, remedy="Leave it out to measure it."),
    "threshold": Range(remedy=_FREE),
    "tolerance": Range(at_least=0),
}


@dataclass(frozen=True)
class Constraint:
    """
    A constraint on a reward. Its threshold is stated as a value, or relative to samples of the policy before training,
    and is then open until [`resolved`].

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
        probability (`float`, *optional*):
            Share of responses, in `(0, 1)`, that may miss the threshold, in place of a bound on the mean: with `kind`
            `"<="`, a threshold of 200 and a probability of 0.05, at most 5% are above 200.
        per_prompt (`bool`, *optional*, defaults to `False`):
            Whether the threshold holds for the mean over each prompt's responses (with `probability`, for all but that
            share of the prompts) and not only for the mean over all.
        tolerance (`float`, *optional*, defaults to `0.0`):
            With `per_prompt` and no `probability`, how much prompts may fall short on average, in the reward's units.
        spread (`float`, *optional*):
            Standard deviation of the reward over responses, in which its violation is measured. Defaults to the one
            that is found before training.

    Raises:
        ValueError: If `kind` is unknown, not exactly one finite threshold is stated, or a number is out of its range.
    """

    reward: str | int
    threshold: float | None = None
    kind: Kind = "=="
    quantile: float | None = None
    relative_gain: float | None = None
    probability: float | None = None
    per_prompt: bool = False
    tolerance: float = 0.0
    spread: float | None = None

    def __post_init__(self) -> None:
        about = " of the constraint" + (f" on {shown(self.reward)}" if isinstance(self.reward, (str, int)) else "")
        check_fields(self, RANGES, label="`{}`" + about.replace("{", "{{").replace("}", "}}"))
        stated = {name: getattr(self, name) for name in ("threshold", "quantile", "relative_gain")}
        stated = {name: value for name, value in stated.items() if value is not None}
        if len(stated) != 1:
            raise ValueError(
                f"The constraint on {self.reward!r} must state exactly one of `threshold`, `quantile` and "
                f"`relative_gain`, got {stated}."
            )
        self._check_signal()

    def _check_signal(self) -> None:
        about = f"of the constraint on {self.reward!r}"
        if self.probability is not None and self.kind == "==":
            raise ValueError(f"`probability` {about} needs the `kind` '>=' or '<=', got '=='.")
        if self.tolerance and (not self.per_prompt or self.probability is not None):
            raise ValueError(
                f"`tolerance={self.tolerance!r}` {about} is how much prompts may fall short on average. It needs "
                "`per_prompt: true`, without `probability`."
            )

    @property
    def is_derived(self) -> bool:
        """Whether the signal is another than the reward itself."""
        return self.per_prompt or self.probability is not None

    @property
    def direction(self) -> Kind:
        """`kind` of the bound on the mean of the signal."""
        if self.probability is not None:
            return "<="
        return ">=" if self.per_prompt else self.kind

    @property
    def limit(self) -> float:
        """
        What the mean of the signal is held to.

        Raises:
            ValueError: If the threshold is open.
        """
        if self.threshold is None:
            raise ValueError(
                f"The threshold of the constraint on {self.reward!r} is open until it is calibrated. Start training "
                "with `calibration_samples` above 0, or state `threshold`."
            )
        if self.probability is not None:
            return self.probability
        return -self.tolerance if self.per_prompt else self.threshold

    @property
    def known_spread(self) -> float | None:
        """The spread of the signal where it needs no samples: the given one, or that of a share."""
        if self.spread is None and self.probability is not None:
            return math.sqrt(self.probability * (1 - self.probability))
        return self.spread

    def signal(self, rewards: torch.Tensor, num_generations: int = 1) -> torch.Tensor:
        """
        What the constraint bounds the mean of, for each response.

        For `per_prompt` the hinge of the prompt's mean is spread over its responses so that their mean is the hinge
        and their policy gradient its gradient: `r - threshold` where the prompt falls short, else 0.

        Args:
            rewards (`torch.Tensor` of shape `(N,)`):
                Reward of each response, those of one prompt next to each other.
            num_generations (`int`, *optional*, defaults to `1`):
                Responses of each prompt.

        Returns:
            `torch.Tensor` of shape `(N,)`.
        """
        if not self.is_derived:
            return rewards
        threshold, means = float(self.threshold or 0.0), rewards
        if self.per_prompt:
            means = rewards.view(-1, num_generations).mean(dim=1).repeat_interleave(num_generations)
        sides = {">=": (means < threshold).int(), "<=": -(means > threshold).int()}
        side = sides[">="] + sides["<="] if self.kind == "==" else sides[self.kind]
        if self.probability is not None:
            return side.abs().to(rewards)
        return side * (rewards - threshold)

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
        return dataclasses.replace(self, threshold=float(threshold), quantile=None, relative_gain=None)

    def violation(self, mean: float) -> float:
        """
        Signed violation by the mean of the signal: positive where more weight on the constraint is called for.

        Raises:
            ValueError: If the threshold is open.
        """
        return mean - self.limit if self.direction == "<=" else self.limit - mean

    def __str__(self) -> str:
        threshold = "?" if self.threshold is None else f"{self.threshold:.4g}"
        stated = f"{self.kind} {threshold}"
        if self.per_prompt:
            stated += " for each prompt"
        if self.probability is not None:
            stated += f" but for {self.probability:.3g}"
        return stated


def constraint_from_dict(given: dict[str, Any]) -> Constraint:
    """A constraint as configurations state it, where `kind` may be `"per_prompt"`: at least, for each prompt."""
    if given.get("kind") == "per_prompt":
        given = {**given, "kind": ">=", "per_prompt": True}
    return Constraint(**given)


def constraint_keys(constraints: Sequence[Constraint]) -> list[str]:
    """
    A name of its own for each constraint, for logs and checkpoints: the reward's, and where a reward has several
    `<reward>.at_least`, `<reward>.at_most` or `<reward>.equal`, with `.per_prompt`, `.share`, and a number if need be.
    """
    rewards = Counter(str(constraint.reward) for constraint in constraints)
    keys = []
    for constraint in constraints:
        key = str(constraint.reward)
        if rewards[key] > 1:
            key += f".{_SUFFIXES[constraint.kind]}"
            key += ".per_prompt" * constraint.per_prompt + ".share" * (constraint.probability is not None)
        keys.append(key)
    return unique_names(keys)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names with equal ones told apart: `name`, `name_2`, `name_3`, in their order."""
    taken, found = set(names), []
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        if seen[name] == 1:
            found.append(name)
            continue
        count = seen[name]
        while f"{name}_{count}" in taken:
            count += 1
        taken.add(f"{name}_{count}")
        found.append(f"{name}_{count}")
    return found


def check_constraints(constraints: Sequence[Constraint]) -> None:
    """Refuses an empty list, and constraints on one reward that no policy can meet together."""
    if not constraints:
        raise ValueError("`constraints` is empty. Give at least one, or use `method='ppo'`.")
    for reward in {constraint.reward for constraint in constraints}:
        own = [constraint for constraint in constraints if constraint.reward == reward]
        spreads = {constraint.spread for constraint in own if constraint.spread and not constraint.is_derived}
        if len(spreads) > 1:
            raise ValueError(
                f"The constraints on reward {reward!r} state several `spread`: {sorted(spreads)}. Give one."
            )
        # A share may be missed, so that such a bound leaves the mean free
        bounds = [c for c in own if c.probability is None and not c.tolerance]
        stated = [(c.threshold, c.kind) for c in bounds if c.threshold is not None]
        lowest = max((threshold for threshold, kind in stated if kind in (">=", "==")), default=-math.inf)
        highest = min((threshold for threshold, kind in stated if kind in ("<=", "==")), default=math.inf)
        if lowest > highest:
            listed = " and ".join(f"{kind} {threshold}" for threshold, kind in stated)
            raise ValueError(
                f"The constraints on reward {reward!r} contradict each other: {listed}. Remove one of them."
            )


def constraints_by_reward(constraints: Sequence[Constraint]) -> dict[str, list[tuple[str, Constraint]]]:
    """The constraints of each reward, by its name, each with its key in logs; a range has two."""
    grouped: dict[str, list[tuple[str, Constraint]]] = {}
    for key, constraint in zip(constraint_keys(constraints), constraints, strict=True):
        grouped.setdefault(str(constraint.reward), []).append((key, constraint))
    return grouped
