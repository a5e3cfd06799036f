"""Tensors as flat stretches of memory."""

import torch
from torch.distributed.tensor import DTensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that is here, and other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_flat(param: torch.Tensor) -> bool:
    """Whether a tensor's memory is one stretch in which the rows of the channel view follow each other."""
    tensor = local_part(param)
    expected = int(tensor.numel())
    dims = sorted((dim for dim in range(tensor.ndim) if tensor.size(dim) > 1), key=tensor.stride, reverse=True)
    if expected == 0 or not dims:
        return True
    if tensor.size(0) > 1 and dims[0] != 0:
        return False
    for dim in dims:
        expected //= tensor.size(dim)
        if tensor.stride(dim) != expected:
            return False
    return True


def has_order_of(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the elements of two tensors of one shape follow each other in memory in the same order."""
    tensor, like = local_part(tensor), local_part(like)
    return all(tensor.stride(dim) == like.stride(dim) for dim in range(like.ndim) if like.size(dim) > 1)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as a flat view."""
    tensor = local_part(tensor).detach()
    return tensor.as_strided((tensor.numel(),), (1,))
