"""
SGDP (https://huggingface.co/papers/2006.08217, algorithm 1).

[`sgdp_`] is the equation. The single-tensor reference executes it (`foreach=False, fused=False`, or half-precision
state); the default step is step.py's. `tests/optim/test_official.py::test_the_default_step_is_the_equation` holds the
two equal, and that file both to the authors' package.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .kernels.stock import Range, fused_sgd, kernel_batches, takes_sgd
from .projection import find_level, project_
from .step import ProjectedOptimizer
from .weights import Block, LocalTensor


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
    level: str | None = "test",
) -> str | None:
    """
    One step of SGDP on one tensor, as the paper's algorithm 1 reads. Changes `param` and `momentum_buffer` in their
    place; the options are those of [`SGDP`]. `level` is `"test"`, or `"channel"`, `"layer"` or `None` where it is
    known whether and where to project. Returns the level that was projected at.
    """
    momentum_buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
    update = grad + momentum * momentum_buffer if nesterov else momentum_buffer

    if level == "test":
        level = find_level(param, grad, delta, eps)
    if level is not None:
        in_place = nesterov or project_momentum
        update = project_(update if in_place else update.clone(), param, level, eps)
    if weight_decay > 0:
        param.mul_(1 - lr * weight_decay * (1 if level is None else wd_ratio) / (1 - momentum))
    if isinstance(lr, torch.Tensor):
        param.sub_(update * lr)
    else:
        param.add_(update, alpha=-lr)
    return level


class SGDP(ProjectedOptimizer):
    """
    SGD with momentum whose update is projected onto the tangent of scale-invariant weights
    (https://huggingface.co/papers/2006.08217). See [`AdamP`] for which weights those are.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, named parameters or groups.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        momentum (`float`, *optional*, defaults to `0.0`):
            Momentum, below 1.
        dampening (`float`, *optional*, defaults to `0.0`):
            Taken off the gradient's part in the momentum, from the first step on.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay, of `lr * weight_decay / (1 - momentum)` each step.
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
        foreach, fused (`bool`, *optional*):
            Which kernels update weights that are not projected: by default torch's fused SGD, where there is momentum
            and one dtype. Both `False`: the reference, one tensor at a time, equal to the authors' package to the last
            bit.
        maximize (`bool`, *optional*, defaults to `False`):
            Whether to ascend.
        capturable (`bool`, *optional*, defaults to `False`):
            Whether the step may be captured in a CUDA graph, as in [`AdamP`].
        differentiable (`bool`, *optional*, defaults to `False`):
            Whether autograd records the step. Whole parameters only.
        projection (`str` or `dict[str, str]`, *optional*):
            Which weights are scale-invariant, as in [`AdamP`].
        state_dtype (`torch.dtype`, *optional*):
            Dtype of the momentum, the parameter's by default.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Whether bfloat16 parameters are rounded at random, as in [`AdamP`].
        on_unknown_shards (`str`, *optional*, defaults to `"raise"`):
            What to do where the layout of sharded parameters can't be read: `"raise"`, or `"adamw"` to go on without
            projection.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:

    ```python
    >>> from trl_ext.optim import SGDP

    >>> optimizer = SGDP(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    ```
    """

    MOMENTS = ("momentum",)
    OPTIONS = {**ProjectedOptimizer.OPTIONS, "project_momentum": False}

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_momentum: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        projection: str | dict[str, str] | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        on_unknown_shards: str = "raise",
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dampening": dampening, "nesterov": nesterov,
            "eps": eps, "delta": delta, "wd_ratio": wd_ratio, "project_momentum": project_momentum, "foreach": foreach,
            "fused": fused, "maximize": maximize, "capturable": capturable, "differentiable": differentiable,
            "projection": projection, "state_dtype": state_dtype, "stochastic_rounding": stochastic_rounding,
            "on_unknown_shards": on_unknown_shards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _decay(self, group: dict[str, Any]) -> Any:
        return group["lr"] * group["weight_decay"] / (1 - group["momentum"])

    def _displace(self, block: Block, out: torch.Tensor) -> None:
        group, stored = block.local.group, block.moments[0]
        momentum = stored.to(out.dtype)
        sign = -1 if group["maximize"] else 1
        momentum.mul_(group["momentum"]).add_(block.grad.to(out.dtype), alpha=sign * (1 - group["dampening"]))
        if momentum is not stored:
            stored.copy_(momentum)
        self._displace_again(block, out)

    def _displace_again(self, block: Block, out: torch.Tensor) -> None:
        group, momentum = block.local.group, block.moments[0].to(out.dtype)
        if group["nesterov"] and block.local.grad is not None:
            torch.mul(momentum, -group["momentum"], out=out)
            out.add_(block.grad.to(out.dtype), alpha=1 if group["maximize"] else -1)
        else:
            torch.neg(momentum, out=out)

    def _project_moments(self, block: Block, weight: torch.Tensor, coefficient: torch.Tensor) -> None:
        group, momentum = block.local.group, block.moments[0]
        if group["project_momentum"] and not group["nesterov"]:
            momentum.view(weight.shape).sub_(weight * coefficient)

    def _step_in_stock_kernels(self, ranges: Sequence[Range]) -> Sequence[Range]:
        batches, rest = kernel_batches(ranges, takes_sgd)
        for batch in batches:
            fused_sgd(batch, self._keep(batch[0][0], 1.0))
        return rest

    def _single_tensor(self, local: LocalTensor, level: str | None) -> str | None:
        assert local.grad is not None
        group = local.group
        return sgdp_(
            local.flat, -local.grad if group["maximize"] else local.grad, local.moments[0], lr=group["lr"],
            momentum=group["momentum"], weight_decay=group["weight_decay"], dampening=group["dampening"],
            nesterov=group["nesterov"], eps=group["eps"], delta=group["delta"], wd_ratio=group["wd_ratio"],
            project_momentum=group["project_momentum"], level=level,
        )  # fmt: skip
