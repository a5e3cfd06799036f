"""What one call of a multi-tensor kernel can update."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .weight import LocalTensor


# A tensor, and the stretches of its memory, its gradient and its running averages that are to be updated
Stretches = tuple[LocalTensor, list[torch.Tensor]]
Range = tuple[LocalTensor, int, int]


def kernel_batches(
    ranges: Sequence[Range], has_kernel: Callable[[LocalTensor], bool]
) -> tuple[list[list[Stretches]], list[Range]]:
    """
    Sorts ranges of tensors by group, device and dtype.

    Args:
        ranges (`Sequence[tuple[LocalTensor, int, int]]`):
            Tensors, each with the first element and the one after the last.
        has_kernel (`Callable[[LocalTensor], bool]`):
            Whether the kernel takes a tensor.

    Returns:
        `tuple[list[list[tuple[LocalTensor, list[torch.Tensor]]]], list[tuple[LocalTensor, int, int]]]`: batches of
        tensors with their stretches of parameter, gradient and running averages, and the ranges that no kernel takes.
    """
    batches: dict[tuple[Any, ...], list[Stretches]] = {}
    rest = []
    for local, start, stop in ranges:
        if local.grad is None or not has_kernel(local):
            rest.append((local, start, stop))
            continue
        tensors = [tensor[start:stop] for tensor in (local.flat, local.grad, *local.moments)]
        batches.setdefault((id(local.group), local.flat.device, local.flat.dtype), []).append((local, tensors))
    return list(batches.values()), rest


def is_of_one_dtype(local: LocalTensor) -> bool:
    """Whether a tensor, its gradient and its running averages have the dtype of the arithmetic."""
    tensors = (local.flat, local.grad, *local.moments)
    return {tensor.dtype for tensor in tensors if tensor is not None} <= {local.compute_dtype}


def wants_kernel(local: LocalTensor) -> bool:
    """Whether a tensor's group allows a fused kernel, on a device that has one."""
    group = local.group
    return group["fused"] is not False and not group["foreach"] and local.flat.device.type in ("cpu", "cuda")
