"""The reference model's activations that the paper's MaPO mask reads, each reduced to one scalar per token."""

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .._upstream import observe_attention
from .lm_head.paired_log_probs import gathered_head, logit_transform
from .shared_prompts import PackedPairs


logger = logging.get_logger(__name__)

GROUPS = ("mlp", "attention", "residual", "logits")
# Names of the modules that play a role, over the decoder-only families of transformers
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")
OUT_PROJECTION_NAMES = (
    "down_proj", "o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc_out", "fc2", "w2", "wo",
)  # fmt: skip
QUERY_KEY_VALUE_NAMES = ("q_proj", "k_proj", "v_proj")
# A mean below this many times its expected rounding error is taken for zero
ROUNDING_MARGIN = 8
# Rows of the head in one tile of capped logits: 32 KB a token in float32
VOCAB_TILE = 8192


class ActivationObserver:
    """
    Collects, by module role, the activations that the paper's MaPO reads, reduced to one scalar per token in the hook.

    Groups: `mlp` (input of the MLP's out-projection; the block's output in a mixture of experts, whose activations are
    scattered over experts), `attention` (queries, keys and values as the attention function receives them, input of
    the attention's out-projection), `residual` (embeddings, outputs of the norms, of attention, of the MLP and of the
    layer, final norm) and `logits` (mean over the vocabulary). The set does not depend on the attention kernel.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to observe while the context lasts.
        layers (`torch.nn.ModuleList`):
            Its decoder layers.
        predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Positions that predict a response token.
        packed ([`PackedPairs`], *optional*):
            The pairs, where the model runs on rows that share prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        predicted: torch.Tensor,
        packed: PackedPairs | None = None,
    ):
        self.model, self.layers, self.predicted, self.packed = model, list(layers), predicted, packed
        self.maps: dict[str, list[torch.Tensor]] = {group: [] for group in GROUPS}
        self.sources: dict[str, set[str]] = {group: set() for group in GROUPS}
        self._stack = ExitStack()

    def __enter__(self) -> "ActivationObserver":
        attentions = {id(module) for module in map(_attention_module, self.layers) if module is not None}

        def observe_query_key_value(module: nn.Module, *tensors: torch.Tensor) -> None:
            if id(module) in attentions:
                for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
                    # (2B, heads, T, d) -> (2B, T, heads * d)
                    self._add("attention", f"attention.{name}", tensor.transpose(1, 2).flatten(2))

        self._stack.enter_context(observe_attention(observe_query_key_value))
        self._hook_input(self.layers[0], "residual", "embeddings")
        for layer in self.layers:
            self._hook_layer(layer)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def finish(self, last_hidden: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Adds the final norm and the mean logit, checks that no group is empty, and returns maps `(2B, T-1)`."""
        self._add("residual", "final norm", last_hidden)
        self._add("logits", "mean logit", mean_logits(self.model, last_hidden).unsqueeze(-1))
        for group in GROUPS:
            if not self.maps[group]:
                raise ValueError(
                    f"No activation of the group {group!r} was seen in {type(self.model).__name__}, so "
                    "`mask_type='activation'` cannot be used with it. Use `mask_type='learned'`, which reads hidden "
                    "states only."
                )
        sources = "; ".join(f"{group}: {', '.join(sorted(names))}" for group, names in self.sources.items())
        logger.info_once(f"Activation mask of {type(self.model).__name__} reads {sources}.")
        return self.maps

    def _add(self, group: str, source: str, values: torch.Tensor) -> None:
        rows, length = self.predicted.shape
        # A mixture of experts flattens its tokens, (2B * T, F)
        reduced = mean_above_rounding(values.detach())
        if self.packed is None:
            reduced = reduced.reshape(rows, length + 1)
        else:
            reduced = self.packed.unpack(reduced.reshape(self.packed.input_ids.shape))
        self.maps[group].append(reduced[:, :-1].to(self.predicted.device))
        self.sources[group].add(source)

    def _hook_output(self, module: nn.Module, group: str, source: str) -> None:
        def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._add(group, source, output if isinstance(output, torch.Tensor) else output[0])

        self._stack.callback(module.register_forward_hook(add).remove)

    def _hook_input(self, module: nn.Module, group: str, source: str) -> None:
        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(group, source, args[0] if args else kwargs["hidden_states"])

        self._stack.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)

    def _hook_layer(self, layer: nn.Module) -> None:
        self._hook_output(layer, "residual", "layer output")
        for name, child in layer.named_children():
            if "norm" in type(child).__name__.lower():
                self._hook_output(child, "residual", name)
        attention = _attention_module(layer)
        if attention is not None:
            self._hook_output(attention, "residual", "attention output")
            projection = _child(attention, OUT_PROJECTION_NAMES)
            if projection is not None:
                self._hook_input(projection, "attention", "input of the out-projection")
            if not _uses_attention_interface(attention):
                for name in QUERY_KEY_VALUE_NAMES:
                    if hasattr(attention, name):
                        self._hook_output(getattr(attention, name), "attention", name)
        mlp = _child(layer, MLP_NAMES) or layer
        projection = _child(mlp, OUT_PROJECTION_NAMES)
        if mlp is not layer:
            self._hook_output(mlp, "residual", "MLP output")
        if projection is not None:
            self._hook_input(projection, "mlp", "input of the out-projection")
        elif mlp is not layer:
            self._hook_output(mlp, "mlp", "MLP output")


def mean_above_rounding(values: torch.Tensor) -> torch.Tensor:
    """Mean over the features, `(..., F)` to `(...)` float32, zero where it is within their rounding error."""
    # After an untrained LayerNorm the mean is zero; its rounding would be stretched to [0, 1] as if it were a signal
    relative_error = torch.finfo(torch.float32).eps + torch.finfo(values.dtype).eps / values.size(-1) ** 0.5
    values = values.float()
    mean = values.mean(dim=-1)
    return torch.where(mean.abs() <= ROUNDING_MARGIN * relative_error * values.abs().mean(dim=-1), 0.0, mean)


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)


def _attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention block of a decoder layer; GPT-2's kin have it one level deeper."""
    attention = _child(layer, ATTENTION_NAMES)
    inner = _child(attention, ATTENTION_NAMES) if attention is not None else None
    return inner or attention


def _uses_attention_interface(attention: nn.Module) -> bool:
    """Whether its queries, keys and values pass through transformers' `AttentionInterface`."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def mean_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Mean logit over the vocabulary, `(2B, T, H)` to `(2B, T)` float32, without holding the logits."""
    scale, softcap = logit_transform(model.config.get_text_config())
    no_autocast = torch.autocast(hidden.device.type, enabled=False)
    with no_autocast, gathered_head(model.get_output_embeddings()) as (weight, bias):
        hidden = hidden.float()
        if softcap is None:
            # The mean passes through the head: it is the projection on the head's mean row
            mean = hidden @ weight.float().mean(dim=0)
            return scale * (mean if bias is None else mean + bias.float().mean())
        total = hidden.new_zeros(hidden.shape[:-1])
        for start in range(0, weight.size(0), VOCAB_TILE):
            tile = slice(start, start + VOCAB_TILE)
            logits = hidden @ weight[tile].float().t()
            if bias is not None:
                logits = logits + bias[tile].float()
            total += (softcap * torch.tanh(scale * logits / softcap)).sum(dim=-1)
        return total / weight.size(0)
