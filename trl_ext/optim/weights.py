"""
A weight whose update may be projected, in the part that this process holds: its dot products and the decision where to
project, worked on in blocks of flat memory; how often it was projected; and what tensors in memory look like.
"""

import operator
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .projection import LEVELS, passes, radial_coefficient
from .shards import GROUP_KEY, Shard


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
        is_done (`bool`, *optional*, defaults to `False`):
            Whether the step has been taken already, without projection.
    """

    local: LocalTensor
    shard: Shard
    level: str | None = None
    by_rows: bool = True
    kernels: Any = None
    dots: torch.Tensor = field(default_factory=lambda: torch.zeros(4, 1))
    displacement: torch.Tensor | None = None
    squared_norm: torch.Tensor | None = None
    is_done: bool = False

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
        return self.shard.offset // max(1, self.shard.row_size)

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
        found = row_dots(block, pairs)
        if displacement is not None:
            found[3].neg_()
        self.dots[: len(pairs), block.row : block.row + block.num_rows] += found

    @property
    def has_few_dots(self) -> bool:
        """Whether `<u, w>` and `<w, w>` are all that is needed, since the whole weight is known to pass."""
        return self.level == "layer"

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
        if self.shard.whole_row_size != self.shard.row_size:
            return None
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
        if not self.by_rows or self.level is not None:
            return dots.new_ones(()) if self.level is None and self.numel else dots.new_zeros(())
        failing = ~passes(dots, self.shard.row_size, self.local.group["delta"], self.local.group["eps"])
        for _, row in self._cut_rows_here():
            failing[row] = False
        return failing.sum().to(dots.dtype)

    def _cut_rows_here(self) -> list[tuple[int | slice, int | slice]]:
        """Of the cut rows that a part of is here, places among all of them, and among the local rows."""
        rows = self.shard.cut_rows
        if isinstance(rows, range):
            return [(slice(self.first_row, self.first_row + self.num_local_rows), slice(None))] if self.numel else []
        held = range(self.first_row, self.first_row + self.num_local_rows)
        return [(place, row - self.first_row) for place, row in enumerate(rows) if row in held]

    def cut_row_dots(self) -> torch.Tensor:
        """This process's part of the dot products of the rows that borders cut, shape `(4, number of them)`."""
        found = self.dots.new_zeros(4, len(self.shard.cut_rows))
        if self.by_rows:
            for place, row in self._cut_rows_here():
                found[:, place] = self.dots[:, row]
        return found

    def take_cut_row_dots(self, cut_row_dots: torch.Tensor) -> None:
        """Takes over the dot products of whole rows, as [`cut_row_dots`] adds up to over processes."""
        if self.by_rows and self.numel:
            for place, row in self._cut_rows_here():
                self.dots[:, row] = cut_row_dots[:, place]

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
        group, eps = self.local.group, self.local.group["eps"]
        per_layer = radial_coefficient(totals.unsqueeze(1), eps)
        if self.level is not None:
            channel = torch.full((), self.level == "channel", device=totals.device)
            layer = ~channel
        else:
            delta = group["delta"]
            cut_fail = (~passes(cut_row_dots, self.shard.whole_row_size, delta, eps)).sum()
            channel = num_failing + cut_fail == 0
            layer = passes(totals.unsqueeze(1), self.shard.whole_numel, delta, eps).squeeze() & ~channel
        coefficient = torch.where(layer, per_layer, torch.zeros_like(per_layer))
        if self.by_rows and self.numel:
            self.take_cut_row_dots(cut_row_dots)
            coefficient = torch.where(channel, radial_coefficient(self.dots, eps), coefficient)
        return coefficient, channel, layer


def row_dots(block: Block, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Dot products of pairs of tensors over a block, for each of its rows, shape `(number of pairs, rows)`."""
    if block.num_rows == 1:
        return torch.stack([torch.dot(a, b) for a, b in pairs]).unsqueeze(1)
    return torch.stack([(a * b).view(block.num_rows, -1).sum(1) for a, b in pairs])


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


def read_answers(answers: Sequence[torch.Tensor]) -> list[bool]:
    """Brings booleans of shape `()` to the host: once, or once for each device that has some."""
    found: dict[int, bool] = {}
    for device in {answer.device for answer in answers}:
        places = [place for place, answer in enumerate(answers) if answer.device == device]
        found |= zip(places, torch.stack([answers[place] for place in places]).tolist(), strict=True)
    return [found[place] for place in range(len(answers))]


class ProjectionCounts:
    """How often each weight was projected at which level; on the device, so that counting does not wait for it."""

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int], int] = {}
        self.hits: dict[tuple[int, int], torch.Tensor] = {}

    def add(
        self, key: tuple[int, int], channel: torch.Tensor | None = None, layer: torch.Tensor | None = None
    ) -> None:
        """Counts a step of a weight, and whether it was projected at the channel or the layer level."""
        self.steps[key] = self.steps.get(key, 0) + 1
        if channel is not None and layer is not None:
            hit = torch.stack([channel.squeeze(), layer.squeeze()]).float()
            self.hits[key] = self.hits[key].add_(hit) if key in self.hits else hit

    def add_known(self, key: tuple[int, int], level: str | None) -> None:
        """Counts a step of a weight whose level is known on the host."""
        hit = None if level is None else [torch.tensor(float(level == name)) for name in LEVELS]
        self.add(key, *(hit or ()))

    def counts(self, key: tuple[int, int]) -> list[float]:
        """Steps of a weight, and how many of them were projected at the channel and at the layer level."""
        hits = self.hits[key].tolist() if key in self.hits else [0.0, 0.0]
        return [float(self.steps.get(key, 0)), *hits]

    def reset(self) -> None:
        """Counts from 0 again."""
        self.steps.clear()
        for hits in self.hits.values():  # Kernels count in them
            hits.zero_()


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
    """A tensor's memory as a flat view. Raises `RuntimeError` where there is none, or it was freed or cut."""
    tensor = local_part(tensor).detach()
    if not is_plain(tensor):
        raise RuntimeError(
            f"A {type(tensor).__name__} of shape {tuple(tensor.shape)}, layout {tensor.layout}, is not plain memory: "
            "the shards and rows in it can't be found. Give it to the optimizer whole and without `capturable`."
        )
    if not is_backed(tensor):
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype} on {tensor.device} has a storage of "
            f"{tensor.untyped_storage().nbytes()} bytes, which does not hold it: its memory was freed or cut. "
            "Take the step before it is freed, or allocate it again."
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a distributed tensor that is here, without a call of autograd's."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is memory with strides, and not a wrapper of other tensors."""
    return (
        tensor.layout is torch.strided
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not tensor.is_neg()
        and not tensor.is_conj()
    )


def is_backed(tensor: torch.Tensor) -> bool:
    """Whether the storage of a plain tensor holds all its elements."""
    last = tensor.numel() - 1
    if last >= 0 and not tensor.is_contiguous():
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1
    return last < 0 or end * tensor.element_size() <= tensor.untyped_storage().nbytes()


class Watch:
    """
    Compares tensors at each step with those that a table of pointers was made from.

    Args:
        params (`Sequence[torch.Tensor]`):
            The parameters, with gradients, plain or distributed.
        states (`Sequence[dict]`):
            Their states.
        moments (`Sequence[str]`):
            Names of the running averages.
    """

    def __init__(self, params: Sequence[torch.Tensor], states: Sequence[dict[str, Any]], moments: Sequence[str]):
        self.params, self.states, self._names = list(params), list(states), tuple(moments)
        self._is_distributed = any(isinstance(param, DTensor) for param in params)
        self._all_states: list[dict[str, Any]] = []
        self._kept = self._kept_tensors()
        self.memory = [*self._locals(self.params), *self._locals(self._kept)]
        self._types, self._found = [*map(type, self.memory)], self._describe(self.memory)
        # Gradients' addresses, 0 where there is none
        self.grads: list[int] = []
        self._grads_found = [self._describe_grad(grad) for grad in self._locals([p.grad for p in params])]
        self._steps = [state.get("step") for state in states]

    def stepped_memory(self) -> list[torch.Tensor]:
        """The weights and running averages that a step changes."""
        if all(self.grads):
            return self.memory
        owners = [*range(len(self.params)), *(n for n in range(len(self.params)) for _ in self._names)]
        return [tensor for tensor, owner in zip(self.memory, owners, strict=True) if self.grads[owner]]

    def _kept_tensors(self) -> list[Any]:
        return [state.get(name) for state in self.states for name in self._names]

    def _locals(self, tensors: list[Any]) -> list[Any]:
        return [local_tensor(tensor) for tensor in tensors] if self._is_distributed else tensors

    @staticmethod
    def _describe(tensors: Sequence[torch.Tensor]) -> tuple[list[Any], ...]:
        return (
            [tensor.data_ptr() for tensor in tensors], [tensor.shape for tensor in tensors],
            [tensor.stride() for tensor in tensors], [tensor.dtype for tensor in tensors],
            [tensor.untyped_storage().nbytes() for tensor in tensors],
        )  # fmt: skip

    @staticmethod
    def _describe_grad(grad: torch.Tensor) -> tuple[Any, ...]:
        return type(grad), grad.shape, grad.stride(), grad.dtype, grad.device, grad.is_neg()

    def is_current(self, state: dict[torch.Tensor, dict[str, Any]]) -> bool:
        """Whether the table's pointers are right but for the gradients', which are looked up."""
        # Looking a tensor up takes longer than all the rest
        if len(state) != len(self._all_states) or not all(map(operator.is_, state.values(), self._all_states)):
            self.states = [state.get(param, {}) for param in self.params]
            self._all_states = list(state.values())
        kept, params = self._kept_tensors(), self._locals(self.params)
        if not all(map(operator.is_, kept, self._kept)):
            return False
        tensors = [*params, *self._locals(kept)]
        if [*map(type, tensors)] != self._types or self._describe(tensors) != self._found:
            return False
        for found, before in zip(self.states, self._steps, strict=True):
            step = found.get("step")
            if step is not before and (isinstance(step, torch.Tensor) or isinstance(before, torch.Tensor)):
                return False
        grads = self._locals([param.grad for param in self.params])
        for grad, expected in zip(grads, self._grads_found, strict=True):
            if grad is None:
                continue
            if grad.layout is not torch.strided or self._describe_grad(grad) != expected or not is_backed(grad):
                return False
        self.grads = [0 if grad is None else grad.data_ptr() for grad in grads]
        return True


class Scratch:
    """
    Memory for work, kept from step to step, since fresh memory is page-faulted on a CPU. The optimizers that step in
    one thread share one ([`shared_scratch`]), so that one optimizer for each parameter keeps no more than one for all.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Elements of any value, shape `(numel,)`, until the next call for this device and dtype."""
        key = (device, dtype)
        if key not in self.tensors or self.tensors[key].numel() < numel:
            self.tensors.pop(key, None)
            self.tensors[key] = torch.empty(numel, dtype=dtype, device=device)
        return self.tensors[key][:numel]


_scratches: "weakref.WeakValueDictionary[int, Scratch]" = weakref.WeakValueDictionary()


def shared_scratch() -> Scratch:
    """The scratch of this thread, which goes with the last optimizer that holds it."""
    key = threading.get_ident()
    found = _scratches.get(key)
    if found is None:
        found = _scratches[key] = Scratch()
    return found
