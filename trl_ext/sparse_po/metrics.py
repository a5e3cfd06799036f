"""Metrics that SparsePO adds to TRL's, from the per-token outputs of one batch."""

from collections.abc import Callable

import torch

from .masked_forward import MaskedCausalLMOutput


def token_metrics(
    outputs: MaskedCausalLMOutput,
    completion_mask: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> dict[str, float]:
    """
    Args:
        outputs ([`MaskedCausalLMOutput`]):
            Output of the policy's forward, chosen rows first.
        completion_mask (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Response tokens.
        gather (`Callable`, *optional*):
            Gathers a tensor over the processes along its first dimension.

    Returns:
        `dict[str, float]`: `logps/chosen` and `logps/rejected` (policy's sums, nats), `kl/chosen` and `kl/rejected`
        (KL(reference || policy) summed over a response, nats), and for each of the masks `mask/<term>/mean` (over
        response tokens), `mask/<term>/sparsity_chosen` and `_rejected` (share of tokens with weight zero, averaged
        over the sequences), and `mask/dead_sequences` (share of sequences where a mask is zero on every token).
    """
    assert outputs.policy_log_probs is not None and outputs.divergences is not None
    assert outputs.reward_mask is not None and outputs.divergence_mask is not None
    lengths = completion_mask.sum(dim=1).clamp_min(1)
    per_sequence = {
        "logps": outputs.policy_log_probs.sum(dim=1),
        "kl": outputs.divergences.sum(dim=1),
    }
    dead = torch.zeros_like(lengths, dtype=torch.bool)
    for term, mask in (("reward", outputs.reward_mask.detach()), ("divergence", outputs.divergence_mask.detach())):
        zeros = ((mask == 0) & completion_mask).sum(dim=1)
        per_sequence[f"mask/{term}/sparsity"] = zeros / lengths
        per_sequence[f"mask/{term}/sum"] = mask.sum(dim=1)
        dead |= zeros == lengths
    columns = torch.stack([*(x.float() for x in per_sequence.values()), dead.float(), lengths.float()], dim=1)
    chosen, rejected = columns.chunk(2, dim=0)
    gathered = gather(torch.stack([chosen, rejected], dim=1)).mean(dim=0).tolist()
    values = {
        side: dict(zip([*per_sequence, "dead", "length"], row, strict=True))
        for side, row in zip(("chosen", "rejected"), gathered, strict=True)
    }
    num_tokens = values["chosen"]["length"] + values["rejected"]["length"]
    metrics = {f"{name}/{side}": values[side][name] for name in ("logps", "kl") for side in values}
    for term in ("reward", "divergence"):
        total = values["chosen"][f"mask/{term}/sum"] + values["rejected"][f"mask/{term}/sum"]
        metrics[f"mask/{term}/mean"] = total / num_tokens
        for side in values:
            metrics[f"mask/{term}/sparsity_{side}"] = values[side][f"mask/{term}/sparsity"]
    metrics["mask/dead_sequences"] = (values["chosen"]["dead"] + values["rejected"]["dead"]) / 2
    return metrics
