"""
The table of a step, from which its kernels work: for each weight, part of a weight or stretch between weights (an
*item*) where its memory lies and how much lies there, how it is viewed, and flags; and the options of each group.

One plan and three back ends. In C (cpu.py, adamp.c) the kernels read the table where it lies, and refuse an item that
does not fit the sizes in it. The Triton kernels (plan.py, triton.py) read a copy on the device. C leaves the columns
of chunks and of cut weights aside: a thread takes a weight at a time, and weights that threads or processes share go
through the passes of cpu.py one by one, as items of their own. Torch's operations (step.py) take tensors and no
addresses: they work on the views that the items are made from ([`Shard`]), and what neither kernel takes is theirs.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch

from ..options import level_of
from ..shards import GROUP_KEY, Shard
from ..weights import LocalTensor, Watch, local_tensor


class Column(IntEnum):
    """Columns of an item, in the order of `Item` in table.h; pointers and sizes are those of its own elements."""

    WEIGHT, GRAD, FIRST, SECOND = range(4)
    # Pointers to the step's number and to a learning rate on the device, in float32; the group; a value of `LEVELS`
    STEP, LR, GROUP, LEVEL = range(4, 8)
    FIRST_CHUNK, NUM_CHUNKS, NUM_HEAD, NUM_TAIL = range(8, 12)
    NUM_PARTS, ROW_SIZE, NUM_ROWS, ROW_VALUES = range(12, 16)
    SUMS, NUM_CUT, HEAD_CUT, TAIL_CUT = range(16, 20)
    # Elements of the whole weight, 1 where a tensor's steps are counted, width of a tile, seed of random numbers
    NUMEL, COUNTS, WIDTH, SEED = range(20, 24)
    # Elements that lie at each of the four pointers
    WEIGHT_LENGTH, GRAD_LENGTH, FIRST_LENGTH, SECOND_LENGTH = range(24, 28)
    # Elements of the item, place of the first of them in the weight, and a value of `DTYPES`
    SIZE, OFFSET, DTYPE = range(28, 31)


# Of the options of a group; table.h and triton.py have them in the order of `options_row`
NUM_OPTIONS = 16
LEVELS = {"none": 0, "test": 1, "channel": 2, "layer": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
# Options that decide which tensors are in the table, or how
LAYOUT_OPTIONS = ("capturable", "foreach", "fused", "differentiable", "stochastic_rounding", "state_dtype")


class Item(NamedTuple):
    """Stretch of a tensor: a weight, with the level that is known or `"test"`, or what lies between weights."""

    start: int
    numel: int
    shard: Shard | None
    level: str | None


def items_of(local: LocalTensor) -> Iterator[Item]:
    """The weights of a tensor that may be projected, and the stretches between them."""
    position = 0
    for shard in sorted(local.shards, key=lambda shard: (shard.start, shard.numel)):
        level = level_of(local.group, shard.name)
        if len(shard.shape) < 2 or shard.num_rows * shard.row_size == 0 or level == "none":
            continue
        if shard.numel or shard.borders:
            if shard.numel and shard.start > position:
                yield Item(position, shard.start - position, None, None)
            yield Item(shard.start, shard.numel, shard, level)
            position = max(position, shard.start + shard.numel)
    if position < local.flat.numel():
        yield Item(position, local.flat.numel() - position, None, None)


def item_row(local: LocalTensor, item: Item) -> np.ndarray:
    """An item in the table, but for what depends on its place there, on the step and on chunks."""
    row = np.zeros(len(Column), dtype=np.int64)
    tensors = (local.flat, local.grad, local.moments[0], local.moments[-1])
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            row[Column.WEIGHT + place] = tensor.data_ptr() + item.start * tensor.element_size()
            row[Column.WEIGHT_LENGTH + place] = tensor.numel() - item.start
    row[Column.LEVEL], row[Column.SIZE] = LEVELS[item.level or "none"], item.numel
    row[Column.DTYPE] = DTYPES[local.flat.dtype]
    row[Column.HEAD_CUT], row[Column.TAIL_CUT] = -1, -1
    row[Column.ROW_SIZE], row[Column.SEED] = 1, _seed(local, item)
    if item.shard is not None:
        shard = item.shard
        row[Column.ROW_SIZE], row[Column.NUMEL] = shard.row_size, math.prod(shard.shape)
        row[Column.OFFSET] = shard.offset + item.start - shard.start
    return row


def seed_of(key: tuple[int, int], start: int = 0) -> int:
    """Tells an item's random numbers from others', and is the same on each replica and after resuming."""
    return zlib.crc32(repr((*key, start)).encode())


def _seed(local: LocalTensor, item: Item) -> int:
    return seed_of((local.group[GROUP_KEY], local.shards[0].index if local.shards else -1), item.start)


def options_row(group: dict[str, Any], lr_pointer: int = 0) -> list[float]:
    """A group's options as the kernels read them; the learning rate is 0 where they read a tensor."""
    lr, decay = 0.0 if lr_pointer else float(group["lr"]), group["weight_decay"]
    if "betas" in group:
        first, second = group["betas"]
        rest = (1 - first, second, 1 - second)
        logs = [math.log(beta) if beta > 0 else -1e4 for beta in (first, second)]
    else:
        first, rest, logs = group["momentum"], (1 - group["dampening"], 0.0, 0.0), [0.0, 0.0]
        decay = decay / (1 - first)
    projects_momentum = group.get("project_momentum", False) and not group["nesterov"]
    return [
        lr, decay, group["wd_ratio"], first, *rest, group["eps"], group["delta"], -1.0 if group["maximize"] else 1.0,
        float(group["nesterov"]), *logs, float(projects_momentum), float(group["stochastic_rounding"]), 0.0,
    ]  # fmt: skip


class Entry:
    """A parameter in a table, and where its items are."""

    def __init__(self, local: LocalTensor, state: dict[str, Any]):
        assert local.param.grad is not None
        self.param, self.group = local.param, local.group
        self.grad_size = local_tensor(local.param.grad).element_size()
        step = state.get("step")
        self.step = step if isinstance(step, torch.Tensor) else int(step or 0)
        # Filled in by the table
        self.items = slice(0, 0)
        self.keys: list[tuple[int, int]] = []


class Table:
    """
    The items of the tensors of one device in memory of the host, and what keeps them up to date.

    Args:
        tensors (`Sequence[LocalTensor]`):
            The tensors, with gradients.
        states (`Sequence[dict]`):
            Their states.
        groups (`Sequence[dict]`):
            All groups of the optimizer.
        moments (`Sequence[str]`):
            Names of the running averages: two are AdamP's, one is SGDP's.
        counts (`ProjectionCounts`):
            Where projections are counted; the counts become views of the table's.
    """

    def __init__(
        self, tensors: Sequence[LocalTensor], states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]],
        moments: Sequence[str], counts: Any,
    ):  # fmt: skip
        self.device = tensors[0].flat.device
        self.is_adam = len(moments) > 1
        self.groups, self.counts = list(groups), counts
        self.keys = [self.layout_key(group) for group in groups]
        self.entries = [Entry(local, state) for local, state in zip(tensors, states, strict=True)]
        self.watch = Watch([local.param for local in tensors], states, moments)
        self._set_up(tensors)

    def _set_up(self, tensors: Sequence[LocalTensor]) -> None:
        # Tensors of the same dtypes follow each other
        self.dtypes = [
            tuple(t.dtype for t in (local.flat, local.grad, local.moments[0]) if t is not None) for local in tensors
        ]
        order = sorted(range(len(tensors)), key=lambda place: str(self.dtypes[place]))
        # Each item with the place of its tensor
        self.items = [(place, item) for place in order for item in items_of(tensors[place])]
        self._owners = np.array([place for place, _ in self.items], dtype=np.int64)
        self._allocate(len(self.items))
        places = {id(group): number for number, group in enumerate(self.groups)}
        for number, (place, item) in enumerate(self.items):
            row = self._items[number]
            row[:] = item_row(tensors[place], item)
            row[Column.GROUP] = places[id(tensors[place].group)]
            row[Column.LR] = self._lr_pointer(tensors[place].group)
            row[Column.COUNTS] = number == 0 or self.items[number - 1][0] != place
        self._place_in_entries()
        self._set_counts(tensors)

    def _allocate(self, num_items: int) -> None:
        num_entries = len(self.entries)
        ends = np.cumsum([len(Column) * num_items, NUM_OPTIONS // 2 * len(self.groups), -(-num_entries // 2)])
        self._ends = [int(end) for end in ends]
        self._host = np.zeros(ends[2], dtype=np.int64)
        self._items = self._host[: ends[0]].reshape(num_items, len(Column))
        # On the device in float32; the kernels in C, whose memory is the host's, have them as they are
        self._options = np.zeros((len(self.groups), NUM_OPTIONS))
        self._short_options = self._host[ends[0] : ends[1]].view(np.float32).reshape(-1, NUM_OPTIONS)
        self._steps = self._host[ends[1] :].view(np.float32)[:num_entries]
        self._grads_in_table: list[int] | None = None
        self._is_dirty = True
        self.was_projected = torch.zeros(num_items, dtype=torch.int32, device=self.device)

    def _place_in_entries(self) -> None:
        numbers: dict[int, list[int]] = {}
        for number, (place, _) in enumerate(self.items):
            numbers.setdefault(place, []).append(number)
        starts = np.zeros(len(self.items), dtype=np.int64)
        address = self._address() + 8 * self._ends[1]
        for place, found in numbers.items():
            entry, own = self.entries[place], [self.items[number][1] for number in found]
            entry.items = slice(found[0], found[-1] + 1)
            starts[entry.items] = [item.start * entry.grad_size for item in own]
            entry.keys = [(entry.group[GROUP_KEY], item.shard.index) for item in own if item.shard is not None]
            if not self.is_adam:
                continue
            if isinstance(entry.step, torch.Tensor):
                self._items[entry.items, Column.STEP] = entry.step.data_ptr()
            else:
                self._items[entry.items, Column.STEP], self._steps[place] = address + 4 * place, entry.step
        self._grad_starts = starts

    def _set_counts(self, tensors: Sequence[LocalTensor]) -> None:
        self.hits = torch.zeros(len(self.items), 2, device=self.device)
        for number, (place, item) in enumerate(self.items):
            if item.shard is not None:
                key = (tensors[place].group[GROUP_KEY], item.shard.index)
                if key in self.counts.hits:
                    self.hits[number].copy_(self.counts.hits[key])
                self.counts.hits[key] = self.hits[number]

    # ------------------------------------------------------------------ what a back end fills in

    def _address(self) -> int:
        """Where the kernels read the table."""
        return int(self._host.ctypes.data)

    def _lr_pointer(self, group: dict[str, Any]) -> int:
        """Where a learning rate on the device lies; 0 for one that the host knows."""
        return 0

    # ------------------------------------------------------------------ each step

    def layout_key(self, group: dict[str, Any]) -> list[Any]:
        """What in a group the table was made for."""
        names, projection = group.get("param_names"), group["projection"]
        kept = dict(projection) if isinstance(projection, dict) else projection
        return [
            kept, len(group["params"]), self._lr_pointer(group), None if names is None else list(names),
            *(group[name] for name in LAYOUT_OPTIONS),
        ]  # fmt: skip

    def fits(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the table was made for these groups."""
        return len(groups) == len(self.groups) and all(
            group is known and self.layout_key(group) == key
            for group, known, key in zip(groups, self.groups, self.keys, strict=True)
        )

    def update(self) -> None:
        """Writes into the table what has changed since the last step, and counts this one."""
        self._write()
        self._count()

    def _write(self) -> None:
        """Writes into the table, where the kernels read it, what has changed since the last step."""
        options = np.array([options_row(group, self._lr_pointer(group)) for group in self.groups])
        if not np.array_equal(options, self._options):
            self._options[:], self._short_options[:] = options, options
            self._is_dirty = True
        grads = self.watch.grads
        if grads != self._grads_in_table:
            found = np.array(grads, dtype=np.int64)[self._owners]
            self._items[:, Column.GRAD] = np.where(found != 0, found + self._grad_starts, 0)
            self._grads_in_table, self._is_dirty = grads, True
        if self.is_adam:
            numbers = self._numbers()
            if not np.array_equal(self._steps, numbers):
                self._steps[:] = numbers
                self._is_dirty = True

    def _count(self) -> None:
        # The kernels on a device count as well, in the table or in the state's own tensor
        for entry, state, grad in zip(self.entries, self.watch.states, self.watch.grads, strict=True):
            if grad:
                for key in entry.keys:
                    self.counts.steps[key] = self.counts.steps.get(key, 0) + 1
                if self.is_adam and not isinstance(state["step"], torch.Tensor):
                    state["step"] += 1
        if self.is_adam:
            self._steps[:] = self._numbers()

    def _numbers(self) -> list[int]:
        """Number of the step of each tensor, 0 where the device counts."""
        steps = [state["step"] for state in self.watch.states]
        return [0 if isinstance(step, torch.Tensor) else step for step in steps]
