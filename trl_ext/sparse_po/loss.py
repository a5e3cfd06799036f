r"""The SparsePO objective on tensors (https://huggingface.co/papers/2410.05102).

For response token `t`, `log_ratio_t` is the sampled log-ratio between policy and reference, `KL_t` the full-vocabulary
KL(reference || policy) at that position, `m_u` the reward mask, `m_d` the divergence mask and `c` = `divergence_coef`:

    term_t = m_u,t * log_ratio_t + c * m_d,t * KL_t
    loss   = mean over the pairs of  -log sigmoid(beta * (sum of chosen term_t - sum of rejected term_t))  + L1 penalty

In training [`sparse_po_terms`] and [`mask_l1_penalty`] run as they stand, and TRL's own code sums the terms and takes
its loss of them; `test_trainer_loss_equals_the_formula` holds the trainer equal to [`sparse_po_loss`].
"""

import torch
import torch.nn.functional as F


def sparse_po_terms(
    log_ratios: torch.Tensor,
    divergences: torch.Tensor,
    reward_mask: torch.Tensor,
    divergence_mask: torch.Tensor,
    divergence_coef: float = 1.0,
    detach_chosen_divergence: bool = False,
) -> torch.Tensor:
    """
    Per-token terms whose sum over a response is `U + divergence_coef * D`, where `U` sums the masked log-ratios and
    `D` the masked divergences.

    Args:
        log_ratios (`torch.Tensor` of shape `(2B, T-1)`, float32):
            `log pi(y_t) - log pi_ref(y_t)` in nats, chosen rows first, zero outside the completion.
        divergences (`torch.Tensor` of shape `(2B, T-1)`, float32):
            `KL(pi_ref || pi)` in nats at each position, not negative, zero outside the completion.
        reward_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Weight `m_u` of each log-ratio.
        divergence_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Weight `m_d` of each divergence.
        divergence_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence term. With masks of one, `0` gives DPO and `1` gives TDPO1.
        detach_chosen_divergence (`bool`, *optional*, defaults to `False`):
            Whether to stop the gradient through the chosen divergence, as TDPO2 does.

    Returns:
        `torch.Tensor` of shape `(2B, T-1)`.
    """
    if detach_chosen_divergence:
        chosen, rejected = divergences.chunk(2, dim=0)
        divergences = torch.cat([chosen.detach(), rejected])
    return reward_mask * log_ratios + divergence_coef * divergence_mask * divergences


def sparse_po_loss(
    log_ratios: torch.Tensor,
    divergences: torch.Tensor,
    reward_mask: torch.Tensor,
    divergence_mask: torch.Tensor,
    beta: float,
    *,
    divergence_coef: float = 1.0,
    detach_chosen_divergence: bool = False,
    l1_reward: float = 0.0,
    l1_divergence: float = 0.0,
    common_mask: bool = False,
) -> torch.Tensor:
    """
    SparsePO loss of a batch of pairs, the formula at the head of this module:
    `-log sigmoid(beta * [U(chosen) - U(rejected) + coef * (D(chosen) - D(rejected))])`, averaged over the pairs, plus
    the L1 penalty of the masks ([`mask_l1_penalty`]).

    Args:
        log_ratios (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Sampled log-ratios in nats, chosen rows first, zero outside the completion.
        divergences (`torch.Tensor` of shape `(2B, T-1)`, float32):
            `KL(pi_ref || pi)` in nats at each position, zero outside the completion.
        reward_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Weight `m_u` of each log-ratio, zero outside the completion.
        divergence_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Weight `m_d` of each divergence, zero outside the completion.
        beta (`float`):
            Inverse temperature of the implicit reward; it multiplies both terms.
        divergence_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the divergence term.
        detach_chosen_divergence (`bool`, *optional*, defaults to `False`):
            Whether to stop the gradient through the chosen divergence.
        l1_reward (`float`, *optional*, defaults to `0.0`):
            Weight of the L1 norm of the reward mask.
        l1_divergence (`float`, *optional*, defaults to `0.0`):
            Weight of the L1 norm of the divergence mask.
        common_mask (`bool`, *optional*, defaults to `False`):
            Whether one mask serves both terms, in which case both L1 weights are halved.

    Returns:
        `torch.Tensor` of shape `()`: mean over the pairs.

    Raises:
        ValueError: If the four tensors differ in shape or the number of rows is odd.
    """
    shapes = [tuple(x.shape) for x in (log_ratios, divergences, reward_mask, divergence_mask)]
    if len(set(shapes)) != 1 or log_ratios.dim() != 2 or log_ratios.size(0) % 2:
        raise ValueError(
            "`log_ratios`, `divergences`, `reward_mask` and `divergence_mask` must share one shape `(2B, T-1)` with "
            f"the chosen rows first, got {shapes}."
        )
    terms = sparse_po_terms(
        log_ratios, divergences, reward_mask, divergence_mask, divergence_coef, detach_chosen_divergence
    )
    chosen, rejected = terms.sum(dim=1).chunk(2, dim=0)
    loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
    return loss + mask_l1_penalty(reward_mask, divergence_mask, l1_reward, l1_divergence, common_mask)


def mask_l1_penalty(
    reward_mask: torch.Tensor,
    divergence_mask: torch.Tensor,
    l1_reward: float,
    l1_divergence: float,
    common_mask: bool = False,
) -> torch.Tensor:
    """
    L1 penalty of the masks: sums over the tokens of a pair, averaged over the pairs, so its strength grows with
    length.

    Args:
        reward_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Mask `m_u`, not negative, zero outside the completion.
        divergence_mask (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Mask `m_d`, not negative, zero outside the completion.
        l1_reward (`float`):
            Weight of the reward mask's norm.
        l1_divergence (`float`):
            Weight of the divergence mask's norm.
        common_mask (`bool`, *optional*, defaults to `False`):
            Whether both masks are the same tensor; it is then counted in both terms and both weights are halved.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    num_pairs = reward_mask.size(0) // 2
    scale = (0.5 if common_mask else 1.0) / num_pairs
    return scale * (l1_reward * reward_mask.abs().sum() + l1_divergence * divergence_mask.abs().sum())


def sft_loss(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """
    Mean negative log-likelihood of the chosen responses' tokens, unmasked: the SFT term of RPO
    (https://huggingface.co/papers/2404.19733) and MPO (https://huggingface.co/papers/2411.10442).

    Args:
        log_probs (`torch.Tensor` of shape `(2B, T-1)`, float32):
            Log-probabilities under the policy in nats, chosen rows first.
        completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Response tokens.

    Returns:
        `torch.Tensor` of shape `()`: mean over all tokens of the batch's chosen responses.
    """
    chosen, _ = log_probs.chunk(2)
    return -chosen[completion_mask.chunk(2)[0]].mean()


def length_desensitized_weights(completion_mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Weights of tokens in LD-DPO (https://huggingface.co/papers/2409.06411), as TRL's `ld_alpha` has them: one up to the
    length of the pair's shorter response, `alpha` after it.

    Args:
        completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Response tokens, chosen rows first.
        alpha (`float`):
            Weight of the tokens that only the longer response has.

    Returns:
        `torch.Tensor` of shape `(2B, T-1)`, float32, zero outside the completion.
    """
    lengths = completion_mask.sum(dim=1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(1)
    return torch.where(completion_mask.cumsum(dim=1) <= shared, 1.0, alpha) * completion_mask
