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

    Args:
        purpose (`str`, *optional*, defaults to `"training"`):
            `"training"`, `"evaluation"`, or `"calibration"`, whose rewards alone are wanted.
        rewards (`torch.Tensor` of shape `(N, K)`, *optional*):
            Rewards, from `_calculate_rewards`.
        scored ([`ForwardRecorder`], *optional*):
            The forwards of the policy that gave log-probabilities and values, from
            `_get_per_token_logps_and_entropies`; `None` once they are read.
        mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            Tokens that the losses count. It and what follows come from `_estimate`.
        values (`torch.Tensor` of shape `(B, T, K+1)`, *optional*):
            Values of the critic before any update on the rollout: those that the value loss is clipped around.
        divergence (`torch.Tensor` of shape `(B, T)`, *optional*):
            Estimate of the KL from the reference at each token, in nats.
        advantages (`torch.Tensor` of shape `(K+1, B, T)`, *optional*):
            Advantages of each reward and, last, of the KL, before they are mixed.
        returns (`torch.Tensor` of shape `(K+1, B, T)`, *optional*):
            Targets of the values.
        spent (`bool`, *optional*, defaults to `False`):
            Whether the policy has moved so far from the one that generated that the updates left are skipped, from
            `_check_update`.
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
