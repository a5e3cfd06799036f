"""What torch's own fused kernels update: tensors, or stretches of them, whose update is not projected."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from ..weights import LocalTensor


# Some elements of a tensor: the first, and the one after the last
Range = tuple[LocalTensor, int, int]
# A tensor, and the elements of it, of its gradient and of its running averages that one call is to update
Slices = tuple[LocalTensor, list[torch.Tensor]]


def kernel_batches(
    ranges: Sequence[Range], has_kernel: Callable[[LocalTensor], bool]
) -> tuple[list[list[Slices]], list[Range]]:
    """
    Sorts ranges of tensors by group, device and dtype. Returns what each call of a kernel is to update, and the ranges
    of tensors that the kernel does not take.
    """
    batches: dict[tuple[Any, ...], list[Slices]] = {}
    rest = []
    for local, start, stop in ranges:
        if local.grad is None or not has_kernel(local):
            rest.append((local, start, stop))
            continue
        tensors = [tensor[start:stop] for tensor in (local.flat, local.grad, *local.moments)]
        batches.setdefault((id(local.group), local.flat.device, local.flat.dtype), []).append((local, tensors))
    return list(batches.values()), rest


def takes_adamw(local: LocalTensor) -> bool:
    """Whether torch's fused AdamW can take a tensor; it knows no Nesterov momentum."""
    return _takes(local) and not local.group.get("nesterov")


def takes_sgd(local: LocalTensor) -> bool:
    """Whether torch's fused SGD can take a tensor; it has no buffer without momentum."""
    return _takes(local) and local.group["momentum"] != 0 and not isinstance(local.group["lr"], torch.Tensor)


def _takes(local: LocalTensor) -> bool:
    """Whether a group allows fused kernels, on a device that has them, and all is of the dtype of the arithmetic."""
    group, tensors = local.group, (local.flat, local.grad, *local.moments)
    allowed = group["fused"] is not False and not group["foreach"] and local.flat.device.type in ("cpu", "cuda")
    return allowed and {tensor.dtype for tensor in tensors if tensor is not None} <= {local.compute_dtype}


def fused_adamw(
    batch: Sequence[Slices], steps: list[torch.Tensor], lr: float | torch.Tensor, weight_decay: float
) -> None:
    """AdamW's step on slices of one batch, with the number of each one's step as a tensor on its device."""
    group = batch[0][0].group
    params, grads, exp_avgs, exp_avg_sqs = _columns(batch)
    torch._fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=weight_decay, eps=group["eps"], amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip


def rounded_decay(lr: Any, decay: float, dtype: torch.dtype) -> float:
    """Weight decay with which fused AdamW takes off what `w * (1 - lr * decay)` does."""
    if isinstance(lr, torch.Tensor) or dtype != torch.float32 or not lr * decay:
        return decay
    # The kernel computes `w - lr * decay * w`. Rounding the factor to float32 makes a difference that is the same at
    # each step, and adds up
    return (1 - float(numpy.float32(1 - lr * decay))) / lr


def fused_sgd(batch: Sequence[Slices], keep: Any) -> None:
    """SGD's step on slices of one batch, after scaling them by `keep`, the share that weight decay leaves."""
    group = batch[0][0].group
    params, grads, momenta = _columns(batch)
    if keep != 1:
        torch._foreach_mul_(params, keep)
    torch._fused_sgd_(
        params, grads, momenta, weight_decay=0.0, momentum=group["momentum"], lr=group["lr"],
        dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"], is_first_step=False,
    )  # fmt: skip


def _columns(batch: Sequence[Slices]) -> list[list[torch.Tensor]]:
    return [list(column) for column in zip(*(tensors for _, tensors in batch), strict=True)]
