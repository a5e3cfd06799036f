"""Thresholds against the rewards of the policy before training: where they lie, and whether they can act."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .constrained_ppo_config import ConstrainedPPOConfig
from .constraints import Constraint


# A spread below this share of the mean is rounding: the reward is a constant
_ROUNDING = 1e-12
# A mean within this share of the spread of an equality's threshold is at it, as far as some 64 samples can tell
_AT_THRESHOLD = 0.05
# Of the bisection for a tilt, in nats per standard deviation
_STRONGEST_TILT = 50.0
_BISECTIONS = 60
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Calibration:
    """
    A constraint against samples of the reference.

    Attributes:
        reward (`str`): Name of the reward.
        kind (`str`): `">="`, `"<="` or `"=="`.
        threshold (`float`): Threshold, in the reward's units.
        stated (`str`): The constraint in words.
        mean (`float`): Mean over the samples.
        spread (`float`): Standard deviation over the samples.
        lowest (`float`): Lowest sample.
        highest (`float`): Highest sample.
        quantiles (`tuple[float, ...]`): At 5, 25, 50, 75 and 95%.
        rank (`float`): Share of the samples at or below the threshold.
        deviations (`float`): Distance of the threshold from the mean in standard deviations; 0 without spread.
        warnings (`tuple[str, ...]`): What is wrong with the threshold, with the remedy.
    """

    reward: str
    kind: str
    threshold: float
    stated: str
    mean: float
    spread: float
    lowest: float
    highest: float
    quantiles: tuple[float, ...]
    rank: float
    deviations: float
    warnings: tuple[str, ...]


def calibrate(constraint: Constraint, name: str, samples: torch.Tensor) -> Calibration:
    """
    Compares a constraint with samples of the reference.

    Args:
        constraint ([`Constraint`]):
            Constraint with a threshold.
        name (`str`):
            Name of its reward.
        samples (`torch.Tensor` of shape `(N,)`):
            Its reward on responses of the reference.

    Returns:
        [`Calibration`]

    Raises:
        ValueError: If there are no samples, or the threshold is open.
    """
    if constraint.threshold is None or samples.numel() == 0:
        raise ValueError(f"The constraint on {name!r} needs a threshold and samples to be calibrated.")
    samples, threshold = samples.double().cpu(), constraint.threshold
    mean, spread = float(samples.mean()), float(samples.std(unbiased=False))
    lowest, highest = float(samples.min()), float(samples.max())
    return Calibration(
        reward=name,
        kind=constraint.kind,
        threshold=threshold,
        stated=str(constraint),
        mean=mean,
        spread=spread,
        lowest=lowest,
        highest=highest,
        quantiles=tuple(samples.quantile(torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()),
        rank=float((samples <= threshold).double().mean()),
        deviations=(threshold - mean) / spread if spread > 0 else 0.0,
        warnings=tuple(_warnings(constraint, name, mean, spread, lowest, highest, len(samples))),
    )


def _warnings(
    constraint: Constraint, name: str, mean: float, spread: float, lowest: float, highest: float, count: int
) -> list[str]:
    threshold, kind = float(constraint.threshold or 0.0), constraint.kind
    stated = f"The constraint `{name} {constraint}`"
    observed = f"the reference's samples lie in [{lowest:.4g}, {highest:.4g}] with mean {mean:.4g}"
    if spread <= _ROUNDING * max(1.0, abs(mean)):
        return [
            f"{stated} is inert: the reward is {mean:.4g} on all {count} samples, so no policy gradient comes from "
            "it. Check the reward function, or remove the constraint."
        ]
    found = []
    upward, downward = kind in (">=", "=="), kind in ("<=", "==")
    if (upward and threshold > highest) or (downward and threshold < lowest):
        bound = f"below {highest:.4g}" if threshold > highest else f"above {lowest:.4g}"
        found.append(
            f"{stated} may be out of reach: {observed}, and not one reaches the threshold. Choose a threshold "
            f"{bound}, or give it as a `quantile`."
        )
    always = (kind == ">=" and threshold <= lowest) or (kind == "<=" and threshold >= highest)
    if always:
        found.append(
            f"{stated} is inert: {observed}, and every sample satisfies it. Tighten the threshold or remove the "
            "constraint."
        )
    elif constraint.is_derived:
        # A bound on each response or prompt may be missed where the mean meets it
        pass
    elif (kind == ">=" and mean >= threshold) or (kind == "<=" and mean <= threshold):
        found.append(
            f"{stated} is already satisfied: {observed}. It acts only if training moves the reward against it; "
            "tighten the threshold if that is not what you want."
        )
    elif kind == "==" and abs(mean - threshold) < _AT_THRESHOLD * spread:
        found.append(f"{stated} is already satisfied: {observed}. The policy has nothing to learn from it.")
    return found


def needed_tilt(samples: torch.Tensor, limit: float) -> float:
    """
    How strongly a policy near the reference must follow a signal for its mean to reach a limit.

    The policy that is nearest to the reference in KL is `p exp(b s) / Z`; with the KL in the objective at a
    coefficient `c`, a constraint of weight `w` makes `b = w / c`. The tilt `b` is read from the samples or, where none
    reaches the limit, from their mean and variance, as for a normal distribution: `(limit - mean) / variance`.

    Args:
        samples (`torch.Tensor` of shape `(N,)`):
            Signal on responses of the reference.
        limit (`float`):
            Mean to be reached.

    Returns:
        `float`: `b`, in nats per unit of the signal, negative where the mean has to fall; 0 without spread.
    """
    samples = samples.double().cpu()
    mean, variance = float(samples.mean()), float(samples.var(unbiased=False))
    if variance == 0:
        return 0.0
    centered = (samples - mean) / variance**0.5
    wanted = (limit - mean) / variance**0.5
    if not float(centered.min()) < wanted < float(centered.max()):
        return wanted / variance**0.5
    low, high = -_STRONGEST_TILT, _STRONGEST_TILT
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached = float((centered * (middle * centered).softmax(dim=0)).sum())
        low, high = (middle, high) if reached < wanted else (low, middle)
    return low / variance**0.5


def cap_warnings(
    constraints: Sequence[Constraint],
    names: Sequence[str],
    signals: torch.Tensor,
    spreads: torch.Tensor,
    config: ConstrainedPPOConfig,
) -> list[str]:
    """
    What to say of constraints whose weight, at its bound, cannot outweigh the KL as far as their threshold asks.

    Args:
        constraints (`Sequence[Constraint]`):
            Constraints with thresholds.
        names (`Sequence[str]`):
            Names of their rewards.
        signals (`torch.Tensor` of shape `(N, C)`):
            The constraints' signals on responses of the reference.
        spreads (`torch.Tensor` of shape `(C,)`):
            Their spreads, as violations are measured in.
        config ([`ConstrainedPPOConfig`]):
            Squashing, bound, mixing, whitening and `kl_coef`. Nothing is said of the objective `"rewards"`, whose own
            pull is not known here.

    Returns:
        `list[str]`: a sentence with a remedy for each such constraint.
    """
    if config.objective != "kl":
        return []
    largest = _largest_weight(config)
    means = signals.double().mean(dim=0).tolist()
    # Constraints that hold from the start have no weight, and leave their share to the KL
    acting = [
        constraint.direction == "==" or constraint.violation(mean) > 0
        for constraint, mean in zip(constraints, means, strict=True)
    ]
    kl_weight = 1.0 if config.mixing == "normalized" else max(len(constraints) - largest * sum(acting), 0.0)
    found = []
    for index, constraint in enumerate(constraints):
        tilt = abs(needed_tilt(signals[:, index], constraint.limit))
        if not acting[index] or not tilt or not math.isfinite(largest):
            continue
        if config.whitening == "streams":
            # Both streams have unit size however large the tilt: the larger weight decides
            is_capped, needed = largest <= kl_weight, kl_weight
        else:
            unit = float(spreads[index]) if config.whitening == "spread" else 1.0
            needed = tilt * unit * float(config.kl_coef) * kl_weight
            is_capped = needed > largest
        if is_capped:
            found.append(
                f"The constraint `{names[index]} {constraint}` may be out of reach of its weight: it needs about "
                f"{needed:.3g} beside the KL, and `multiplier_squash={config.multiplier_squash!r}` and "
                f"`multiplier_max={config.multiplier_max}` allow {largest:.3g}. Raise `multiplier_max`, lower "
                "`kl_coef`, or take `mixing='normalized'` with `multiplier_squash='none'`."
            )
    return found


def _largest_weight(config: ConstrainedPPOConfig) -> float:
    """The most that a weight can be."""
    maximum = math.inf if config.multiplier_max is None else config.multiplier_max
    if config.multiplier_squash == "sigmoid":
        return 1 / (1 + math.exp(-maximum))
    if config.multiplier_squash in ("tanh", None):
        return math.tanh(maximum)
    return maximum
