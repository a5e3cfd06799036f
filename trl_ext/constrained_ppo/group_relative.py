"""Advantages without a critic: each reward against the other completions of its prompt, then mixed by multipliers.

    A_k = (r_k - mean of the group) / (spread + 1e-4)        A = mix of A_0 and the A_k of the constraints

`A_0` is [`reward_advantages`], TRL's own advantage of the weighted rewards, or zero under the objective `"kl"`. The
divergence from the reference has no stream here: it is the loss's KL term, whose coefficient [`kl_share`] scales as
the same mixture scales the objective.
"""

from collections.abc import Callable
from typing import Literal

import torch

from .advantages import mix_advantages, mix_normalized


Scale = Literal["group", "batch", "none"]
Mixing = Literal["paper", "normalized"]
# What TRL adds to a standard deviation
_EPS = 1e-4


def group_advantages(rewards: torch.Tensor, num_generations: int, scale: str) -> torch.Tensor:
    """
    Rewards against the mean over the completions of their prompt, each stream by itself.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`):
            Rewards of all processes, the completions of a prompt next to each other; NaN where one does not apply.
        num_generations (`int`):
            Completions of each prompt, of which N is a multiple.
        scale (`str`):
            What the differences are divided by: the standard deviation over the `"group"` or over the `"batch"`, each
            with 1e-4 added, or `"none"`.

    Returns:
        `torch.Tensor` of shape `(N, K)`, NaN where the reward is.

    Raises:
        ValueError: If `scale` is unknown, or N no multiple of `num_generations`.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"`scale_rewards` must be 'group', 'batch' or 'none', got {scale!r}.")
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} completions are no whole number of groups of {num_generations}.")
    grouped = rewards.view(-1, num_generations, rewards.size(1))
    centered = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centered = centered / (_deviation(grouped, dim=1) + _EPS)
    elif scale == "batch":
        centered = centered / (_deviation(rewards, dim=0) + _EPS)
    return centered.view_as(rewards)


def _deviation(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Standard deviation, unbiased, of what is not NaN; zero of one value alone. The dimension is kept."""
    count = values.isfinite().sum(dim=dim, keepdim=True)
    squares = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def reward_advantages(
    rewards: torch.Tensor,
    reward_weights: torch.Tensor,
    num_generations: int,
    scale: str,
    aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """
    The advantage of the weighted rewards as [`~trl.GRPOTrainer`] has it.

    Args:
        rewards (`torch.Tensor` of shape `(N, K)`):
            Rewards, as [`group_advantages`] takes them.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Weight of each reward.
        num_generations (`int`):
            Completions of each prompt.
        scale (`str`):
            As [`group_advantages`] takes it, for the sum.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            `"sum_then_normalize"` is GRPO's; with `"normalize_then_sum"`, GDPO's
            (https://huggingface.co/papers/2601.05242), every reward is scaled in its group, and their sum over all N.

    Returns:
        `torch.Tensor` of shape `(N,)`; zero for a completion that no reward applies to.
    """
    each = rewards if aggregation == "sum_then_normalize" else group_advantages(rewards, num_generations, "group")
    # Not finite where no reward applies
    total = (each * reward_weights.to(each)).nansum(dim=1).where(rewards.isfinite().any(dim=1), torch.nan)
    if aggregation == "sum_then_normalize":
        found = group_advantages(total.unsqueeze(1), num_generations, scale)
    else:
        found = group_advantages(total.unsqueeze(1), len(total), "group")
    return found.squeeze(1).nan_to_num(nan=0.0)


def leave_one_out(advantages: torch.Tensor, rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """
    Advantages `(N,)` or `(N, K)` against the mean over the *other* completions of the prompt, RLOO's baseline
    (https://huggingface.co/papers/2402.14740), from those against the mean over all: `n / (n - 1)` times as large, n
    the completions of the prompt that a reward `(N, K)` applies to.
    """
    count = rewards.isfinite().any(dim=1).view(-1, num_generations).sum(dim=1).repeat_interleave(num_generations)
    factor = count / (count - 1).clamp(min=1)
    return advantages * (factor if advantages.dim() == 1 else factor.unsqueeze(1))


def mix_groups(
    objective: torch.Tensor, streams: torch.Tensor, weights: torch.Tensor, mixing: str = "normalized"
) -> torch.Tensor:
    """
    One advantage for each completion: [`mix_advantages`] or [`mix_normalized`] of whole completions, not whitened.

    Args:
        objective (`torch.Tensor` of shape `(N,)`):
            Advantages of the objective.
        streams (`torch.Tensor` of shape `(N, C)`):
            Advantages of the constrained rewards, with the sign turned for an upper bound.
        weights (`torch.Tensor` of shape `(C,)`):
            Weight of each constraint.
        mixing (`str`, *optional*, defaults to `"normalized"`):
            `"paper"` or `"normalized"`.

    Returns:
        `torch.Tensor` of shape `(N,)`.
    """
    mix: Callable[..., torch.Tensor] = mix_normalized if mixing == "normalized" else mix_advantages
    every = torch.ones(len(objective), 1, device=objective.device)
    mixed = mix(objective.unsqueeze(1), streams.t().unsqueeze(-1), weights, every, whiten_streams=False)
    return mixed.squeeze(1)


def kl_share(weights: torch.Tensor, mixing: str, objective: str) -> float:
    """
    What the KL term's coefficient is multiplied by under constraints of these `weights` `(C,)`: the factor of the
    mixture before `A_0`, of which the KL is a part; but 1 with `"normalized"` and the objective `"rewards"`, where the
    KL stands beside the mixture. Never negative, for the policy would then be driven from its reference.
    """
    if mixing == "normalized" and objective == "rewards":
        return 1.0
    factor = mix_groups(weights.new_ones(1), weights.new_zeros(1, len(weights)), weights, mixing)
    return max(0.0, float(factor))
