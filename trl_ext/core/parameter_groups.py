"""Optimizer groups: by weight decay, and of parameters that a method adds to a model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from .._upstream import decay_parameter_names


def decay_groups(model: nn.Module, weight_decay: float, named: bool = False) -> list[dict[str, Any]]:
    """
    The groups that [`~transformers.Trainer`] makes of a model's trainable parameters: weight decay for all but biases
    and norms, and groups of their own for sharded parameters of different device meshes.

    Args:
        model (`nn.Module`):
            Model.
        weight_decay (`float`):
            Weight decay of the first group; the second's is 0.
        named (`bool`, *optional*, defaults to `False`):
            Whether the groups hold `(name, parameter)` pairs.

    Returns:
        `list[dict[str, Any]]`: without several meshes two groups, either of which may be empty.
    """
    decayed = set(decay_parameter_names(model))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [item for item in trainable if item[0] in decayed], "weight_decay": weight_decay},
        {"params": [item for item in trainable if item[0] not in decayed], "weight_decay": 0.0},
    ]
    if len({_mesh(parameter) for _, parameter in trainable}) > 1:
        groups = [{**group, "params": items} for group in groups for items in _by_mesh(group["params"])]
    if not named:
        return [{**group, "params": [parameter for _, parameter in group["params"]]} for group in groups]
    # torch takes all groups with names or none, and finds none in an empty group
    return [group if group["params"] else {**group, "param_names": []} for group in groups]


def _mesh(parameter: nn.Parameter) -> DeviceMesh | None:
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def _by_mesh(items: Sequence[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    meshes: dict[DeviceMesh | None, list[tuple[str, nn.Parameter]]] = {}
    for item in items:
        meshes.setdefault(_mesh(item[1]), []).append(item)
    return list(meshes.values())


def move_to_own_groups(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    learning_rate: float | None,
    tag: str,
    scheduler: Any = None,
) -> None:
    """
    Takes parameters out of an optimizer's groups and adds them as groups of their own, last, so that the learning rate
    that a trainer logs stays the first group's. A group that they leave empty goes. Does nothing the second time.

    Args:
        optimizer (`torch.optim.Optimizer`):
            Optimizer without state.
        groups (`Sequence[tuple[Sequence[nn.Parameter], float]]`):
            Parameters with their weight decay; empty ones are left out.
        learning_rate (`float` or `None`):
            Learning rate of the new groups, before any schedule; `None` is that of the optimizer's first group.
        tag (`str`):
            Key set to `True` in the new groups.
        scheduler (`torch.optim.lr_scheduler.LRScheduler`, *optional*):
            Scheduler that was built on the optimizer as it was. Its schedule of the first group is that of the new
            ones too.

    Raises:
        ValueError: If the scheduler is of a kind that does not scale each group's initial rate.
    """
    if any(group.get(tag) for group in optimizer.param_groups):
        return
    owned = {id(parameter) for parameters, _ in groups for parameter in parameters}
    previous = optimizer.param_groups
    names = {
        id(p): n for group in previous for p, n in zip(group["params"], group.get("param_names", ()), strict=False)
    }
    kept = [
        place
        for place, group in enumerate(previous)
        if not group["params"] or any(id(p) not in owned for p in group["params"])
    ]
    regrouped = [
        {**previous[place], "params": [p for p in previous[place]["params"] if id(p) not in owned]} for place in kept
    ]
    if learning_rate is None:
        learning_rate = float(previous[0].get("initial_lr", previous[0]["lr"]))
    new: dict[str, Any] = {"lr": learning_rate, tag: True}
    added = [{"params": list(ps), "weight_decay": decay} for ps, decay in groups if ps]
    if scheduler is not None and getattr(scheduler, "optimizer", None) is optimizer:
        _extend_scheduler(scheduler, kept, len(added), learning_rate)
        scheduled, initial = float(previous[0]["lr"]), float(previous[0]["initial_lr"])
        new |= {"initial_lr": learning_rate, "lr": learning_rate * (scheduled / initial if initial else 1.0)}
    regrouped += [{**group, **new} for group in added]
    # Groups are added anew, since an optimizer may keep records of those it was given
    optimizer.param_groups = []
    for group in regrouped:
        if names:
            group["param_names"] = [names.get(id(p), f"{tag}.{place}") for place, p in enumerate(group["params"])]
        optimizer.add_param_group(group)


def _extend_scheduler(scheduler: Any, kept: list[int], num_new: int, learning_rate: float) -> None:
    """Lets a scheduler's lists, one entry a group, follow the groups: those kept, then new ones like the first."""
    own = [scheduler, *getattr(scheduler, "_schedulers", ())]
    for inner in own:
        keeps_rates_in_groups = isinstance(inner, CyclicLR | OneCycleLR)
        if keeps_rates_in_groups or not (hasattr(inner, "base_lrs") or hasattr(inner, "_schedulers")):
            raise ValueError(
                f"`optimizers` has a `{type(inner).__name__}`, which was built before this trainer's own parameters "
                "joined the optimizer and cannot take them in. Leave it out, `optimizers=(optimizer, None)`, and name "
                "a schedule by `lr_scheduler_type`, or pass a scheduler that scales initial rates, such as `LambdaLR`."
            )
    for inner in own:
        if hasattr(inner, "lr_lambdas"):
            inner.lr_lambdas = [*(inner.lr_lambdas[place] for place in kept), *[inner.lr_lambdas[0]] * num_new]
        if hasattr(inner, "_last_lr"):
            base = float(inner.optimizer.param_groups[0]["initial_lr"])
            last = learning_rate * (float(inner._last_lr[0]) / base if base else 1.0)
            inner._last_lr = [*(inner._last_lr[place] for place in kept), *[last] * num_new]
        if hasattr(inner, "base_lrs"):
            inner.base_lrs = [*(inner.base_lrs[place] for place in kept), *[learning_rate] * num_new]
