"""Value heads on the policy's last hidden state, one for each reward and one for the KL."""

import functools
import types
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .._compat import FusedCausalLMOutput


VALUE_HEADS = "value_heads"


@dataclass
class ValuedCausalLMOutput(FusedCausalLMOutput):
    """
    TRL's output with the values.

    Attributes:
        state_values (`torch.Tensor` of shape `(B, T-1, K+1)`, float32):
            Value of the state before each next token, for each reward and, last, the KL.
    """

    state_values: torch.Tensor | None = None


class ValueHeads(nn.Module):
    """
    Linear value heads that start at zero.

    Args:
        hidden_size (`int`):
            Width of the backbone.
        num_heads (`int`):
            Number of streams: rewards, and one for the KL.
    """

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor` of shape `(B, T, H)`, any floating dtype):
                Hidden states.

        Returns:
            `torch.Tensor` of shape `(B, T, num_heads)`, float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


def add_value_heads(model: PreTrainedModel, heads: nn.Module, detach: bool = False) -> None:
    """
    Attaches `heads` as `model.value_heads` and adds their values to the output of TRL's fused head, in the same
    forward.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy with TRL's fused head, before any engine wraps it. Under PEFT, the base model.
        heads (`torch.nn.Module`):
            Module from `(B, T, H)` to `(B, T, K+1)`.
        detach (`bool`, *optional*, defaults to `False`):
            Whether the heads' gradient stops at the backbone.
    """
    fused_forward = model.forward
    model.add_module(VALUE_HEADS, heads)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused_forward(*args, **kwargs)
        kept: list[torch.Tensor] = []
        hook = self.base_model.register_forward_hook(lambda _m, _i, output: kept.append(output.last_hidden_state))
        try:
            output = fused_forward(*args, fused_lm_head=True, **kwargs)
        finally:
            hook.remove()
        hidden = kept[0][:, :-1]
        values = getattr(self, VALUE_HEADS)(hidden.detach() if detach else hidden)
        own = {f.name: getattr(output, f.name) for f in fields(FusedCausalLMOutput)}
        return ValuedCausalLMOutput(**own, state_values=values)

    model.forward = types.MethodType(forward, model)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """
    Squared error of values against returns; where a value has moved by more than `cliprange` since generation, the
    larger of the errors of the value and of the clipped value.

    Args:
        values (`torch.Tensor` of any shape):
            Values now.
        old_values (`torch.Tensor` of the same shape):
            Values at generation.
        returns (`torch.Tensor` of the same shape):
            Targets.
        cliprange (`float`):
            Range; 0 leaves the loss unclipped.

    Returns:
        `torch.Tensor` of the same shape: half the squared error.
    """
    error = (values - returns).square()
    if cliprange > 0:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error
