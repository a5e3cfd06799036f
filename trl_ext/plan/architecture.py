"""Sizes of a model that is built on the meta device: its parameters, and what its forward keeps for the backward."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


# Bytes of 16 bits that a layer keeps of each token and feature, where its forward does not run on the meta device:
# Korthikanti et al., 2205.05198, without the attention's matrix
_KEPT_BYTES = 34
_ATTENTION = "on_meta"


@dataclass(frozen=True)
class Architecture:
    """
    Sizes of a model.

    Attributes:
        parameters (`int`): Parameters, adapters included.
        trained (`int`): Those with gradients.
        outside (`int`): Parameters outside the layers.
        layer (`int`): Parameters of one layer.
        num_layers (`int`): Layers.
        hidden_size (`int`): Width.
        vocab_size (`int`): Tokens of the vocabulary.
        cache_width (`int`): Numbers that the cache keeps of a token in one layer.
        kept_by_layer (`int`): Bytes that a layer's forward keeps.
        kept_outside (`int`): Bytes that the rest of the backbone keeps.
        element_bytes (`int`): Bytes of an activation.
    """

    parameters: int
    trained: int
    outside: int
    layer: int
    num_layers: int
    hidden_size: int
    vocab_size: int
    cache_width: int
    kept_by_layer: int
    kept_outside: int
    element_bytes: int

    def activations(self, batch: int, length: int, checkpointed: bool) -> int:
        """
        Bytes of the backbone's activations; `kept_by_layer` and `kept_outside` are of this batch and length.

        Args:
            batch (`int`):
                Sequences.
            length (`int`):
                Tokens of each.
            checkpointed (`bool`):
                Whether each layer keeps its input alone and is run again in the backward pass.

        Returns:
            `int`
        """
        inputs = batch * length * self.hidden_size * self.element_bytes
        if not checkpointed:
            return self.kept_outside + self.num_layers * self.kept_by_layer
        # What the layer keeps when it is run again, and on the way back through it about twice as much of gradients
        # and of what products need: fitted to four measured runs (docs/command_line.md)
        return self.kept_outside + self.num_layers * inputs + 3 * self.kept_by_layer


def measure(config: Any, dtype: torch.dtype, batch: int, length: int, peft_config: Any = None) -> Architecture:
    """
    Builds a causal language model on the meta device and runs one and two of its layers there.

    Args:
        config (`~transformers.PreTrainedConfig`):
            Configuration of the model.
        dtype (`torch.dtype`):
            In which it computes.
        batch (`int`):
            Sequences of a micro-step.
        length (`int`):
            Tokens of each.
        peft_config (`~peft.PeftConfig`, *optional*):
            Adapters.

    Returns:
        `Architecture`
    """
    text = config.get_text_config()
    whole, one, two = (_build(config, layers, dtype, peft_config) for layers in (None, 1, 2))
    (total, trained), (first, _), (second, _) = (_count(model) for model in (whole, one, two))
    element = torch.empty((), dtype=dtype, device="meta").element_size()
    try:
        kept = [_kept_bytes(model, batch, length) for model in (one, two)]
        by_layer, outside = kept[1] - kept[0], 2 * kept[0] - kept[1]
    except Exception:  # some models ask for more than token ids, or compute on what is not there
        by_layer, outside = _KEPT_BYTES * batch * length * text.hidden_size * element // 2, 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Architecture(
        parameters=total, trained=trained, outside=max(2 * first - second, 0), layer=second - first,
        num_layers=text.num_hidden_layers, hidden_size=text.hidden_size, vocab_size=text.vocab_size,
        cache_width=2 * heads * head_dim, kept_by_layer=max(by_layer, 0), kept_outside=max(outside, 0),
        element_bytes=element,
    )  # fmt: skip


def _build(config: Any, num_layers: int | None, dtype: torch.dtype, peft_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if num_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types[:num_layers])
    with torch.device("meta"), _flash_attention():
        try:
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=dtype, attn_implementation=_ATTENTION
            )
        except KeyError:  # classes of attention by name, as GPT-J's, which know none but their own
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, copy.deepcopy(peft_config))
    return model


def _count(model: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are trained; tied ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def _kept_bytes(model: Any, batch: int, length: int) -> int:
    """Bytes that the backbone's forward keeps for the backward pass, parameters left out, each storage once."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = getattr(base, base.base_model_prefix)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its place
        return tensor

    ids = torch.zeros((batch, length), dtype=torch.long, device="meta")
    with _flash_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = backbone(inputs_embeds=base.get_input_embeddings()(ids).requires_grad_(), use_cache=False)[0]
    del states
    return sum(storage.nbytes() for storage in kept.values())


class _Flash(torch.autograd.Function):
    """An attention that keeps what flash attention keeps: queries, keys, values, outputs and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("Nothing is computed on the meta device.")


def _attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    return _Flash.apply(query, key, value).transpose(1, 2).contiguous(), None


@contextmanager
def _flash_attention() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]
