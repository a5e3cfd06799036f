"""What the projection does in a run, weight by weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


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

    def shares(self, key: tuple[int, int]) -> dict[str, Any]:
        """Steps of a weight, and the shares of them that were projected."""
        steps = self.steps.get(key, 0)
        channel, layer = self.hits[key].tolist() if key in self.hits else (0.0, 0.0)
        return {"steps": steps, "channel": channel / max(steps, 1), "layer": layer / max(steps, 1)}

    def reset(self) -> None:
        """Counts from 0 again."""
        self.steps.clear()
        self.hits.clear()


def report(optimizer: ProjectedOptimizer) -> dict[str, dict[str, Any]]:
    """See [`ProjectedOptimizer.report`]."""
    return {}
