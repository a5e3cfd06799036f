"""SparsePO's forward of the policy: per-token terms of the loss in place of per-token log-probabilities.

Masks and head run inside the policy's own forward, so that DDP synchronises the masks and DeepSpeed and FSDP own them,
as TRL's fused head does for the language-model head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .._upstream import FusedCausalLMOutput
from .lm_head.paired_log_probs import head_parameters, logit_transform, paired_log_probs
from .loss import sparse_po_terms
from .mask_kinds import TokenInputs
from .masks import TOKEN_MASKS, scatter_tokens
from .reference_pass import ReferenceStates, backbone_inputs, predicting_states, run_backbone
from .router_loss import router_loss
from .shared_prompts import pack_pairs


@dataclass
class MaskedCausalLMOutput(FusedCausalLMOutput):
    """
    Output of the policy's forward under SparsePO. Every per-token field has shape `(2B, T-1)`, is float32, and is zero
    outside the completion.

    Attributes:
        log_probs (`torch.Tensor`):
            The terms of [`sparse_po_terms`], not log-probabilities: TRL sums them as it sums log-probabilities.
        policy_log_probs (`torch.Tensor`):
            Log-probabilities of the labels under the policy, with gradient.
        reference_log_probs (`torch.Tensor`):
            Log-probabilities of the labels under the reference model.
        divergences (`torch.Tensor`):
            KL(reference || policy), without gradient.
        reward_mask (`torch.Tensor`):
            Weight of each log-ratio, with gradient.
        divergence_mask (`torch.Tensor`):
            Weight of each divergence, with gradient.
    """

    policy_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    divergences: torch.Tensor | None = None
    reward_mask: torch.Tensor | None = None
    divergence_mask: torch.Tensor | None = None


@dataclass
class ReferenceInput:
    """
    What the policy's forward is given of the reference model.

    Attributes:
        states ([`ReferenceStates`]):
            The reference model's states on the batch.
        model ([`~transformers.PreTrainedModel`]):
            Causal language model whose config says how logits are scaled and capped.
        head (`torch.nn.Module`, or anything with its `weight` and `bias`):
            Its language-model head, sharded or not (see [`reference_head`]).
        given (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Weights of the batch's tokens that came with the data, each `(2B, T-1)`, float32.
    """

    states: ReferenceStates
    model: PreTrainedModel
    head: Any
    given: tuple[torch.Tensor, torch.Tensor] | None = None


def policy_forward(
    model: PreTrainedModel,
    divergence_coef: float,
    detach_chosen_divergence: bool,
    share_prompt: bool,
    forward: Callable[..., Any],
    *args: Any,
    reference: ReferenceInput | None = None,
    **kwargs: Any,
) -> Any:
    """
    What `model.forward`, which was `forward`, becomes (see [`extend_forward`]): given a `reference`, a call of TRL's
    fused head returns a [`MaskedCausalLMOutput`]; other calls are unchanged.
    """
    if reference is None or not kwargs.get("fused_lm_head"):
        return forward(*args, **kwargs)
    labels, kwargs = backbone_inputs(kwargs)
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    packed = pack_pairs(kwargs["input_ids"], kwargs["attention_mask"]) if share_prompt else None
    backbone = run_backbone(model, packed, *args, **kwargs)
    labels = labels[:, 1:].to(model.get_output_embeddings().weight.device)
    predicted = labels != -100
    # (N, H): the N response tokens only
    hidden = predicting_states(backbone.last_hidden_state.to(labels.device), predicted, packed)
    log_probs, ref_log_probs, divergences, entropy, mean_logits, is_top1 = (
        scatter_tokens(values, predicted) for values in _head_outputs(model, hidden, labels[predicted], reference)
    )
    tokens = TokenInputs(
        predicted, reference.states, labels, log_probs.detach(), ref_log_probs, divergences.detach(), entropy,
        reference.given,
    )  # fmt: skip
    reward_mask, divergence_mask = getattr(model, TOKEN_MASKS)(reference.states, predicted, tokens)
    terms = sparse_po_terms(
        log_probs - ref_log_probs,
        divergences if divergence_coef else divergences.detach(),
        reward_mask,
        divergence_mask,
        divergence_coef,
        detach_chosen_divergence,
    )
    aux_loss = None
    if kwargs.get("output_router_logits"):
        # Of a shared prompt's tokens each row of the pair counts its own
        router_logits = getattr(backbone, "router_logits", None) or ()
        router_logits = router_logits if packed is None else packed.unpack_flat(router_logits)
        aux_loss = router_loss(model, router_logits, kwargs.get("attention_mask"))
    return MaskedCausalLMOutput(
        log_probs=terms,
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        aux_loss=aux_loss,
        policy_log_probs=log_probs,
        reference_log_probs=ref_log_probs,
        divergences=divergences.detach(),
        reward_mask=reward_mask,
        divergence_mask=divergence_mask,
    )


def _head_outputs(
    model: PreTrainedModel, hidden: torch.Tensor, labels: torch.Tensor, reference: ReferenceInput
) -> tuple[torch.Tensor, ...]:
    """Both models' log-probabilities, divergences, and the policy's entropy, mean logits and top-1, each `(N,)`."""
    weight, bias = head_parameters(model.get_output_embeddings())
    ref_weight, ref_bias = head_parameters(reference.head)
    scale, softcap = logit_transform(model.config.get_text_config())
    ref_scale, ref_softcap = logit_transform(reference.model.config.get_text_config())
    *values, statistics = paired_log_probs(
        hidden,
        weight,
        reference.states.hidden.to(hidden.device),
        ref_weight,
        labels,
        policy_bias=bias,
        ref_bias=ref_bias,
        policy_logit_scale=scale,
        policy_softcap=softcap,
        ref_logit_scale=ref_scale,
        ref_softcap=ref_softcap,
        return_statistics=True,
    )
    return (*values, *statistics)
