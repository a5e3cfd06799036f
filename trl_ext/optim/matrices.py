"""
Sharded matrices for optimizers of your own: which part of which weight this process holds, whatever wrapper cut the
parameters, and sums and whole matrices over the processes that hold it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .shards import GROUP_KEY, Exchange, Layouts, Shard, exchange_key
from .weights import local_part, memory


@dataclass(frozen=True)
class Stretch:
    """
    Elements that follow each other in one tensor of an optimizer's group.

    Args:
        param (`torch.Tensor`):
            What the group holds: a parameter, or the flat tensor that a wrapper put in the place of several. Key of
            its state.
        group (`dict`):
            The group.
        start, stop (`int`):
            First element in the local part of `param`, flat, and the one after the last.
    """

    param: torch.Tensor
    group: dict[str, Any]
    start: int
    stop: int

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        These elements of a tensor.

        Args:
            tensor (`torch.Tensor` of the shape of `param`):
                `param`, its gradient, or a running average made with `torch.zeros_like(param)`.

        Returns:
            `torch.Tensor` of shape `(stop - start,)`, a view that may be written to.

        Raises:
            RuntimeError: If the tensor's elements do not follow each other row by row.
        """
        if not local_part(tensor).is_contiguous():
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} with strides {local_part(tensor).stride()}: sharded "
                "matrices need elements that follow each other row by row. Make it contiguous."
            )
        return memory(tensor)[self.start : self.stop]


@dataclass(frozen=True)
class ShardedMatrix(Stretch):
    """
    The part of a weight of at least two dimensions that is here, which may be empty or all of it.

    Args:
        shard (`Shard`):
            Where it lies in the weight.
    """

    shard: Shard

    @property
    def name(self) -> str | None:
        """The weight's name, where the optimizer was given named parameters."""
        return self.shard.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        return self.shard.shape

    @property
    def is_whole(self) -> bool:
        """Whether one process holds all of it: of those that [`ShardedMatrices.read`] names, this one."""
        return not self.shard.borders

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """
        What a process needs of a whole matrix.

        Args:
            whole (`torch.Tensor` of the weight's shape):
                Such as an update that was computed from a gathered gradient.

        Returns:
            `torch.Tensor`: the elements in the places of [`~Stretch.part`], shape `(stop - start,)`.
        """
        return self.shard.cut(whole)


class ShardedMatrices:
    """
    The matrices in an optimizer's groups under DDP, DeepSpeed ZeRO-1, 2 and 3, FSDP1, FSDP2, HSDP and tensor
    parallelism: what [`AdamP`] reads layouts with and adds numbers up with, for an optimizer of your own. See
    docs/optimizers.md for Muon on it, which equals one process under each of them.

    Args:
        optimizer (`torch.optim.Optimizer`):
            The optimizer, with all its groups: make this at the end of `__init__`, since wrappers cut and replace
            parameters afterwards.

    Example:

    ```python
    >>> matrices = ShardedMatrices(optimizer)
    >>> for matrix in matrices.read():
    ...     update = orthogonalized(matrices.gather(matrix, matrix.param.grad))
    ...     matrix.part(matrix.param).sub_(matrix.cut(update), alpha=matrix.group["lr"])
    ```
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer = optimizer
        self._layouts = Layouts()
        self._remember()

    def _remember(self) -> None:
        for group in self._optimizer.param_groups:
            if group.setdefault(GROUP_KEY, self._layouts.new_key()) not in self._layouts:
                self._layouts.remember(group)

    def read(self) -> list[ShardedMatrix]:
        """
        The matrices to step on: those with a gradient here, and those of which other processes hold a part, which
        wait for this one. The same order on each process. DeepSpeed shows an optimizer one group at a time.

        Raises:
            UnknownShardsError: If the layout of a parameter can't be read.
        """
        return [
            matrix
            for matrix in self._matrices()
            if not matrix.is_whole or (matrix.stop > matrix.start and matrix.param.grad is not None)
        ]

    def rest(self) -> list[Stretch]:
        """Elements with a gradient that are in no matrix: biases, norms and padding."""
        found, matrices = [], list(self._matrices())
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                numel, position = local_part(param).numel(), 0
                own = sorted((m.start, m.stop) for m in matrices if m.param is param and m.stop > m.start)
                for start, stop in [*own, (numel, numel)]:
                    if start > position:
                        found.append(Stretch(param, group, position, start))
                    position = stop
        return found

    def _matrices(self) -> Iterator[ShardedMatrix]:
        self._remember()
        for group in self._optimizer.param_groups:
            for number, param in enumerate(group["params"]):
                for shard in self._layouts.read(param, number, {"on_unknown_shards": "raise", **group}):
                    if len(shard.shape) > 1 and shard.whole_numel:
                        yield ShardedMatrix(param, group, shard.start, shard.start + shard.numel, shard)

    def gather(self, matrix: ShardedMatrix, tensor: torch.Tensor | None) -> torch.Tensor:
        """
        A whole matrix from its parts. All processes that hold a part must call it, in the same order; it takes one
        all-reduce of the matrix where it is cut.

        Args:
            matrix ([`ShardedMatrix`]):
                One of [`~ShardedMatrices.read`].
            tensor (`torch.Tensor` of the shape of `matrix.param`, or `None`):
                The parameter, its gradient or a running average; `None` counts as zeros.

        Returns:
            `torch.Tensor` of the weight's shape, float32 or the tensor's own dtype, which is not to be written to.
        """
        if matrix.is_whole:
            assert tensor is not None
            return matrix.part(tensor).view(matrix.shape)
        dtype = torch.float32 if tensor is None or tensor.dtype != torch.float64 else torch.float64
        whole = torch.zeros(matrix.shape, dtype=dtype, device=local_part(matrix.param).device)
        if tensor is not None and matrix.stop > matrix.start:
            matrix.shard.paste(matrix.part(tensor).to(dtype), whole)
        (total,) = Exchange([whole.view(-1)], matrix.shard.process_group).results()
        return total.view(matrix.shape)

    def sums(self, matrices: Sequence[ShardedMatrix], vectors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """
        Adds numbers up over the processes that hold parts of the same matrix, in one all-reduce for each set of
        processes. All of them must call it with vectors of the same sizes for the same matrices.

        Args:
            matrices (`Sequence[ShardedMatrix]`):
                Matrices of [`~ShardedMatrices.read`].
            vectors (`Sequence[torch.Tensor]`):
                For each of them a vector such as `matrix.part(param).square().sum().view(1)`.

        Returns:
            `list[torch.Tensor]`: the sums, as the vectors where a matrix is whole.
        """
        found = list(vectors)
        shared: dict[tuple[int, ...], list[int]] = {}
        for place, matrix in enumerate(matrices):
            if not matrix.is_whole:
                shared.setdefault(exchange_key(matrix.shard.process_group), []).append(place)
        exchanges = [
            (places, Exchange([vectors[place] for place in places], matrices[places[0]].shard.process_group))
            for places in shared.values()
        ]
        for places, exchange in exchanges:
            for place, total in zip(places, exchange.results(), strict=True):
                found[place] = total
        return found
