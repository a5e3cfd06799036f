"""Checkpoints of other optimizers and of other options: what is taken over, what is refused, and what is said."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch


logger = logging.getLogger(__name__)

# Running averages of torch's optimizers under other names than ours
OTHER_NAMES = {"momentum": "momentum_buffer"}
# Options that change what a step does
WATCHED = (
    "betas", "eps", "weight_decay", "delta", "wd_ratio", "nesterov", "momentum", "dampening", "project_momentum",
    "projection", "adam_ratio", "radial_ratio",
)  # fmt: skip


def take_over(
    state_dict: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    needed: Sequence[str],
    moments: Sequence[str],
    name: str,
) -> dict[str, Any]:
    """
    A checkpoint as an optimizer can load it.

    Args:
        state_dict (`dict[str, Any]`):
            The checkpoint's state, which is left alone.
        groups (`Sequence[dict]`):
            The optimizer's groups, whose options fill in what the checkpoint lacks.
        needed (`Sequence[str]`):
            Options that every group must have.
        moments (`Sequence[str]`):
            Names of the running averages.
        name (`str`):
            The optimizer's, for messages.

    Returns:
        `dict[str, Any]`: a copy with all options, and the running averages under these names.

    Raises:
        ValueError: If a parameter's state lacks a running average.
    """
    saved = [dict(group) for group in state_dict["param_groups"]]
    missing = sorted({option for group in saved for option in needed if option not in group})
    states = {key: _renamed(state, moments) for key, state in state_dict["state"].items()}
    for state in states.values():
        absent = [moment for moment in moments if not isinstance(state.get(moment), torch.Tensor)]
        if state and absent:
            raise ValueError(
                f"{name} can't go on from this checkpoint: its optimizer kept {sorted(state)} and not {absent}. "
                "Resume with the optimizer that wrote it, or start from the checkpoint's model without its optimizer."
            )
    if missing:
        logger.warning(
            "%s takes over the running averages of another optimizer's checkpoint; it has no %s, which are this "
            "optimizer's own.", name, ", ".join(f"`{option}`" for option in missing),
        )  # fmt: skip
    for group, own in zip(saved, groups, strict=False):
        for option in needed:
            if option in own:
                group.setdefault(option, own[option])
    _warn_of_changes(saved, groups, name)
    return {**state_dict, "state": states, "param_groups": saved}


def _renamed(state: dict[str, Any], moments: Sequence[str]) -> dict[str, Any]:
    """A parameter's state, with the running averages under our names."""
    names = {OTHER_NAMES[moment]: moment for moment in moments if moment in OTHER_NAMES and moment not in state}
    return {names.get(key, key): value for key, value in state.items()}


def _warn_of_changes(saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], name: str) -> None:
    """Says which options of a configuration lose against the checkpoint's."""
    changes: dict[str, None] = {}
    for group, own in zip(saved, groups, strict=False):
        pairs = {option: (own[option], group[option]) for option in WATCHED if option in own and option in group}
        # A schedule changes `lr`, and keeps what the configuration said
        if "initial_lr" in group:
            pairs["lr"] = (own.get("initial_lr", own["lr"]), group["initial_lr"])
        for option, (ours, theirs) in pairs.items():
            if not isinstance(ours, torch.Tensor) and not isinstance(theirs, torch.Tensor) and _differ(ours, theirs):
                changes[f"`{option}` is {theirs} as in the checkpoint, not {ours} as configured"] = None
    if changes:
        warnings.warn(
            f"{name}, resumed: {'; '.join(changes)}. To change an option, set it in `optimizer.param_groups` after "
            "loading, or start from the checkpoint's model without its optimizer.",
            stacklevel=4,
        )


def _differ(ours: Any, theirs: Any) -> bool:
    both = [list(value) if isinstance(value, tuple) else value for value in (ours, theirs)]
    return bool(both[0] != both[1])
