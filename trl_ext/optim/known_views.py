"""Weights that are known to be scale-invariant, so that no test has to find them."""

import re
from typing import Any


CHOICES = ("test", "channel", "layer", "none")
# By the architecture: a weight that only reaches a normalisation, through linear maps, may be scaled as one. Measured
# on models with random weights, see docs/optimizers.md
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


def check_projection(name: str, options: dict[str, Any]) -> None:
    """
    Checks the option `projection` of a group.

    Raises:
        ValueError: If a view is unknown, a pattern is not one, or patterns are given for parameters without names.
    """
    projection = options.get("projection")
    if projection is None or projection in CHOICES:
        return
    if not isinstance(projection, dict):
        raise ValueError(f"{name}: `projection` must be one of {CHOICES} or a dict of patterns, got {projection!r}.")
    for pattern, view in projection.items():
        if view not in CHOICES:
            raise ValueError(f"{name}: `projection[{pattern!r}]` must be one of {CHOICES}, got {view!r}.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: `projection` has the pattern {pattern!r}, which is none: {error}.") from None


def known_view(group: dict[str, Any], index: int) -> str:
    """
    View of the weight at a place of a group: `"channel"`, `"layer"`, `"test"` to find out, or `"none"`.

    Weights that no pattern matches are not projected: where the scale-invariant ones are named, a test of the others
    could only hit by chance.

    Raises:
        ValueError: If the group has patterns but no names.
    """
    projection = group["projection"]
    if not isinstance(projection, dict):
        return projection or "test"
    names = group.get("param_names")
    if names is None or index >= len(names):
        raise ValueError(
            "`projection` has patterns, but the parameters have no names. Build the optimizer with "
            "`model.named_parameters()`, or give the groups `(name, parameter)` pairs."
        )
    return next((view for pattern, view in projection.items() if re.search(pattern, names[index])), "none")
