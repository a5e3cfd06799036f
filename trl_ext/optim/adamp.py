"""AdamP (https://huggingface.co/papers/2006.08217, algorithm 2)."""

import math
from typing import Any

import torch

from .projected_optimizer import ProjectedOptimizer
from .projection import find_view, project_


class AdamP(ProjectedOptimizer):
    """
    AdamW whose update is projected onto the tangent of scale-invariant weights, so that momentum does not inflate
    their norm (https://huggingface.co/papers/2006.08217).

    A weight counts as scale-invariant where its gradient is orthogonal to it, in each row or as a whole. There the
    radial part is taken out of the update and weight decay is reduced. Elsewhere, and on biases, this is AdamW.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, named parameters or groups.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the running averages of the gradient and of its square.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the root of the second moment after its bias correction, and to norms.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay.
        delta (`float`, *optional*, defaults to `0.1`):
            Threshold of the test for scale invariance: `|cos(gradient, weight)| < delta / sqrt(row size)`.
        wd_ratio (`float`, *optional*, defaults to `0.1`):
            Factor on weight decay where the update is projected.
        nesterov (`bool`, *optional*, defaults to `False`):
            Whether to use Nesterov's momentum.
        foreach (`bool`, *optional*):
            With `fused`, which implementation runs. Both `False`: the reference, one tensor at a time.
        fused (`bool`, *optional*):
            Whether to use fused kernels.
        maximize (`bool`, *optional*, defaults to `False`):
            Whether to ascend.
        capturable (`bool`, *optional*, defaults to `False`):
            Whether the step may be captured in a CUDA graph: no synchronisation with the device.
        differentiable (`bool`, *optional*, defaults to `False`):
            Whether autograd records the step.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:

    ```python
    >>> from trl_ext.optim import AdamP

    >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
    ```
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio,
            "nesterov": nesterov, "foreach": foreach, "fused": fused, "maximize": maximize, "capturable": capturable,
            "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        adamp_(
            param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], lr=group["lr"], beta1=beta1,
            beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"], delta=group["delta"],
            wd_ratio=group["wd_ratio"], nesterov=group["nesterov"],
        )  # fmt: skip


def adamp_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
) -> str | None:
    """
    One step of AdamP on one tensor, as the paper's algorithm 2 with Adam's bias correction reads.

    Args:
        param, grad, exp_avg, exp_avg_sq (`torch.Tensor` of one shape):
            Weight and moments, changed in their place, and the gradient.
        step (`int`):
            Number of this step, from 1.

    Returns:
        `str`, *optional*: the view that was projected on.
    """
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    momentum = beta1 * exp_avg + (1 - beta1) * grad if nesterov else exp_avg
    update = momentum / denominator

    view = find_view(param, grad, delta, eps)
    if view is not None:
        project_(update, param, view, eps)
    if weight_decay > 0:
        param.mul_(1 - lr * weight_decay * (1 if view is None else wd_ratio))
    param.add_(update, alpha=-lr / (1 - beta1**step))
    return view
