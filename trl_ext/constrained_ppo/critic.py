"""The critic: one value head for each reward and one for the KL, on the policy's hidden states or its own backbone.

    L_V = 0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)        for each token and stream

is [`clipped_value_loss`] and what runs, in `ConstrainedPPOTrainer._compute_loss`. A plain form stands in
`recipes/experiments/minimal/constrained_ppo.py`; `tests/constrained_ppo/test_minimal.py` holds the two equal.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from .._upstream import FusedCausalLMOutput, copy_parameters, gathered_state_dict, is_partitioned
from ..core.companion import Companion, base_policy
from ..core.recorder import Forward, last_hidden_states
from ..equilibrium.value_heads import EARLIER_SPECTRAL_CAP, EPValueHeads, without_subspaces
from .advantages import merged_moments, token_moments
from .constrained_ppo_config import ConstrainedPPOConfig


VALUE_HEADS = "value_heads"
CRITIC_FILE = "critic.safetensors"
Metrics = dict[str, list[float]]


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float | torch.Tensor
) -> torch.Tensor:
    """
    Half the squared error of values against returns, element by element; where a value has moved by more than
    `cliprange` since generation (a number, 0 for no bound, or a tensor that broadcasts against the values), the larger
    of the errors of the value and of the clipped value.
    """
    error = (values - returns).square()
    if isinstance(cliprange, torch.Tensor) or cliprange > 0:
        clipped = old_values + (values - old_values).clamp(-cliprange, cliprange)  # type: ignore[arg-type]
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * error


@dataclass
class ValuedCausalLMOutput(FusedCausalLMOutput):
    """TRL's output with the values."""

    # (B, T-1, K+1), float32: value of the state before each next token, for each reward and, last, the KL
    state_values: torch.Tensor | None = None
    # (1,), float32: objective of equilibrium heads, in training and where it has a weight
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
        """Values `(B, T, num_heads)`, float32, of hidden states `(B, T, H)` of any floating dtype."""
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
        """Values `(B, T, num_heads)`, float32, of tokens `(B, T)` and the mask of those that are not padding."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self.heads(output.last_hidden_state)


@runtime_checkable
class RelaxingHeads(Protocol):
    """
    What value heads that relax to a fixed point offer beside `forward`, as [`EPHead`] does. A critic of any class that
    has it is asked for its objective and its metrics.
    """

    feedback: str  # "symmetric", or "asymmetric", which has an objective and an asymmetry

    def homeostasis_loss(self) -> torch.Tensor:
        """Objective that straightens the feedback, scalar."""
        ...

    def metrics(self) -> dict[str, float]:
        """How the last forward relaxed."""
        ...

    def asymmetry(self) -> dict[str, float]:
        """How far the feedback weights are from the transposed forward ones."""
        ...


class CriticCompanion(Companion):
    """
    The critic inside a policy with TRL's fused head (see [`Companion`]): its values come in the forward of that head,
    when it is called with `with_values=True`. `critic` is a [`SeparateCritic`], or a module from hidden states to
    values, `(B, T, H)` to `(B, T, K+1)`; `detach` stops its gradient at the policy's backbone, and `homeostasis` adds
    the objective of [`RelaxingHeads`] to the output in training.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        critic: nn.Module,
        reward_names: Sequence[str],
        learning_rate: float | None = None,
        detach: bool = False,
        homeostasis: bool = False,
    ):
        super().__init__(VALUE_HEADS, critic, CRITIC_FILE, "value heads", learning_rate)
        self.policy, self.reward_names = policy, list(reward_names)
        self.detach, self.homeostasis = detach, homeostasis

    def forward(self, policy_forward: Forward, *args: Any, with_values: bool = False, **kwargs: Any) -> Any:
        """What [`extend_forward`] puts in place of the policy's forward; with values a [`ValuedCausalLMOutput`]."""
        if not with_values:
            return policy_forward(*args, **kwargs)
        critic = getattr(self.policy, VALUE_HEADS)
        if isinstance(critic, SeparateCritic):
            output = policy_forward(*args, **kwargs)
            values = critic(kwargs["input_ids"], kwargs.get("attention_mask"))[:, :-1]
        else:
            with last_hidden_states(self.policy) as states:
                output = policy_forward(*args, **kwargs)
            hidden = states[0][:, :-1]
            values = critic(hidden.detach() if self.detach else hidden)
        own = {field.name: getattr(output, field.name) for field in fields(FusedCausalLMOutput)}
        output = ValuedCausalLMOutput(**own, state_values=values)
        if self.homeostasis and self.policy.training and torch.is_grad_enabled():
            # Here, within the forward that an engine gathers weights for
            output.homeostasis_loss = cast(RelaxingHeads, value_heads_of(critic)).homeostasis_loss().reshape(1)
        return output

    def metadata(self) -> dict[str, str]:
        found = {"rewards": json.dumps(self.reward_names)}
        if isinstance(self.module, SeparateCritic):
            found["backbone"] = json.dumps(self.module.backbone.config.to_dict(), default=str)
        heads = value_heads_of(self.module)
        if isinstance(heads, EPValueHeads):
            found["heads"] = json.dumps(heads.settings())
        return found

    def without_former_tensors(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return without_subspaces(state)

    def check_metadata(self, saved: dict[str, str], path: Path) -> None:
        heads = value_heads_of(self.module)
        if isinstance(heads, EPValueHeads) and "spectral_cap" not in json.loads(
            saved.get("heads", '{"spectral_cap": 0}')
        ):
            heads.spectral_cap = EARLIER_SPECTRAL_CAP  # the run goes on as it was
        names = json.loads(saved.get("rewards", "null"))
        if names is not None and names != self.reward_names:
            raise ValueError(
                f"{path} holds value heads for the rewards {names}, and this run has {self.reward_names}. Resume with "
                "the rewards of the saved run."
            )


def value_heads_of(critic: nn.Module) -> nn.Module:
    """The module of a critic that maps hidden states to values: a shared critic itself, or a separate one's heads."""
    return critic.heads if isinstance(critic, SeparateCritic) else critic


def kind_of(critic: nn.Module | None) -> str:
    """
    `"shared"` or `"separate"` for a critic that can be rebuilt from its file, `"module"` for the user's own, `"none"`
    without one.
    """
    if critic is None:
        return "none"
    kinds = {ValueHeads: "shared", EPValueHeads: "shared", SeparateCritic: "separate"}
    return kinds.get(type(critic), "module")


def _value_heads(hidden_size: int, num_heads: int, args: ConstrainedPPOConfig) -> nn.Module:
    """The heads that `critic_head` names, for hidden states of a width; the same on all processes."""
    if args.critic_head == "linear":
        return ValueHeads(hidden_size, num_heads)
    heads = EPValueHeads(
        hidden_size, num_heads, args.critic_hidden_features, args.critic_feedback, args.critic_feedback_angle,
        args.critic_spectral_cap,
    )  # fmt: skip
    # TRL seeds every process differently, and `fully_shard` would put a weight together from several draws
    heads.reset_parameters(torch.Generator().manual_seed(args.seed))
    return heads


def build_critic(
    policy: Any, num_heads: int, args: ConstrainedPPOConfig, critic_model: str | nn.Module | None = None
) -> nn.Module:
    """
    The critic that a configuration and the argument `critic_model` of the trainer ask for; refuses one that does not
    fit the policy or the number of streams. The policy may have an adapter.
    """
    adapted, policy = policy, base_policy(policy)
    if args.critic == "separate":
        if isinstance(critic_model, SeparateCritic):
            return critic_model
        if critic_model is None or isinstance(critic_model, str):
            backbone = _backbone(adapted, critic_model or args.critic_model_name_or_path)
        elif isinstance(critic_model, PreTrainedModel):
            backbone = critic_model.base_model
        else:
            raise ValueError(
                "`critic='separate'` takes a model or its name as `critic_model`, got "
                f"`{type(critic_model).__name__}`. For a module on the policy's hidden states set `critic='shared'`."
            )
        width = backbone.config.get_text_config().hidden_size
        return SeparateCritic(backbone, num_heads, _value_heads(width, num_heads, args))
    hidden_size = policy.config.get_text_config().hidden_size
    if critic_model is None:
        return _value_heads(hidden_size, num_heads, args)
    if isinstance(critic_model, (str, PreTrainedModel)):
        raise ValueError(
            "`critic_model` is a model and `critic='shared'` takes a module from hidden states "
            f"`(B, T, {hidden_size})` to values `(B, T, {num_heads})`. Set `critic='separate'` for a critic with a "
            "backbone of its own."
        )
    critic_model.to(policy.device)
    _check_module(critic_model, torch.zeros(1, 2, hidden_size, device=policy.device), num_heads, args)
    return critic_model


def _check_module(critic_model: nn.Module, states: torch.Tensor, num_heads: int, args: ConstrainedPPOConfig) -> None:
    wanted, hidden_size = (1, 2, num_heads), states.size(-1)
    try:
        with torch.no_grad():
            found = tuple(critic_model(states).shape)
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
    is_asymmetric = isinstance(critic_model, RelaxingHeads) and critic_model.feedback == "asymmetric"
    if args.critic_homeostasis_coef > 0 and not is_asymmetric:
        raise ValueError(
            f"`critic_homeostasis_coef={args.critic_homeostasis_coef}` needs feedback weights, and `critic_model`, a "
            f"`{type(critic_model).__name__}`, has none. Leave it at 0, or give an `EPHead` with "
            "`feedback='asymmetric'`."
        )


def _backbone(adapted: Any, name_or_path: str | None) -> PreTrainedModel:
    """The backbone of a model, such as a reward model, or a copy of the policy's, whose token ids it is given."""
    policy = base_policy(adapted)
    if name_or_path is None and is_deepspeed_zero3_enabled() and policy.config.name_or_path:
        # A model in pieces cannot be copied; one from its folder can take its weights
        backbone = AutoModel.from_pretrained(policy.config.name_or_path, dtype=policy.dtype)
        if is_partitioned(policy) and not is_peft_model(adapted):
            copy_parameters(policy.base_model, backbone)
    elif name_or_path is None:
        backbone = _copied_backbone(adapted)
    else:
        backbone = AutoModel.from_pretrained(name_or_path, dtype=policy.dtype)
    check_vocabulary(backbone, policy, name_or_path)
    return backbone.requires_grad_(True)


def check_vocabulary(backbone: PreTrainedModel, policy: PreTrainedModel, name_or_path: str | None) -> None:
    """Refuses a critic's backbone, of the name given, that does not know every token id of the policy."""
    size, needed = backbone.config.get_text_config().vocab_size, policy.config.get_text_config().vocab_size
    if size < needed:
        raise ValueError(
            f"`critic_model_name_or_path={name_or_path!r}` has a vocabulary of {size} tokens and the policy one of "
            f"{needed}; the critic reads the policy's token ids. Choose a model with the policy's tokenizer."
        )


def _copied_backbone(adapted: Any) -> PreTrainedModel:
    """A copy of the policy's backbone as plain layers: an adapter's weights are merged into them."""
    if any(not parameter.is_floating_point() for parameter in adapted.base_model.parameters()):
        raise ValueError(
            "`critic='separate'` starts from a copy of the policy, whose quantised weights cannot be trained. Set "
            "`critic_model_name_or_path`, which is loaded in full, or `critic='shared'`."
        )
    if not is_peft_model(adapted):
        return copy.deepcopy(adapted.base_model)
    if adapted.active_peft_config.is_prompt_learning:
        return copy.deepcopy(base_policy(adapted).base_model)
    return copy.deepcopy(adapted).merge_and_unload().base_model


def critic_sums(values: torch.Tensor, returns: torch.Tensor, errors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums over a minibatch's tokens, `(3, K+1)`: of the value loss, which are `errors`, the values and returns."""
    inside = mask.unsqueeze(-1)
    return torch.stack([errors, (values * inside).sum((0, 1)), (returns * inside).sum((0, 1))])


def record_critic(metrics: Metrics, names: Sequence[str], means: torch.Tensor) -> None:
    """Records the value loss, mean value and mean return of each stream: [`critic_sums`] by the number of tokens."""
    for name, column in zip(names, means.t().tolist(), strict=True):
        for metric, value in zip(("loss", "value", "return"), column, strict=True):
            metrics[f"critic/{name}/{metric}"].append(value)


def update_statistics(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    old_values: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """
    What one process's minibatch says of an update, for [`record_update`].

    Args:
        log_ratio (`torch.Tensor` of shape `(B, T)`):
            Log-probability of each token less the one at generation.
        advantages (`torch.Tensor` of shape `(B, T)`):
            Advantages that the policy follows.
        returns (`torch.Tensor` of shape `(B, T, K+1)`):
            Targets of the values.
        old_values (`torch.Tensor` of shape `(B, T, K+1)`):
            Values at generation.
        mask (`torch.Tensor` of shape `(B, T)`, bool or integer):
            Response tokens.

    Returns:
        `torch.Tensor` of shape `(3 + 2 (2K+3),)`: sum, largest and smallest ratio, and [`token_moments`] of the
        returns, of what the values left unexplained and of the advantages.
    """
    inside, ratio = mask.bool(), log_ratio.exp()
    extremes = [
        ratio.masked_fill(~inside, 0.0).sum(),
        ratio.masked_fill(~inside, -torch.inf).amax(),
        ratio.masked_fill(~inside, torch.inf).amin(),
    ]
    streams = [returns.movedim(-1, 0), (returns - old_values).movedim(-1, 0), advantages.unsqueeze(0)]
    return torch.cat([torch.stack(extremes), token_moments(torch.cat(streams), mask).flatten()])


def record_update(metrics: Metrics, names: Sequence[str], statistics: torch.Tensor, counts: torch.Tensor) -> None:
    """
    Records ratios, advantages and how much of the returns the values explain, unless there is not one token.

    Args:
        metrics (`dict[str, list[float]]`):
            Where to record.
        names (`Sequence[str]`):
            Names of the streams.
        statistics (`torch.Tensor` of shape `(P, 3 + 2 (2K+3))`):
            [`update_statistics`] of each process.
        counts (`torch.Tensor` of shape `(P,)`):
            Tokens of each process.
    """
    num_tokens = float(counts.sum())
    if not num_tokens:
        return
    metrics["ratio/mean"].append(float(statistics[:, 0].sum()) / num_tokens)
    metrics["ratio/max"].append(float(statistics[:, 1].amax()))
    metrics["ratio/min"].append(float(statistics[:, 2].amin()))
    means, variances = merged_moments(statistics[:, 3:].unflatten(1, (2, -1)), counts)
    metrics["advantage/mean"].append(float(means[-1]))
    metrics["advantage/std"].append(float(variances[-1].sqrt()))
    for index, name in enumerate(names):
        spread, left = float(variances[index]), float(variances[len(names) + index])
        metrics[f"critic/{name}/return_std"].append(spread**0.5)
        # Returns that do not vary leave nothing to explain
        metrics[f"critic/{name}/explained_variance"].append(1 - left / spread if spread > 0 else 0.0)


def record_heads(metrics: Metrics, heads: nn.Module) -> None:
    """Records what [`RelaxingHeads`] say of themselves, nothing for others. All processes must call it."""
    if not isinstance(heads, RelaxingHeads):
        return
    for name, value in heads.metrics().items():
        # A count so far, of which only the last is of interest
        metrics[name] = [value] if "num_" in name else [*metrics[name], value]
    if heads.feedback == "asymmetric":
        whole = {f"heads.{name}": tensor for name, tensor in gathered_state_dict(heads).items()}
        for name, value in torch.func.functional_call(_Asymmetry(heads), whole, ()).items():
            metrics[name].append(value)


class _Asymmetry(nn.Module):
    """`asymmetry` as a forward, which `functional_call` can run on gathered weights."""

    def __init__(self, heads: nn.Module):
        super().__init__()
        self.heads = heads

    def forward(self) -> dict[str, float]:
        return cast(RelaxingHeads, self.heads).asymmetry()
