"""What the projection does in a run, weight by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .exchange import sum_over
from .weight import plain_blocks


if TYPE_CHECKING:
    from .projected_optimizer import ProjectedOptimizer
    from .shards import Shard
    from .weight import LocalTensor, Weight


class ProjectionCounts:
    """How often each weight was projected, in which view; on the device, so that counting does not wait for it."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], int] = {}
        self.hits: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, weight: Weight, channel: torch.Tensor | None = None, layer: torch.Tensor | None = None) -> None:
        """Counts a step, and whether the weight was projected in the channel or the layer view."""
        key = (weight.local.group["projection_group"], weight.shard.index)
        self.steps[key] = self.steps.get(key, 0) + 1
        if channel is not None and layer is not None:
            hit = torch.stack([channel.squeeze(), layer.squeeze()]).float()
            self.hits[key] = self.hits[key].add_(hit) if key in self.hits else hit

    def add_known(self, local: LocalTensor, shard: Shard, view: str | None) -> None:
        """Counts a step of a weight whose view is known on the host."""
        key = (local.group["projection_group"], shard.index)
        self.steps[key] = self.steps.get(key, 0) + 1
        if view is not None:
            hit = torch.tensor([float(view == "channel"), float(view == "layer")])
            self.hits[key] = self.hits[key].add_(hit) if key in self.hits else hit

    def counts(self, key: tuple[int, int]) -> list[float]:
        """Steps of a weight, and how many of them were projected in the channel and in the layer view."""
        hits = self.hits[key].tolist() if key in self.hits else [0.0, 0.0]
        return [float(self.steps.get(key, 0)), *hits]

    def reset(self) -> None:
        """Counts from 0 again."""
        self.steps.clear()
        self.hits.clear()


def report(optimizer: ProjectedOptimizer, counts: ProjectionCounts) -> dict[str, dict[str, Any]]:
    """See [`ProjectedOptimizer.report`]."""
    weights = optimizer.stepped_weights()
    found = {}
    for weight, total in zip(weights, _summed(optimizer, weights, counts), strict=True):
        squared_norm, update_squared, radial, steps, channel, layer = total.tolist()
        group, index = weight.local.group, weight.shard.index
        names = group.get("param_names")
        name = names[index] if names else f"{group['projection_group']}.{index}"
        norm, num_steps = squared_norm**0.5, round(steps)
        tangential = max(update_squared - radial**2 / squared_norm, 0.0) ** 0.5 if norm else 0.0
        found[name] = {
            "steps": num_steps,
            "channel": channel / max(num_steps, 1),
            "layer": layer / max(num_steps, 1),
            "weight_norm": norm,
            "effective_step_size": float(group["lr"]) * tangential / norm if norm else float("nan"),
        }
    return found


def _summed(optimizer: ProjectedOptimizer, weights: list[Weight], counts: ProjectionCounts) -> list[torch.Tensor]:
    """
    For each whole weight `<w, w>`, `<u, u>`, `<u, w>`, and its counts, with one all-reduce for each process group.
    """
    totals: list[torch.Tensor] = []
    shared: dict[int, list[int]] = {}
    for place, weight in enumerate(weights):
        shard = weight.shard
        # Every holder of a cut weight counts its steps
        num_holders = torch.distributed.get_world_size(shard.process_group) if shard.borders else 1
        count = torch.tensor(counts.counts((weight.local.group["projection_group"], shard.index))) / num_holders
        totals.append(torch.cat([_dots(optimizer, weight), count.double()]))
        if shard.process_group is not None:
            shared.setdefault(id(shard.process_group), []).append(place)
    for places in shared.values():
        process_group = weights[places[0]].shard.process_group
        summed = sum_over(torch.stack([totals[place] for place in places]), process_group)
        for place, total in zip(places, summed, strict=True):
            totals[place] = total
    return totals


def _dots(optimizer: ProjectedOptimizer, weight: Weight) -> torch.Tensor:
    """`<w, w>`, `<u, u>` and `<u, w>` over the part of a weight that is here, shape `(3,)`, on the CPU."""
    local, start = weight.local, weight.shard.start
    total = torch.zeros(3, dtype=torch.float64, device=local.flat.device)
    for block in plain_blocks(local, start, start + weight.shard.numel):
        update, value = optimizer.update_of(block), block.flat.to(local.compute_dtype)
        total += torch.stack([torch.dot(value, value), torch.dot(update, update), torch.dot(update, value)])
    return total.cpu()
