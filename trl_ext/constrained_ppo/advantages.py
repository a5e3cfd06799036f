"""Advantages of constrained PPO on tensors `(B, T)`: estimated for each reward and for the KL, mixed into one.

    A = (A_0 + sum_i w_i A_i) / (1 + sum_i |w_i|)   normalized
    A = (K - sum_i w_i) A_0 + sum_i w_i A_i         (4.4) of https://huggingface.co/papers/2310.04373

[`mix_normalized`] and [`mix_advantages`] are those equations and what runs, through `RolloutController.mix` and
[`policy_advantages`]. A plain form of (4.4) stands in `recipes/experiments/minimal/constrained_ppo.py`;
`tests/constrained_ppo/test_minimal.py` holds the two equal.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]
# Rounding leaves a constant stream a spread of about its size times the machine precision; a real one has far more
_ROUNDINGS = 10


def mix_advantages(
    kl_advantages: torch.Tensor,
    reward_advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    whiten_streams: bool = True,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """
    Advantage of the Lagrangian, equation (4.4): `(K - sum_i w_i) A_KL + sum_i w_i A_i`.

    With `whiten_streams`, as in the official code, every stream is whitened before it is mixed. The KL coefficient
    then scales the KL critic's targets only and cancels from the policy gradient: the weights alone set how much KL
    counts.

    Args:
        kl_advantages (`torch.Tensor` of shape `(B, T)`):
            Advantages of the objective, such as the KL stream.
        reward_advantages (`torch.Tensor` of shape `(K, B, T)`):
            Advantages of the constrained rewards.
        weights (`torch.Tensor` of shape `(K,)`):
            Weight of each reward, such as `LagrangeMultipliers.weights()`.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        whiten_streams (`bool`, *optional*, defaults to `True`):
            Whether to whiten every stream first.
        reduce (`Callable`, *optional*):
            Sum of a tensor over processes, for the moments of the whitening.

    Returns:
        `torch.Tensor` of shape `(B, T)`, zero outside the mask.

    Raises:
        ValueError: If there is not one weight for each reward, or shapes differ.
    """
    objective, constrained, weights = _prepared(
        kl_advantages, reward_advantages, weights, mask, whiten_streams, reduce
    )
    mixed = (len(weights) - weights.sum()) * objective + torch.einsum("k,kbt->bt", weights, constrained)
    return mixed * mask.to(mixed.dtype)


def mix_normalized(
    objective_advantages: torch.Tensor,
    reward_advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    whiten_streams: bool = False,
    reduce: Reduce | None = None,
) -> torch.Tensor:
    """
    Advantage of the Lagrangian as PPO-Lagrangian has it: `(A_0 + sum_i w_i A_i) / (1 + sum_i |w_i|)`. For a cost,
    whose stream enters with the sign turned, this is safe-rlhf's `(A_R - lambda A_C) / (1 + lambda)`. The size of the
    weights divides, and not their sum: the weights of equalities may be negative, and a sum below -1 would turn the
    gradient round. Where `A_0` are rewards the KL does not belong into it, where it would count less with every
    multiplier: add its advantage to the result.

    Arguments, shapes, result and errors are those of [`mix_advantages`]. The sign of a constrained reward is turned
    where its constraint is an upper bound, and streams are whitened only on request.
    """
    objective, constrained, weights = _prepared(
        objective_advantages, reward_advantages, weights, mask, whiten_streams, reduce
    )
    mixed = (objective + torch.einsum("k,kbt->bt", weights, constrained)) / (1 + weights.abs().sum())
    return mixed * mask.to(mixed.dtype)


def _prepared(
    objective: torch.Tensor,
    constrained: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    whiten_streams: bool,
    reduce: Reduce | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if constrained.dim() != 3 or weights.shape != constrained.shape[:1]:
        raise ValueError(
            f"`weights` must have one value for each of the K streams of `reward_advantages` `(K, B, T)`, got "
            f"{tuple(weights.shape)} and {tuple(constrained.shape)}."
        )
    if not objective.shape == mask.shape == constrained.shape[1:]:
        raise ValueError(
            f"The objective's advantages {tuple(objective.shape)} and `mask` {tuple(mask.shape)} must have the shape "
            f"`(B, T)` of `reward_advantages` {tuple(constrained.shape)}."
        )
    if whiten_streams:
        objective, constrained = whiten(objective, mask, reduce=reduce), whiten(constrained, mask, reduce=reduce)
    return objective, constrained, weights.to(objective)


def policy_advantages(
    advantages: torch.Tensor,
    mask: torch.Tensor,
    reward_weights: torch.Tensor,
    objective: Literal["kl", "rewards"] = "rewards",
    constrained: Sequence[int] = (),
    signs: torch.Tensor | None = None,
    multiplier_weights: torch.Tensor | None = None,
    mixing: Literal["paper", "normalized"] = "paper",
    whitening: Literal["spread", "streams", "mixture", "none"] = "mixture",
    reduce: Reduce | None = None,
    spreads: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The advantage that the policy follows, from those of all streams.

    Without multipliers it is `sum_k a_k A_k + A_KL`. With them, the objective `A_0` is `A_KL`, or that sum, and the
    constrained rewards enter through [`mix_advantages`] or [`mix_normalized`].

    Args:
        advantages (`torch.Tensor` of shape `(K+1, B, T)`):
            Advantages of the K rewards and, last, of the KL.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        reward_weights (`torch.Tensor` of shape `(K,)`):
            Fixed weight `a_k` of each reward in the objective.
        objective (`str`, *optional*, defaults to `"rewards"`):
            `"kl"` or `"rewards"`.
        constrained (`Sequence[int]`, *optional*):
            Reward of each of the N constraints.
        signs (`torch.Tensor` of shape `(N,)`, *optional*):
            -1 for an upper bound, else 1. Defaults to ones.
        multiplier_weights (`torch.Tensor` of shape `(N,)`, *optional*):
            Effective weight of each constraint.
        mixing (`str`, *optional*, defaults to `"paper"`):
            `"paper"` or `"normalized"`.
        whitening (`str`, *optional*, defaults to `"mixture"`):
            `"spread"`, `"streams"`, `"mixture"` or `"none"`. The first two bring rewards to one scale and leave the
            KL in nats times its coefficient, but for `"streams"` with the objective `"kl"`, or `"paper"`'s mixing,
            whose whole objective is whitened.
        reduce (`Callable`, *optional*):
            Sum of a tensor over processes, for the moments of the whitening.
        spreads (`torch.Tensor` of shape `(K,)`, *optional*):
            What each reward's advantages are divided by with `"spread"`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, zero outside the mask.
    """
    rewards, kl = advantages[:-1], advantages[-1]
    if whitening == "spread" and spreads is not None:
        rewards = rewards / spreads.to(rewards).view(-1, 1, 1)
    if whitening == "streams" and multiplier_weights is None:
        rewards = whiten(rewards, mask, reduce=reduce)
    weighted = torch.einsum("k,kbt->bt", reward_weights.to(rewards), rewards)
    if multiplier_weights is None:
        mixed = weighted + kl
    else:
        signs = torch.ones(len(constrained)) if signs is None else signs
        bounded = signs.to(rewards).view(-1, 1, 1) * rewards[list(constrained)]
        by_stream = whitening == "streams"
        if mixing == "normalized" and objective == "rewards":
            mixed = mix_normalized(weighted, bounded, multiplier_weights, mask, by_stream, reduce) + kl
        else:
            mix = mix_normalized if mixing == "normalized" else mix_advantages
            base = kl if objective == "kl" else weighted + kl
            mixed = mix(base, bounded, multiplier_weights, mask, by_stream, reduce)
    mixed = mixed * mask.to(mixed.dtype)
    return whiten(mixed, mask, reduce=reduce) if whitening == "mixture" else mixed


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalised advantage estimation (https://huggingface.co/papers/1506.02438) over the response tokens.

    `delta_t = r_t + gamma * V_{t+1} - V_t` and `A_t = delta_t + gamma * lambda * A_{t+1}`, where `t + 1` is the next
    token that `mask` keeps; after the last one value and advantage are zero.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)` or `(K, B, T)`):
            Reward of each token, of one or several streams.
        values (`torch.Tensor` of the shape of `rewards`):
            Value of the state before each token.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        gamma (`float`):
            Discount, in `[0, 1]`.
        gae_lambda (`float`):
            Decay of the estimator, in `[0, 1]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages and returns `A + V`, each of the shape of `rewards`, zero
        outside the mask, without gradient.

    Raises:
        ValueError: If shapes differ or a coefficient is outside `[0, 1]`.
    """
    if rewards.shape != values.shape or rewards.shape[-2:] != mask.shape or rewards.dim() not in (2, 3):
        raise ValueError(
            f"`rewards`, `values` and `mask` must share one shape `(B, T)`, the first two with or without streams in "
            f"front, got {tuple(rewards.shape)}, {tuple(values.shape)} and {tuple(mask.shape)}."
        )
    for name, coefficient in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= coefficient <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {coefficient}.")
    values, inside = values.detach(), mask.bool()
    found: list[torch.Tensor] = []
    next_value, next_advantage = torch.zeros_like(values[..., 0]), torch.zeros_like(values[..., 0])
    steps = zip(rewards.unbind(-1), values.unbind(-1), inside.unbind(-1), strict=True)
    for reward, value, is_inside in reversed(list(steps)):
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * gae_lambda * next_advantage
        next_value = torch.where(is_inside, value, next_value)
        next_advantage = torch.where(is_inside, advantage, next_advantage)
        found.append(advantage)
    advantages = torch.stack(found[::-1], dim=-1).masked_fill(~inside, 0.0)
    return advantages, (advantages + values).masked_fill(~inside, 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8, reduce: Reduce | None = None) -> torch.Tensor:
    """
    Mean zero and standard deviation one over the tokens that `mask` keeps.

    A stream without spread says nothing about its tokens and becomes zero, not NaN.

    Args:
        values (`torch.Tensor` of shape `(..., B, T)`):
            One or several streams.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the standard deviation.
        reduce (`Callable`, *optional*):
            Sum of a tensor over processes, so that the moments are those of all tokens.

    Returns:
        `torch.Tensor` of the shape of `values`, zero outside the mask.
    """
    reduce = reduce or (lambda tensor: tensor)
    inside = mask.to(values.dtype)
    sums = (values * inside).sum(dim=(-2, -1), keepdim=True)
    totals = reduce(torch.cat([sums.flatten(), inside.sum().view(1)]))
    count = totals[-1].clamp_min(1)
    mean = totals[:-1].view_as(sums) / count
    centered = (values - mean) * inside
    deviation = (reduce(centered.square().sum(dim=(-2, -1), keepdim=True)) / count).sqrt()
    rounding = _ROUNDINGS * torch.finfo(values.dtype).eps * mean.abs()
    return torch.where(deviation > rounding, centered / (deviation + eps), 0.0)


def reward_streams(rewards: torch.Tensor, kl_rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Rewards of every token: each reward at the last token of its response, and the KL at every token.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Reward of each response.
        kl_rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token for staying at the reference.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.

    Returns:
        `torch.Tensor` of shape `(K+1, B, T)`, the KL last, zero outside the mask; a response with no token gets none.
    """
    inside = mask.bool()
    positions = torch.arange(mask.size(1), device=mask.device)
    last = positions.where(inside, -1).amax(dim=1, keepdim=True)
    streams = torch.where(positions == last, rewards.t().unsqueeze(-1), 0.0)
    return torch.cat([streams, kl_rewards.masked_fill(~inside, 0.0).unsqueeze(0)])


def squared_distance_rewards(
    rewards: torch.Tensor, thresholds: torch.Tensor, means: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Rewards of PPO-SAT, which wants every reward at its threshold with fixed weights.

    The paper's, of each sample, is `-(r - theta)^2`; a binary reward then has its best value at a mean of 0 whenever
    `theta < 0.5`. With `means` it is `-(m - theta)^2 - 2 (m - theta) (r - m)`, the first-order form around the batch
    mean `m`, whose policy gradient is that of `-(E[r] - theta)^2`.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Reward of each sample.
        thresholds (`torch.Tensor` of shape `(K,)`):
            Threshold of each reward.
        means (`torch.Tensor` of shape `(K,)`, *optional*):
            Mean of each reward over all samples of the rollout.

    Returns:
        `torch.Tensor` of shape `(B, K)`.
    """
    if means is None:
        return -(rewards - thresholds).square()
    gap = means - thresholds
    return -gap.square() - 2 * gap * (rewards - means)


def token_divergence(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Estimate of the KL from the reference at each sampled token.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens under the policy that sampled them.
        reference_log_probs (`torch.Tensor` of shape `(B, T)`):
            Under the reference.
        estimator (`str`):
            `"k1"`, the log-ratio, or `"k3"`, `exp(-ratio) - 1 + ratio`, unbiased too and never negative.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in nats.

    Raises:
        ValueError: If the estimator is unknown.
    """
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"`kl_estimator` must be 'k1' or 'k3', got {estimator!r}.")
