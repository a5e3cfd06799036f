"""
The step of the Triton kernels on the tensors of one device: how the items of its table (table.py) are cut into chunks,
and what is added up. The table is kept on the device and copied there only where a tensor or an option changed.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ..shards import Shard, exchange_key
from ..weights import LocalTensor, has_order_of, is_backed, is_flat, is_plain, local_tensor
from .table import DTYPES, Column, Item, Table


DEVICE_TYPES = {"cuda"}
# Elements of a chunk, and of the longest row that one chunk holds whole; multiples of 8
CHUNK, MAX_ROW = 4096, 16384
# Widths of the tiles for narrow rows, as the kernels have them
WIDTHS = (4, 16, 64, 256)
# Of the two large kernels: elements at a time, warps, registers of a thread (0 leaves them to the compiler), programs
# of a processor; as they ran on an H200 (docs/results/gpu.md), and tests/gpu times others too
BLOCK, NUM_WARPS, MAX_REGISTERS, NUM_PROGRAMS = 1024, 4, 0, 8
# Of the small one
SUM_BLOCK, SPLIT_ROWS, SPLIT_PARTS = 1024, 32, 32
# Of a chunk, as triton.py has them
NUM_SUMS = 5
# Runs in the place of triton.py where it is set
substitute: ModuleType | None = None


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
        and state_dtypes <= DTYPES.keys()
        and weight.numel() > 0
        and all(tensor.shape == weight.shape and is_backed(tensor) for tensor in tensors)
        and is_flat(param)
        and has_order_of(grad, param)
        and _triton_is_here()
    )


@functools.cache
def _triton_is_here() -> bool:
    return importlib.util.find_spec("triton") is not None


def _kernels() -> ModuleType:
    if substitute is not None:
        return substitute
    from . import triton

    return triton


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


def _lr_pointer(group: dict[str, Any]) -> int:
    """Where a learning rate on the device lies; 0 for one that the host knows."""
    lr = group["lr"]
    return lr.data_ptr() if isinstance(lr, torch.Tensor) and lr.device.type in DEVICE_TYPES else 0


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


class Plan(Table):
    """
    A step of the kernels on the tensors of one device.

    Args:
        tensors, states, groups, moments, counts:
            As in [`Table`].
    """

    def __init__(
        self, tensors: Sequence[LocalTensor], states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]],
        moments: Sequence[str], counts: Any,
    ):  # fmt: skip
        super().__init__(tensors, states, groups, moments, counts)
        self.cut_weights: list[CutWeight] = []
        self.can_be_captured = any(group["capturable"] for group in groups)
        self._captured: list[torch.Tensor] = []
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = None
        self._cut_into_chunks()
        self._set_cuts(tensors)

    # ------------------------------------------------------------------ the table

    def _address(self) -> int:
        self.table = torch.empty(len(self._host), dtype=torch.int64, device=self.device)
        return self.table.data_ptr()

    def _lr_pointer(self, group: dict[str, Any]) -> int:
        return _lr_pointer(group)

    def _cut_into_chunks(self) -> None:
        chunks, num_chunks, num_rows = [], 0, 0
        # Tensors of the same dtypes share a launch
        self._launches: list[tuple[tuple[torch.dtype, ...], int, int]] = []
        for number, (place, item) in enumerate(self.items):
            pieces, row = cut(item), self._items[number]
            row[Column.FIRST_CHUNK], row[Column.NUM_CHUNKS] = num_chunks, len(pieces.chunks)
            row[Column.NUM_HEAD], row[Column.NUM_TAIL] = pieces.num_head, pieces.num_tail
            row[Column.NUM_PARTS] = pieces.num_parts
            row[Column.NUM_ROWS], row[Column.ROW_VALUES] = pieces.num_rows, num_rows
            if item.shard is not None:
                row[Column.WIDTH] = next((width for width in WIDTHS if item.shard.row_size <= width), 0)
            chunks.append(np.insert(pieces.chunks, 0, number, axis=1))
            first = num_chunks
            num_chunks, num_rows = num_chunks + len(pieces.chunks), num_rows + pieces.num_rows
            if self._launches and self._launches[-1][0] == self.dtypes[place]:
                first = self._launches.pop()[1]
            self._launches.append((self.dtypes[place], first, num_chunks))
        num_items, device = len(self.items), self.device
        self.chunks = torch.from_numpy(np.concatenate(chunks)).to(device)
        self.sums = torch.zeros(num_chunks or 1, NUM_SUMS, device=device)
        self.row_values = torch.zeros(num_rows or 1, device=device)
        self.layer_values = torch.zeros(num_items, device=device)
        self.modes = torch.zeros(num_items, dtype=torch.int32, device=device)
        self.is_anything_left = torch.zeros(1, dtype=torch.int32, device=device)

    def _set_cuts(self, tensors: Sequence[LocalTensor]) -> None:
        """Room for what is added up, the weights of one process group side by side and in the order of the groups."""
        found = [
            (place, tensors[place].shards.index(item.shard), number, item.shard)
            for number, (place, item) in enumerate(self.items)
            if item.shard and item.shard.borders
        ]
        process_groups = list(dict.fromkeys(exchange_key(shard.process_group) for *_, shard in found))
        found.sort(key=lambda one: (process_groups.index(exchange_key(one[3].process_group)), *one[:2]))
        size = 0
        for place, _, number, shard in found:
            row, cut_rows, length = self._items[number], shard.cut_rows, 5 + 4 * len(shard.cut_rows)
            first_row = shard.offset // shard.row_size
            row[Column.SUMS], row[Column.NUM_CUT] = size, len(cut_rows)
            if row[Column.NUM_HEAD]:
                row[Column.HEAD_CUT] = cut_rows.index(first_row)
            if row[Column.NUM_TAIL]:
                row[Column.TAIL_CUT] = cut_rows.index(first_row + int(row[Column.NUM_ROWS]) - 1)
            self.cut_weights.append(CutWeight(self, tensors[place].param, shard, size, size + length))
            size += length
        # Behind them those that are whole here
        for number, (_, item) in enumerate(self.items):
            if item.shard and not item.shard.borders:
                self._items[number, Column.SUMS] = size
                size += 5
        self.totals = torch.zeros(size or 1, device=self.device)

    # ------------------------------------------------------------------ each step

    def _write(self) -> None:
        super()._write()
        self._used_table = self._upload()

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
        kernels = _kernels()
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
        kernels = _kernels()
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
        _kernels().decide_kernel[(len(self.items),)](
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
