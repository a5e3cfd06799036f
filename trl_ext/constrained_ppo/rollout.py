"""What one rollout carries from generation to the loss."""

from dataclasses import dataclass, field
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

    purpose: Literal["training", "evaluation", "calibration"] = "training"  # Calibration wants the rewards alone
    rewards: torch.Tensor = _UNKNOWN  # (N, K), from `_calculate_rewards`
    # Forwards that gave log-probabilities and values, from `_get_per_token_logps_and_entropies`, until they are read
    scored: ForwardRecorder | None = None
    # From `_estimate`
    mask: torch.Tensor = _UNKNOWN  # (B, T), tokens that the losses count
    values: torch.Tensor = _UNKNOWN  # (B, T, K+1), before any update on the rollout: what the value loss is clipped at
    divergence: torch.Tensor = _UNKNOWN  # (B, T), KL from the reference at each token, in nats
    advantages: torch.Tensor = _UNKNOWN  # (K+1, B, T), of each reward and, last, of the KL, before they are mixed
    returns: torch.Tensor = _UNKNOWN  # (K+1, B, T), targets of the values
    # Without a critic and where no log-probabilities are known before the loss: KL and mask of each micro-batch so far
    losses_divergences: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    # Whether the policy has moved so far that the updates left are skipped, from `_check_update`
    spent: bool = False
