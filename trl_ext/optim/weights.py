"""
A weight whose update may be projected, in the part that this process holds: its dot products and the decision where to
project, worked on in blocks of flat memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .projection import passes, radial_coefficient
from .shards import Shard


# Key of a group that stays the group's own: its index does not, since wrappers drop and split groups
GROUP_KEY = "projection_group"
# Elements that are worked on at a time. On a CPU they stay in the cache, and no large temporary is allocated and
# page-faulted each step.
CPU_BLOCK, GPU_BLOCK = 2**16, 2**24
# Rows looked at before the channel level is given up: of a weight that is not scale-invariant one in twelve passes
NUM_PROBED_ROWS = 32


@dataclass
class LocalTensor:
    """
    One tensor of a group as flat views of equal length.

    Args:
        param (`torch.Tensor`):
            What the group holds; key of its state.
        group (`dict`):
            The group.
        shards (`list[Shard]`):
            The weights in it.
        flat (`torch.Tensor` of shape `(N,)`):
            The local part's memory.
        grad (`torch.Tensor` of shape `(N,)`, *optional*):
            Its gradient; `None` where this process has none.
        moments (`tuple[torch.Tensor, ...]`):
            Running averages, each of shape `(N,)`.
        step (`int` or `torch.Tensor`):
            Number of this step, from 1.
    """

    param: torch.Tensor
    group: dict[str, Any]
    shards: list[Shard]
    flat: torch.Tensor
    grad: torch.Tensor | None
    moments: tuple[torch.Tensor, ...]
    step: int | torch.Tensor

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float32 for half-precision parameters."""
        return self.flat.dtype if self.flat.dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def block_size(self) -> int:
        """Elements to work on at a time."""
        return CPU_BLOCK if self.flat.device.type == "cpu" else GPU_BLOCK


@dataclass(frozen=True)
class Block:
    """Elements of a [`LocalTensor`] that are worked on at a time: whole rows of a weight, or a part of one."""

    local: LocalTensor
    start: int
    stop: int
    row: int = 0
    num_rows: int = 1

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.start : self.stop]

    @property
    def flat(self) -> torch.Tensor:
        """The parameter's elements."""
        return self._cut(self.local.flat)

    @property
    def grad(self) -> torch.Tensor:
        """The gradient's elements."""
        assert self.local.grad is not None
        return self._cut(self.local.grad)

    @property
    def moments(self) -> tuple[torch.Tensor, ...]:
        """The running averages' elements."""
        return tuple(self._cut(moment) for moment in self.local.moments)


def plain_blocks(local: LocalTensor, start: int, stop: int) -> Iterator[Block]:
    """Cuts elements of a tensor into blocks, rows or not."""
    for first in range(start, stop, local.block_size):
        yield Block(local, first, min(first + local.block_size, stop))


@dataclass
class Weight:
    """
    A weight with at least two dimensions, or the part of it that is here.

    Args:
        local (`LocalTensor`):
            Tensor that holds it.
        shard (`Shard`):
            Where it lies there.
        level (`str`, *optional*):
            Level at which it is known to be scale-invariant; `None` to test.
        by_rows (`bool`, *optional*, defaults to `True`):
            Whether each row has dot products of its own. Not at the layer level.
        kernels (module, *optional*):
            Compiled passes, kernels/cpu.py; `None` for blocks of torch operations.
        dots (`torch.Tensor` of shape `(4, R)`):
            For each row `<g, w>`, `<g, g>`, `<w, w>` and `<u, w>` with gradient `g`, weight `w` and update `u`.
        displacement (`torch.Tensor` of shape `(numel,)`, *optional*):
            Minus the update, where it is kept between the passes.
        squared_norm (`torch.Tensor` of shape `()`, *optional*):
            `<w, w>`, where the test has computed it.
        old (`torch.Tensor` of shape `(numel,)`, *optional*):
            The weights from before the step without projection, where that has been taken.
    """

    local: LocalTensor
    shard: Shard
    level: str | None = None
    by_rows: bool = True
    kernels: Any = None
    dots: torch.Tensor = field(default_factory=lambda: torch.zeros(4, 1))
    displacement: torch.Tensor | None = None
    squared_norm: torch.Tensor | None = None
    old: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.level == "layer":
            self.by_rows = False

    @property
    def key(self) -> tuple[int, int]:
        """Names the weight from step to step: its group's key and its place there."""
        return self.local.group[GROUP_KEY], self.shard.index

    @property
    def param(self) -> torch.Tensor:
        """What the group holds."""
        return self.local.param

    @property
    def numel(self) -> int:
        """Elements that this process updates."""
        return self.shard.numel if self.local.grad is not None else 0

    @property
    def first_row(self) -> int:
        """First row at the channel level that a part of is here."""
        return self.shard.offset // self.shard.row_size

    @property
    def num_local_rows(self) -> int:
        """Rows at the channel level that a part of is here."""
        return -(-(self.shard.offset + self.numel) // self.shard.row_size) - self.first_row if self.numel else 0

    def blocks(self) -> Iterator[Block]:
        """Cuts the part that is here into blocks, at rows where rows count."""
        start, row_size, limit = self.shard.start, self.shard.row_size, self.local.block_size
        if not self.by_rows:
            yield from plain_blocks(self.local, start, start + self.numel)
            return
        position = 0
        while position < self.numel:
            row, column = divmod(self.shard.offset + position, row_size)
            if column == 0 and row_size <= min(limit, self.numel - position):
                num_rows = min(limit, self.numel - position) // row_size
                size = num_rows * row_size
            else:
                num_rows, size = 1, min(row_size - column, limit, self.numel - position)
            first = start + position
            yield Block(self.local, first, first + size, row - self.first_row, num_rows)
            position += size

    def allocate_dots(self) -> None:
        """Sets the dot products to 0."""
        shape = (4, self.num_local_rows if self.by_rows else 1)
        self.dots = torch.zeros(shape, dtype=self.local.compute_dtype, device=self.local.flat.device)

    def add_dots(self, block: Block, displacement: torch.Tensor | None) -> None:
        """Adds a block's `<g, w>`, `<g, g>`, `<w, w>` and, given the displacement `-u`, `<u, w>`."""
        dtype = self.local.compute_dtype
        weight, grad = block.flat.to(dtype), block.grad.to(dtype)
        pairs = [(grad, weight), (grad, grad), (weight, weight)]
        if displacement is not None:
            pairs.append((displacement, weight))
        if block.num_rows == 1:
            found = torch.stack([torch.dot(a, b) for a, b in pairs]).unsqueeze(1)
        else:
            found = torch.stack([(a * b).view(block.num_rows, -1).sum(1) for a, b in pairs])
        if displacement is not None:
            found[3].neg_()
        self.dots[: len(pairs), block.row : block.row + block.num_rows] += found

    def add_layer_dots(self, parts: Sequence[torch.Tensor]) -> None:
        """
        Sets the dot products of a weight that is known to pass at the layer level from `<-u, w>` of its blocks; those
        of the test are not needed.
        """
        self.dots[3, 0] = torch.stack(list(parts)).sum().neg_()
        start = self.shard.start
        flat = self.local.flat[start : start + self.numel]
        self.dots[2, 0] = self.squared_norm if self.squared_norm is not None else squared_norm(flat, self.local)

    def probe(self) -> torch.Tensor | None:
        """Whether the first whole rows pass in the channel level; `None` where no whole row is here."""
        row_size, local = self.shard.row_size, self.local
        skipped = -self.shard.offset % row_size
        num_rows = min(NUM_PROBED_ROWS, max(1, local.block_size // row_size), (self.numel - skipped) // row_size)
        if num_rows < 1:
            return None
        start = self.shard.start + skipped
        block = Block(local, start, start + num_rows * row_size, 0, num_rows)
        probed = Weight(local, self.shard)
        probed.dots = torch.zeros(4, num_rows, dtype=local.compute_dtype, device=local.flat.device)
        probed.add_dots(block, None)
        return passes(probed.dots, row_size, local.group["delta"], local.group["eps"]).all()

    def totals(self) -> torch.Tensor:
        """Dot products over the part that is here, shape `(4,)`."""
        return self.dots.sum(1)

    def num_failing_rows(self) -> torch.Tensor:
        """
        Rows at the channel level, whole on this process, that don't pass; 1 where they were given up. Shape `()`.
        """
        dots = self.dots
        if not self.by_rows:
            return dots.new_ones(()) if self.level is None and self.numel else dots.new_zeros(())
        cut = [row - self.first_row for row in self.shard.cut_rows]
        failing = ~passes(dots, self.shard.row_size, self.local.group["delta"], self.local.group["eps"])
        for row in cut:
            if 0 <= row < self.num_local_rows:
                failing[row] = False
        return failing.sum().to(dots.dtype)

    def cut_row_dots(self) -> torch.Tensor:
        """This process's part of the dot products of the rows that borders cut, shape `(4, number of them)`."""
        rows = self.shard.cut_rows
        found = self.dots.new_zeros(4, len(rows))
        if self.by_rows:
            for place, row in enumerate(rows):
                if 0 <= row - self.first_row < self.num_local_rows:
                    found[:, place] = self.dots[:, row - self.first_row]
        return found

    def sums(self) -> torch.Tensor:
        """What is added up over processes: four totals, a count, and four for each cut row, flat."""
        return torch.cat([self.totals(), self.num_failing_rows().view(1), self.cut_row_dots().flatten()])

    def split_sums(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What [`choose`] takes, from [`sums`] over all processes."""
        sums = sums.to(self.dots.dtype)
        return sums[:4], sums[4], sums[5:].view(4, len(self.shard.cut_rows))

    def choose(
        self, totals: torch.Tensor, num_failing: torch.Tensor, cut_row_dots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Decides on the level, on the device, from the `totals` of the whole weight, shape `(4,)`, the number of failing
        rows of all processes without those that borders cut, shape `()`, and the dot products of the latter, shape
        `(4, number of cut rows)`. Returns the radial coefficient of each local row or of all, whether the channel
        level was chosen, and whether the layer level was.
        """
        group, row_size = self.local.group, self.shard.row_size
        delta, eps = group["delta"], group["eps"]
        per_layer = radial_coefficient(totals.unsqueeze(1), eps)
        if self.level is not None:
            channel = torch.full((), self.level == "channel", device=totals.device)
            layer = ~channel
        else:
            cut_fail = (~passes(cut_row_dots, row_size, delta, eps)).sum()
            channel = num_failing + cut_fail == 0
            numel = self.shard.num_rows * row_size
            layer = passes(totals.unsqueeze(1), numel, delta, eps).squeeze() & ~channel
        coefficient = torch.where(layer, per_layer, torch.zeros_like(per_layer))
        if self.by_rows and self.numel:
            for place, row in enumerate(self.shard.cut_rows):
                if 0 <= row - self.first_row < self.num_local_rows:
                    self.dots[:, row - self.first_row] = cut_row_dots[:, place]
            coefficient = torch.where(channel, radial_coefficient(self.dots, eps), coefficient)
        return coefficient, channel, layer


def layer_dots(weight: Weight) -> torch.Tensor:
    """`<g, w>`, `<g, g>`, `<w, w>` of the part of a weight that is here, shape `(3,)`."""
    local, start, stop = weight.local, weight.shard.start, weight.shard.start + weight.numel
    assert local.grad is not None
    size = weight.numel if local.flat.device.type != "cpu" else 4 * local.block_size
    total = torch.zeros(3, dtype=local.compute_dtype, device=local.flat.device)
    for flat, grad in zip(local.flat[start:stop].split(size), local.grad[start:stop].split(size), strict=True):
        w, g = flat.to(local.compute_dtype), grad.to(local.compute_dtype)
        total += torch.stack([torch.dot(g, w), torch.dot(g, g), torch.dot(w, w)])
    return total


def squared_norm(flat: torch.Tensor, local: LocalTensor) -> torch.Tensor:
    """`<w, w>`, in blocks that fit the cache."""
    size = flat.numel() if flat.device.type != "cpu" else 4 * local.block_size
    blocks = [block.to(local.compute_dtype) for block in flat.split(size)]
    return torch.stack([torch.dot(block, block) for block in blocks]).sum()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that is here, and other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_flat(param: torch.Tensor) -> bool:
    """Whether a tensor's memory is one stretch in which the rows of the channel level follow each other."""
    tensor = local_part(param)
    expected = int(tensor.numel())
    dims = sorted((dim for dim in range(tensor.ndim) if tensor.size(dim) > 1), key=tensor.stride, reverse=True)
    if expected == 0 or not dims:
        return True
    if tensor.size(0) > 1 and dims[0] != 0:
        return False
    for dim in dims:
        expected //= tensor.size(dim)
        if tensor.stride(dim) != expected:
            return False
    return True


def has_order_of(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether the elements of two tensors of one shape follow each other in memory in the same order."""
    tensor, like = local_part(tensor), local_part(like)
    return all(tensor.stride(dim) == like.stride(dim) for dim in range(like.ndim) if like.size(dim) > 1)


def memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as a flat view."""
    tensor = local_part(tensor).detach()
    return tensor.as_strided((tensor.numel(),), (1,))
