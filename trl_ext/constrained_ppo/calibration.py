"""Thresholds against the rewards of the policy before training: where they lie, and whether they can act."""

from dataclasses import dataclass

import torch

from .multipliers import Constraint


# A spread below this share of the mean is rounding: the reward is a constant
_ROUNDING = 1e-12
# A mean within this share of the spread of an equality's threshold is at it, as far as some 64 samples can tell
_AT_THRESHOLD = 0.05
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Calibration:
    """
    A constraint against samples of the reference.

    Attributes:
        reward (`str`): Name of the reward.
        kind (`str`): `">="`, `"<="` or `"=="`.
        threshold (`float`): Threshold, in the reward's units.
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
    stated = f"The constraint `{name} {kind} {threshold:.4g}`"
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
    elif (kind == ">=" and mean >= threshold) or (kind == "<=" and mean <= threshold):
        found.append(
            f"{stated} is already satisfied: {observed}. It acts only if training moves the reward against it; "
            "tighten the threshold if that is not what you want."
        )
    elif kind == "==" and abs(mean - threshold) < _AT_THRESHOLD * spread:
        found.append(f"{stated} is already satisfied: {observed}. The policy has nothing to learn from it.")
    return found
