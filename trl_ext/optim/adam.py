"""Adam's update of moments, on blocks of flat memory: what [`AdamP`], [`AdamO`] and [`AdamH`] share."""

from collections.abc import Sequence
from typing import Any

import torch

from .kernels.stock import Range, fused_adamw, kernel_batches, rounded_decay, takes_adamw
from .step import ProjectedOptimizer
from .weights import Block, LocalTensor


def adam_update_(
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int | torch.Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
) -> torch.Tensor:
    """
    Adam's update `m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)`, without the learning rate. Changes the running
    averages `m` and `v` of the gradient in their place; the number `t` of the step counts from 1.
    """
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
    return exp_avg / denominator / (1 - beta1**step)


class AdamUpdate(ProjectedOptimizer):
    """Base of the optimizers whose update is Adam's before its radial part is looked at."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def _prepare(self) -> None:
        super()._prepare()
        self._step_tensors: dict[torch.device, tuple[int, torch.Tensor]] = {}

    def _initialise(self, state: dict[str, Any], param: torch.Tensor, group: dict[str, Any]) -> None:
        super()._initialise(state, param, group)
        if "step" not in state:
            on_device = group["capturable"]
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device) if on_device else 0

    def _decay(self, group: dict[str, Any]) -> Any:
        return self._plain_lr(group) * group["weight_decay"]

    def _displace(self, block: Block, out: torch.Tensor) -> None:
        group = block.local.group
        beta1, beta2 = group["betas"]
        exp_avg, exp_avg_sq = block.moments
        if takes_adamw(block.local):
            # From zero weights, with a learning rate of 1 and no decay, the stock kernel makes minus the update
            out.zero_()
            tensors = [out, block.grad, exp_avg, exp_avg_sq]
            fused_adamw([(block.local, tensors)], [self._step_tensor(block.local)], lr=1.0, weight_decay=0.0)
            return
        grad = block.grad.to(out.dtype)
        grad = -grad if group["maximize"] else grad
        first, second = exp_avg.to(out.dtype), exp_avg_sq.to(out.dtype)
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self._write_displacement(block.local, first, second, grad, out)
        for moment, value in ((exp_avg, first), (exp_avg_sq, second)):
            if moment is not value:
                moment.copy_(value)

    def _displace_again(self, block: Block, out: torch.Tensor) -> None:
        first, second = (moment.to(out.dtype) for moment in block.moments)
        # Only Nesterov's momentum needs the gradient again; a report after it is gone shows the momentum's update
        needs_grad = block.local.group.get("nesterov") and block.local.grad is not None
        grad = block.grad.to(out.dtype) if needs_grad else None
        if grad is not None and block.local.group["maximize"]:
            grad = -grad
        self._write_displacement(block.local, first, second, grad, out)

    def _write_displacement(
        self,
        local: LocalTensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        grad: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        beta1, beta2 = local.group["betas"]
        correction1, correction2 = 1 - beta1**local.step, 1 - beta2**local.step
        torch.sqrt(exp_avg_sq, out=out).div_(correction2**0.5).add_(local.group["eps"])
        momentum = exp_avg
        if local.group.get("nesterov") and grad is not None:
            momentum = torch.mul(exp_avg, beta1).add_(grad, alpha=1 - beta1)
        torch.div(momentum, out, out=out).div_(-correction1)

    def _step_tensor(self, local: LocalTensor) -> torch.Tensor:
        """The number of the step as torch's fused kernel takes it, one tensor for all tensors of a device."""
        if isinstance(local.step, torch.Tensor):
            return local.step
        device = local.flat.device
        if self._step_tensors.get(device, (0, None))[0] != local.step:
            self._step_tensors[device] = (local.step, torch.full((), float(local.step), device=device))
        return self._step_tensors[device][1]

    def _step_in_stock_kernels(self, ranges: Sequence[Range]) -> Sequence[Range]:
        batches, rest = kernel_batches(ranges, takes_adamw)
        for batch in batches:
            local, steps = batch[0][0], [self._step_tensor(local) for local, _ in batch]
            lr = self._plain_lr(local.group)
            decay = rounded_decay(lr, local.group["weight_decay"], local.flat.dtype)
            fused_adamw(batch, steps, lr=lr, weight_decay=decay)
        return rest
