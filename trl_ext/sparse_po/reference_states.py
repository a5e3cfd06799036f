"""What SparsePO reads from the reference model in one pass without gradient: final states, and what the masks need."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available, logging

from .._upstream import observe_attention
from .masks import ActivationTokenMask, standardize
from .paired_lm_head import logit_transform


logger = logging.get_logger(__name__)

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "moe")
OUT_PROJECTION_NAMES = (
    "down_proj",
    "o_proj",
    "out_proj",
    "c_proj",
    "dense",
    "dense_4h_to_h",
    "fc_out",
    "fc2",
    "w2",
    "wo",
)
QUERY_KEY_VALUE_NAMES = ("q_proj", "k_proj", "v_proj")
ACTIVATION_GROUPS = ("mlp", "attention", "residual", "logits")


@dataclass
class ReferenceStates:
    """
    States of the reference model on one batch.

    Attributes:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Final hidden states at the positions that predict the N response tokens, in row-major order of the batch.
        layer_states (`torch.Tensor` of shape `(L, N, H)`, *optional*):
            Standardized states of every layer at those positions, for learned masks.
        activation_mask (`torch.Tensor` of shape `(2B, T-1)`, *optional*):
            The activation mask, float32.
    """

    hidden: torch.Tensor
    layer_states: torch.Tensor | None = None
    activation_mask: torch.Tensor | None = None


class ReferenceCollector:
    """
    Runs the backbone of a causal language model and keeps what `mask_type` needs.

    It is handed to the model's own forward (see [`add_token_masks`]), so that the pass runs inside the engine that
    owns the parameters.

    Args:
        mask_type (`str`):
            `"learned"`, `"activation"` or `"ones"`.
    """

    def __init__(self, mask_type: str):
        self.mask_type = mask_type
        self._states: ReferenceStates | None = None

    @property
    def states(self) -> ReferenceStates:
        """What the last run kept."""
        if self._states is None:
            raise RuntimeError("The reference model was not run with this collector.")
        return self._states

    def run(self, model: PreTrainedModel, labels: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """
        Runs `model.base_model(*args, **kwargs)` and keeps its states.

        Args:
            model ([`~transformers.PreTrainedModel`]):
                The reference model, or the policy with its adapter switched off.
            labels (`torch.Tensor` of shape `(2B, T)`, int64):
                Token ids, `-100` outside the completion.
        """
        predicted = labels[:, 1:] != -100
        if self.mask_type == "learned":
            hidden, layer_states = _run_with_layer_states(model, predicted, *args, **kwargs)
            self._states = ReferenceStates(hidden, layer_states=layer_states)
        elif self.mask_type == "activation":
            observer = ActivationObserver(model, predicted)
            with observer:
                last_hidden = model.base_model(*args, **kwargs).last_hidden_state
            mask = ActivationTokenMask()(observer.finish(last_hidden), predicted)
            self._states = ReferenceStates(_compact(last_hidden, predicted), activation_mask=mask)
        else:
            last_hidden = model.base_model(*args, **kwargs).last_hidden_state
            self._states = ReferenceStates(_compact(last_hidden, predicted))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """
    The decoder blocks of a causal language model: the outermost `ModuleList` with `num_hidden_layers` elements.

    Raises:
        ValueError: If the model has no such list.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    candidates = [
        (name.count("."), name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not candidates:
        raise ValueError(
            f"No list of {num_layers} decoder layers was found in {type(model).__name__}, so the masks have no states "
            "to read. Use `mask_type='ones'`, or a decoder-only transformers model."
        )
    return min(candidates, key=lambda candidate: candidate[:2])[2]


def _first_tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _compact(hidden: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    return hidden[:, :-1][predicted.to(hidden.device)]


def _run_with_layer_states(
    model: PreTrainedModel, predicted: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last layer's state is taken after the final norm, as `hidden_states[-1]` is."""
    states: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(standardize(_compact(_first_tensor(output), predicted)))

    with ExitStack() as stack:
        for layer in list(decoder_layers(model))[:-1]:
            stack.callback(layer.register_forward_hook(keep).remove)
        hidden = _compact(model.base_model(*args, **kwargs).last_hidden_state, predicted)
    states.append(standardize(hidden))
    return hidden, torch.stack([state.to(hidden.device) for state in states])


class ActivationObserver:
    """
    Collects, by module role, the activations that the paper's MaPO reads, reduced to one scalar per token in the hook.

    Groups: `mlp` (input of the MLP's out-projection; the block's output in a mixture of experts, whose activations are
    scattered over experts), `attention` (queries, keys and values as the attention function receives them, input of
    the attention's out-projection), `residual` (embeddings, outputs of the norms, of attention, of the MLP and of the
    layer, final norm) and `logits` (mean over the vocabulary). The set does not depend on the attention kernel.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model to observe, as a context manager.
        predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Positions that predict a response token.
    """

    def __init__(self, model: PreTrainedModel, predicted: torch.Tensor):
        self.model = model
        self.predicted = predicted
        self.maps: dict[str, list[torch.Tensor]] = {group: [] for group in ACTIVATION_GROUPS}
        self.fired: dict[str, set[str]] = {group: set() for group in ACTIVATION_GROUPS}
        self._stack = ExitStack()

    def __enter__(self) -> "ActivationObserver":
        layers = list(decoder_layers(self.model))
        attentions = [module for module in map(attention_module, layers) if module is not None]
        observed_modules = {id(module) for module in attentions}

        def observe_query_key_value(module: nn.Module, *tensors: torch.Tensor) -> None:
            if id(module) in observed_modules:
                for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
                    self._keep("attention", f"attention.{name}", tensor.transpose(1, 2).flatten(2))

        self._stack.enter_context(observe_attention(observe_query_key_value))
        self._hook_input(layers[0], "residual", "embeddings")
        for layer in layers:
            self._hook_layer(layer)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.close()

    def finish(self, last_hidden: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """
        Adds the final norm and the mean logit, and checks that every group has a map.

        Raises:
            ValueError: If a group is empty.
        """
        self._keep("residual", "final norm", last_hidden)
        self._keep("logits", "mean logit", mean_logits(self.model, last_hidden).unsqueeze(-1))
        for group in ACTIVATION_GROUPS:
            if not self.maps[group]:
                raise ValueError(
                    f"No activation of the group {group!r} was seen in {type(self.model).__name__}, so "
                    "`mask_type='activation'` cannot be used with it. Use `mask_type='learned'`, which reads hidden "
                    "states only."
                )
        _log_fired(
            type(self.model).__name__,
            "; ".join(f"{group}: {', '.join(sorted(names))}" for group, names in self.fired.items()),
        )
        return self.maps

    def _keep(self, group: str, name: str, values: torch.Tensor) -> None:
        rows, length = self.predicted.shape
        reduced = mean_above_rounding(values.detach()).reshape(rows, length + 1)
        self.maps[group].append(reduced[:, :-1].to(self.predicted.device))
        self.fired[group].add(name)

    def _hook_output(self, module: nn.Module, group: str, name: str) -> None:
        hook = module.register_forward_hook(lambda _m, _i, output: self._keep(group, name, _first_tensor(output)))
        self._stack.callback(hook.remove)

    def _hook_input(self, module: nn.Module, group: str, name: str) -> None:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(group, name, args[0] if args else kwargs["hidden_states"])

        self._stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)

    def _hook_layer(self, layer: nn.Module) -> None:
        self._hook_output(layer, "residual", "layer output")
        for name, child in layer.named_children():
            if "norm" in type(child).__name__.lower():
                self._hook_output(child, "residual", name)
        attention = attention_module(layer)
        if attention is not None:
            self._hook_output(attention, "residual", "attention output")
            projection = out_projection(attention)
            if projection is not None:
                self._hook_input(projection, "attention", "input of the out-projection")
            if not uses_attention_interface(attention):
                for name in QUERY_KEY_VALUE_NAMES:
                    if hasattr(attention, name):
                        self._hook_output(getattr(attention, name), "attention", name)
        mlp = _child(layer, MLP_NAMES) or layer
        projection = out_projection(mlp)
        if mlp is not layer:
            self._hook_output(mlp, "residual", "MLP output")
        if projection is not None:
            self._hook_input(projection, "mlp", "input of the out-projection")
        elif mlp is not layer:
            self._hook_output(mlp, "mlp", "MLP output")


def mean_above_rounding(values: torch.Tensor) -> torch.Tensor:
    """
    Mean over the features, zero where it is within the rounding error of the features.

    The features after an untrained LayerNorm have mean zero; without this their rounding would be taken for a signal
    and stretched to `[0, 1]`.

    Args:
        values (`torch.Tensor` of shape `(..., F)`, any floating dtype):
            Activations.

    Returns:
        `torch.Tensor` of shape `(...)`, float32.
    """
    relative_error = torch.finfo(torch.float32).eps + torch.finfo(values.dtype).eps / values.size(-1) ** 0.5
    values = values.float()
    mean = values.mean(dim=-1)
    return torch.where(mean.abs() <= 8 * relative_error * values.abs().mean(dim=-1), 0.0, mean)


_LOGGED: set[tuple[str, str]] = set()


def _log_fired(model_name: str, description: str) -> None:
    if (model_name, description) not in _LOGGED:
        _LOGGED.add((model_name, description))
        logger.info(f"Activation mask of {model_name} reads {description}.")


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in module.named_children() if name in names), None)


def attention_module(layer: nn.Module) -> nn.Module | None:
    """The attention block of a decoder layer, by name, or `None`."""
    attention = _child(layer, ATTENTION_NAMES)
    inner = _child(attention, ATTENTION_NAMES) if attention is not None else None
    return inner or attention


def out_projection(block: nn.Module) -> nn.Module | None:
    """The last projection of an attention or MLP block, by name, or `None`."""
    return next((child for name, child in block.named_children() if name in OUT_PROJECTION_NAMES), None)


def uses_attention_interface(attention: nn.Module) -> bool:
    """Whether an attention block calls the attention function through transformers' `AttentionInterface`."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def mean_logits(model: PreTrainedModel, hidden: torch.Tensor, vocab_tile: int = 8192) -> torch.Tensor:
    """
    Mean logit over the vocabulary at every position, without holding the logits.

    Without soft-capping the mean passes through the head: it is the projection on the head's mean row.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model; its head is read inside its own forward.
        hidden (`torch.Tensor` of shape `(2B, T, H)`):
            Final hidden states.
        vocab_tile (`int`, *optional*, defaults to `8192`):
            Rows of the head in one tile, under soft-capping.

    Returns:
        `torch.Tensor` of shape `(2B, T)`, float32.
    """
    scale, softcap = logit_transform(model.config.get_text_config())
    with gathered_head(model.get_output_embeddings()) as (weight, bias):
        hidden = hidden.float()
        if softcap is None:
            mean = hidden @ weight.float().mean(dim=0)
            return scale * (mean if bias is None else mean + bias.float().mean())
        total = hidden.new_zeros(hidden.shape[:-1])
        for start in range(0, weight.size(0), vocab_tile):
            tile = slice(start, start + vocab_tile)
            logits = hidden @ weight[tile].float().t()
            if bias is not None:
                logits = logits + bias[tile].float()
            total += (softcap * torch.tanh(scale * logits / softcap)).sum(dim=-1)
        return total / weight.size(0)


@contextmanager
def gathered_head(head: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of a language-model head, whole, whatever shards them."""
    from torch.distributed.tensor import DTensor

    from .._upstream import maybe_gather_lm_head_ctx

    weight, bias = head.weight, getattr(head, "bias", None)
    whole: Callable[[Any], Any] = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    with maybe_gather_lm_head_ctx(weight, bias):
        yield whole(weight), whole(bias)


def original_head(head: Any) -> Any:
    """
    The head that a reference pass uses: where PEFT trains a copy (`modules_to_save=["lm_head"]`), the `"ref"`
    adapter's copy or the untrained original.
    """
    if not is_peft_available():
        return head
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(head, ModulesToSaveWrapper):
        return head
    return head.modules_to_save["ref"] if "ref" in head.modules_to_save else head.original_module
