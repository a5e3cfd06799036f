"""
The radial projection (https://huggingface.co/papers/2006.08217, algorithms 1 and 2) of a weight's update, at one of
two levels: each row of its own ("channel"), or the whole weight ("layer").

[`project_`] and [`is_scale_invariant`] are the equations. The single-tensor reference executes them; the default step
executes [`passes`] and [`radial_coefficient`], the same from dot products, in torch or as kernels/ write them in C and
Triton. `tests/optim/test_projection.py` holds the two equal.
"""

import math
from collections.abc import Sequence

import torch


# In the order in which they are tried; the first that passes the test is projected at
LEVELS = ("channel", "layer")


def project_(update: torch.Tensor, param: torch.Tensor, level: str, eps: float) -> torch.Tensor:
    """
    Takes the radial part out of an update, row by row: `u - n * <n, u>` with `n = w / (|w| + eps)` (equation 12).

    Args:
        update (`torch.Tensor`):
            Update, changed in its place.
        param (`torch.Tensor` of the same shape):
            Weight before weight decay.
        level (`str`):
            `"channel"` or `"layer"`.
        eps (`float`):
            Added to the norm.

    Returns:
        `torch.Tensor`: `update`.
    """
    per_row = [-1] + [1] * (param.ndim - 1)
    unit = param / as_rows(param, level).norm(dim=1).view(per_row).add_(eps)
    update -= unit * as_rows(unit * update, level).sum(dim=1).view(per_row)
    return update


def is_scale_invariant(param: torch.Tensor, grad: torch.Tensor, level: str, delta: float, eps: float) -> torch.Tensor:
    """
    Whether the gradient is orthogonal to the weight in each row, as it is where the loss does not depend on the row's
    norm: `max |cos(g, w)| < delta / sqrt(row size)`.

    Args:
        param (`torch.Tensor` with at least one dimension):
            Weight.
        grad (`torch.Tensor` of the same shape):
            Its gradient.
        level (`str`):
            `"channel"` or `"layer"`.
        delta (`float`):
            Threshold on the cosine, before division by the square root of the row's size.
        eps (`float`):
            Smallest norm, so that a row of zeros passes.

    Returns:
        `torch.Tensor` of shape `()`, boolean, on the weight's device.
    """
    rows, grad_rows = as_rows(param, level), as_rows(grad, level)
    cosine = torch.nn.functional.cosine_similarity(grad_rows, rows, dim=1, eps=eps).abs()
    return cosine.max() < threshold(delta, rows.size(1))


def find_level(
    param: torch.Tensor, grad: torch.Tensor, delta: float, eps: float, levels: Sequence[str] = LEVELS
) -> str | None:
    """
    The first level that passes [`is_scale_invariant`]; `None` where none does and for weights of fewer than two
    dimensions. Synchronises with the device once for each level tried.
    """
    if param.ndim < 2 or param.numel() == 0:
        return None
    return next((level for level in levels if bool(is_scale_invariant(param, grad, level, delta, eps))), None)


def as_rows(tensor: torch.Tensor, level: str) -> torch.Tensor:
    """
    A weight as a matrix whose rows are taken to be scale-invariant each.

    Args:
        tensor (`torch.Tensor` with at least one dimension):
            Weight, gradient or update.
        level (`str`):
            `"channel"`: one row for each index of the first dimension. `"layer"`: one row.

    Returns:
        `torch.Tensor` of shape `(R, C)`, a view where the layout allows it.
    """
    return tensor.reshape(tensor.size(0) if level == "channel" else 1, -1)


def threshold(delta: float, row_size: int) -> float:
    """Largest cosine that passes for orthogonal: `delta / sqrt(row_size)`."""
    return delta / math.sqrt(row_size)


def passes(dots: torch.Tensor, row_size: int, delta: float, eps: float) -> torch.Tensor:
    """
    [`is_scale_invariant`] from dot products, for each row.

    Args:
        dots (`torch.Tensor` of shape `(4, R)`):
            For each row `<g, w>`, `<g, g>`, `<w, w>` and `<u, w>`, with gradient `g`, weight `w` and update `u`.
        row_size (`int`):
            Elements in a row.
        delta (`float`):
            Threshold on the cosine, before division by the square root of the row's size.
        eps (`float`):
            Smallest norm.

    Returns:
        `torch.Tensor` of shape `(R,)`, boolean.
    """
    norms = dots[1:3].sqrt().clamp_(min=eps)
    return dots[0].abs() < norms[0] * norms[1] * threshold(delta, row_size)


def radial_coefficient(dots: torch.Tensor, eps: float) -> torch.Tensor:
    """
    How much of the weight the projection adds to minus the update, for each row: `<u, w> / (|w| + eps)^2`, so that
    `u - coefficient * w` is what [`project_`] gives.

    Args:
        dots (`torch.Tensor` of shape `(4, R)`):
            As in [`passes`].
        eps (`float`):
            Added to the norm.

    Returns:
        `torch.Tensor` of shape `(R,)`.
    """
    return dots[3] / (dots[2].sqrt() + eps).square()
