"""Advantages of constrained PPO on tensors: generalised advantage estimation for each reward, and their mixture."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalised advantage estimation (https://huggingface.co/papers/1506.02438) over the response tokens.

    `delta_t = r_t + gamma * V_{t+1} - V_t` and `A_t = delta_t + gamma * lambda * A_{t+1}`, where `t + 1` is the next
    token that `mask` keeps; after the last one value and advantage are zero.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`):
            Reward of each token.
        values (`torch.Tensor` of shape `(B, T)`):
            Value of the state before each token.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        gamma (`float`):
            Discount, in `[0, 1]`.
        gae_lambda (`float`):
            Decay of the estimator, in `[0, 1]`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: advantages and returns `A + V`, each `(B, T)`, zero outside the mask,
        without gradient.

    Raises:
        ValueError: If shapes differ or a coefficient is outside `[0, 1]`.
    """
    if not rewards.shape == values.shape == mask.shape or rewards.dim() != 2:
        raise ValueError(
            f"`rewards`, `values` and `mask` must share one shape `(B, T)`, got {tuple(rewards.shape)}, "
            f"{tuple(values.shape)} and {tuple(mask.shape)}."
        )
    for name, coefficient in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= coefficient <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {coefficient}.")
    values, keep = values.detach(), mask.bool()
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for step in reversed(range(values.size(1))):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        advantage = delta + gamma * gae_lambda * next_advantage
        next_value = torch.where(keep[:, step], values[:, step], next_value)
        next_advantage = torch.where(keep[:, step], advantage, next_advantage)
        advantages[:, step] = torch.where(keep[:, step], advantage, 0.0)
    return advantages, (advantages + values).masked_fill(~keep, 0.0)


def whiten(values: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
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

    Returns:
        `torch.Tensor` of the shape of `values`, zero outside the mask.
    """
    keep = mask.to(values.dtype)
    count = keep.sum().clamp_min(1)
    mean = (values * keep).sum(dim=(-2, -1), keepdim=True) / count
    centered = (values - mean) * keep
    deviation = (centered.square().sum(dim=(-2, -1), keepdim=True) / count).sqrt()
    # Rounding leaves a constant stream a spread of about its size times the machine precision
    rounding = 10 * torch.finfo(values.dtype).eps * mean.abs()
    return torch.where(deviation > rounding, centered / (deviation + eps), 0.0)


def mix_advantages(
    kl_advantages: torch.Tensor,
    reward_advantages: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    whiten_streams: bool = True,
) -> torch.Tensor:
    """
    Advantage of the Lagrangian, equation (4.4): `(K - sum_i w_i) A_KL + sum_i w_i A_i`.

    With `whiten_streams`, as in the official code, every stream is whitened before it is mixed. The KL coefficient
    then
    scales the KL critic's targets only and cancels from the policy gradient: the weights alone set how much KL counts.

    Args:
        kl_advantages (`torch.Tensor` of shape `(B, T)`):
            Advantages of the KL stream.
        reward_advantages (`torch.Tensor` of shape `(K, B, T)`):
            Advantages of the constrained rewards.
        weights (`torch.Tensor` of shape `(K,)`):
            Weight of each reward, such as `LagrangeMultipliers.weights()`.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.
        whiten_streams (`bool`, *optional*, defaults to `True`):
            Whether to whiten every stream first.

    Returns:
        `torch.Tensor` of shape `(B, T)`, zero outside the mask.

    Raises:
        ValueError: If there is not one weight for each reward, or shapes differ.
    """
    if reward_advantages.dim() != 3 or weights.shape != reward_advantages.shape[:1]:
        raise ValueError(
            f"`weights` must have one value for each of the K streams of `reward_advantages` `(K, B, T)`, got "
            f"{tuple(weights.shape)} and {tuple(reward_advantages.shape)}."
        )
    if not kl_advantages.shape == mask.shape == reward_advantages.shape[1:]:
        raise ValueError(
            f"`kl_advantages` {tuple(kl_advantages.shape)} and `mask` {tuple(mask.shape)} must have the shape `(B, "
            f"T)` of `reward_advantages` {tuple(reward_advantages.shape)}."
        )
    if whiten_streams:
        kl_advantages, reward_advantages = whiten(kl_advantages, mask), whiten(reward_advantages, mask)
    weights = weights.to(kl_advantages)
    mixed = (len(weights) - weights.sum()) * kl_advantages + torch.einsum("k,kbt->bt", weights, reward_advantages)
    return mixed * mask.to(mixed.dtype)
