"""Triton kernels of [`paired_log_probs`] for GPUs: one pass over a tile where torch needs several.

`test_triton_kernels_in_the_interpreter` holds them equal to what runs without Triton.
"""

import torch
from transformers.utils import is_triton_available


AVAILABLE = is_triton_available()

if AVAILABLE:
    import triton
    import triton.language as tl

    # Logits that one program holds in registers
    BLOCK_SIZE = 1024

    @triton.jit
    def _fold_kernel(
        policy, ref, policy_max, ref_max, policy_sum, ref_sum, policy_weighted, gap_weighted, num_columns,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        policy_m, ref_m = tl.load(policy_max + row), tl.load(ref_max + row)
        policy_s, ref_s = tl.load(policy_sum + row), tl.load(ref_sum + row)
        policy_w, gap_w = tl.load(policy_weighted + row), tl.load(gap_weighted + row)
        for start in range(0, num_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            valid = column < num_columns
            z = tl.load(policy + row * num_columns + column, mask=valid, other=-float("inf"))
            z_ref = tl.load(ref + row * num_columns + column, mask=valid, other=-float("inf"))
            new_m = tl.maximum(policy_m, tl.max(z, axis=0))
            new_ref_m = tl.maximum(ref_m, tl.max(z_ref, axis=0))
            weight = tl.where(valid, tl.exp(z - new_m), 0.0)
            ref_weight = tl.where(valid, tl.exp(z_ref - new_ref_m), 0.0)
            rescale, ref_rescale = tl.exp(policy_m - new_m), tl.exp(ref_m - new_ref_m)
            policy_s = policy_s * rescale + tl.sum(weight, axis=0)
            policy_w = policy_w * rescale + tl.sum(tl.where(valid, weight * z, 0.0), axis=0)
            ref_s = ref_s * ref_rescale + tl.sum(ref_weight, axis=0)
            gap_w = gap_w * ref_rescale + tl.sum(tl.where(valid, ref_weight * (z_ref - z), 0.0), axis=0)
            policy_m, ref_m = new_m, new_ref_m
        tl.store(policy_max + row, policy_m)
        tl.store(ref_max + row, ref_m)
        tl.store(policy_sum + row, policy_s)
        tl.store(ref_sum + row, ref_s)
        tl.store(policy_weighted + row, policy_w)
        tl.store(gap_weighted + row, gap_w)

    @triton.jit
    def _logit_gradient_kernel(
        logits, ref_logits, normalizer, ref_normalizer, grad_log_probs, grad_kl, local_labels, num_columns,
        HAS_KL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        valid = column < num_columns
        place = row * num_columns + column
        grad = tl.load(grad_log_probs + row)
        probability = tl.exp(tl.load(logits + place, mask=valid, other=0.0) - tl.load(normalizer + row))
        if HAS_KL:
            divergence_grad = tl.load(grad_kl + row)
            ref_logit = tl.load(ref_logits + place, mask=valid, other=0.0)
            ref_probability = tl.exp(ref_logit - tl.load(ref_normalizer + row))
            gradient = (divergence_grad - grad) * probability - divergence_grad * ref_probability
        else:
            gradient = -grad * probability
        gradient += tl.where(column == tl.load(local_labels + row), grad, 0.0)
        tl.store(logits + place, gradient, mask=valid)


def fold(policy: torch.Tensor, ref: torch.Tensor, running: list[torch.Tensor]) -> None:
    """
    Folds one tile of both models' logits, contiguous `(R, C)`, into the running statistics of its rows, `(R,)` each:
    maxima of both, sums of exponentials of both, weighted logits of the policy, weighted gaps between the two.
    """
    _fold_kernel[(policy.size(0),)](policy, ref, *running, policy.size(1), BLOCK=BLOCK_SIZE)


def logit_gradient_(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    normalizers: list[torch.Tensor],
    grad_log_probs: torch.Tensor,
    grad_kl: torch.Tensor | None,
    local_labels: torch.Tensor,
) -> torch.Tensor:
    """Gradient of one tile of logits, contiguous `(R, C)`, in their place."""
    has_kl = ref_logits is not None and grad_kl is not None
    divergence_gradient = grad_log_probs if grad_kl is None else grad_kl
    _logit_gradient_kernel[(logits.size(0), triton.cdiv(logits.size(1), BLOCK_SIZE))](
        logits, ref_logits if has_kl else logits, normalizers[0].contiguous(), normalizers[1].contiguous(),
        grad_log_probs.contiguous(), divergence_gradient.contiguous(), local_labels.contiguous(),
        logits.size(1), HAS_KL=has_kl, BLOCK=BLOCK_SIZE,
    )  # fmt: skip
    return logits
