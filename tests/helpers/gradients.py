"""Gradients that pass the test for scale invariance at a level, or at none."""

import torch


def gradient_of(kind, weight, generator):
    """Float64, orthogonal to the weight in rows or as a whole, or far from it."""
    weight = weight.detach().double()
    grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if weight.ndim < 2:
        return grad
    rows, others = (t.reshape(t.size(0) if kind == "channel" else 1, -1) for t in (weight, grad))
    others = others - rows * ((others * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))
    return (others + rows * (kind == "generic")).reshape(weight.shape)
