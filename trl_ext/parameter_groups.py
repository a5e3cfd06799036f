"""Optimizer groups: by weight decay, and of parameters that a method adds to a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ._compat import decay_parameter_names


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """
    The groups that [`~transformers.Trainer`] makes of a model's trainable parameters: weight decay for all but biases
    and norms.

    Args:
        model (`nn.Module`):
            Model.
        weight_decay (`float`):
            Weight decay of the first group; the second's is 0.

    Returns:
        `list[dict[str, Any]]`: two groups, either of which may be empty.
    """
    decayed = set(decay_parameter_names(model))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [
        {"params": [p for name, p in trainable.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decayed], "weight_decay": 0.0},
    ]


def move_to_own_groups(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    learning_rate: float,
    tag: str,
) -> None:
    """
    Takes parameters out of an optimizer's groups and adds them as groups of their own, last, so that the learning rate
    that a trainer logs stays the first group's. Does nothing the second time.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Optimizer without state.
        groups (`Sequence[tuple[Sequence[nn.Parameter], float]]`):
            Parameters with their weight decay; empty ones are left out.
        learning_rate (`float`):
            Learning rate of the new groups.
        tag (`str`):
            Key set to `True` in the new groups.
    """
    if any(group.get(tag) for group in optimizer.param_groups):
        return
    owned = {id(parameter) for parameters, _ in groups for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in owned]
    for parameters, weight_decay in groups:
        if parameters:
            optimizer.add_param_group(
                {"params": list(parameters), "lr": learning_rate, "weight_decay": weight_decay, tag: True}
            )
