"""The radial projection (https://huggingface.co/papers/2006.08217, algorithms 1 and 2), on views of a weight."""

import math
from collections.abc import Sequence

import torch


# In the order in which they are tried; the first that passes the test is projected on
VIEWS = ("channel", "layer")


def as_rows(tensor: torch.Tensor, view: str) -> torch.Tensor:
    """
    A weight as a matrix whose rows are taken to be scale-invariant each.

    Args:
        tensor (`torch.Tensor` with at least one dimension):
            Weight, gradient or update.
        view (`str`):
            `"channel"`: one row for each index of the first dimension. `"layer"`: one row.

    Returns:
        `torch.Tensor` of shape `(R, C)`, a view where the layout allows it.
    """
    return tensor.reshape(tensor.size(0) if view == "channel" else 1, -1)


def threshold(delta: float, row_size: int) -> float:
    """Largest cosine that passes for orthogonal: `delta / sqrt(row_size)`."""
    return delta / math.sqrt(row_size)


def is_scale_invariant(param: torch.Tensor, grad: torch.Tensor, view: str, delta: float, eps: float) -> torch.Tensor:
    """
    Whether the gradient is orthogonal to the weight in each row, as it is where the loss does not depend on the row's
    norm.

    Args:
        param (`torch.Tensor` with at least one dimension):
            Weight.
        grad (`torch.Tensor` of the same shape):
            Its gradient.
        view (`str`):
            `"channel"` or `"layer"`.
        delta (`float`):
            Threshold on the cosine, before division by the square root of the row's size.
        eps (`float`):
            Smallest norm, so that a row of zeros passes.

    Returns:
        `torch.Tensor` of shape `()`, boolean, on the weight's device.
    """
    rows, grad_rows = as_rows(param, view), as_rows(grad, view)
    cosine = torch.nn.functional.cosine_similarity(grad_rows, rows, dim=1, eps=eps).abs()
    return cosine.max() < threshold(delta, rows.size(1))


def find_view(
    param: torch.Tensor, grad: torch.Tensor, delta: float, eps: float, views: Sequence[str] = VIEWS
) -> str | None:
    """
    The first view that passes [`is_scale_invariant`]; `None` where none does and for weights of fewer than two
    dimensions. Synchronises with the device once for each view tried.
    """
    if param.ndim < 2 or param.numel() == 0:
        return None
    return next((view for view in views if bool(is_scale_invariant(param, grad, view, delta, eps))), None)


def project_(update: torch.Tensor, param: torch.Tensor, view: str, eps: float) -> torch.Tensor:
    """
    Takes the radial part out of an update, row by row: `u - n * <n, u>` with `n = w / (|w| + eps)` (equation 12).

    Args:
        update (`torch.Tensor`):
            Update, changed in its place.
        param (`torch.Tensor` of the same shape):
            Weight before weight decay.
        view (`str`):
            `"channel"` or `"layer"`.
        eps (`float`):
            Added to the norm.

    Returns:
        `torch.Tensor`: `update`.
    """
    per_row = [-1] + [1] * (param.ndim - 1)
    unit = param / as_rows(param, view).norm(dim=1).view(per_row).add_(eps)
    update -= unit * as_rows(unit * update, view).sum(dim=1).view(per_row)
    return update


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
