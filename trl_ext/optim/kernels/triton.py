"""Triton kernels of [`AdamP`] for GPUs: the dot products of the test, and the two passes of a projected update."""

from __future__ import annotations

import torch
from transformers.utils import is_triton_available

from ..weights import LocalTensor, Weight


# The test comes before the first pass and reads the host once for all weights
TESTS_WHILE_MEASURING = False

if is_triton_available():
    import triton
    import triton.language as tl

    BLOCK_SIZE = 1024
    # Programs that share a long row
    MAX_SPLITS = 256

    @triton.jit
    def _update(grad, first, second, root_correction2, correction1, beta1, rest1, eps, NESTEROV: tl.constexpr):
        momentum = first
        if NESTEROV:
            momentum = beta1 * first + rest1 * grad
        return momentum / (tl.sqrt(second) / root_correction2 + eps) / correction1

    @triton.jit
    def _measure_kernel(
        weight, grad, exp_avg, exp_avg_sq, corrections, partial, size, row_size, column, num_splits, beta1, beta2,
        rest1, rest2, eps, sign, NESTEROV: tl.constexpr, UPDATE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
        first_element = tl.maximum(row * row_size - column, 0)
        last_element = tl.minimum((row + 1) * row_size - column, size)
        correction1, root_correction2 = tl.load(corrections), tl.load(corrections + 1)
        gw = tl.zeros((BLOCK,), tl.float32)
        gg = tl.zeros((BLOCK,), tl.float32)
        ww = tl.zeros((BLOCK,), tl.float32)
        uw = tl.zeros((BLOCK,), tl.float32)
        for start in range(first_element + split * BLOCK, last_element, num_splits * BLOCK):
            place = start + tl.arange(0, BLOCK)
            valid = place < last_element
            w = tl.load(weight + place, mask=valid, other=0.0)
            g = sign * tl.load(grad + place, mask=valid, other=0.0)
            gw += g * w
            gg += g * g
            ww += w * w
            if UPDATE:
                m = tl.load(exp_avg + place, mask=valid, other=0.0)
                v = tl.load(exp_avg_sq + place, mask=valid, other=0.0)
                m = beta1 * m + rest1 * g
                v = beta2 * v + rest2 * g * g
                tl.store(exp_avg + place, m, mask=valid)
                tl.store(exp_avg_sq + place, v, mask=valid)
                u = _update(g, m, v, root_correction2, correction1, beta1, rest1, eps, NESTEROV)
                uw += tl.where(valid, u * w, 0.0)
        out = partial + (row * num_splits + split) * 4
        tl.store(out, tl.sum(gw, axis=0))
        tl.store(out + 1, tl.sum(gg, axis=0))
        tl.store(out + 2, tl.sum(ww, axis=0))
        tl.store(out + 3, tl.sum(uw, axis=0))

    @triton.jit
    def _apply_kernel(
        weight, grad, exp_avg, exp_avg_sq, corrections, scale, coefficient, size, row_size, column, lr, beta1, rest1,
        eps, sign, NESTEROV: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = place < size
        correction1, root_correction2 = tl.load(corrections), tl.load(corrections + 1)
        w = tl.load(weight + place, mask=valid, other=0.0)
        m = tl.load(exp_avg + place, mask=valid, other=0.0)
        v = tl.load(exp_avg_sq + place, mask=valid, other=0.0)
        g = m
        if NESTEROV:
            g = sign * tl.load(grad + place, mask=valid, other=0.0)
        u = _update(g, m, v, root_correction2, correction1, beta1, rest1, eps, NESTEROV)
        if ONE_ROW:
            radial = tl.load(coefficient)
        else:
            radial = tl.load(coefficient + (place + column) // row_size, mask=valid, other=0.0)
        w = tl.load(scale) * w - lr * (u - radial * w)
        tl.store(weight + place, w, mask=valid)


def is_usable(local: LocalTensor) -> bool:
    """Whether the kernels take a tensor: float32 throughout, on a GPU, not with `fused=False` or `foreach=True`."""
    group, tensors = local.group, (local.flat, local.grad, *local.moments)
    return (
        local.flat.device.type == "cuda"
        and group["fused"] is not False
        and not group["foreach"]
        and not isinstance(group["lr"], torch.Tensor)
        and all(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)
        and is_triton_available()
    )


def _corrections(local: LocalTensor) -> torch.Tensor:
    """Bias correction of the first moment, and root of the second's, on the device, shape `(2,)`."""
    beta1, beta2 = local.group["betas"]
    one, device = torch.ones((), device=local.flat.device), local.flat.device
    if isinstance(local.step, torch.Tensor):
        return torch.stack([one - beta1**local.step, (one - beta2**local.step).sqrt()])
    corrections = (1 - beta1**local.step, (1 - beta2**local.step) ** 0.5)
    return torch.stack([torch.full((), value, device=device) for value in corrections])


def _constants(local: LocalTensor) -> dict[str, float | bool]:
    group, (beta1, beta2) = local.group, local.group["betas"]
    return {"beta1": beta1, "beta2": beta2, "rest1": 1 - beta1, "rest2": 1 - beta2, "eps": group["eps"],
            "sign": -1.0 if group["maximize"] else 1.0, "NESTEROV": group["nesterov"]}  # fmt: skip


def _dots(
    local: LocalTensor, start: int, numel: int, row_size: int, column: int, num_rows: int, update: bool
) -> torch.Tensor:
    """Dot products of each row, shape `(4, R)`, in an order of sums that is the same each time."""
    stop = start + numel
    num_splits = max(1, min(MAX_SPLITS, triton.cdiv(min(row_size, numel), 8 * BLOCK_SIZE)))
    partial = torch.empty(num_rows, num_splits, 4, device=local.flat.device)
    assert local.grad is not None
    moments = [moment[start:stop] for moment in local.moments]
    _measure_kernel[(num_rows, num_splits)](
        local.flat[start:stop], local.grad[start:stop], *moments, _corrections(local), partial, numel, row_size,
        column, num_splits, UPDATE=update, BLOCK=BLOCK_SIZE, **_constants(local),
    )  # fmt: skip
    return partial.sum(1).t()


def test_dots(weight: Weight) -> torch.Tensor:
    """`<g, w>`, `<g, g>`, `<w, w>` of the part of a weight that is here, shape `(3,)`."""
    return _dots(weight.local, weight.shard.start, weight.numel, weight.numel, 0, 1, update=False)[:3, 0]


def measure(weight: Weight) -> None:
    """Updates a weight's moments and writes its dot products."""
    shard = weight.shard
    if weight.by_rows:
        row_size, column, num_rows = shard.row_size, shard.offset % shard.row_size, weight.num_local_rows
    else:
        row_size, column, num_rows = weight.numel, 0, 1
    weight.dots = _dots(weight.local, shard.start, weight.numel, row_size, column, num_rows, update=True).contiguous()


def apply(weight: Weight, scale: torch.Tensor, coefficient: torch.Tensor) -> None:
    """Applies decay and the projected update. `scale` of shape `()`, `coefficient` of shape `(R,)` or `(1,)`."""
    local, start, stop = weight.local, weight.shard.start, weight.shard.start + weight.numel
    constants = _constants(local)
    del constants["beta2"], constants["rest2"]
    assert local.grad is not None
    moments = [moment[start:stop] for moment in local.moments]
    _apply_kernel[(triton.cdiv(weight.numel, BLOCK_SIZE),)](
        local.flat[start:stop], local.grad[start:stop], *moments, _corrections(local), scale, coefficient.contiguous(),
        weight.numel, weight.shard.row_size, weight.shard.offset % weight.shard.row_size, lr=local.group["lr"],
        ONE_ROW=coefficient.numel() == 1, BLOCK=BLOCK_SIZE, **constants,
    )  # fmt: skip
