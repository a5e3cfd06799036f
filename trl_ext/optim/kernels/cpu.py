"""
Compiled passes of [`AdamP`] on a CPU: the step of all whole weights over one table ([`Plan`]), and its parts for
single weights that threads or processes share. Each call tells the C side where tensors lie and how much lies there.
"""

import ctypes
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ..options import level_of
from ..shards import GROUP_KEY, Shard
from ..weights import (
    LocalTensor,
    Watch,
    Weight,
    has_order_of,
    is_backed,
    is_flat,
    is_plain,
    local_tensor,
    shared_scratch,
)
from .compilation import compiled_library


# As adamp.c numbers them
LEVELS = (None, "channel", "layer", "test")
# Elements below which a second thread costs more than it brings
MIN_PER_THREAD = 2**19
# Most rows of a weight, since a coefficient is kept for each
MAX_ROWS = 2**26
# Columns of a part
LENGTH = 17
WEIGHT, GRAD, START, SIZE, LEVEL, EXPECTED, OPTIONS = 0, 2, 8, 9, 13, 14, 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("norm_eps", "delta")),
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "inverse_root_correction2")),
        *((name, ctypes.c_float) for name in ("inverse_correction1", "sign", "lr", "keep", "keep_projected")),
        *((name, ctypes.c_int32) for name in ("nesterov", "rounds_at_random")),
        ("seed", ctypes.c_uint32),
    ]


def options_of(group: dict[str, Any], step: int, key: tuple[int, int] = (0, 0)) -> _Options:
    """A group's options at one step as the kernels read them; `key` names the weight where it is rounded at random."""
    (beta1, beta2), decay = group["betas"], group["lr"] * group["weight_decay"]
    seed = zlib.crc32(repr((step, *key)).encode()) if group["stochastic_rounding"] else 0
    return _Options(
        group["eps"], group["delta"], beta1, beta2, 1 - beta1, 1 - beta2, group["eps"], (1 - beta2**step) ** -0.5,
        1 / (1 - beta1**step), -1.0 if group["maximize"] else 1.0, group["lr"], 1 - decay,
        1 - decay * group["wd_ratio"], group["nesterov"], group["stochastic_rounding"], seed,
    )  # fmt: skip


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


class Plan:
    """
    The step of the compiled kernels on tensors that are one whole weight each, in one call for all of them.

    Args:
        tensors (`Sequence[LocalTensor]`):
            The tensors, with gradients.
        states (`Sequence[dict]`):
            Their states.
        groups (`Sequence[dict]`):
            All groups of the optimizer.
        moments (`Sequence[str]`):
            Names of the running averages.
        counts (`ProjectionCounts`):
            Where projections are counted; the counts become views of the plan's.
    """

    # Nothing in it is cut
    cut_weights: Sequence[Any] = ()

    def __init__(
        self, tensors: Sequence[LocalTensor], states: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]],
        moments: Sequence[str], counts: Any,
    ):  # fmt: skip
        self.groups, self.counts = list(groups), counts
        self._keys = [_layout_key(group) for group in groups]
        self.watch = Watch([local.param for local in tensors], states, moments)
        self._groups_of = [local.group for local in tensors]
        self.keys = [(local.group[GROUP_KEY], local.shards[0].index) for local in tensors]
        levels = [LEVELS.index(level_of(local.group, local.shards[0].name)) for local in tensors]
        self._table = np.array(
            [_part(local, local.shards[0], level) for local, level in zip(tensors, levels, strict=True)],
            dtype=np.int64,
        )
        self._num_rows = max(local.shards[0].num_rows for local in tensors)
        self._hits = torch.zeros(len(tensors), 2)
        for key, hits in zip(self.keys, self._hits, strict=True):
            if key in counts.hits:
                hits.copy_(counts.hits[key])
            counts.hits[key] = hits

    def fits(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the plan was made for these groups."""
        return len(groups) == len(self.groups) and all(
            group is known and _layout_key(group) == key
            for group, known, key in zip(groups, self.groups, self._keys, strict=True)
        )

    def update(self) -> None:
        """Counts the step, and writes the gradients' places and the number of the options of each weight."""
        grads, numbers = self.watch.grads, []
        found: list[_Options] = []
        places: dict[tuple[Any, ...], int] = {}
        for grad, state, group, key in zip(grads, self.watch.states, self._groups_of, self.keys, strict=True):
            if not grad:
                numbers.append(0)
                continue
            state["step"] += 1
            self.counts.steps[key] = self.counts.steps.get(key, 0) + 1
            name = (id(group), state["step"], key if group["stochastic_rounding"] else None)
            if name not in places:
                places[name] = len(found)
                found.append(options_of(group, state["step"], key))
            numbers.append(places[name])
        self._table[:, GRAD], self._table[:, OPTIONS] = grads, numbers
        self._options = (_Options * max(len(found), 1))(*found)

    def measure(self) -> None:
        """Takes the whole step, weight by weight while it is in the cache."""
        kernels = compiled_library()
        assert kernels is not None
        pieces = self._shares()
        size = self._num_rows
        scratch = shared_scratch().take(size * len(pieces), torch.float32, torch.device("cpu"))

        def share(number: int, first: int, last: int) -> None:
            _check(kernels.adamp_update_weights(
                ctypes.c_void_p(self._table.ctypes.data), ctypes.c_int64(first), ctypes.c_int64(last), self._options,
                ctypes.c_int64(len(self._options)), _at(scratch, number * size), ctypes.c_int64(size),
                _at(self._hits, 0),
            ))  # fmt: skip

        _run([functools.partial(share, number, *ends) for number, ends in enumerate(pieces)])

    def apply(self) -> None:
        """Tells autograd what has changed, as torch's own operations do."""
        increment_version(self.watch.stepped_memory())

    def _shares(self) -> list[tuple[int, int]]:
        """Weights of about the same size together for each of torch's threads."""
        sizes = np.cumsum(self._table[:, SIZE])
        num_threads = max(1, min(torch.get_num_threads(), int(sizes[-1]) // MIN_PER_THREAD))
        targets = sizes[-1] * np.arange(1, num_threads) / num_threads
        ends = [0, *np.searchsorted(sizes, targets).tolist(), len(sizes)]
        return [(first, last) for first, last in itertools.pairwise(ends) if last > first]


def _layout_key(group: dict[str, Any]) -> list[Any]:
    """What in a group the plan was made for."""
    projection = group["projection"]
    names = ("capturable", "foreach", "fused", "differentiable", "state_dtype")
    kept = dict(projection) if isinstance(projection, dict) else projection
    tensors = [isinstance(group[name], torch.Tensor) for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio")]
    return [kept, group.get("param_names"), torch.get_num_threads(), *tensors, *(group[name] for name in names)]


def _part(local: LocalTensor, shard: Shard, level: int, start: int = 0, size: int | None = None) -> list[int]:
    """Some elements of a weight, all of them by default, as adamp.c takes them."""
    assert local.grad is not None
    first, column = shard.start + start, (shard.offset + start) % shard.row_size
    spans = [
        number for tensor in (local.flat, local.grad, *local.moments) for number in (tensor.data_ptr(), tensor.numel())
    ]
    size = shard.numel if size is None else size
    return [*spans, first, size, shard.row_size, column, shard.offset + start, level, 0, DTYPES[local.flat.dtype], 0]


# ------------------------------------------------------------------ single weights


def _at(tensor: torch.Tensor, element: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + element * tensor.element_size())


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


def _piece(weight: Weight, start: int, stop: int, by_rows: bool = True) -> tuple[ctypes.Array, int, int]:
    """A stretch of a weight, the first row of it, and the number of its rows; one row where rows don't count."""
    shard = weight.shard
    part = _part(weight.local, shard, LEVELS.index("test"), start, stop - start)
    if not by_rows:
        part[10:12] = weight.numel, start
        return (ctypes.c_int64 * LENGTH)(*part), 0, 1
    first, last = (shard.offset % shard.row_size + place for place in (start, stop - 1))
    row = first // shard.row_size
    return (ctypes.c_int64 * LENGTH)(*part), row, last // shard.row_size - row + 1


def _options(weight: Weight) -> Any:
    local = weight.local
    assert isinstance(local.step, int)
    return ctypes.byref(options_of(local.group, local.step, weight.key))


def test(weight: Weight) -> str | None:
    """The level at which a whole weight passes, from gradient and weight alone."""
    kernels, options = compiled_library(), _options(weight)
    assert kernels is not None
    whole, _, _ = _piece(weight, 0, weight.numel)
    if _check(kernels.adamp_test_rows(whole, options)):
        return "channel"

    def piece(start: int, stop: int) -> torch.Tensor:
        totals = torch.zeros(3, dtype=torch.float64)
        _check(kernels.adamp_sum_up(_piece(weight, start, stop)[0], _at(totals, 0)))
        return totals

    dots = torch.zeros(4, 1, dtype=torch.float64)
    for totals in _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)]):
        dots[:3, 0] += totals
    # As one row, whose level would be that of rows
    return "layer" if _level_of(weight, dots, weight.numel) else None


def step(weight: Weight) -> None:
    """Takes AdamW's step."""
    kernels, options = compiled_library(), _options(weight)
    assert kernels is not None

    def piece(start: int, stop: int) -> None:
        _check(kernels.adamp_step(_piece(weight, start, stop)[0], options))

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version([weight.local.flat, *weight.local.moments])


def measure(weight: Weight) -> None:
    """Updates a weight's moments and writes its dot products."""
    kernels, options = compiled_library(), _options(weight)
    assert kernels is not None

    def piece(start: int, stop: int) -> tuple[int, torch.Tensor]:
        part, row, num_rows = _piece(weight, start, stop, weight.by_rows)
        dots = torch.zeros(num_rows, 4, dtype=torch.float64)
        _check(kernels.adamp_measure(part, options, _at(dots, 0), ctypes.c_int64(num_rows)))
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
    return LEVELS[kernels.adamp_test(ctypes.c_int64(len(dots)), _at(dots, 0), *doubles, _at(totals, 0))]


def apply(weight: Weight, scale: torch.Tensor | float, coefficient: torch.Tensor) -> None:
    """
    Applies decay (`scale`, shape `()`) and the projected update with the radial `coefficient` of each local row or of
    all, shape `(R,)` or `(1,)`.
    """
    kernels, options, keep = compiled_library(), _options(weight), ctypes.c_float(float(scale))
    assert kernels is not None
    coefficient, by_rows = coefficient.float().contiguous(), weight.by_rows and coefficient.numel() > 1

    def piece(start: int, stop: int) -> None:
        part, row, num_rows = _piece(weight, start, stop, by_rows)
        if row + num_rows > coefficient.numel():
            _check(-1)
        _check(kernels.adamp_apply(part, options, keep, _at(coefficient, row), ctypes.c_int64(num_rows)))

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version(weight.local.flat)
