"""Rounding of float32 results to half-precision parameters."""

import torch


def copy_rounded_(target: torch.Tensor, value: torch.Tensor, stochastic: bool) -> None:
    """
    Copies float32 values into a tensor of lower precision.

    Args:
        target (`torch.Tensor`):
            Tensor, changed in its place.
        value (`torch.Tensor` of the same shape):
            What it becomes.
        stochastic (`bool`):
            Whether to round up or down at random so that the mean is right, which keeps updates smaller than half a
            unit in the last place; to the nearest otherwise. bfloat16 only; draws from torch's global generator.
    """
    if not stochastic or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    # bfloat16 is the upper half of float32: a random number added to the lower half carries over with the right odds
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))
