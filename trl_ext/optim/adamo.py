"""
AdamO (https://huggingface.co/papers/2602.05136): the norm by SGD, the direction by Adam.

[`adamo_`] is the equation, which `fused=False` executes; the default step is radial.py's. `tests/optim/test_radial.py`
holds the two equal.
"""

from collections.abc import Sequence
from typing import Any

import torch

from .adam import adam_update_
from .projection import as_rows
from .radial import RadialOptimizer, RadialWeight
from .weights import LocalTensor, Weight


def adamo_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int | torch.Tensor,
    *,
    lr: float | torch.Tensor,
    radial_ratio: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    level: str | None,
) -> None:
    """
    One step of AdamO on one tensor. Changes `param`, `exp_avg` and `exp_avg_sq` in their place; `step` counts from 1,
    and the options are those of [`AdamO`]. `level` is `"layer"`, `"channel"`, or `None` for AdamW's step.
    """
    settings = {"beta1": beta1, "beta2": beta2, "eps": eps}
    if level is None:
        update = adam_update_(grad, exp_avg, exp_avg_sq, step, **settings)
        param.mul_(1 - lr * weight_decay).sub_(update * lr)
        return
    rows = as_rows(param, level)
    squared_norms = rows.square().sum(1).clamp(min=eps**2)

    def radial(tensor: torch.Tensor) -> torch.Tensor:
        return (as_rows(tensor, level) * rows).sum(1).div(squared_norms).view(-1, *[1] * (param.ndim - 1))

    radial_gradient = radial(grad)
    update = adam_update_(grad - radial_gradient * param, exp_avg, exp_avg_sq, step, **settings)
    tangential = update - radial(update) * param
    param.mul_(1 - lr * weight_decay - lr * radial_ratio * radial_gradient).sub_(tangential * lr)


class AdamO(RadialOptimizer):
    """
    Adam for the direction of a weight and SGD for its norm (https://huggingface.co/papers/2602.05136).

    With `r = <g, w> / <w, w>` the gradient is split into its radial part `r w` and the tangential rest. Running
    averages are those of the tangential part, so that what happens to the norm does not reach the second moment;
    Adam's update of them is projected onto the tangent, `u' = u - <u, w> / <w, w> w`; and the norm takes a step of SGD
    with decoupled decay:

        w <- w - lr * u' - lr * radial_ratio * r w - lr * weight_decay * w

    Biases and norms, and weights that `projection` leaves out, take AdamW's step.

    From the paper's abstract come the split, SGD for the norm and Adam for the tangential part alone. The rest is our
    reading, since its equations were not at hand: one learning rate for both with a ratio between them, no momentum in
    the norm, AdamW's decay. The paper's radial step sizes that adapt to curvature and its rules for special layers are
    left out; on scale-invariant weights the radial gradient is 0, and only decay moves the norm.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, named parameters or groups.
        lr (`float` or `torch.Tensor`, *optional*, defaults to `1e-3`):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the running averages of the tangential gradient and of its square.
        eps (`float`, *optional*, defaults to `1e-8`):
            Added to the root of the second moment after its bias correction, and the smallest norm.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Decoupled weight decay.
        radial_ratio (`float`, *optional*, defaults to `1.0`):
            Learning rate of the norm, as a share of `lr`.
        fused (`bool`, *optional*):
            `False`: the reference, one tensor at a time. Otherwise torch's fused AdamW makes the update where it can.
        maximize (`bool`, *optional*, defaults to `False`):
            Whether to ascend.
        capturable (`bool`, *optional*, defaults to `False`):
            Whether the step may be captured in a CUDA graph.
        projection (`str` or `dict[str, str]`, *optional*):
            `None` or `"layer"` takes each weight of at least two dimensions as a whole, `"channel"` each row of it and
            `"head/N"` each `N` rows; `"none"` is AdamW. A dict maps patterns, searched for in the parameters' names,
            to one of these; weights that no pattern matches are AdamW's. See [`hidden_matrices`].
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
    >>> from trl_ext.optim import AdamO

    >>> optimizer = AdamO(model.parameters(), lr=1e-3, weight_decay=1e-2)
    ```
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        radial_ratio: float = 1.0,
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
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "radial_ratio": radial_ratio,
            "foreach": False if fused is False else None, "fused": fused, "maximize": maximize,
            "capturable": capturable, "differentiable": False, "projection": projection, "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding, "on_unknown_shards": on_unknown_shards,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _prepare_measuring(self, weights: Sequence[Weight]) -> None:
        """Finds the radial part of each gradient, in an all-reduce of its own where weights are cut."""
        for weight in weights:
            assert isinstance(weight, RadialWeight)
            weight.allocate_dots()
            if weight.numel:
                for block in weight.blocks():
                    weight.add_gradient_dots(block)
        exchanges = self._exchanges([weight for weight in weights if weight.shard.borders])
        for weight in weights:
            if not weight.shard.borders:
                _keep_radial_gradient(weight, weight.sums())
        for members, exchange in exchanges:
            for member, sums in zip(members, exchange.results(), strict=True):
                _keep_radial_gradient(member, sums)

    def _combine(self, weight: RadialWeight, dots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        group, radial_gradient = weight.local.group, weight.radial_gradient
        assert radial_gradient is not None
        lr, sign = group["lr"], -1.0 if group["maximize"] else 1.0
        update = dots[3] / dots[2].clamp(min=group["eps"] ** 2)
        radial = update - sign * group["radial_ratio"] * radial_gradient - group["weight_decay"]
        return 1 + lr * radial, torch.ones_like(update) * lr

    def _reference(self, local: LocalTensor, values: Sequence[torch.Tensor], level: str | None) -> None:
        group, (param, grad, exp_avg, exp_avg_sq) = local.group, values
        adamo_(
            param, grad, exp_avg, exp_avg_sq, local.step, lr=group["lr"], radial_ratio=group["radial_ratio"],
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"],
            level=level,
        )  # fmt: skip


def _keep_radial_gradient(weight: Any, sums: torch.Tensor) -> None:
    """Keeps `<g, w> / <w, w>` of a weight's rows, or of all, from [`Weight.sums`] over all processes."""
    totals, _, cut_row_dots = weight.split_sums(sums)
    weight.take_cut_row_dots(cut_row_dots)
    dots = weight.dots if weight.by_rows else totals.unsqueeze(1)
    weight.radial_gradient = dots[0] / dots[2].clamp(min=weight.local.group["eps"] ** 2)
