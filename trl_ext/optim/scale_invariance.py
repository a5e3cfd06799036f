"""Weights that are known to be scale-invariant by their architecture, so that no test has to find them."""

from typing import Any


# A weight that only reaches a normalisation, through linear maps, may be scaled as one. Measured on models with random
# weights, see docs/optimizers.md
SCALE_INVARIANT_WEIGHTS = {
    "gemma2": r"\.(v_proj|o_proj|up_proj|down_proj)\.weight$",
    "gemma3": r"\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)\.weight$",
    "gemma3_text": r"\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)\.weight$",
    "olmo2": r"\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)\.weight$",
    "qwen3": r"\.(q_proj|k_proj)\.weight$",
    "qwen3_moe": r"\.(q_proj|k_proj)\.weight$",
}


def scale_invariant_weights(config: Any) -> dict[str, str]:
    """
    The option `projection` for a model of a known architecture.

    Query and key projections under a normalisation of queries and keys (Qwen3, Gemma 3, OLMo 2), and value, output, up
    and down projections under a normalisation of a block's output (Gemma 2 and 3, OLMo 2).

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
    return {SCALE_INVARIANT_WEIGHTS[model_type]: "layer"}
