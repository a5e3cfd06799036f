"""
Compiled passes of [`AdamP`] on a CPU: the step of all whole weights over one table ([`Plan`]), and its parts for
single weights that threads or processes share, each of which is an item of the same table. Each call tells the C side
where tensors lie and how much lies there.
"""

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ..options import level_of
from ..shards import Shard
from ..weights import LocalTensor, Weight, has_order_of, is_backed, is_flat, is_plain, local_tensor, shared_scratch
from .compilation import compiled_library
from .table import DTYPES, LEVELS, Column, Item, Table, item_row, options_row, seed_of


LEVEL_NAMES = {number: None if name == "none" else name for name, number in LEVELS.items()}
# Elements below which a second thread costs more than it brings
MIN_PER_THREAD = 2**19
# Most rows of a weight, since a coefficient is kept for each
MAX_ROWS = 2**26


# ------------------------------------------------------------------ what the kernels take


def is_usable(local: LocalTensor) -> bool:
    """Whether the kernels can take a tensor; every other one goes the way through torch."""
    tensors, is_counted = (local.flat, local.grad, *local.moments), not isinstance(local.step, torch.Tensor)
    return is_counted and _allows(local.group) and _takes_memory(tensors) and _is_built(local.group)


def takes(param: torch.Tensor, group: dict[str, Any], state: dict[str, Any], moments: Sequence[str]) -> bool:
    """Whether a parameter with a gradient can be in a plan, as far as its memory and its group go."""
    weight, grad = local_tensor(param), param.grad
    if weight.ndim < 2 or grad is None or isinstance(state.get("step"), torch.Tensor) or not _allows(group):
        return False
    kept = [local_tensor(state[name]) for name in moments if name in state]
    tensors = [weight, local_tensor(grad), *kept]
    return (
        all(tensor.shape == weight.shape for tensor in tensors)
        and len(kept) in (0, len(moments))
        and (bool(kept) or (group["state_dtype"] or weight.dtype) == torch.float32)
        and _takes_memory(tensors)
        and is_flat(param)
        and has_order_of(grad, param)
        and _is_built(group)
    )


def takes_shards(group: dict[str, Any], shards: Sequence[Shard]) -> bool:
    """Whether a tensor is one whole weight that may be projected, and too small for more than one thread."""
    if len(shards) != 1 or shards[0].borders or len(shards[0].shape) < 2 or not shards[0].numel:
        return False
    is_small = len(_pieces(shards[0].numel)) == 1 and shards[0].num_rows <= MAX_ROWS
    return is_small and level_of(group, shards[0].name) != "none"


def _allows(group: dict[str, Any]) -> bool:
    numbers = (group["lr"], group["eps"], group["weight_decay"], group["delta"], group["wd_ratio"], *group["betas"])
    return (
        group["fused"] is not False
        and not (group["foreach"] or group["capturable"] or group["differentiable"])
        and not any(isinstance(number, torch.Tensor) for number in numbers)
    )


def _is_built(group: dict[str, Any]) -> bool:
    return compiled_library(group["fused"] is True) is not None


def _takes_memory(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether weight, gradient and running averages are memory of a CPU that the kernels read."""
    weight, grad, *moments = tensors
    if weight is None or grad is None or weight.dtype not in DTYPES or grad.dtype != weight.dtype:
        return False
    return all(moment is not None and moment.dtype == torch.float32 for moment in moments) and all(
        tensor is not None
        and tensor.device.type == "cpu"
        and is_plain(tensor)
        and is_backed(tensor)
        and tensor.data_ptr() % tensor.element_size() == 0
        for tensor in tensors
    )


# ------------------------------------------------------------------ the step of whole weights


class Plan(Table):
    """
    The step of the compiled kernels on tensors that are one whole weight each, in one call for all of them.

    Args:
        tensors, states, groups, moments, counts:
            As in [`Table`].
    """

    # Nothing in it is cut
    cut_weights: Sequence[Any] = ()

    def layout_key(self, group: dict[str, Any]) -> list[Any]:
        """What in a group the table was made for."""
        tensors = [
            isinstance(group[name], torch.Tensor) for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio")
        ]
        return [*super().layout_key(group), torch.get_num_threads(), *tensors]

    def measure(self) -> None:
        """Takes the whole step, weight by weight while it is in the cache."""
        kernels = compiled_library()
        assert kernels is not None
        pieces = self._shares()
        size = int((self._items[:, Column.SIZE] // self._items[:, Column.ROW_SIZE]).max())
        scratch = shared_scratch().take(size * len(pieces), torch.float32, torch.device("cpu"))

        def share(number: int, first: int, last: int) -> None:
            _check(kernels.adamp_update_weights(
                _of(self._items), ctypes.c_int64(first), ctypes.c_int64(last), *_sized(self._options),
                _at(self.was_projected, 0), _at(scratch, number * size), ctypes.c_int64(size), _at(self.hits, 0),
            ))  # fmt: skip

        _run([functools.partial(share, number, *ends) for number, ends in enumerate(pieces)])

    def apply(self) -> None:
        """Tells autograd what has changed, as torch's own operations do."""
        increment_version(self.watch.stepped_memory())

    def _shares(self) -> list[tuple[int, int]]:
        """Weights of about the same size together for each of torch's threads."""
        sizes = np.cumsum(self._items[:, Column.SIZE])
        num_threads = max(1, min(torch.get_num_threads(), int(sizes[-1]) // MIN_PER_THREAD))
        targets = sizes[-1] * np.arange(1, num_threads) / num_threads
        ends = [0, *np.searchsorted(sizes, targets).tolist(), len(sizes)]
        return [(first, last) for first, last in itertools.pairwise(ends) if last > first]


# ------------------------------------------------------------------ single weights


def _at(tensor: torch.Tensor, element: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + element * tensor.element_size())


def _of(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _sized(options: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _of(options), ctypes.c_int64(len(options))


def _check(result: int) -> int:
    """What a kernel returned, unless it refused what it was given."""
    if result < 0:
        raise RuntimeError(
            "AdamP's kernels were given a weight, gradient or running average that is smaller than its layout says. "
            "Nothing was changed. Build the optimizer after resizing parameters, or pass `fused=False`."
        )
    return result


def _pieces(numel: int) -> list[tuple[int, int]]:
    """Stretches of equal size, one for each of torch's threads."""
    num_threads = max(1, min(torch.get_num_threads(), numel // MIN_PER_THREAD))
    size = -(-numel // num_threads)
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


def _run(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Calls functions, at the same time if there are several; ctypes lets go of the interpreter's lock."""
    return [tasks[0]()] if len(tasks) == 1 else list(_pool(len(tasks)).map(lambda task: task(), tasks))


class _Single:
    """The options of a weight's group, and items of stretches of the weight."""

    def __init__(self, weight: Weight):
        assert isinstance(weight.local.step, int)
        self.weight, self.options = weight, np.array([options_row(weight.local.group)])
        self.step = np.array([weight.local.step], dtype=np.float32)

    def item(self, start: int, stop: int, by_rows: bool = True) -> tuple[np.ndarray, int, int]:
        """A stretch of the weight, the first row of it, and the number of its rows; one row where rows don't count."""
        local, shard = self.weight.local, self.weight.shard
        item = item_row(local, Item(shard.start + start, stop - start, shard, "test"))
        item[Column.STEP], item[Column.SEED] = self.step.ctypes.data, seed_of(self.weight.key)
        if not by_rows:
            item[Column.ROW_SIZE] = item[Column.OFFSET] + item[Column.SIZE]
            return item, 0, 1
        first, last = (shard.offset % shard.row_size + place for place in (start, stop - 1))
        row = first // shard.row_size
        return item, row, last // shard.row_size - row + 1


def test(weight: Weight) -> str | None:
    """The level at which a whole weight passes, from gradient and weight alone."""
    kernels, single = compiled_library(), _Single(weight)
    assert kernels is not None
    whole, _, _ = single.item(0, weight.numel)
    if _check(kernels.adamp_test_rows(_of(whole), *_sized(single.options))):
        return "channel"

    def piece(start: int, stop: int) -> torch.Tensor:
        totals = torch.zeros(3, dtype=torch.float64)
        item, _, _ = single.item(start, stop)
        _check(kernels.adamp_sum_up(_of(item), _at(totals, 0)))
        return totals

    dots = torch.zeros(4, 1, dtype=torch.float64)
    for totals in _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)]):
        dots[:3, 0] += totals
    # As one row, whose level would be that of rows
    return "layer" if _level_of(weight, dots, weight.numel) else None


def step(weight: Weight) -> None:
    """Takes AdamW's step."""
    kernels, single = compiled_library(), _Single(weight)
    assert kernels is not None

    def piece(start: int, stop: int) -> None:
        item, _, _ = single.item(start, stop)
        _check(kernels.adamp_step(_of(item), *_sized(single.options)))

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version([weight.local.flat, *weight.local.moments])


def measure(weight: Weight) -> None:
    """Updates a weight's moments and writes its dot products."""
    kernels, single = compiled_library(), _Single(weight)
    assert kernels is not None

    def piece(start: int, stop: int) -> tuple[int, torch.Tensor]:
        item, row, num_rows = single.item(start, stop, weight.by_rows)
        dots = torch.zeros(num_rows, 4, dtype=torch.float64)
        sizes = (_at(dots, 0), ctypes.c_int64(num_rows))
        _check(kernels.adamp_measure(_of(item), *_sized(single.options), *sizes))
        return row, dots

    found = _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version(list(weight.local.moments))
    total = found[0][1]
    if len(found) > 1:
        total = torch.zeros(weight.num_local_rows if weight.by_rows else 1, 4, dtype=torch.float64)
        for row, dots in found:
            total[row : row + dots.size(0)] += dots
    weight.dots = total.t()
    if weight.shard.borders:  # In the dtype of processes that hold nothing
        weight.dots = weight.dots.float()


def find_level(weight: Weight) -> str | None:
    """The level at which a whole weight passes, after [`measure`] of its rows. For the layer level adds them up."""
    totals = torch.zeros(4, 1, dtype=torch.float64)
    level = _level_of(weight, weight.dots, weight.shard.row_size, totals)
    if level == "layer":
        weight.dots, weight.by_rows = totals, False
    return level


def _level_of(weight: Weight, dots: torch.Tensor, row_size: int, totals: torch.Tensor | None = None) -> str | None:
    kernels, delta, dots = compiled_library(), weight.local.group["delta"], dots.t().contiguous()
    assert kernels is not None
    totals = torch.zeros(4, 1, dtype=torch.float64) if totals is None else totals
    limits = [delta / math.sqrt(size) for size in (row_size, weight.numel)]
    doubles = map(ctypes.c_double, (*limits, weight.local.group["eps"]))
    return LEVEL_NAMES[kernels.adamp_test(ctypes.c_int64(len(dots)), _at(dots, 0), *doubles, _at(totals, 0))]


def apply(weight: Weight, scale: torch.Tensor | float, coefficient: torch.Tensor) -> None:
    """
    Applies decay (`scale`, shape `()`) and the projected update with the radial `coefficient` of each local row or of
    all, shape `(R,)` or `(1,)`.
    """
    kernels, single, keep = compiled_library(), _Single(weight), ctypes.c_float(float(scale))
    assert kernels is not None
    coefficient, by_rows = coefficient.float().contiguous(), weight.by_rows and coefficient.numel() > 1

    def piece(start: int, stop: int) -> None:
        item, row, num_rows = single.item(start, stop, by_rows)
        if row + num_rows > coefficient.numel():
            _check(-1)
        sizes = (_at(coefficient, row), ctypes.c_int64(num_rows))
        _check(kernels.adamp_apply(_of(item), *_sized(single.options), keep, *sizes))

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version(weight.local.flat)
