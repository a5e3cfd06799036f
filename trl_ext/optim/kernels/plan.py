"""
The table that the Triton kernels of a step work on: where the tensors of one device lie, how they are cut into chunks,
and the groups' options. It is kept on the device and copied there only where a tensor or an option changed.
"""

import functools
import importlib.util
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ..options import level_of
from ..shards import GROUP_KEY, Shard, exchange_key
from ..weights import LocalTensor, Watch, has_order_of, is_backed, is_flat, is_plain, local_tensor


DEVICE_TYPES = {"cuda"}
DTYPES = (torch.float32, torch.bfloat16)
LEVELS = {"test": 1, "channel": 2, "layer": 3}
# Elements of a chunk, and of the longest row that one chunk holds whole; multiples of 8
CHUNK, MAX_ROW = 4096, 16384
# Widths of the tiles for narrow rows, as the kernels have them
WIDTHS = (4, 16, 64, 256)
# Of the two large kernels: elements at a time, warps, registers of a thread (0 leaves them to the compiler), programs
# of a processor; as they ran on an H200 (docs/results/gpu.md), and tests/gpu times others too
BLOCK, NUM_WARPS, MAX_REGISTERS, NUM_PROGRAMS = 1024, 4, 0, 8
# Of the small one
SUM_BLOCK, SPLIT_ROWS, SPLIT_PARTS = 1024, 32, 32
# Columns of an item, of the options of a group, and of a chunk, as triton.py names them
NUM_COLUMNS, NUM_OPTIONS, NUM_SUMS = 24, 16, 5
GRAD_COLUMN = 1
# Options that decide which tensors are in the table, or how
LAYOUT_OPTIONS = (
    "projection",
    "capturable",
    "foreach",
    "fused",
    "differentiable",
    "stochastic_rounding",
    "state_dtype",
)


def takes(param: torch.Tensor, group: dict[str, Any], state: dict[str, Any], moments: Sequence[str]) -> bool:
    """Whether a parameter with a gradient can be in a plan; every other one goes the way through torch."""
    weight, grad = local_tensor(param), param.grad
    if weight.device.type not in DEVICE_TYPES or grad is None or not _allows(group, weight.device):
        return False
    kept = [state[name] for name in moments if name in state]
    tensors = [weight, local_tensor(grad), *map(local_tensor, kept)]
    if not all(is_plain(t) and t.dtype in DTYPES and t.device == weight.device for t in tensors):
        return False
    step = state.get("step")
    if isinstance(step, torch.Tensor) and (step.dtype != torch.float32 or step.device != weight.device):
        return False
    state_dtypes = {tensor.dtype for tensor in kept} or {group["state_dtype"] or weight.dtype}
    return (
        len(state_dtypes) == 1
        and state_dtypes <= set(DTYPES)
        and weight.numel() > 0
        and all(tensor.shape == weight.shape and is_backed(tensor) for tensor in tensors)
        and is_flat(param)
        and has_order_of(grad, param)
        and _triton_is_here()
    )


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def _allows(group: dict[str, Any], device: torch.device) -> bool:
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" and (lr.device != device or lr.dtype != torch.float32):
        return False
    others = ("eps", "weight_decay", "delta", "wd_ratio", "momentum", "dampening")
    return (
        group["fused"] is not False
        and not (group["foreach"] or group["differentiable"])
        # The random numbers are those of a step's number, which SGDP's state lacks
        and not (group["stochastic_rounding"] and "betas" not in group)
        and not any(isinstance(group.get(name), torch.Tensor) for name in others)
        and not any(isinstance(beta, torch.Tensor) for beta in group.get("betas", ()))
    )


class Entry:
    """A parameter in a plan, and where its items are."""

    def __init__(self, local: LocalTensor, state: dict[str, Any]):
        assert local.param.grad is not None
        self.param, self.group = local.param, local.group
        self.grad_size = local_tensor(local.param.grad).element_size()
        step = state.get("step")
        self.step = step if isinstance(step, torch.Tensor) else int(step or 0)
        # Filled in by the plan
        self.items = slice(0, 0)
        self.starts = np.zeros(0, dtype=np.int64)
        self.keys: list[tuple[int, int]] = []


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


class Cut(NamedTuple):
    """An item's chunks: `(item, start, size, 2 * row + whether rows are whole)` without the item, and their kinds."""

    chunks: np.ndarray
    num_head: int = 0
    num_tail: int = 0
    num_parts: int = 0
    num_rows: int = 0


def _fragments(start: int, stop: int, row: int) -> np.ndarray:
    starts = np.arange(start, stop, CHUNK, dtype=np.int64)
    return np.stack([starts, np.minimum(CHUNK, stop - starts), np.full_like(starts, 2 * row)], axis=1)


def cut(item: Item) -> Cut:
    """Cuts an item into chunks: whole rows where rows count, a row in parts where it is long or borders cut it."""
    shard = item.shard
    if shard is None or item.level == "layer" or item.numel == 0:
        return Cut(_fragments(0, item.numel, 0))
    row_size, column = shard.row_size, shard.offset % shard.row_size
    head = min(row_size - column, item.numel) if column or item.numel < row_size else 0
    num_rows, tail = divmod(item.numel - head, row_size)
    first, first_row, num_parts = _fragments(0, head, 0), int(head > 0), 0
    last = _fragments(item.numel - tail, item.numel, first_row + num_rows)
    if row_size > MAX_ROW:
        num_parts = -(-row_size // CHUNK)
        part = np.arange(num_parts, dtype=np.int64) * CHUNK
        rows = np.arange(num_rows, dtype=np.int64)[:, None]
        starts, sizes = (
            head + rows * row_size + part,
            np.broadcast_to(np.minimum(CHUNK, row_size - part), (num_rows, num_parts)),
        )
        body = np.stack([starts, sizes, np.broadcast_to(2 * (first_row + rows), starts.shape)], axis=2).reshape(-1, 3)
    else:
        per_chunk = max(1, CHUNK // row_size)
        rows = np.arange(0, num_rows, per_chunk, dtype=np.int64)
        sizes = np.minimum(per_chunk, num_rows - rows) * row_size
        body = np.stack([head + rows * row_size, sizes, 2 * (first_row + rows) + 1], axis=1)
    total_rows = first_row + num_rows + int(tail > 0)
    return Cut(np.concatenate([first, body, last]), len(first), len(last), num_parts, total_rows)


def _item_row(local: LocalTensor, item: Item, pieces: Cut) -> np.ndarray:
    """An item in the table, but for what depends on its place there."""
    row = np.zeros(NUM_COLUMNS, dtype=np.int64)
    tensors = (local.flat, local.moments[0], local.moments[-1])
    row[[0, 2, 3]] = [tensor.data_ptr() + item.start * tensor.element_size() for tensor in tensors]
    row[5] = _lr_pointer(local.group)
    row[7] = LEVELS.get(item.level or "none", 0)
    row[9:15] = len(pieces.chunks), pieces.num_head, pieces.num_tail, pieces.num_parts, 1, pieces.num_rows
    row[18:20] = -1
    if item.shard is not None:
        row[13], row[20] = item.shard.row_size, math.prod(item.shard.shape)
        row[22] = next((width for width in WIDTHS if item.shard.row_size <= width), 0)
    return row


def _seed(local: LocalTensor, item: Item) -> int:
    """Tells an item's random numbers from others', and is the same on each replica and after resuming."""
    first = local.shards[0].index if local.shards else -1
    return zlib.crc32(repr((local.group[GROUP_KEY], first, item.start)).encode())


def _lr_pointer(group: dict[str, Any]) -> int:
    """Where a learning rate on the device lies; 0 for one that the host knows."""
    lr = group["lr"]
    return lr.data_ptr() if isinstance(lr, torch.Tensor) and lr.device.type in DEVICE_TYPES else 0


def options_row(group: dict[str, Any]) -> list[float]:
    """A group's options as the kernels read them; the learning rate is 0 where they read a tensor."""
    lr, decay = 0.0 if _lr_pointer(group) else float(group["lr"]), group["weight_decay"]
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


def layout_key(group: dict[str, Any]) -> list[Any]:
    """What in a group the plan was made for."""
    names, projection = group.get("param_names"), group["projection"]
    kept = dict(projection) if isinstance(projection, dict) else projection
    return [
        kept, len(group["params"]), _lr_pointer(group), None if names is None else list(names),
        *(group[name] for name in LAYOUT_OPTIONS[1:]),
    ]  # fmt: skip


class CutWeight(NamedTuple):
    """A weight in a plan that shard borders cut."""

    plan: "Plan"
    param: torch.Tensor
    shard: Shard
    first: int
    last: int

    def sums(self) -> torch.Tensor:
        """What is added up over processes, laid out as `Weight.sums`."""
        return self.plan.totals[self.first : self.last]


def side_by_side(weights: Sequence[Any]) -> list[Any]:
    """Joins cut weights whose sums follow each other in a plan, so that they are added up and copied together."""
    found: list[Any] = []
    for weight in weights:
        last = found[-1] if found else None
        both = isinstance(weight, CutWeight) and isinstance(last, CutWeight)
        if both and last.plan is weight.plan and last.last == weight.first:  # type: ignore[union-attr]
            found[-1] = weight._replace(first=last.first)  # type: ignore[union-attr]
        else:
            found.append(weight)
    return found


class Plan:
    """
    A step of the kernels on the tensors of one device.

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
            Where projections are counted; the counts become views of the plan's.
    """

    def __init__(
        self, tensors: Sequence[LocalTensor], states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]],
        moments: Sequence[str], counts: Any,
    ):  # fmt: skip
        self.device = tensors[0].flat.device
        self.is_adam = len(moments) > 1
        self.groups, self.counts = list(groups), counts
        self.keys = [layout_key(group) for group in groups]
        self.entries = [Entry(local, state) for local, state in zip(tensors, states, strict=True)]
        self.watch = Watch([local.param for local in tensors], states, moments)
        self._grads_in_table = [0] * len(tensors)
        self.cut_weights: list[CutWeight] = []
        self.can_be_captured = any(group["capturable"] for group in groups)
        self._captured: list[torch.Tensor] = []
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = None
        self._set_up(tensors)

    # ------------------------------------------------------------------ the table

    def _set_up(self, tensors: Sequence[LocalTensor]) -> None:
        # Tensors of the same dtypes share a launch
        dtypes = [
            tuple(t.dtype for t in (local.flat, local.grad, local.moments[0]) if t is not None) for local in tensors
        ]
        order = sorted(range(len(tensors)), key=lambda place: str(dtypes[place]))
        items = [(place, item) for place in order for item in items_of(tensors[place])]
        places = {id(group): number for number, group in enumerate(self.groups)}
        rows, chunks, num_chunks, num_rows = [], [], 0, 0
        self._launches: list[tuple[tuple[torch.dtype, ...], int, int]] = []
        for number, (place, item) in enumerate(items):
            pieces = cut(item)
            row = _item_row(tensors[place], item, pieces)
            row[[6, 8, 15]] = places[id(tensors[place].group)], num_chunks, num_rows
            row[21] = number == 0 or items[number - 1][0] != place
            row[23] = _seed(tensors[place], item)
            rows.append(row)
            chunks.append(np.insert(pieces.chunks, 0, number, axis=1))
            first = num_chunks
            num_chunks, num_rows = num_chunks + len(pieces.chunks), num_rows + pieces.num_rows
            if self._launches and self._launches[-1][0] == dtypes[place]:
                first = self._launches.pop()[1]
            self._launches.append((dtypes[place], first, num_chunks))
        self._place_in_entries(items)
        self._allocate(rows, chunks, num_rows)
        self._set_cuts(items, tensors)
        self._set_counts(items, tensors)

    def _place_in_entries(self, items: Sequence[tuple[int, Item]]) -> None:
        numbers: dict[int, list[int]] = {}
        for number, (place, _) in enumerate(items):
            numbers.setdefault(place, []).append(number)
        for place, found in numbers.items():
            entry, own = self.entries[place], [items[number][1] for number in found]
            entry.items = slice(found[0], found[-1] + 1)
            entry.starts = np.array([item.start for item in own], dtype=np.int64) * entry.grad_size
            entry.keys = [(entry.group[GROUP_KEY], item.shard.index) for item in own if item.shard is not None]

    def _allocate(self, rows: list[np.ndarray], chunks: list[np.ndarray], num_rows: int) -> None:
        num_items, num_entries, device = len(rows), len(self.entries), self.device
        ends = np.cumsum([NUM_COLUMNS * num_items, NUM_OPTIONS // 2 * len(self.groups), -(-num_entries // 2)])
        self._host = np.zeros(ends[2], dtype=np.int64)
        self._items = self._host[: ends[0]].reshape(num_items, NUM_COLUMNS)
        self._options = self._host[ends[0] : ends[1]].view(np.float32).reshape(-1, NUM_OPTIONS)
        self._steps = self._host[ends[1] :].view(np.float32)[:num_entries]
        self._items[:] = rows
        self._ends = [int(end) for end in ends]
        self._is_dirty = True
        self.table = torch.empty(len(self._host), dtype=torch.int64, device=device)
        if self.is_adam:
            for number, entry in enumerate(self.entries):
                own = self.table.data_ptr() + 8 * self._ends[1] + 4 * number
                if isinstance(entry.step, torch.Tensor):
                    self._items[entry.items, 4] = entry.step.data_ptr()
                else:
                    self._items[entry.items, 4], self._steps[number] = own, entry.step
        cuts = np.concatenate(chunks)
        self.chunks = torch.from_numpy(cuts).to(device)
        self.sums = torch.zeros(len(cuts) or 1, NUM_SUMS, device=device)
        self.row_values = torch.zeros(num_rows or 1, device=device)
        self.layer_values = torch.zeros(num_items, device=device)
        self.was_projected, self.modes = (torch.zeros(num_items, dtype=torch.int32, device=device) for _ in range(2))
        self.is_anything_left = torch.zeros(1, dtype=torch.int32, device=device)

    def _set_cuts(self, items: Sequence[tuple[int, Item]], tensors: Sequence[LocalTensor]) -> None:
        """Room for what is added up, the weights of one process group side by side and in the order of the groups."""
        found = [
            (place, tensors[place].shards.index(item.shard), number, item.shard)
            for number, (place, item) in enumerate(items)
            if item.shard and item.shard.borders
        ]
        process_groups = list(dict.fromkeys(exchange_key(shard.process_group) for *_, shard in found))
        found.sort(key=lambda one: (process_groups.index(exchange_key(one[3].process_group)), *one[:2]))
        size = 0
        for place, _, number, shard in found:
            row, cut_rows, length = self._items[number], shard.cut_rows, 5 + 4 * len(shard.cut_rows)
            first_row = shard.offset // shard.row_size
            row[16:18] = size, len(cut_rows)
            row[18] = cut_rows.index(first_row) if row[10] else -1
            row[19] = cut_rows.index(first_row + int(row[14]) - 1) if row[11] else -1
            self.cut_weights.append(CutWeight(self, tensors[place].param, shard, size, size + length))
            size += length
        # Behind them those that are whole here
        for number, (_, item) in enumerate(items):
            if item.shard and not item.shard.borders:
                self._items[number, 16] = size
                size += 5
        self.totals = torch.zeros(size or 1, device=self.device)

    def _set_counts(self, items: Sequence[tuple[int, Item]], tensors: Sequence[LocalTensor]) -> None:
        self.hits = torch.zeros(len(items), 2, device=self.device)
        for number, (place, item) in enumerate(items):
            if item.shard is not None:
                key = (tensors[place].group[GROUP_KEY], item.shard.index)
                if key in self.counts.hits:
                    self.hits[number].copy_(self.counts.hits[key])
                self.counts.hits[key] = self.hits[number]

    # ------------------------------------------------------------------ each step

    def fits(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the plan was made for these groups."""
        return len(groups) == len(self.groups) and all(
            group is known and layout_key(group) == key
            for group, known, key in zip(groups, self.groups, self.keys, strict=True)
        )

    def update(self) -> None:
        """Writes into the table what has changed since the last step, and counts this one."""
        options = np.array([options_row(group) for group in self.groups], dtype=np.float32)
        if not np.array_equal(options, self._options):
            self._options[:] = options
            self._is_dirty = True
        grads = self.watch.grads
        if grads != self._grads_in_table:
            for entry, grad, before in zip(self.entries, grads, self._grads_in_table, strict=True):
                if grad != before:
                    self._items[entry.items, GRAD_COLUMN] = grad + entry.starts if grad else 0
            self._grads_in_table, self._is_dirty = grads, True
        if self.is_adam:
            numbers = [0 if isinstance(step, torch.Tensor) else step for step in self._counted()]
            if not np.array_equal(self._steps, numbers):
                self._steps[:] = numbers
                self._is_dirty = True
        self._used_table = self._upload()
        # The kernels count as well, in the table or in the state's own tensor
        for entry, state, grad in zip(self.entries, self.watch.states, grads, strict=True):
            if grad:
                for key in entry.keys:
                    self.counts.steps[key] = self.counts.steps.get(key, 0) + 1
                if self.is_adam and not isinstance(state["step"], torch.Tensor):
                    state["step"] += 1
        if self.is_adam:
            self._steps[:] = [0 if isinstance(step, torch.Tensor) else step for step in self._counted()]

    def _counted(self) -> list[Any]:
        return [state["step"] for state in self.watch.states]

    def _upload(self) -> torch.Tensor:
        """The table on the device. One that a CUDA graph captures is its own, whose source stays as it is."""
        if self.device.type != "cuda":
            self.table.copy_(torch.from_numpy(self._host))
            return self.table
        if torch.cuda.is_current_stream_capturing():
            source, target = self._spare or self._new_table()
            self._spare = None
            source.copy_(torch.from_numpy(self._host))
            target.copy_(source, non_blocking=True)
            self._captured += [source, target]
            return target
        if self._spare is None and self.can_be_captured:
            self._spare = self._new_table()
        if self._is_dirty:
            # Pinned memory is not given out again before the copy is done
            source = torch.empty(len(self._host), dtype=torch.int64, pin_memory=True)
            source.copy_(torch.from_numpy(self._host))
            self.table.copy_(source, non_blocking=True)
            self._is_dirty = False
        return self.table

    def _new_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(len(self._host), dtype=torch.int64, pin_memory=True), torch.empty_like(self.table)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            yield

    def _tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        table, ends = self._used_table, self._ends
        return table[: ends[0]], table[ends[0] : ends[1]].view(torch.float32)

    def measure(self) -> None:
        """First kernel: moments, dot products, and the step of what is not expected to be projected."""
        from . import triton as kernels

        with self._on_device():
            for dtypes, first, last in self._launches:
                kernels.measure_kernel[self._grid(last - first)](
                    *self._tables(), self.chunks, self.was_projected, self.row_values, self.sums,
                    self.is_anything_left, first, last, **self._constants(dtypes),
                )  # fmt: skip
            if self.cut_weights:
                self._decide(adds_up=True, decides=False)

    def apply(self) -> None:
        """The other two kernels; [`totals`] must have been added up over processes where borders cut weights."""
        from . import triton as kernels

        with self._on_device():
            self._decide(adds_up=not self.cut_weights, decides=True)
            for dtypes, first, last in self._launches:
                kernels.apply_kernel[self._grid(last - first)](
                    *self._tables(), self.chunks, self.modes, self.layer_values, self.row_values,
                    self.is_anything_left, first, last, **self._constants(dtypes),
                )  # fmt: skip
        # Autograd is told, as by torch's own operations
        increment_version(self.watch.stepped_memory())

    def _decide(self, adds_up: bool, decides: bool) -> None:
        from . import triton as kernels

        kernels.decide_kernel[(len(self._items),)](
            *self._tables(), self.was_projected, self.modes, self.layer_values, self.row_values, self.sums,
            self.totals, self.hits, self.is_anything_left, SUM=adds_up, DECIDE=decides, ADAM=self.is_adam,
            BLOCK=SUM_BLOCK, ROWS=SPLIT_ROWS, PARTS=SPLIT_PARTS, num_warps=8,
        )  # fmt: skip

    def _grid(self, num_chunks: int) -> tuple[int]:
        if self.device.type != "cuda":
            return (min(num_chunks, 3),)
        processors = _num_processors(self.device)
        return (min(num_chunks, NUM_PROGRAMS * processors),)

    def _constants(self, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
        import triton.language as tl

        names = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
        found = dict(zip("WGM", (names[dtype] for dtype in dtypes), strict=True))
        # Random rounding takes a third more registers, so it is compiled in only where a group has it
        rounds = any(group["stochastic_rounding"] for group in self.groups)
        found |= {"ADAM": self.is_adam, "ROUNDS": rounds, "BLOCK": BLOCK, "num_warps": NUM_WARPS}
        return {**found, "maxnreg": MAX_REGISTERS} if MAX_REGISTERS and self.device.type == "cuda" else found


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
