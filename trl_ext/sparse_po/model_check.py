"""What SparsePO asks of policy and reference model, found out before training starts.

One pass over a few tokens tells whether the head that SparsePO computes is the head that the model has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import PreTrainedModel

from .lm_head.paired_log_probs import gathered_head, logit_transform


logger = get_logger(__name__)

PROBE_LENGTH = 8  # tokens
# Largest logit of the probe: what caps or normalizes logits shows at this size, whatever the weights
PROBE_LOGIT = 30.0


def check_vocabularies(policy: PreTrainedModel, reference: PreTrainedModel, given: bool) -> None:
    """
    Refuses two models of different vocabularies.

    Args:
        policy ([`~transformers.PreTrainedModel`]):
            Policy.
        reference ([`~transformers.PreTrainedModel`]):
            Reference model.
        given (`bool`):
            Whether the user gave it, so that it was not loaded from the policy's path.

    Raises:
        ValueError: If the rows of their heads differ in number.
    """
    sizes = [_vocabulary_size(model) for model in (policy, reference)]
    if sizes[0] == sizes[1]:
        return
    if given:
        remedy = "Resize the embeddings of one of them, or leave out `ref_model`."
    else:
        remedy = (
            f"It was loaded from {policy.config.name_or_path!r}, as the policy was before its embeddings were resized. "
            "Pass a copy of the resized policy, `ref_model=copy.deepcopy(model)`, or save that and load both from there."
        )
    raise ValueError(
        f"`model` has a vocabulary of {sizes[0]} tokens and its reference model of {sizes[1]}: the token-level "
        f"divergence needs one vocabulary. {remedy}"
    )


def _vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the head, also where ZeRO-3 shards it."""
    weight = model.get_output_embeddings().weight
    shape = getattr(weight, "ds_shape", weight.shape)
    return shape[0] if len(shape) == 2 and shape[0] else model.config.get_text_config().vocab_size


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode and without gradient while the context lasts; then each block is as it was."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in before:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def probe_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch of one pair, a few tokens each, as the collator makes them; drawn without random numbers."""
    ids = (torch.arange(2 * PROBE_LENGTH).view(2, -1) + 3) % _vocabulary_size(model)
    completion = torch.ones_like(ids)
    completion[:, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def check_head(model: PreTrainedModel, forward: Callable[..., Any]) -> None:
    """
    Compares the logits of a model with those that SparsePO computes from its last hidden states, on a few tokens.

    The hidden states are scaled on their way to the head until the largest logit is [`PROBE_LOGIT`], where capping and
    normalization show.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        forward (`Callable`):
            Runs it: the model itself, or the engine that owns its parameters.

    Raises:
        ValueError: If they differ, or the model has no backbone that returns hidden states.
    """
    expected: list[torch.Tensor] = []
    transform = logit_transform(model.config.get_text_config())
    rounding = 1e-3

    def scale_hidden_states(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal rounding
        hidden = output.last_hidden_state
        if hidden.dtype != torch.float32 or torch.is_autocast_enabled(hidden.device.type):
            rounding = 2e-2
        largest = transform.scale * _projection(model, hidden).abs().max()
        output.last_hidden_state = (hidden * (PROBE_LOGIT / largest.clamp_min(1e-6))).to(hidden.dtype)
        expected.append(transform.apply_(_projection(model, output.last_hidden_state)))
        return output

    inputs = probe_inputs(model)
    hook = model.base_model.register_forward_hook(scale_hidden_states)
    try:
        with evaluating(model):
            logits = forward(**{name: inputs[name] for name in ("input_ids", "attention_mask")}, use_cache=False).logits
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{_family(model)} has no backbone that returns `last_hidden_state`, from which SparsePO computes "
            f"log-probabilities ({error}). Use another family."
        ) from error
    finally:
        hook.remove()
    found = logits.float()
    # A model split over devices may end on another than the head
    expected[0] = expected[0].to(found.device)
    if not (found.isfinite().all() and expected[0].isfinite().all()):
        logger.info(f"The logits of {_family(model)} are not finite on the tokens that the head is checked with.")
        return
    difference = (found - expected[0]).abs().max().item()
    if difference > rounding * max(PROBE_LOGIT, found.abs().max().item()):
        raise ValueError(
            f"{_family(model)} does not compute its logits from the last hidden states by `lm_head` alone, or with "
            f"a scale and cap that its config names: on a test input they differ by {difference:.3g} nats from those "
            "that SparsePO, and TRL's fused head, would train on. Use another family."
        )


def _projection(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """The head's rows on hidden states with its bias, before scale and cap, in float32."""
    no_autocast = torch.autocast(hidden.device.type, enabled=False)
    with no_autocast, gathered_head(model.get_output_embeddings()) as (weight, bias):
        projected = hidden.to(weight.device, torch.float32) @ weight.float().t()
        return projected if bias is None else projected + bias.float()


def _family(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.config.model_type})"
