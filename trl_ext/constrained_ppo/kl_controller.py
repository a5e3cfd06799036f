"""The coefficient of the KL, fixed or adaptive (https://huggingface.co/papers/2310.04373, appendix B)."""

import torch


CLIP = 0.2


def adapted_coefficient(coefficient: float, divergence: float, target: float, step: float) -> float:
    """
    `coefficient * (1 + step * clip((divergence - target) / target, -0.2, 0.2))`.

    Args:
        coefficient (`float`):
            Coefficient so far.
        divergence (`float`):
            KL for each token of the last rollout, in nats.
        target (`float`):
            Wanted KL for each token, in nats, positive.
        step (`float`):
            Step, in (0, 1).

    Returns:
        `float`
    """
    error = (divergence - target) / target
    return coefficient * (1 + step * max(-CLIP, min(CLIP, error)))


def token_divergence(log_probs: torch.Tensor, reference_log_probs: torch.Tensor, estimator: str) -> torch.Tensor:
    """
    Estimate of the KL from the reference at each sampled token.

    Args:
        log_probs (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities of the tokens under the policy that sampled them.
        reference_log_probs (`torch.Tensor` of shape `(B, T)`):
            Under the reference.
        estimator (`str`):
            `"k1"`, the log-ratio, or `"k3"`, `exp(-ratio) - 1 + ratio`, unbiased too and never negative.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in nats.

    Raises:
        ValueError: If the estimator is unknown.
    """
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"`kl_estimator` must be 'k1' or 'k3', got {estimator!r}.")
