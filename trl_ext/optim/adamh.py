"""
AdamH, Adam under Hyperball (https://huggingface.co/papers/2606.16899): weights stay on their sphere.

[`adamh_`] is the equation, which `fused=False` executes; the default step is radial.py's. `tests/optim/test_radial.py`
holds the two equal.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .adam import adam_update_
from .projection import as_rows
from .radial import RadialOptimizer, RadialWeight
from .weights import LocalTensor, Weight


def adamh_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int | torch.Tensor,
    *,
    lr: float | torch.Tensor,
    adam_ratio: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    level: str | None,
) -> None:
    """
    One step of AdamH on one tensor. Changes `param`, `exp_avg` and `exp_avg_sq` in their place; `step` counts from 1,
    and the options are those of [`AdamH`]. `level` is `"layer"`, `"channel"`, or `None` for AdamW's step.
    """
    update = adam_update_(grad, exp_avg, exp_avg_sq, step, beta1=beta1, beta2=beta2, eps=eps)
    if level is None:
        lr = lr * adam_ratio
        param.mul_(1 - lr * weight_decay).sub_(update * lr)
        return
    shape = [-1] + [1] * (param.ndim - 1)
    radius, length = (as_rows(tensor, level).norm(dim=1) for tensor in (param, update))
    share = torch.where(length > 0, radius / length, torch.zeros_like(radius))
    moved = param - update * (lr * share).view(shape)
    norm = as_rows(moved, level).norm(dim=1)
    param.copy_(moved * torch.where(norm > 0, radius / norm, torch.ones_like(norm)).view(shape))


class AdamH(RadialOptimizer):
    """
    Adam whose weights keep their norm and whose steps have a fixed length relative to it
    (https://huggingface.co/papers/2606.16899, Hyperball around Adam), in place of weight decay.

    With Adam's update `u` and the Frobenius norm `R = |w|`:

        w' = w - lr * R * u / |u| ;    w <- R * w' / |w'|

    so that `lr` is the angle that a step turns a weight by, about, whatever its size. Biases and norms, and weights
    that `projection` leaves out, take AdamW's step with the learning rate `lr * adam_ratio`.

    The equation and the weights that it is for, matrices but embeddings and output layers, are the authors'. They
    write `R` as the norm of the first weights. As in their own code it is that of the present ones, which is the same
    but for rounding, and needs no state. A weight of zeros has no sphere, and the first step refuses it.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, named parameters or groups.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-2`):
            Length of a step relative to the weight's norm. Where AdamW was tuned, its authors suggest
            `sqrt(lr * weight_decay)` of AdamW to start from.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the running averages of the gradient and of its square.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the root of the second moment after its bias correction.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay of what is not kept on its sphere.
        adam_ratio (`float`, *optional*, defaults to `0.1`):
            Learning rate of what is not kept on its sphere, as a share of `lr`.
        fused (`bool`, *optional*):
            `False`: the reference, one tensor at a time. Otherwise torch's fused AdamW makes the update where it can.
        maximize (`bool`, *optional*, defaults to `False`):
            Whether to ascend.
        capturable (`bool`, *optional*, defaults to `False`):
            Whether the step may be captured in a CUDA graph.
        projection (`str` or `dict[str, str]`, *optional*):
            Which weights are kept on their sphere, as a whole, in rows or in heads, as in [`AdamO`].
        state_dtype (`torch.dtype`, *optional*):
            Dtype of the running averages, the parameter's by default. The arithmetic is float32 at least.
        stochastic_rounding (`bool`, *optional*, defaults to `False`):
            Whether bfloat16 parameters are rounded at random, as in [`AdamP`].
        on_unknown_shards (`str`, *optional*, defaults to `"raise"`):
            What to do where the layout of sharded parameters can't be read: `"raise"`, or `"adamw"` to go on with
            AdamW's step.

    Raises:
        ValueError: If a hyperparameter is out of its range.

    Example:

    ```python
    >>> from trl_ext.optim import AdamH, hidden_matrices

    >>> optimizer = AdamH(model.named_parameters(), lr=1e-2, projection=hidden_matrices(model))
    ```
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_ratio: float = 0.1,
        *,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        projection: str | dict[str, str] | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        on_unknown_shards: str = "raise",
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adam_ratio": adam_ratio,
            "foreach": False if fused is False else None, "fused": fused, "maximize": maximize,
            "capturable": capturable, "differentiable": False, "projection": projection, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "on_unknown_shards": on_unknown_shards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _plain_lr(self, group: dict[str, Any]) -> Any:
        return group["lr"] * group["adam_ratio"]

    def _turn(self, weight: Weight, norm: float, update_squared: float, tangential: float) -> float:
        group = weight.local.group
        if self._level_of(group, weight.shard.name) == "none" or not update_squared:
            return super()._turn(weight, norm, update_squared, tangential)
        return float(group["lr"]) * tangential / update_squared**0.5

    def _combine(self, weight: RadialWeight, dots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lr = weight.local.group["lr"]
        _refuse_zeros(weight, dots)
        radius, length = dots[2].sqrt(), dots[1].sqrt()
        factor = torch.where(length > 0, lr * radius / length, torch.zeros_like(radius))
        # Of the weight moved by `factor * u`
        squared_norm = dots[2] - 2 * factor * dots[3] + factor.square() * dots[1]
        scale = torch.where(squared_norm > 0, radius / squared_norm.sqrt(), torch.ones_like(radius))
        return scale, scale * factor

    def _reference(self, local: LocalTensor, values: Sequence[torch.Tensor], level: str | None) -> None:
        group = local.group
        if level is not None and not local.step > 1 and not values[0].any():
            raise _no_sphere(local.shards[0].name, local.shards[0].shape)
        param, grad, exp_avg, exp_avg_sq = values
        adamh_(
            param, grad, exp_avg, exp_avg_sq, local.step, lr=group["lr"], adam_ratio=group["adam_ratio"],
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"],
            level=level,
        )  # fmt: skip


def _refuse_zeros(weight: RadialWeight, dots: torch.Tensor) -> None:
    """Refuses a weight of zeros at its first step, where the host may be read."""
    local = weight.local
    if isinstance(local.step, torch.Tensor) or local.step > 1 or weight.by_rows:
        return
    if not bool(dots[2].any()):
        raise _no_sphere(weight.shard.name, weight.shard.shape)


def _no_sphere(name: str | None, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"AdamH: the weight {name or 'without a name'} of shape {shape} is zero, and would stay so on its sphere. "
        'Leave it to AdamW: `projection={"lora_B": "none", "": "layer"}` with the patterns of such weights first, and '
        "named parameters."
    )
