"""Thresholds against the rewards of the policy before training: where they lie, and whether they can act."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from .lagrangian import Constraint, check_constraints


if TYPE_CHECKING:
    from .constrained_ppo_trainer import ConstrainedPPOTrainer


logger = get_logger(__name__)
CALIBRATION_FILE = "calibration.json"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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
        quantiles=tuple(samples.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()),
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
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return [
            f"{stated} is inert: the reward is {mean:.4g} on all {count} samples, so no policy gradient comes "
            f"from it. "
            "Check the reward function, or remove the constraint."
        ]
    found = []
    upward, downward = kind in (">=", "=="), kind in ("<=", "==")
    if (upward and threshold > highest) or (downward and threshold < lowest):
        bound = f"below {highest:.4g}" if threshold > highest else f"above {lowest:.4g}"
        found.append(
            f"{stated} may be out of reach: {observed}, and not one reaches the threshold. Choose a threshold "
            f"{bound}, "
            "or give it as a `quantile`."
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
    elif kind == "==" and abs(mean - threshold) < 0.05 * spread:
        found.append(f"{stated} is already satisfied: {observed}. The policy has nothing to learn from it.")
    return found


def calibration_table(calibrations: Sequence[Calibration]) -> Table:
    """One row for each constraint."""
    table = Table(title="Constraints against the reference, before training")
    for column in ("constraint", "mean", "spread", "5%", "25%", "50%", "75%", "95%", "below threshold", "deviations"):
        table.add_column(column, justify="left" if column == "constraint" else "right")
    for row in calibrations:
        numbers = [row.mean, row.spread, *row.quantiles]
        table.add_row(
            f"{row.reward} {row.kind} {row.threshold:.4g}",
            *(f"{number:.3g}" for number in numbers),
            f"{row.rank:.0%}",
            f"{row.deviations:+.2f}",
        )
    return table


def save_calibration(calibrations: Sequence[Calibration], folder: str | Path) -> None:
    """Writes `calibration.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = [asdict(calibration) for calibration in calibrations]
    (Path(folder) / CALIBRATION_FILE).write_text(json.dumps(rows, indent=1))


class CalibrationCallback(TrainerCallback):
    """
    Compares the constraints of a run with the policy before its first step, and resolves thresholds stated relative to
    it. A resumed run keeps the thresholds of its checkpoint.

    Args:
        trainer ([`ConstrainedPPOTrainer`]):
            Trainer.
    """

    def __init__(self, trainer: "ConstrainedPPOTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        controller = trainer.controller
        if not controller.targets or not args.calibration_samples or trainer.resumed:
            return
        rewards = trainer.sample_rewards(args.calibration_samples).cpu()
        samples = [rewards[:, index] for index in controller.constrained]
        targets = [target.resolved(own) for target, own in zip(controller.targets, samples, strict=True)]
        check_constraints(targets)
        controller.set_targets(targets)
        found = [calibrate(*row) for row in zip(targets, controller.constrained_names(), samples, strict=True)]
        if trainer.is_world_process_zero():
            if not args.disable_tqdm:
                Console().print(calibration_table(found))
            save_calibration(found, args.output_dir)
        for calibration in found:
            for warning in calibration.warnings:
                logger.warning(warning, main_process_only=True)
