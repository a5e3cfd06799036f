"""What one rollout carries from generation to the loss."""

from dataclasses import dataclass
from typing import Literal

import torch

from ..core.recorder import ForwardRecorder


_UNKNOWN = torch.empty(0)


@dataclass
class Rollout:
    """
    One rollout, filled in by `ConstrainedPPOTrainer`'s hooks in the order of its fields. `GRPOTrainer` calls them one
    by one and hands the loss nothing but a batch, so all that they tell each other stands here. B are this process's
    completions, N those of all processes, T tokens, K rewards.
    """

    purpose: Literal["training", "evaluation", "calibration"] = "training"
    rewards: torch.Tensor = _UNKNOWN
    scored: ForwardRecorder | None = None
    mask: torch.Tensor = _UNKNOWN
    values: torch.Tensor = _UNKNOWN
    divergence: torch.Tensor = _UNKNOWN
    advantages: torch.Tensor = _UNKNOWN
    returns: torch.Tensor = _UNKNOWN
    spent: bool = False
