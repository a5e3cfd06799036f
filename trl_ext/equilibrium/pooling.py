"""The state of a sequence that a classifier's head reads, for decoders and encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import PreTrainedConfig


# transformers' own import comes by here, before it has models
if TYPE_CHECKING:
    from transformers import PreTrainedModel


PoolingName = Literal["last", "first", "mean", "pooler"]
_CLASSIFIER_POOLING: dict[str, PoolingName] = {"cls": "first", "mean": "mean"}


def default_pooling(config: PreTrainedConfig) -> PoolingName:
    """
    How transformers' own classifier on a backbone pools.

    Args:
        config (`PreTrainedConfig`):
            Configuration of the backbone.

    Returns:
        `str`: of encoders, that is those which transformers trains with masked tokens, what `classifier_pooling` says
        if they have it, as ModernBERT, and else `"first"`; of all others `"last"`.
    """
    # Its import registers the classifier, whose own import comes by here
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if not is_encoder:
        return "last"
    return _CLASSIFIER_POOLING.get(getattr(config, "classifier_pooling", None) or "cls", "first")


def check_pooling(pooling: str | None) -> None:
    """
    Refuses an unknown pooling.

    Raises:
        ValueError: If it is neither a [`PoolingName`] nor `None`.
    """
    if pooling is not None and pooling not in get_args(PoolingName):
        raise ValueError(
            f"`pooling` must be one of {list(get_args(PoolingName))}, or None for the backbone's own, got {pooling!r}."
        )


def remove_unused_pooler(backbone: PreTrainedModel, pooling: PoolingName) -> None:
    """
    Takes out an encoder's pooler where the head does not read it: without a gradient it would stop distributed
    training. transformers does the same with `add_pooling_layer=False`.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            Model without a head; changed in place.
        pooling (`str`):
            A [`PoolingName`].

    Raises:
        ValueError: If `pooling="pooler"` and there is none.
    """
    pooler = getattr(backbone, "pooler", None)
    if pooling == "pooler" and pooler is None:
        raise ValueError(
            f"`pooling='pooler'` needs a backbone with a pooler, which `{type(backbone).__name__}` has not. Use "
            "'first', whose state a pooler reads, or 'mean'."
        )
    if pooling != "pooler" and pooler is not None:
        backbone.pooler = None


def last_token_states(hidden: torch.Tensor, input_ids: torch.Tensor | None, pad_token_id: int | None) -> torch.Tensor:
    """
    The state of the last token of each row that is not padding, left or right, as transformers' classifiers pool.

    Args:
        hidden (`torch.Tensor` of shape `(B, T, H)`):
            States.
        input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Tokens. Without them the last position counts.
        pad_token_id (`int`, *optional*):
            Padding token.

    Returns:
        `torch.Tensor` of shape `(B, H)`.

    Raises:
        ValueError: If there are several rows and no padding token.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    if pad_token_id is None and len(hidden) > 1:
        raise ValueError(
            f"A batch of {len(hidden)} rows needs a padding token. Set `model.config.get_text_config().pad_token_id`."
        )
    if pad_token_id is None or input_ids is None:
        return hidden[:, -1]
    kept = (input_ids != pad_token_id).to(hidden.device, torch.int32)
    positions = torch.arange(input_ids.size(1), device=hidden.device, dtype=torch.int32)
    return hidden[rows, (positions * kept).argmax(-1)]


def _kept_tokens(
    hidden: torch.Tensor,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pad_token_id: int | None,
) -> torch.Tensor:
    """`(B, T)`, 1 where a token is not padding, in the dtype of the states."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.to(hidden)
    if input_ids is not None and pad_token_id is not None:
        return (input_ids != pad_token_id).to(hidden)
    return hidden.new_ones(hidden.shape[:2])


def pooled_states(
    outputs: Any,
    pooling: PoolingName,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    pad_token_id: int | None = None,
) -> torch.Tensor:
    """
    One state for each row.

    Args:
        outputs (`ModelOutput`):
            The backbone's, with `last_hidden_state` of shape `(B, T, H)` and, for `"pooler"`, `pooler_output`.
        pooling (`str`):
            `"last"` or `"first"`, the state of the last or first token that is not padding, left or right; `"mean"`,
            that of all such tokens; `"pooler"`, what the backbone's pooler makes of the first.
        input_ids (`torch.Tensor` of shape `(B, T)`, *optional*):
            Tokens.
        attention_mask (`torch.Tensor` of shape `(B, T)`, *optional*):
            1 where a token is not padding. Read by `"first"` and `"mean"`, which else compare tokens with
            `pad_token_id`.
        pad_token_id (`int`, *optional*):
            Padding token.

    Returns:
        `torch.Tensor` of shape `(B, H)`.

    Raises:
        ValueError: If `pooling="last"`, there are several rows and no padding token.
    """
    if pooling == "pooler":
        return outputs.pooler_output
    hidden = outputs.last_hidden_state
    if pooling == "last":
        return last_token_states(hidden, input_ids, pad_token_id)
    kept = _kept_tokens(hidden, input_ids, attention_mask, pad_token_id)
    if pooling == "first":
        return hidden[torch.arange(len(hidden), device=hidden.device), kept.argmax(dim=1)]
    # In float32: a sum over many tokens overflows or is rounded in half precision
    kept = kept.float().unsqueeze(-1)
    return (hidden.float() * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1.0)
