"""The critic: one value head for each reward and one for the KL, on the policy's hidden states or its own backbone."""

import copy
import functools
import types
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .._upstream import FusedCausalLMOutput
from ..equilibrium.head import EPHead
from ..equilibrium.value_heads import EPValueHeads
from .constrained_ppo_config import ConstrainedPPOConfig


VALUE_HEADS = "value_heads"


@dataclass
class ValuedCausalLMOutput(FusedCausalLMOutput):
    """
    TRL's output with the values.

    Attributes:
        state_values (`torch.Tensor` of shape `(B, T-1, K+1)`, float32):
            Value of the state before each next token, for each reward and, last, the KL.
        homeostasis_loss (`torch.Tensor` of shape `(1,)`, float32, *optional*):
            Homeostasis objective of equilibrium heads, in training and where it has a weight.
    """

    state_values: torch.Tensor | None = None
    homeostasis_loss: torch.Tensor | None = None


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


class SeparateCritic(nn.Module):
    """
    Value heads on a backbone of their own.

    Args:
        backbone (`torch.nn.Module`):
            Decoder without language-model head, such as `AutoModel` gives it.
        num_heads (`int`):
            Number of streams: rewards, and one for the KL.
        heads (`torch.nn.Module`, *optional*):
            Module from hidden states to values. Defaults to [`ValueHeads`].
    """

    def __init__(self, backbone: PreTrainedModel, num_heads: int, heads: nn.Module | None = None):
        super().__init__()
        self.backbone = backbone
        self.heads = heads or ValueHeads(backbone.config.get_text_config().hidden_size, num_heads)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor` of shape `(B, T)`):
                Tokens.
            attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
                Tokens that are not padding.

        Returns:
            `torch.Tensor` of shape `(B, T, num_heads)`, float32.
        """
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.heads(output.last_hidden_state)


def value_heads_of(critic: nn.Module) -> nn.Module:
    """The module of a critic that maps hidden states to values: a shared critic itself, or a separate one's heads."""
    return critic.heads if isinstance(critic, SeparateCritic) else critic


def build_value_heads(hidden_size: int, num_heads: int, args: ConstrainedPPOConfig) -> nn.Module:
    """The heads that `critic_head` names, for hidden states of a width; the same on all processes."""
    if args.critic_head == "linear":
        return ValueHeads(hidden_size, num_heads)
    heads = EPValueHeads(
        hidden_size, num_heads, args.critic_hidden_features, args.critic_feedback, args.critic_feedback_angle
    )
    # TRL seeds every process differently, and `fully_shard` would put a weight together from several draws
    heads.reset_parameters(torch.Generator().manual_seed(args.seed))
    return heads


def build_critic(
    policy: PreTrainedModel, num_heads: int, args: ConstrainedPPOConfig, critic_model: str | nn.Module | None = None
) -> nn.Module:
    """
    The critic that a configuration and the argument `critic_model` of the trainer ask for.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy.
        num_heads (`int`):
            Number of streams: rewards, and one for the KL.
        args ([`ConstrainedPPOConfig`]):
            Configuration.
        critic_model (`str`, [`~transformers.PreTrainedModel`] or `torch.nn.Module`, *optional*):
            See [`ConstrainedPPOTrainer`].

    Returns:
        `torch.nn.Module`

    Raises:
        ValueError: If the critic does not fit the policy or the number of streams, or `critic` is the other kind.
    """
    if args.critic == "separate":
        if critic_model is None or isinstance(critic_model, str):
            critic = build_separate_critic(policy, num_heads, critic_model or args.critic_model_name_or_path)
            critic.heads = build_value_heads(critic.backbone.config.get_text_config().hidden_size, num_heads, args)
            return critic
        if isinstance(critic_model, PreTrainedModel):
            heads = build_value_heads(critic_model.config.get_text_config().hidden_size, num_heads, args)
            return SeparateCritic(critic_model.base_model, num_heads, heads)
        raise ValueError(
            f"`critic='separate'` takes a model or its name as `critic_model`, got "
            f"`{type(critic_model).__name__}`. For "
            "a module on the policy's hidden states set `critic='shared'`."
        )
    hidden_size = policy.config.get_text_config().hidden_size
    if critic_model is None:
        return build_value_heads(hidden_size, num_heads, args)
    if isinstance(critic_model, (str, PreTrainedModel)):
        raise ValueError(
            f"`critic_model` is a model and `critic='shared'` takes a module from hidden states `(B, T, "
            f"{hidden_size})`"
            f" to values `(B, T, {num_heads})`. Set `critic='separate'` for a critic with a backbone of its own."
        )
    critic_model.to(policy.device)
    wanted = (1, 2, num_heads)
    try:
        with torch.no_grad():
            found = tuple(critic_model(torch.zeros(1, 2, hidden_size, device=policy.device)).shape)
    except RuntimeError as error:
        raise ValueError(
            f"`critic_model` does not take hidden states of width {hidden_size}, the policy's: {error}. Build it for "
            "that width."
        ) from error
    if found != wanted:
        raise ValueError(
            f"`critic_model` maps hidden states `(1, 2, {hidden_size})` to {found}; it must give {wanted}: one value "
            f"for each of the {num_heads - 1} rewards and one for the KL."
        )
    is_asymmetric = isinstance(critic_model, EPHead) and critic_model.feedback == "asymmetric"
    if args.critic_homeostasis_coef > 0 and not is_asymmetric:
        raise ValueError(
            f"`critic_homeostasis_coef={args.critic_homeostasis_coef}` needs feedback weights, and `critic_model`, a "
            f"`{type(critic_model).__name__}`, has none. Leave it at 0, or give an `EPHead` with "
            "`feedback='asymmetric'`."
        )
    return critic_model


def build_separate_critic(policy: PreTrainedModel, num_heads: int, name_or_path: str | None = None) -> SeparateCritic:
    """
    A separate critic that starts from a model, such as a reward model, or from the policy.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy.
        num_heads (`int`):
            Number of streams: rewards, and one for the KL.
        name_or_path (`str`, *optional*):
            Model to start from; of a classifier or language model, its backbone. Defaults to a copy of the policy's
            backbone.

    Returns:
        [`SeparateCritic`]

    Raises:
        ValueError: If the model has a smaller vocabulary than the policy, whose token ids it is given.
    """
    if name_or_path is None and is_deepspeed_zero3_enabled():
        name_or_path = policy.config._name_or_path or None
    if name_or_path is None:
        backbone = copy.deepcopy(policy.base_model)
    else:
        backbone = AutoModel.from_pretrained(name_or_path, dtype=policy.dtype)
    size, needed = backbone.config.get_text_config().vocab_size, policy.config.get_text_config().vocab_size
    if size < needed:
        raise ValueError(
            f"`critic_model_name_or_path={name_or_path!r}` has a vocabulary of {size} tokens and the policy one of "
            f"{needed}; the critic reads the policy's token ids. Choose a model with the policy's tokenizer."
        )
    backbone.requires_grad_(True)
    return SeparateCritic(backbone, num_heads)


def add_value_heads(
    model: PreTrainedModel, critic: nn.Module, detach: bool = False, homeostasis: bool = False
) -> None:
    """
    Attaches a critic as `model.value_heads` and adds its values to the output of TRL's fused head, in the same
    forward, when it is called with `with_values=True`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy with TRL's fused head, before any engine wraps it. Under PEFT, the base model.
        critic (`torch.nn.Module`):
            [`SeparateCritic`], or a module from hidden states `(B, T, H)` to values `(B, T, K+1)`.
        detach (`bool`, *optional*, defaults to `False`):
            Whether the critic's gradient stops at the policy's backbone.
        homeostasis (`bool`, *optional*, defaults to `False`):
            Whether the output has the homeostasis objective of equilibrium heads, in training.
    """
    fused_forward = model.forward
    model.add_module(VALUE_HEADS, critic)

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, with_values: bool = False, **kwargs: Any) -> Any:
        if not with_values:
            return fused_forward(*args, **kwargs)
        module = getattr(self, VALUE_HEADS)
        if isinstance(module, SeparateCritic):
            output = fused_forward(*args, **kwargs)
            values = module(kwargs["input_ids"], kwargs.get("attention_mask"))[:, :-1]
        else:
            kept: list[torch.Tensor] = []
            hook = self.base_model.register_forward_hook(lambda _m, _i, output: kept.append(output.last_hidden_state))
            try:
                output = fused_forward(*args, **kwargs)
            finally:
                hook.remove()
            hidden = kept[0][:, :-1]
            values = module(hidden.detach() if detach else hidden)
        own = {f.name: getattr(output, f.name) for f in fields(FusedCausalLMOutput)}
        output = ValuedCausalLMOutput(**own, state_values=values)
        if homeostasis and self.training and torch.is_grad_enabled():
            # Here, within the forward that an engine gathers weights for
            output.homeostasis_loss = cast(EPHead, value_heads_of(module)).homeostasis_loss().reshape(1)
        return output

    model.forward = types.MethodType(forward, model)


class ValueRecorder:
    """
    Calls a model for values too and keeps what it gave, so that a subclass sees what `super()` computed.

    Args:
        model (`torch.nn.Module`):
            Policy with a critic, wrapped or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._values: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []
        self._homeostasis: list[torch.Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, with_values=True, **kwargs)
        self._values.append(output.state_values)
        self._log_probs.append(output.log_probs)
        if output.homeostasis_loss is not None:
            self._homeostasis.append(output.homeostasis_loss)
        return output

    def values(self, length: int) -> torch.Tensor:
        """Values of the states before the last `length` tokens, `(B, length, K+1)`."""
        return torch.cat([values[:, -length:] for values in self._values])

    def log_probs(self, length: int) -> torch.Tensor:
        """Log-probabilities of the last `length` tokens, `(B, length)`."""
        return torch.cat([log_probs[:, -length:] for log_probs in self._log_probs])

    def homeostasis_loss(self) -> torch.Tensor | None:
        """The homeostasis objective, scalar, or `None` where no call gave it."""
        return torch.cat(self._homeostasis).mean() if self._homeostasis else None


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
