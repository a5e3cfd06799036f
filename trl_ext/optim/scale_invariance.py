"""Weights that are known to be scale-invariant by their architecture, so that no test has to find them."""

from typing import Any


# A weight that only reaches a normalisation, through linear maps, may be scaled as one. Measured on models with random
# weights, see docs/optimizers.md
_QK = ("q_proj", "k_proj")
# Where it is a normalisation of each head, its rows of each head may be scaled apart
_GEMMA3, _GEMMA3N = ("gemma3", "gemma3_text"), ("gemma3n", "gemma3n_text")
_QWEN3 = ("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
NORMALISED_HEADS = {**dict.fromkeys(_GEMMA3 + _QWEN3, _QK), **dict.fromkeys(_GEMMA3N, (*_QK, "v_proj"))}
_BLOCK_OUTPUT = ("v_proj", "o_proj", "up_proj", "down_proj")
SCALE_INVARIANT_WEIGHTS = {
    "gemma2": _BLOCK_OUTPUT,
    "glm4": ("v_proj", "o_proj", "down_proj"),
    **dict.fromkeys((*_GEMMA3, *_GEMMA3N, "olmo2", "olmo3"), _QK + _BLOCK_OUTPUT),
    **dict.fromkeys(_QWEN3, _QK),
}
# Towers of multimodal models name their projections alike and have no such norms
_OTHER_TOWERS = r"^(?!.*(vision|visual|audio|image|video))"
# PEFT's trained copies of whole modules
_COPY = r"(\.modules_to_save\.[^.]+)?"


def scale_invariant_weights(config: Any) -> dict[str, str]:
    """
    The option `projection` for a model of a known architecture.

    Query and key projections under a normalisation of queries and keys (Qwen3, Qwen3-VL, Gemma 3 and 3n, OLMo 2 and
    3), in each head where each is normalised by itself (all of these but OLMo, and Gemma 3n's values too), and value,
    output, up and down projections under a normalisation of a block's output (Gemma 2, 3 and 3n, OLMo 2 and 3; GLM-4
    but for the up projection, which is part of a larger matrix there). Of multimodal models only the
    language model's are named, and of PEFT's `modules_to_save` the copies that train.

    Args:
        config (`transformers.PretrainedConfig`):
            The model's config.

    Returns:
        `dict[str, str]`: `{pattern: "layer"}`, and `{pattern: "head/N"}` with the head dimension `N`.

    Raises:
        ValueError: If the architecture is not known to have scale-invariant weights.

    Example:

    ```python
    >>> from trl_ext.optim import AdamP, scale_invariant_weights

    >>> optimizer = AdamP(model.named_parameters(), projection=scale_invariant_weights(model.config))
    ```
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in SCALE_INVARIANT_WEIGHTS:
        raise ValueError(
            f"No weights of the architecture {model_type!r} are known to be scale-invariant; those of "
            f"{sorted(SCALE_INVARIANT_WEIGHTS)} are. Leave `projection` unset to test each weight at each step, or "
            'name the weights: `projection={"q_proj|k_proj": "layer"}`.'
        )
    names, text = SCALE_INVARIANT_WEIGHTS[model_type], getattr(config, "text_config", config)
    if getattr(text, "attention_bias", False):
        # A bias beside a weight is not scaled with it
        unbiased = ("up_proj", "down_proj", *(["o_proj"] if model_type == "glm4" else []))
        names = tuple(name for name in names if name in unbiased)
    in_heads = [name for name in names if name in NORMALISED_HEADS.get(model_type, ())]
    whole = [name for name in names if name not in in_heads]
    views = [(whole, "layer")]
    if in_heads:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        views.append((in_heads, f"head/{head_dim}"))
    return {rf"{_OTHER_TOWERS}.*\.({'|'.join(own)}){_COPY}\.weight$": view for own, view in views if own}
