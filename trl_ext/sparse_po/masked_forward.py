"""SparsePO's forward pass of the policy: per-token terms of the loss in place of per-token log-probabilities.

Masks and head run inside the policy's own forward, so that DDP synchronises the masks and DeepSpeed and FSDP own them,
as TRL's fused head does for the language-model head.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .._upstream import FusedCausalLMOutput
from .loss import sparse_po_terms
from .masks import LearnedTokenMask, MaskInit
from .paired_lm_head import logit_transform, paired_log_probs
from .reference_states import ReferenceCollector, ReferenceStates


TOKEN_MASKS = "token_masks"
# PeftModel.forward passes these on as None, where a backbone may not take them
_PEFT_EXTRAS = ("output_hidden_states", "output_attentions", "return_dict")


@dataclass
class MaskedCausalLMOutput(FusedCausalLMOutput):
    """
    Output of the policy's forward under SparsePO. Every per-token field has shape `(2B, T-1)`, is float32, and is zero
    outside the completion.

    Attributes:
        log_probs (`torch.Tensor`):
            The terms of [`sparse_po_terms`], not log-probabilities: TRL sums them as it sums log-probabilities.
        policy_log_probs (`torch.Tensor`):
            Log-probabilities of the labels under the policy, without gradient.
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
        head (`torch.nn.Module`):
            Its language-model head, sharded or not.
    """

    states: ReferenceStates
    model: PreTrainedModel
    head: nn.Linear


class TokenMasks(nn.Module):
    """
    The learned masks that a setting uses, and the rule by which they weight the two terms.

    A mask that no term uses is not built, so no engine sees a parameter without gradient.

    Args:
        num_layers (`int`):
            Layers of the reference model.
        hidden_size (`int`):
            Size of its hidden states.
        mask_type (`str`):
            `"learned"`, `"activation"` or `"ones"`.
        independent (`bool`):
            Whether rewards and divergences have masks of their own.
        mask_reward (`bool`):
            Whether log-ratios are masked.
        mask_divergence (`bool`):
            Whether divergences are masked.
        init (`str`):
            Initialisation of [`LearnedTokenMask`].
        seed (`int`):
            Seed of the masks' random weights, so that every process draws the same.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        mask_type: str = "learned",
        independent: bool = False,
        mask_reward: bool = True,
        mask_divergence: bool = True,
        init: MaskInit = "positive",
        seed: int = 0,
    ):
        super().__init__()
        self.mask_type = mask_type
        self.masks_reward = mask_type != "ones" and mask_reward
        self.masks_divergence = mask_type != "ones" and mask_divergence
        self.independent = independent
        names = ["common"]
        if independent:
            names = ["reward"] * self.masks_reward + ["divergence"] * self.masks_divergence
        if mask_type != "learned":
            names = []
        generator = torch.Generator().manual_seed(seed)
        self.learned = nn.ModuleDict(
            {name: LearnedTokenMask(num_layers, hidden_size, init, generator) for name in names}
        )

    @property
    def is_common(self) -> bool:
        """Whether one learned mask weights both terms."""
        return self.mask_type == "learned" and not self.independent and self.masks_reward and self.masks_divergence

    def forward(self, states: ReferenceStates, predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states ([`ReferenceStates`]):
                States of the reference model.
            predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
                Positions that predict a response token.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: reward mask and divergence mask, each `(2B, T-1)` float32, zero
            outside the completion.
        """
        ones = predicted.float()
        weights: dict[str, torch.Tensor]
        if self.mask_type == "activation":
            if states.activation_mask is None:
                raise ValueError("`states` has no activation mask: collect it with `mask_type='activation'`.")
            weights = {"common": states.activation_mask}
        else:
            weights = {
                name: scatter_tokens(mask(states.layer_states), predicted) for name, mask in self.learned.items()
            }
        reward_name, divergence_name = ("reward", "divergence") if self.independent else ("common", "common")
        reward_mask = weights[reward_name] if self.masks_reward else ones
        divergence_mask = weights[divergence_name] if self.masks_divergence else ones
        return reward_mask, divergence_mask


def scatter_tokens(values: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Puts `(N,)` values of the response tokens at their places in `(2B, T-1)`, zero elsewhere, with gradient."""
    return values.new_zeros(predicted.shape).masked_scatter(predicted, values)


def add_token_masks(
    model: PreTrainedModel,
    masks: TokenMasks | None = None,
    divergence_coef: float = 1.0,
    detach_chosen_divergence: bool = False,
) -> None:
    """
    Gives `model.forward` two more keywords, on top of TRL's fused head.

    With `reference_collector=collector` the forward only runs the backbone for the collector. With
    `reference=reference_input` it returns a [`MaskedCausalLMOutput`]. With neither it is unchanged.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model to patch, before any engine wraps it. Under PEFT, the base model.
        masks ([`TokenMasks`], *optional*):
            Masks to attach as the submodule `token_masks`; a reference model has none.
        divergence_coef (`float`, *optional*, defaults to `1.0`):
            See [`sparse_po_terms`].
        detach_chosen_divergence (`bool`, *optional*, defaults to `False`):
            See [`sparse_po_terms`].
    """
    unmasked_forward = model.forward
    if masks is not None:
        model.add_module(TOKEN_MASKS, masks)

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        reference: ReferenceInput | None = None,
        reference_collector: ReferenceCollector | None = None,
        **kwargs: Any,
    ) -> Any:
        if reference is None and reference_collector is None:
            return unmasked_forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs.pop("fused_lm_head", None)
        kwargs["use_cache"] = False
        for name in _PEFT_EXTRAS:
            if kwargs.get(name) is None:
                kwargs.pop(name, None)
        if reference_collector is not None:
            reference_collector.run(self, labels, *args, **kwargs)
            return FusedCausalLMOutput(loss=reference_collector.states.hidden.new_zeros(()))
        assert reference is not None
        return _masked_forward(self, labels, reference, divergence_coef, detach_chosen_divergence, args, kwargs)

    model.forward = types.MethodType(forward, model)


def _masked_forward(
    model: PreTrainedModel,
    labels: torch.Tensor,
    reference: ReferenceInput,
    divergence_coef: float,
    detach_chosen_divergence: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> MaskedCausalLMOutput:
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = model.base_model(*args, **kwargs)
    head = model.get_output_embeddings()
    device = head.weight.device
    labels = labels[:, 1:].to(device)
    predicted = labels != -100
    hidden = backbone.last_hidden_state[:, :-1].to(device)[predicted]
    scale, softcap = logit_transform(config)
    ref_scale, ref_softcap = logit_transform(reference.model.config.get_text_config())
    log_probs, ref_log_probs, divergences, statistics = paired_log_probs(
        hidden,
        head.weight,
        reference.states.hidden.to(device),
        reference.head.weight,
        labels[predicted],
        policy_bias=getattr(head, "bias", None),
        ref_bias=getattr(reference.head, "bias", None),
        policy_logit_scale=scale,
        policy_softcap=softcap,
        ref_logit_scale=ref_scale,
        ref_softcap=ref_softcap,
        return_statistics=True,
    )
    log_probs, ref_log_probs, divergences, entropy, mean_logits, is_top1 = (
        scatter_tokens(values, predicted) for values in (log_probs, ref_log_probs, divergences, *statistics)
    )
    reward_mask, divergence_mask = getattr(model, TOKEN_MASKS)(reference.states, predicted)
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
        aux_loss = load_balancing_loss_func(
            backbone.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
        )
    return MaskedCausalLMOutput(
        log_probs=terms,
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1,
        aux_loss=aux_loss,
        policy_log_probs=log_probs.detach(),
        reference_log_probs=ref_log_probs,
        divergences=divergences.detach(),
        reward_mask=reward_mask,
        divergence_mask=divergence_mask,
    )
