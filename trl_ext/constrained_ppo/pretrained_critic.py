"""Critics that have learned before: saved by an earlier run, or a reward model with its score head as value head."""

import copy
import json
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import cached_file

from .._upstream import gathered_state_dict
from ..core.companion import read_companion
from .checkpoint import critic_from_pretrained
from .constrained_ppo_config import ConstrainedPPOConfig
from .critic import CRITIC_FILE, SeparateCritic, ValueHeads, check_vocabulary, kind_of, value_heads_of


logger = get_logger(__name__)


def pretrained_critic(
    critic_model: str | nn.Module | None,
    policy: PreTrainedModel,
    reward_names: list[str],
    args: ConstrainedPPOConfig,
) -> Any:
    """
    The trainer's `critic_model` with what has learned before in place of its name.

    Args:
        critic_model (`str` or `torch.nn.Module`, or `None`):
            What the trainer was given.
        policy ([`~transformers.PreTrainedModel`]):
            Policy.
        reward_names (`list[str]`):
            Names of the rewards, in the order of the value heads.
        args ([`ConstrainedPPOConfig`]):
            Configuration.

    Returns:
        [`SeparateCritic`] or [`ValueHeads`] where one was saved under the name or `critic_score_reward` is set, else
        `critic_model` as it is.

    Raises:
        ValueError: If the critic is of another kind, has none of the rewards, or no score head.
    """
    source = args.critic_model_name_or_path if critic_model is None else critic_model
    if args.critic_score_reward is not None:
        return critic_from_score_head(source, policy, reward_names, args.critic_score_reward)
    if not isinstance(source, str) or _critic_file(source) is None:
        return critic_model
    critic = saved_critic(source, policy, reward_names, args.critic == "separate")
    equilibrium = not isinstance(value_heads_of(critic), ValueHeads)
    if equilibrium != (args.critic_head == "equilibrium"):
        saved = "equilibrium" if equilibrium else "linear"
        raise ValueError(
            f"The critic saved in {source} has {saved} heads, and `critic_head={args.critic_head!r}`. Set "
            f"`critic_head='{saved}'`."
        )
    return critic


def _critic_file(name_or_path: str) -> str | None:
    try:
        return cached_file(name_or_path, CRITIC_FILE)
    except OSError:
        return None


def saved_critic(
    name_or_path: str, policy: PreTrainedModel, reward_names: list[str], separate: bool
) -> SeparateCritic | nn.Module:
    """
    The critic that an earlier run saved, with its heads in the order of this run's rewards.

    Heads go by name; those of rewards that the earlier run did not have start at zero. Value heads that were saved
    with a policy become a separate critic on that policy's backbone where one is asked for.

    Args:
        name_or_path (`str`):
            Folder or Hub id of a policy with `critic.safetensors` beside it.
        policy ([`~transformers.PreTrainedModel`]):
            Policy of this run.
        reward_names (`list[str]`):
            Its rewards.
        separate (`bool`):
            Whether the critic is to have a backbone of its own.

    Returns:
        [`SeparateCritic`], or with `separate=False` the value heads.

    Raises:
        ValueError: If it has a backbone and is not to have one, has none of the rewards, its backbone does not know
            the policy's tokens, or under ZeRO-3 for a separate one.
    """
    if separate and is_deepspeed_zero3_enabled():
        raise ValueError(
            f"A separate critic from {name_or_path} is put together as a whole, which ZeRO-3 cuts before it is "
            "loaded. Use ZeRO-2, or give the name of a model as the critic's backbone."
        )
    critic = critic_from_pretrained(name_or_path)
    if kind_of(critic) == "separate" and not separate:
        raise ValueError(
            f"The critic saved in {name_or_path} has a backbone of its own. Set `critic='separate'` to go on with it."
        )
    names = json.loads(read_companion(str(_critic_file(name_or_path)))[1]["rewards"])
    heads = _heads_by_name(value_heads_of(critic), names, reward_names, name_or_path)
    if not separate:
        width, needed = heads.weight.size(1) if isinstance(heads, ValueHeads) else None, _width(policy)
        if width not in (None, needed):
            raise ValueError(
                f"The value heads saved in {name_or_path} read hidden states of width {width}, and the policy's have "
                f"{needed}. Give a critic of a policy of this size, or set `critic='separate'`."
            )
        return heads.train()
    if isinstance(critic, SeparateCritic):
        backbone = critic.backbone.to(policy.dtype)
    else:
        backbone = AutoModel.from_pretrained(name_or_path, dtype=policy.dtype)
    check_vocabulary(backbone, policy, name_or_path)
    return SeparateCritic(backbone.requires_grad_(True), len(reward_names) + 1, heads).train()


def _width(model: PreTrainedModel) -> int:
    return model.config.get_text_config().hidden_size


def _heads_by_name(heads: nn.Module, saved: list[str], names: list[str], source: str) -> nn.Module:
    if saved == names:
        return heads
    known = [name for name in names if name in saved]
    if not known or not isinstance(heads, ValueHeads):
        raise ValueError(
            f"The critic saved in {source} has values of the rewards {saved}, and this run has {names}. Give a critic "
            "of these rewards, or none."
        )
    found = ValueHeads(heads.weight.size(1), len(names) + 1)
    places = [(names.index(name), saved.index(name)) for name in known] + [(len(names), len(saved))]
    with torch.no_grad():
        for place, earlier in places:
            found.weight[place], found.bias[place] = heads.weight[earlier], heads.bias[earlier]
    new = [name for name in names if name not in saved]
    if new:
        logger.warning(f"The critic saved in {source} has no values of {new}; theirs start at zero.")
    return found


def critic_from_score_head(
    source: str | nn.Module | None, policy: PreTrainedModel, reward_names: list[str], reward: str
) -> SeparateCritic:
    """
    A separate critic that starts as a reward model: its backbone, and its score head as the value of one reward.

    The value of a state is then what the reward model would say of the text up to there, which at the last token is
    the reward itself; the other heads start at zero.

    Args:
        source (`str` or [`~transformers.PreTrainedModel`], or `None`):
            Sequence classifier with one label and a linear head `score`, or its name or folder.
        policy ([`~transformers.PreTrainedModel`]):
            Policy.
        reward_names (`list[str]`):
            Names of the rewards.
        reward (`str`):
            The reward whose value the score is.

    Returns:
        [`SeparateCritic`]

    Raises:
        ValueError: If there is no such reward or head, the head is not trained, or the model does not know the
            policy's tokens.
    """
    if reward not in reward_names:
        raise ValueError(f"`critic_score_reward={reward!r}` names no reward; they are {reward_names}.")
    missing: set[str] = set()
    if isinstance(source, str):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=policy.dtype, output_loading_info=True
        )
        missing = set(info["missing_keys"])
    else:
        model = copy.deepcopy(source)  # it may also be the reward, which must not learn
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear) or score.out_features != 1 or "score.weight" in missing:
        raise ValueError(
            f"`critic_score_reward={reward!r}` needs a reward model with one label and a trained linear head `score`, "
            f"and {source if isinstance(source, str) else type(source).__name__} has none. Give one as "
            "`critic_model_name_or_path`, or leave `critic_score_reward` out."
        )
    backbone = model.base_model
    check_vocabulary(backbone, policy, source if isinstance(source, str) else model.config.name_or_path)
    critic = SeparateCritic(backbone.requires_grad_(True), len(reward_names) + 1)
    heads, place = critic.heads, reward_names.index(reward)
    with torch.no_grad():
        for name, tensor in gathered_state_dict(score).items():
            heads.get_parameter(name)[place] = tensor.squeeze(0)
    return critic
