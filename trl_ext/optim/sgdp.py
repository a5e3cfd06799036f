"""SGDP (https://huggingface.co/papers/2006.08217, algorithm 1)."""

from typing import Any

import torch

from .projected_optimizer import ProjectedOptimizer
from .projection import find_view, project_


class SGDP(ProjectedOptimizer):
    """
    SGD with momentum whose update is projected onto the tangent of scale-invariant weights
    (https://huggingface.co/papers/2006.08217). See [`AdamP`] for which weights those are.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, named parameters or groups.
        lr (`float` or `torch.Tensor`):
            Learning rate.
        momentum (`float`, *optional*, defaults to `0.0`):
            Momentum, below 1.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay, of `lr * weight_decay / (1 - momentum)` each step.
        dampening (`float`, *optional*, defaults to `0.0`):
            Taken off the gradient's part in the momentum, from the first step on.
        nesterov (`bool`, *optional*, defaults to `False`):
            Whether to use Nesterov's momentum.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to norms.
        delta (`float`, *optional*, defaults to `0.1`):
            Threshold of the test for scale invariance: `|cos(gradient, weight)| < delta / sqrt(row size)`.
        wd_ratio (`float`, *optional*, defaults to `0.1`):
            Factor on weight decay where the update is projected.
        project_momentum (`bool`, *optional*, defaults to `False`):
            Whether the projection also changes the stored momentum, as the official package does without Nesterov's
            momentum and the paper's algorithm does not. With `nesterov=True` it has no effect, there as here.
        foreach, fused, maximize, capturable, differentiable:
            As in [`AdamP`].

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:

    ```python
    >>> from trl_ext.optim import SGDP

    >>> optimizer = SGDP(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    ```
    """

    OPTIONS = {**ProjectedOptimizer.OPTIONS, "project_momentum": False}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_momentum: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening, "nesterov": nesterov,
            "eps": eps, "delta": delta, "wd_ratio": wd_ratio, "project_momentum": project_momentum, "foreach": foreach,
            "fused": fused, "maximize": maximize, "capturable": capturable, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        sgdp_(
            param, grad, state["momentum"], lr=group["lr"], momentum=group["momentum"],
            weight_decay=group["weight_decay"], dampening=group["dampening"], nesterov=group["nesterov"],
            eps=group["eps"], delta=group["delta"], wd_ratio=group["wd_ratio"],
            project_momentum=group["project_momentum"],
        )  # fmt: skip


def sgdp_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor,
    *,
    lr: float | torch.Tensor,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    eps: float,
    delta: float,
    wd_ratio: float,
    project_momentum: bool,
) -> str | None:
    """
    One step of SGDP on one tensor, as the paper's algorithm 1 reads.

    Args:
        param, grad, momentum_buffer (`torch.Tensor` of one shape):
            Weight and momentum, changed in their place, and the gradient.

    Returns:
        `str`, *optional*: the view that was projected on.
    """
    momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
    update = grad + momentum * momentum_buffer if nesterov else momentum_buffer

    view = find_view(param, grad, delta, eps)
    if view is not None:
        in_place = nesterov or project_momentum
        update = project_(update if in_place else update.clone(), param, view, eps)
    if weight_decay > 0:
        param.mul_(1 - lr * weight_decay * (1 if view is None else wd_ratio) / (1 - momentum))
    param.add_(update, alpha=-lr)
    return view
