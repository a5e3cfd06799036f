"""Triton kernels of [`paired_log_probs`] for GPUs: one pass over a tile where torch needs several.

A tile holds projections as the matrix product left them, bfloat16 for bfloat16 models; bias, scale, soft-capping and
all sums are float32, in registers. For each token and vocabulary entry in bfloat16, 8 bytes are moved in the forward
pass (two products write their tiles, [`fold`] reads both) and 10 in the backward pass ([`logit_gradient_`] also writes
one), which `python -m tests.benchmarks.head_traffic` counts. `test_triton_kernels_in_the_interpreter` holds them to
float64.
"""

import importlib.util
from typing import NamedTuple

import torch


AVAILABLE = importlib.util.find_spec("triton") is not None
# Raised with what a field or an argument below means, so that no kernel of the Hub from before is taken for this one
VERSION = 1
INTERFACE = ("VERSION", "Side", "Running", "fold", "logit_gradient_")


class Side(NamedTuple):
    """
    One model's tile of projections, and what makes logits of them.

    Attributes:
        tile (`torch.Tensor` of shape `(R, C)`, contiguous): Projections, in the dtype of the product or in float32.
        bias (`torch.Tensor` of shape `(C,)`, *optional*): Bias of the tile's columns.
        scale (`float`): Factor on projection and bias.
        softcap (`float`, *optional*): Soft-capping bound of the scaled sum.
    """

    tile: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


class Running(NamedTuple):
    """
    Running statistics of a tile's rows, each `(R,)` float32, contiguous; [`fold`] writes them.

    Attributes:
        policy_max (`torch.Tensor`): Highest logit of the policy.
        ref_max (`torch.Tensor`): Highest logit of the reference model.
        policy_sum (`torch.Tensor`): Sum of the policy's exponentials, relative to its highest logit.
        ref_sum (`torch.Tensor`): The reference model's.
        policy_weighted (`torch.Tensor`): The policy's logits, each times its exponential.
        gap_weighted (`torch.Tensor`): Reference's minus policy's logits, each times the reference's exponential.
        logit_sum (`torch.Tensor`): Sum of the policy's logits.
        policy_label (`torch.Tensor`): The policy's logit of the label, written by the tile that holds it.
        ref_label (`torch.Tensor`): The reference model's.
    """

    policy_max: torch.Tensor
    ref_max: torch.Tensor
    policy_sum: torch.Tensor
    ref_sum: torch.Tensor
    policy_weighted: torch.Tensor
    gap_weighted: torch.Tensor
    logit_sum: torch.Tensor
    policy_label: torch.Tensor
    ref_label: torch.Tensor


if AVAILABLE:
    import triton
    import triton.language as tl

    # Entries that one program holds at a time: 16 bytes of bfloat16 for each thread of its eight warps
    BLOCK_SIZE = 2048
    NUM_WARPS = 8
    # Where a lane's maximum starts: finite, so that its distance to a masked entry's -inf is no NaN
    LOWEST = tl.constexpr(-3.0e38)

    @triton.jit
    def _squash(projection, bias, scale, softcap, HAS_SOFTCAP: tl.constexpr):
        """Logit, and the hyperbolic tangent in it or 0."""
        logit = (projection.to(tl.float32) + bias) * scale
        tangent = 0.0
        if HAS_SOFTCAP:
            tangent = 2.0 * tl.sigmoid(2.0 * logit / softcap) - 1.0
            logit = softcap * tangent
        return logit, tangent

    @triton.jit
    def _load(tile, place, bias, column, valid, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
        added = 0.0
        if HAS_BIAS:
            added = tl.load(bias + column, mask=valid, other=0.0).to(tl.float32)
        return _squash(tl.load(tile + place, mask=valid, other=0.0), added, scale, softcap, HAS_SOFTCAP)

    @triton.jit
    def _weigh(logit, maximum):
        """The exponential of a lane's next logit, the factor on what the lane holds, and its new maximum."""
        distance = logit - maximum
        smaller = tl.exp(-tl.abs(distance))
        rises = distance > 0
        return tl.where(rises, 1.0, smaller), tl.where(rises, smaller, 1.0), tl.maximum(maximum, logit)

    @triton.jit
    def _fold_kernel(
        policy, ref, policy_bias, ref_bias, policy_max, ref_max, policy_sum, ref_sum, policy_weighted, gap_weighted,
        logit_sum, policy_label, ref_label, labels, first_column, num_columns, policy_scale, policy_softcap, ref_scale,
        ref_softcap, POLICY_BIAS: tl.constexpr, REF_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr,
        REF_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        policy_row, ref_row = policy + row * num_columns, ref + row * num_columns
        lane = tl.arange(0, BLOCK)
        zeros = tl.zeros((BLOCK,), tl.float32)
        top, ref_top = zeros + LOWEST, zeros + LOWEST
        total, ref_total, weighted, gap, plain = zeros, zeros, zeros, zeros, zeros
        for start in range(0, num_columns, BLOCK):
            column = start + lane
            valid = column < num_columns
            z, _ = _load(
                policy_row, column, policy_bias, column, valid, policy_scale, policy_softcap, POLICY_BIAS,
                POLICY_SOFTCAP,
            )  # fmt: skip
            z_ref, _ = _load(
                ref_row, column, ref_bias, column, valid, ref_scale, ref_softcap, REF_BIAS, REF_SOFTCAP
            )  # fmt: skip
            plain += tl.where(valid, z, 0.0)
            weight, factor, top = _weigh(tl.where(valid, z, -float("inf")), top)
            ref_weight, ref_factor, ref_top = _weigh(tl.where(valid, z_ref, -float("inf")), ref_top)
            total = total * factor + weight
            weighted = weighted * factor + weight * z
            ref_total = ref_total * ref_factor + ref_weight
            gap = gap * ref_factor + ref_weight * (z_ref - z)
        # The lanes' sums and those of the tiles before, all relative to one maximum
        old, ref_old = tl.load(policy_max + row), tl.load(ref_max + row)
        new, ref_new = tl.maximum(old, tl.max(top, axis=0)), tl.maximum(ref_old, tl.max(ref_top, axis=0))
        factor, ref_factor = tl.exp(top - new), tl.exp(ref_top - ref_new)
        kept, ref_kept = tl.exp(old - new), tl.exp(ref_old - ref_new)
        tl.store(policy_max + row, new)
        tl.store(ref_max + row, ref_new)
        tl.store(policy_sum + row, tl.load(policy_sum + row) * kept + tl.sum(total * factor, axis=0))
        tl.store(ref_sum + row, tl.load(ref_sum + row) * ref_kept + tl.sum(ref_total * ref_factor, axis=0))
        tl.store(policy_weighted + row, tl.load(policy_weighted + row) * kept + tl.sum(weighted * factor, axis=0))
        tl.store(gap_weighted + row, tl.load(gap_weighted + row) * ref_kept + tl.sum(gap * ref_factor, axis=0))
        tl.store(logit_sum + row, tl.load(logit_sum + row) + tl.sum(plain, axis=0))
        label = tl.load(labels + row) - first_column
        inside = (label >= 0) & (label < num_columns)
        z, _ = _load(
            policy_row, label, policy_bias, label, inside, policy_scale, policy_softcap, POLICY_BIAS, POLICY_SOFTCAP
        )  # fmt: skip
        z_ref, _ = _load(ref_row, label, ref_bias, label, inside, ref_scale, ref_softcap, REF_BIAS, REF_SOFTCAP)
        tl.store(policy_label + row, z, mask=inside)
        tl.store(ref_label + row, z_ref, mask=inside)

    @triton.jit
    def _logit_gradient_kernel(
        policy, ref, policy_bias, ref_bias, normalizer, ref_normalizer, grad_log_probs, grad_kl, labels, first_column,
        num_columns, policy_scale, policy_softcap, ref_scale, ref_softcap, HAS_KL: tl.constexpr,
        POLICY_BIAS: tl.constexpr, REF_BIAS: tl.constexpr, POLICY_SOFTCAP: tl.constexpr, REF_SOFTCAP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        valid = column < num_columns
        place = row * num_columns + column
        grad = tl.load(grad_log_probs + row)
        z, tangent = _load(
            policy, place, policy_bias, column, valid, policy_scale, policy_softcap, POLICY_BIAS, POLICY_SOFTCAP
        )  # fmt: skip
        probability = tl.exp(z - tl.load(normalizer + row))
        if HAS_KL:
            divergence_grad = tl.load(grad_kl + row)
            z_ref, _ = _load(ref, place, ref_bias, column, valid, ref_scale, ref_softcap, REF_BIAS, REF_SOFTCAP)
            ref_probability = tl.exp(z_ref - tl.load(ref_normalizer + row))
            gradient = (divergence_grad - grad) * probability - divergence_grad * ref_probability
        else:
            gradient = -grad * probability
        gradient += tl.where(column == tl.load(labels + row) - first_column, grad, 0.0)
        if POLICY_SOFTCAP:
            gradient *= 1.0 - tangent * tangent
        tl.store(policy + place, (gradient * policy_scale).to(policy.dtype.element_ty), mask=valid)


def _transforms(policy: Side, ref: Side) -> dict[str, float | bool]:
    return {
        "policy_scale": policy.scale, "policy_softcap": policy.softcap or 1.0, "ref_scale": ref.scale,
        "ref_softcap": ref.softcap or 1.0, "POLICY_BIAS": policy.bias is not None, "REF_BIAS": ref.bias is not None,
        "POLICY_SOFTCAP": policy.softcap is not None, "REF_SOFTCAP": ref.softcap is not None,
    }  # fmt: skip


def fold(policy: Side, ref: Side, running: Running, labels: torch.Tensor, first_column: int) -> None:
    """
    Folds one tile of both models into the running statistics of its rows.

    Args:
        policy (`Side`):
            The policy's tile.
        ref (`Side`):
            The reference model's, of the same shape.
        running (`Running`):
            Statistics of the tiles before, with maxima of `-inf` before the first.
        labels (`torch.Tensor` of shape `(R,)`, int64):
            Labels of the rows, in the whole vocabulary.
        first_column (`int`):
            The vocabulary entry of the tile's first column.
    """
    tile, other = policy.tile, ref.tile
    # A pointer that is not read stands for a bias that is missing
    _fold_kernel[(tile.size(0),)](
        tile, other, tile if policy.bias is None else policy.bias, other if ref.bias is None else ref.bias, *running,
        labels.contiguous(), first_column, tile.size(1), **_transforms(policy, ref), BLOCK=BLOCK_SIZE,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def logit_gradient_(
    policy: Side,
    ref: Side | None,
    normalizers: list[torch.Tensor],
    grad_log_probs: torch.Tensor,
    grad_kl: torch.Tensor | None,
    labels: torch.Tensor,
    first_column: int,
) -> torch.Tensor:
    """
    Gradient of one tile of the policy's projections, in their place and in their dtype.

    Args:
        policy (`Side`):
            The policy's tile; it is overwritten.
        ref (`Side` or `None`):
            The reference model's, where `grad_kl` is given.
        normalizers (`list[torch.Tensor]`):
            `log sum_v exp(z)` of the policy's and of the reference model's logits, `(R,)` float32 each.
        grad_log_probs (`torch.Tensor` of shape `(R,)`):
            Gradient of the label's log-probability.
        grad_kl (`torch.Tensor` of shape `(R,)`, or `None`):
            Gradient of the divergence.
        labels (`torch.Tensor` of shape `(R,)`, int64):
            Labels of the rows, in the whole vocabulary.
        first_column (`int`):
            The vocabulary entry of the tile's first column.

    Returns:
        `torch.Tensor` of shape `(R, C)`: The policy's tile.
    """
    tile, has_kl = policy.tile, ref is not None and grad_kl is not None
    other = policy if ref is None else ref
    _logit_gradient_kernel[(tile.size(0), triton.cdiv(tile.size(1), BLOCK_SIZE))](
        tile, other.tile, tile if policy.bias is None else policy.bias, tile if other.bias is None else other.bias,
        normalizers[0].contiguous(), normalizers[1].contiguous(), grad_log_probs.contiguous(),
        (grad_log_probs if grad_kl is None else grad_kl).contiguous(), labels.contiguous(), first_column, tile.size(1),
        **_transforms(policy, other), HAS_KL=has_kl, BLOCK=BLOCK_SIZE, num_warps=NUM_WARPS,
    )  # fmt: skip
    return tile
