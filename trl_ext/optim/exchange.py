"""The one all-reduce of a sharded step: dot products of the weights that shard borders cut."""

from collections.abc import Sequence
from typing import Any

import torch

from .weight import Weight


class Exchange:
    """
    Sums, over the processes that hold them together, the dot products of cut weights: for each weight four totals,
    a count of failing rows, and four more for each row that a border cuts.

    Each process takes part whether or not it holds a piece, so the weights' number and order are those of the layout.

    Args:
        weights (`Sequence[Weight]`):
            Cut weights of one process group, with their dot products, in the same order on each process.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = list(weights)
        parts: list[torch.Tensor] = []
        for weight in weights:
            parts += [weight.totals(), weight.num_failing_rows().view(1), weight.cut_row_dots().flatten()]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        self.device = parts[0].device
        process_group = weights[0].shard.process_group
        self.sums = torch.cat([part.to(dtype) for part in parts]).to(_device_of(process_group, self.device))
        self.work = torch.distributed.all_reduce(self.sums, group=process_group, async_op=True)

    def results(self) -> list[tuple[Weight, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Waits, and returns each weight with its totals, failing rows and the dot products of its cut rows."""
        self.work.wait()
        sums, position, found = self.sums.to(self.device), 0, []
        for weight in self.weights:
            num_cut = len(weight.shard.cut_rows)
            part = sums[position : position + 5 + 4 * num_cut].to(weight.dots.dtype)
            found.append((weight, part[:4], part[4], part[5:].view(4, num_cut)))
            position += 5 + 4 * num_cut
        return found


def exchange_all(weights: Sequence[Weight]) -> list[Exchange]:
    """Starts one all-reduce for each process group among the weights."""
    by_group: dict[int, list[Weight]] = {}
    for weight in weights:
        by_group.setdefault(id(weight.shard.process_group), []).append(weight)
    return [Exchange(members) for members in by_group.values()]


def sum_over(tensor: torch.Tensor, process_group: Any) -> torch.Tensor:
    """The sum of a tensor over processes, on the tensor's device."""
    summed = tensor.to(_device_of(process_group, tensor.device))
    torch.distributed.all_reduce(summed, group=process_group)
    return summed.to(tensor.device)


def _device_of(process_group: Any, device: torch.device) -> torch.device:
    """Where a group's backend can reduce: NCCL can't on a CPU, where offloaded optimizers work."""
    if device.type == "cpu" and torch.distributed.get_backend(process_group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return device
