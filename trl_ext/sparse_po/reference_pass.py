"""What the reference model tells SparsePO of a batch, in one pass without gradient: its final states, from which its
next-token distribution follows, and what the masks read.

The pass runs inside the reference model's own forward, so that the engine that owns the parameters gathers them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from .._upstream import FusedCausalLMOutput
from .activations import ActivationObserver
from .lm_head.paired_log_probs import head_parameters
from .shared_prompts import PackedPairs, branches_apart, pack_pairs


# The adapter of a PEFT policy that TRL keeps as the reference, where a trained adapter is trained further
REFERENCE_ADAPTER = "ref"
# PeftModel.forward passes these on as None, where a backbone may not take them
_PEFT_EXTRAS = ("output_hidden_states", "output_attentions", "return_dict")


@dataclass
class ReferenceStates:
    """
    States of the reference model on one batch.

    Attributes:
        hidden (`torch.Tensor` of shape `(N, H)`):
            Final hidden states at the positions that predict the N response tokens, in row-major order of the batch.
        layer_states (`torch.Tensor` of shape `(L, N, H)`, *optional*):
            Standardized states of every layer at those positions, for learned masks.
        activation_maps (`dict[str, list[torch.Tensor]]`, *optional*):
            For activation masks: by group, maps of shape `(2B, T-1)` (see [`ActivationObserver`]).
    """

    hidden: torch.Tensor
    layer_states: torch.Tensor | None = None
    activation_maps: dict[str, list[torch.Tensor]] | None = None


@dataclass
class ReferenceCollector:
    """
    Handed to a forward that [`reference_forward`] extends, which leaves the states here.

    Args:
        mask_type (`str`):
            `"learned"`, `"activation"` or `"ones"`: what the states are for.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether the backbone runs on pairs that share their prompt (see [`pack_pairs`]).
        states ([`ReferenceStates`], *optional*):
            What the last run left.
    """

    mask_type: str
    share_prompt: bool = False
    states: ReferenceStates | None = None


def reference_forward(
    model: PreTrainedModel,
    forward: Callable[..., Any],
    *args: Any,
    reference_collector: ReferenceCollector | None = None,
    **kwargs: Any,
) -> Any:
    """
    What the reference model's forward, which was `forward`, becomes (see [`extend_forward`]): given a collector, only
    the backbone runs, and leaves its states there; other calls are unchanged.
    """
    if reference_collector is None:
        return forward(*args, **kwargs)
    labels, kwargs = backbone_inputs(kwargs)
    states = read_reference(
        model, reference_collector.mask_type, labels, *args, share_prompt=reference_collector.share_prompt, **kwargs
    )
    reference_collector.states = states
    return FusedCausalLMOutput(loss=states.hidden.new_zeros(()))


# Traced by a compiler, which does not look at hooks again, the first batch's would be those of every other
@torch.compiler.disable
def read_reference(
    model: PreTrainedModel, mask_type: str, labels: torch.Tensor, *args: Any, share_prompt: bool = False, **kwargs: Any
) -> ReferenceStates:
    """
    Runs a reference model's backbone and keeps what the masks read.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The reference model, or the policy with its adapter switched off.
        mask_type (`str`):
            `"learned"`, `"activation"` or `"ones"`.
        labels (`torch.Tensor` of shape `(2B, T)`, int64):
            Token ids, `-100` outside the completion.
        args (`Any`):
            Passed to `model.base_model`.
        share_prompt (`bool`, *optional*, defaults to `False`):
            Whether the backbone runs on pairs that share their prompt.
        kwargs (`Any`):
            Passed to `model.base_model`.

    Returns:
        [`ReferenceStates`]
    """
    predicted = labels[:, 1:] != -100
    packed = pack_pairs(kwargs["input_ids"], kwargs["attention_mask"]) if share_prompt else None
    if mask_type == "learned":
        return _read_layers(model, predicted, packed, *args, **kwargs)
    if mask_type == "activation":
        with ActivationObserver(model, decoder_layers(model), predicted, packed) as observer:
            last_hidden = run_backbone(model, packed, *args, **kwargs).last_hidden_state
        maps = observer.finish(last_hidden)
        return ReferenceStates(predicting_states(last_hidden, predicted, packed), activation_maps=maps)
    last_hidden = run_backbone(model, packed, *args, **kwargs).last_hidden_state
    return ReferenceStates(predicting_states(last_hidden, predicted, packed))


def _read_layers(
    model: PreTrainedModel, predicted: torch.Tensor, packed: PackedPairs | None, *args: Any, **kwargs: Any
) -> ReferenceStates:
    states: list[torch.Tensor] = []

    def append(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        states.append(standardize(predicting_states(hidden, predicted, packed)))

    with ExitStack() as hooks:
        for layer in decoder_layers(model):
            hooks.callback(layer.register_forward_hook(append).remove)
        last_hidden = run_backbone(model, packed, *args, **kwargs).last_hidden_state
        hidden = predicting_states(last_hidden, predicted, packed)
    # The last layer's state is taken after the final norm, as `hidden_states[-1]` is, unless a projection follows too
    if hidden.size(-1) == states[-1].size(-1):
        states[-1] = standardize(hidden)
    if len({state.size(-1) for state in states}) > 1:
        raise ValueError(
            f"The layers of {type(model).__name__} have states of {sorted({state.size(-1) for state in states})} "
            "features, and `mask_type='learned'` reads layers of one width. Use `mask_type='activation'` or 'ones'."
        )
    return ReferenceStates(hidden, layer_states=torch.stack([state.to(hidden.device) for state in states]))


def run_backbone(model: PreTrainedModel, packed: PackedPairs | None, *args: Any, **kwargs: Any) -> Any:
    """
    Runs a causal language model's backbone, on a batch or on its packed pairs.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        packed ([`PackedPairs`] or `None`):
            The batch's pairs, which take the place of its inputs.
        args (`Any`):
            Passed to `model.base_model`.
        kwargs (`Any`):
            Passed to `model.base_model`.

    Returns:
        Output of the backbone; its states have shape `(2B, T, H)`, or `(B, S, H)` of packed pairs.
    """
    if packed is None:
        return model.base_model(*args, **kwargs)
    with branches_apart(model, packed):
        return model.base_model(*args, **{**kwargs, **packed.inputs()})


def predicting_states(
    hidden: torch.Tensor, predicted: torch.Tensor, packed: PackedPairs | None = None
) -> torch.Tensor:
    """
    Hidden states at the positions that predict a response token.

    Args:
        hidden (`torch.Tensor` of shape `(2B, T, H)`, or `(B, S, H)` of packed pairs):
            States of a batch.
        predicted (`torch.Tensor` of shape `(2B, T-1)`, bool):
            Those positions.
        packed ([`PackedPairs`], *optional*):
            The pairs that were packed.

    Returns:
        `torch.Tensor` of shape `(N, H)`, in row-major order of the batch.
    """
    if packed is not None:
        return packed.predicting(hidden, predicted)
    return hidden[:, :-1][predicted.to(hidden.device)]


def standardize(hidden: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """A LayerNorm over the features before its scale and shift, in float32, returned in the dtype of `hidden`."""
    return nn.functional.layer_norm(hidden.float(), hidden.shape[-1:], eps=eps).to(hidden.dtype)


def backbone_inputs(kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The labels, and the keywords of a causal language model's forward that its backbone takes."""
    dropped = {"labels", "fused_lm_head", *(name for name in _PEFT_EXTRAS if kwargs.get(name) is None)}
    rest = {name: value for name, value in kwargs.items() if name not in dropped}
    return kwargs["labels"], {**rest, "use_cache": False}


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal language model: the outermost `ModuleList` of `num_hidden_layers` elements."""
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


def reference_head(model: PreTrainedModel) -> Any:
    """
    The head of a reference model; of a policy, to be asked for while its adapter is switched off or the reference
    adapter is active. What PEFT wraps is unwrapped, since later the policy's own adapter is active again.
    """
    head = model.get_output_embeddings()
    if not is_peft_available():
        return head
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if not isinstance(head, AuxiliaryTrainingWrapper):
        return head
    if head.disable_adapters:
        return head.original_module
    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapters[0]]
    weight, bias = head_parameters(head)
    return SimpleNamespace(weight=weight.detach(), bias=bias)
