"""The model that the KL is measured from.

[`~trl.GRPOTrainer`] loads it anew from the policy's `_name_or_path`, which need not be the policy: a model that was
trained, merged or resized in memory keeps the name of the folder it came from. Here a policy that is handed over as a
model is copied, [`frozen_copy`]; one that is given by name is loaded twice, as there.
"""

import copy
from collections.abc import Callable
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .._upstream import copy_parameters, is_partitioned
from .critic import VALUE_HEADS


def check_reference(ref_model: Any, model: Any, peft_config: Any, kl_coef: float) -> None:
    """Refuses a `ref_model` of the wrong kind, and an adapter without which the policy is not the one at the start."""
    configs = [peft_config] if peft_config is not None else getattr(model, "peft_config", {}).values()
    moving = {bias for bias in (getattr(config, "bias", "none") for config in configs) if bias != "none"}
    if moving and kl_coef > 0:
        raise ValueError(
            f"The adapter has `bias={moving.pop()!r}`: the biases that it trains stay when it is off, so that the "
            "reference would move with the policy. Set `bias='none'`, or `kl_coef=0`."
        )
    if ref_model is None:
        return
    if not isinstance(ref_model, (str, PreTrainedModel)):
        raise TypeError(
            f"`ref_model` must be a model, or its id or folder, got `{type(ref_model).__name__}`. Leave it out for a "
            "frozen copy of the policy."
        )
    if peft_config is not None or is_peft_model(model):
        raise ValueError(
            "`ref_model` is given and the policy has an adapter: the reference is then the policy with its adapter "
            "off. Leave `ref_model` out, or merge the adapter and train all weights."
        )
    if kl_coef == 0:
        raise ValueError(
            "`ref_model` is given and `kl_coef=0` computes no divergence. Leave it out, or set `kl_coef`."
        )
    if isinstance(ref_model, PreTrainedModel) and isinstance(model, PreTrainedModel):
        sizes = [one.config.get_text_config().vocab_size for one in (ref_model, model)]
        if sizes[0] < sizes[1]:
            raise ValueError(
                f"`ref_model` has a vocabulary of {sizes[0]} tokens and the policy one of {sizes[1]}; the reference "
                "scores the policy's tokens. Give a model with the policy's tokenizer."
            )


def reference_builder(model: Any, ref_model: str | PreTrainedModel | None = None) -> Callable[..., PreTrainedModel]:
    """
    Builds the reference, before anything has changed the policy.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The policy as it was handed over.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*, defaults to `None`):
            The reference, or its id or folder.

    Returns:
        `Callable`: called as `build(load, name, **kwargs)` with TRL's way to load a model and its arguments for the
        policy; gives the reference, in evaluation mode and without gradients.
    """

    def build(load: Callable[..., PreTrainedModel], name: str, **kwargs: Any) -> PreTrainedModel:
        if isinstance(ref_model, str):
            reference = load(ref_model, **kwargs)
        elif ref_model is not None and ref_model is not model:
            reference = ref_model
        elif isinstance(model, str):
            reference = load(name, **kwargs)
        elif is_partitioned(model):
            reference = _loaded_copy(model, load, name, kwargs)
        else:
            reference = frozen_copy(model)
        return reference.requires_grad_(False).eval()

    return build


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without what an earlier trainer left in it: its wider forward and value heads."""
    copied = copy.deepcopy(model)
    if not hasattr(model, "_hf_hook"):  # accelerate's dispatch over devices, which is copied with the model
        # TRL's fused head is a closure over the original: a copy of it would still run that
        vars(copied).pop("forward", None)
    if hasattr(copied, VALUE_HEADS):
        delattr(copied, VALUE_HEADS)
    return copied.requires_grad_(False).eval()


def _loaded_copy(model: PreTrainedModel, load: Callable[..., Any], name: str, kwargs: dict) -> PreTrainedModel:
    """Under ZeRO-3, where a model cannot be copied: one from the same folder, with the policy's weights."""
    if not name:
        raise ValueError(
            "Under DeepSpeed ZeRO-3 the reference is loaded from the policy's `config._name_or_path`, which is empty. "
            "Save the model and give its folder as `model` or `ref_model`."
        )
    reference = load(name, **kwargs)
    copy_parameters(model, reference)
    return reference


def divergence_warning(mean: float, error: float) -> str:
    """
    What may be wrong where the KL of a response, in nats, is negative, or not zero before the first step, by many
    standard errors.
    """
    measured = f"The mean KL of a response from the reference is {mean:.3g} ± {error:.2g} nats"
    if mean < 0:
        return (
            f"{measured}, and a KL is never negative: the responses were not drawn from the policy that they are "
            "scored with. Look for dropout (`disable_dropout`), for `top_k`, `top_p` or `min_p`, and for a generation "
            "engine with other weights."
        )
    return (
        f"{measured} before the first step, so that the policy is drawn to another model from the start. Look for an "
        "adapter that starts away from zero, or give the `ref_model` that you mean."
    )
