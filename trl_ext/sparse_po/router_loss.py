"""The load-balancing loss of a mixture of experts, as the model's own forward takes it."""

import inspect
import sys
from typing import Any

import torch
from transformers import PreTrainedModel


def router_loss(
    model: PreTrainedModel, router_logits: Any, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Load-balancing loss of a batch, by the function that the model's module defines for its own forward.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        router_logits (`tuple` of `torch.Tensor`, each of shape `(2B * T, E)`, or `None`):
            Logits over the `E` experts that its backbone returned for each layer; `None` or empty without experts.
        attention_mask (`torch.Tensor` of shape `(2B, T)`, *optional*):
            Zero for padding, which is not counted.

    Returns:
        `torch.Tensor` of shape `()`, float32, zero where the family's own forward has no such loss.

    Raises:
        NotImplementedError: If the function asks for more than experts, experts for each token and the mask.
    """
    balance = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if balance is None or not router_logits:
        return torch.zeros((), device=model.device)
    taken = list(inspect.signature(balance).parameters)
    if taken != ["gate_logits", "num_experts", "top_k", "attention_mask"]:
        raise NotImplementedError(
            f"{type(model).__name__} ({model.config.model_type}) balances its experts by a loss of its own "
            f"({', '.join(taken)}), which SparsePO does not compute. Set `router_aux_loss_coef=0`, and "
            "`output_router_logits=False` in the model's config."
        )
    return balance(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)


def check_router_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """
    Computes the load-balancing loss of a few tokens, before training asks for it.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        inputs (`dict[str, torch.Tensor]`):
            `input_ids` and `attention_mask`, each `(2B, T)`.

    Raises:
        NotImplementedError: If the family's loss is one that SparsePO does not compute.
    """
    output = model.base_model(**inputs, use_cache=False, output_router_logits=True)
    router_loss(model, getattr(output, "router_logits", None) or (), inputs["attention_mask"])
