"""Measurements of a trained policy and of its masks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from scipy.stats import rankdata
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.companion import base_policy
from .lm_head.paired_log_probs import gathered_head, logit_transform, paired_log_probs
from .masks import TokenMasks, scatter_tokens
from .reference_pass import read_reference, reference_head


@dataclass
class RewardAndDivergence:
    """
    Reward and divergence of responses sampled from a policy.

    Attributes:
        completions (`list[str]`): The responses.
        rewards (`list[float]`): Reward of each response.
        divergences (`list[float]`): KL(policy || reference) in nats, summed over the tokens of each response.
    """

    completions: list[str]
    rewards: list[float]
    divergences: list[float]

    @property
    def mean_reward(self) -> float:
        return float(np.mean(self.rewards))

    @property
    def mean_divergence(self) -> float:
        return float(np.mean(self.divergences))

    @property
    def standard_errors(self) -> tuple[float, float]:
        """Standard errors of the mean reward and of the mean divergence; `nan` for a single response."""
        if len(self.rewards) < 2:
            return float("nan"), float("nan")
        return tuple(float(np.std(x, ddof=1) / len(x) ** 0.5) for x in (self.rewards, self.divergences))  # type: ignore


def reward_and_divergence(
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    reward_function: Callable[..., list[float]],
    *,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> RewardAndDivergence:
    """
    Samples responses to each prompt and measures them.

    The divergence is exact at every position of the sample: the whole next-token distributions are compared. The
    model's own generation settings (such as a repetition penalty) are set aside, so that the samples are the policy's.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Policy, without gradient.
        ref_model ([`~transformers.PreTrainedModel`] or `None`):
            Reference model; `None` for a PEFT policy against itself with the adapter switched off.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        prompts (`list[str]`):
            Prompts.
        reward_function (`Callable`):
            Reward function as TRL's online trainers take it, called with `prompts` and `completions`.
        num_samples (`int`, *optional*, defaults to `1`):
            Responses to each prompt, which stand next to each other in the result.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Longest response.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature. The divergence is that of the untempered distributions.
        batch_size (`int`, *optional*, defaults to `64`):
            Prompts in one batch.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the samples; the process's own random state is left as it was.

    Returns:
        [`RewardAndDivergence`]

    Raises:
        ValueError: If there are no prompts or a prompt without tokens, no reference model for a policy without
            adapter, no end token, or `num_samples` below 1.
    """
    if not prompts:
        raise ValueError("`prompts` is empty. Give at least one prompt.")
    if ref_model is None and not is_peft_model(model):
        raise ValueError("`ref_model` is None, which needs a PEFT policy. Give the reference model.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("`tokenizer` has no `eos_token`, so no response would end. Set `tokenizer.eos_token`.")
    prompts = [prompt for prompt in prompts for _ in range(num_samples)]
    completions: list[str] = []
    divergences: list[float] = []
    with torch.no_grad(), torch.random.fork_rng(), _evaluating(model, ref_model), _plain_sampling(model):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            sequences, labels = _sample(model, tokenizer, batch, max_new_tokens, temperature)
            completions += [
                tokenizer.decode(row[mask], skip_special_tokens=True)
                for row, mask in zip(sequences, labels != -100, strict=True)
            ]
            divergences += _divergences(model, ref_model, sequences, labels).tolist()
    rewards = reward_function(prompts=prompts, completions=completions)
    return RewardAndDivergence(completions, [float(reward) for reward in rewards], divergences)


@contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    training = [model for model in models if model is not None and model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


@contextmanager
def _plain_sampling(model: PreTrainedModel) -> Iterator[None]:
    policy = base_policy(model)
    settings = policy.generation_config
    policy.generation_config = GenerationConfig()
    try:
        yield
    finally:
        policy.generation_config = settings


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Right-padded sequences and labels, `-100` on the prompt and after the first end token."""
    prompt_ids = [tokenizer(prompt, return_token_type_ids=False)["input_ids"] for prompt in prompts]
    if not all(prompt_ids):
        raise ValueError(
            "A prompt in `prompts` has no tokens. Remove it, or begin it with the tokenizer's `bos_token`."
        )
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompt_ids))
    padded = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=model.device)
    generated = model.generate(
        input_ids=padded, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos,
    )[:, width:]  # fmt: skip
    ended = (generated == eos).cumsum(dim=1)
    lengths = ((ended == 0) | ((ended == 1) & (generated == eos))).sum(dim=1).tolist()
    rows = [ids + row[:length].tolist() for ids, row, length in zip(prompt_ids, generated, lengths, strict=True)]
    longest = max(map(len, rows))
    sequences = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=model.device)
    labels = torch.full_like(sequences, -100)
    for index, (ids, row) in enumerate(zip(prompt_ids, rows, strict=True)):
        labels[index, len(ids) : len(row)] = sequences[index, len(ids) : len(row)]
    return sequences, labels


def _divergences(
    model: PreTrainedModel, ref_model: PreTrainedModel | None, sequences: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    lengths = (labels != -100).long().cumsum(dim=1).argmax(dim=1)
    attention_mask = (torch.arange(sequences.size(1), device=sequences.device) <= lengths.unsqueeze(1)).long()
    inputs = {"input_ids": sequences, "attention_mask": attention_mask, "use_cache": False}
    policy = base_policy(model)
    predicted = labels[:, 1:] != -100
    hidden = policy.base_model(**inputs).last_hidden_state[:, :-1][predicted]
    switched_off = model.disable_adapter() if ref_model is None else nullcontext()
    reference = policy if ref_model is None else ref_model
    with switched_off:
        ref_hidden = reference.base_model(**inputs).last_hidden_state[:, :-1][predicted]
        ref_head = reference_head(reference)
    scale, softcap = logit_transform(policy.config.get_text_config())
    ref_scale, ref_softcap = logit_transform(reference.config.get_text_config())
    with (
        gathered_head(policy.get_output_embeddings()) as (weight, bias),
        gathered_head(ref_head) as (ref_weight, ref_bias),
    ):
        # KL(second || first): the policy stands second
        _, _, divergences = paired_log_probs(
            ref_hidden, ref_weight, hidden, weight, labels[:, 1:][predicted], policy_bias=ref_bias, ref_bias=bias,
            policy_logit_scale=ref_scale, policy_softcap=ref_softcap, ref_logit_scale=scale, ref_softcap=softcap,
        )  # fmt: skip
    return scatter_tokens(divergences, predicted).sum(dim=1)


@torch.no_grad()
def mask_weights(
    masks: TokenMasks, ref_model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights of the response tokens of a batch, outside a trainer.

    Args:
        masks ([`TokenMasks`]):
            Masks, such as [`restore_masks`] returns.
        ref_model ([`~transformers.PreTrainedModel`]):
            Reference model they were trained with.
        inputs (`dict[str, torch.Tensor]`):
            `input_ids`, `attention_mask` and `completion_mask`, each `(rows, T)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: reward mask and divergence mask, each `(rows, T-1)`, float32, zero outside
        the completion. Column `t` weights token `t + 1`.
    """
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    model_inputs: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with _evaluating(ref_model):
        states = read_reference(ref_model, masks.mask_type, labels, **model_inputs, use_cache=False)
    return masks(states, inputs["completion_mask"][:, 1:].bool())


@dataclass
class MaskRecovery:
    """
    How well a mask finds the tokens that matter.

    Attributes:
        auc (`float`): Chance that a token that matters has a higher weight than one that does not, ties counted half.
        average_precision (`float`): Precision averaged over the tokens that matter, from the highest weight down;
            tokens of equal weight are taken together.
        weight_share (`float`): Share of the total weight that lies on the tokens that matter; 0 for a mask of zeros.
        token_share (`float`): Share of the tokens that matter.
    """

    auc: float
    average_precision: float
    weight_share: float
    token_share: float

    @property
    def lift(self) -> float:
        """Mean weight of the tokens that matter over the mean weight of all; 0 for a mask of zeros."""
        return self.weight_share / self.token_share


def mask_recovery(weights: list[np.ndarray], truth: list[np.ndarray]) -> MaskRecovery:
    """
    Compares weights with the known truth, all tokens of all sequences together.

    Args:
        weights (`list[np.ndarray]`):
            Weights of the response tokens of each sequence, not negative.
        truth (`list[np.ndarray]`):
            For the same tokens, a value that is not zero where the token matters.

    Returns:
        [`MaskRecovery`]

    Raises:
        ValueError: If lengths differ, a weight is negative or not finite, or all or no tokens matter.
    """
    if [len(x) for x in weights] != [len(x) for x in truth]:
        raise ValueError("`weights` and `truth` must have one value for each token of the same sequences.")
    weight, matters = np.concatenate(weights).astype(float), np.concatenate(truth) != 0
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise ValueError("`weights` must be finite and not negative. Leave out tokens that have no weight.")
    num_matter, num_others = int(matters.sum()), int((~matters).sum())
    if not num_matter or not num_others:
        raise ValueError("`truth` must mark some tokens and not all; otherwise there is nothing to find.")
    rank_sum = rankdata(weight)[matters].sum()
    auc = (rank_sum - num_matter * (num_matter + 1) / 2) / (num_matter * num_others)
    _, level = np.unique(-weight, return_inverse=True)
    matter_at_level = np.bincount(level, weights=matters)
    precision = matter_at_level.cumsum() / np.bincount(level).cumsum()
    total = weight.sum()
    return MaskRecovery(
        auc=float(auc),
        average_precision=float((matter_at_level * precision).sum() / num_matter),
        weight_share=float(weight[matters].sum() / total) if total > 0 else 0.0,
        token_share=num_matter / len(weight),
    )
