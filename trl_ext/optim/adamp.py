"""
AdamP (https://huggingface.co/papers/2006.08217, algorithm 2).

[`adamp_`] is the equation. The single-tensor reference executes it (`foreach=False, fused=False`, or half-precision
state); the default step is step.py's, with the kernels of kernels/cpu.py and kernels/triton.py.
`tests/optim/test_official.py::test_the_default_step_is_the_equation` holds the two equal, and that file both to the
authors' package.
"""

from typing import Any

import torch

from .adam import AdamUpdate
from .kernels import cpu
from .projection import find_level, project_
from .weights import LocalTensor


def adamp_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int | torch.Tensor,
    *,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    nesterov: bool,
    level: str | None = "test",
) -> str | None:
    """
    One step of AdamP on one tensor, as the paper's algorithm 2 with Adam's bias correction reads. Changes `param`,
    `exp_avg` and `exp_avg_sq` in their place; `step` counts from 1, and the options are those of [`AdamP`]. `level` is
    `"test"`, or `"channel"`, `"layer"` or `None` where it is known whether and where to project. Returns the level
    that was projected at.
    """
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    momentum = beta1 * exp_avg + (1 - beta1) * grad if nesterov else exp_avg
    update = momentum / denominator

    if level == "test":
        level = find_level(param, grad, delta, eps)
    if level is not None:
        project_(update, param, level, eps)
    if weight_decay > 0:
        param.mul_(1 - lr * weight_decay * (1 if level is None else wd_ratio))
    step_size = lr / (1 - beta1**step)
    if isinstance(step_size, torch.Tensor):
        param.sub_(update * step_size)
    else:
        param.add_(update, alpha=-step_size)
    return level


class AdamP(AdamUpdate):
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
            Whether weights that are not projected are updated by torch's multi-tensor operations. With `fused`, both
            `False`: the reference, one tensor at a time, equal to the authors' package to the last bit.
        fused (`bool`, *optional*):
            Whether fused kernels are used where they exist: for parameters and state of one dtype, float32 or
            float64, and, in torch's own AdamW kernel, no Nesterov momentum. For float32 on a CPU, AdamP's own are
            compiled at the first step, once for each machine, if there is a C compiler; `True` warns where there is
            none. By default they are used, unless `foreach` is set.
        maximize (`bool`, *optional*, defaults to `False`):
            Whether to ascend.
        capturable (`bool`, *optional*, defaults to `False`):
            Whether the step may be captured in a CUDA graph: it then never reads the host. On a GPU no step of the
            Triton kernels does; elsewhere every weight takes the two passes that projected ones need.
        differentiable (`bool`, *optional*, defaults to `False`):
            Whether autograd records the step. Whole parameters only.
        projection (`str` or `dict[str, str]`, *optional*):
            `None` or `"test"` tests each weight at each step, as the paper does. `"layer"` and `"channel"` state that
            all weights of the group are scale-invariant at that level, and `"none"` that none is. A dict maps
            patterns, searched for in the parameters' names, to one of these; weights that no pattern matches are not
            projected. See [`scale_invariant_weights`].
        state_dtype (`torch.dtype`, *optional*):
            Dtype of the running averages, the parameter's by default. With bfloat16 parameters, `torch.float32` keeps
            small gradients from vanishing in the second moment, and the arithmetic is float32.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Whether bfloat16 parameters are rounded at random, so that updates below half a unit in the last place
            count on average. The random numbers follow from the number of the step, so that replicas round alike.
        on_unknown_shards (`str`, *optional*, defaults to `"raise"`):
            What to do where the layout of sharded parameters can't be read: `"raise"`, or `"adamw"` to go on without
            projection.

    Raises:
        ValueError: If a hyperparameter is out of its range.
        RuntimeError: If two execution options exclude each other.

    Example:

    ```python
    >>> from trl_ext.optim import AdamP

    >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
    ```
    """

    CPU_KERNELS = cpu

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
        projection: str | dict[str, str] | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        on_unknown_shards: str = "raise",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "delta": delta, "wd_ratio": wd_ratio,
            "nesterov": nesterov, "foreach": foreach, "fused": fused, "maximize": maximize, "capturable": capturable,
            "differentiable": differentiable, "projection": projection, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "on_unknown_shards": on_unknown_shards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _single_tensor(self, local: LocalTensor, level: str | None) -> str | None:
        assert local.grad is not None
        group = local.group
        grad = -local.grad if group["maximize"] else local.grad
        exp_avg, exp_avg_sq = local.moments
        return adamp_(
            local.flat, grad, exp_avg, exp_avg_sq, local.step, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"], delta=group["delta"],
            wd_ratio=group["wd_ratio"], nesterov=group["nesterov"], level=level,
        )  # fmt: skip
