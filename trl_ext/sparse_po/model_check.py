"""What SparsePO asks of policy and reference model, found out before training starts.

One pass over a few tokens tells whether the head that SparsePO computes is the head that the model has.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


def check_vocabularies(sizes: tuple[int, int], loaded_from: str | None = None) -> None:
    """
    Refuses two models of different vocabularies.

    Args:
        sizes (`tuple[int, int]`):
            Tokens in the vocabularies of policy and reference model (see [`vocabulary_size`]).
        loaded_from (`str`, *optional*):
            Path that the reference model is loaded from, where the user gave none.

    Raises:
        ValueError: If they differ.
    """
    if sizes[0] == sizes[1]:
        return
    if loaded_from is None:
        remedy = "Resize the embeddings of one of them, or leave out `ref_model`."
    else:
        remedy = (
            f"That is loaded from {loaded_from!r}, where the policy was before its embeddings were resized. Pass a "
            "copy of the resized policy, `ref_model=copy.deepcopy(model)`, or save that and load it from there."
        )
    raise ValueError(
        f"`model` has a vocabulary of {sizes[0]} tokens and its reference model of {sizes[1]}: the token-level "
        f"divergence needs one vocabulary. {remedy}"
    )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of a model's head, also where ZeRO-3 shards it."""
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
    ids = (torch.arange(2 * PROBE_LENGTH).view(2, -1) + 3) % vocabulary_size(model)
    completion = torch.ones_like(ids)
    completion[:, :2] = 0
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def check_head(
    model: PreTrainedModel, forward: Callable[..., Any] | None = None, backbone: Callable[..., Any] | None = None
) -> None:
    """
    Compares the logits of a model with those that SparsePO computes from its last hidden states, on a few tokens.

    What enters the head is scaled until the largest logit is [`PROBE_LOGIT`], where capping and normalization show.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        forward (`Callable`, *optional*):
            Runs it: the engine that owns its parameters. Defaults to the model itself.
        backbone (`Callable`, *optional*):
            Runs its backbone, given the inputs of a batch. Defaults to `model.base_model`.

    Raises:
        ValueError: If they differ, or the model has no backbone that returns hidden states.
    """
    transform = logit_transform(model.config.get_text_config())
    hidden: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    rounding = 1e-3

    def scale_input(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal rounding
        if args[0].dtype != torch.float32 or torch.is_autocast_enabled(args[0].device.type):
            rounding = 2e-2
        largest = transform.scale * _projection(model, args[0]).abs().max()
        scale = PROBE_LOGIT / largest.clamp_min(1e-6).to(args[0].device)
        scaled = (hidden[0] * scale.to(hidden[0].device)).to(hidden[0].dtype)
        expected.append(transform.apply_(_projection(model, scaled)))
        return ((args[0] * scale).to(args[0].dtype), *args[1:])

    inputs = {name: tensor for name, tensor in probe_inputs(model).items() if name != "completion_mask"}
    hooks = ExitStack()
    try:
        with hooks, evaluating(model):
            seen = model.base_model.register_forward_hook(lambda _m, _i, out: hidden.append(out.last_hidden_state))
            hooks.callback(seen.remove)
            (backbone or model.base_model)(**inputs, use_cache=False)
            hooks.callback(model.get_output_embeddings().register_forward_pre_hook(scale_input).remove)
            found = (forward or model)(**inputs, use_cache=False).logits.float()
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{_family(model)} has no backbone that returns `last_hidden_state` to a head of its own, from which "
            f"SparsePO computes log-probabilities ({error}). Use another family."
        ) from error
    if not expected:
        raise ValueError(
            f"{_family(model)} does not call the head that its `get_output_embeddings()` returns, from which SparsePO "
            "computes log-probabilities. Use another family, or a model whose forward nobody has replaced."
        )
    ours = expected[0].to(found.device)  # a model split over devices may end on another than the head
    if not (found.isfinite().all() and ours.isfinite().all()):
        logger.info(f"The logits of {_family(model)} are not finite on the tokens that the head is checked with.")
        return
    difference = (found - ours).abs().max().item()
    if difference > rounding * max(PROBE_LOGIT, found.abs().max().item()):
        raise ValueError(
            f"{_family(model)} does not compute its logits from the last hidden states by its head alone, or with "
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
