"""Weights that are known to be scale-invariant by their architecture, so that no test has to find them."""

from typing import Any


# A weight that only reaches a normalisation, through linear maps, may be scaled as one. Measured on models with random
# weights, see docs/optimizers.md
_QK = ("q_proj", "k_proj")
_BLOCK_OUTPUT = ("v_proj", "o_proj", "up_proj", "down_proj")
SCALE_INVARIANT_WEIGHTS = {
    "gemma2": _BLOCK_OUTPUT,
    "glm4": ("v_proj", "o_proj", "down_proj"),
    **dict.fromkeys(("gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "olmo2", "olmo3"), _QK + _BLOCK_OUTPUT),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe", "qwen3_vl_moe_text"), _QK),
}
# Towers of multimodal models name their projections alike and have no such norms
_OTHER_TOWERS = r"^(?!.*(vision|visual|audio|image|video))"
# PEFT's trained copies of whole modules
_COPY = r"(\.modules_to_save\.[^.]+)?"


def scale_invariant_weights(config: Any) -> dict[str, str]:
    """
    The option `projection` for a model of a known architecture.

    Query and key projections under a normalisation of queries and keys (Qwen3, Qwen3-VL, Gemma 3 and 3n, OLMo 2 and
    3), and value, output, up and down projections under a normalisation of a block's output (Gemma 2, 3 and 3n, OLMo 2
    and 3; GLM-4 but for the up projection, which is part of a larger matrix there). Of multimodal models only the
    language model's are named, and of PEFT's `modules_to_save` the copies that train.

    Args:
        config (`transformers.PretrainedConfig`):
            The model's config.

    Returns:
        `dict[str, str]`: `{pattern: "layer"}`.

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
    names = SCALE_INVARIANT_WEIGHTS[model_type]
    if getattr(getattr(config, "text_config", config), "attention_bias", False):
        # A bias beside a weight is not scaled with it
        unbiased = ("up_proj", "down_proj", *(["o_proj"] if model_type == "glm4" else []))
        names = tuple(name for name in names if name in unbiased)
    return {rf"{_OTHER_TOWERS}.*\.({'|'.join(names)}){_COPY}\.weight$": "layer"}
