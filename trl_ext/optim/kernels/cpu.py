"""Compiled passes of [`AdamP`] on a CPU, where a C compiler is found."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.autograd.graph import increment_version

from ..projection import LEVELS, threshold
from ..weights import LocalTensor, Weight


SOURCE = Path(__file__).with_name("adamp.c")
FLAGS = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Whether the first pass tests as well, and can take AdamW's step at once
TESTS_WHILE_MEASURING = True
# Elements below which a second thread costs more than it brings
MIN_PER_THREAD = 2**19


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "inverse_root_correction2")),
        *((name, ctypes.c_float) for name in ("inverse_correction1", "sign", "lr")),
        ("nesterov", ctypes.c_int32),
    ]


@functools.cache
def _build() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "no C compiler was found"
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + version + _machine()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_ext"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / f"adamp_cpu_{key}.so"
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / built.name
                command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, text=True)
                os.replace(made, built)  # Processes may build at the same time
        return ctypes.CDLL(str(built))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        return f"the kernels were not built ({getattr(error, 'stderr', None) or error})"


def _machine() -> bytes:
    """What code for this processor may not run on another's: home folders are shared between nodes."""
    info = Path("/proc/cpuinfo")
    lines = info.read_bytes().splitlines() if info.exists() else []
    features = {line for line in lines if line.lower().startswith((b"flags", b"features"))}
    return b"".join(sorted(features)) + f"{platform.machine()} {platform.processor()}".encode()


@functools.cache
def compiled_library(needed: bool = False) -> ctypes.CDLL | None:
    """
    The kernels, built once for each processor and source in the cache folder (`XDG_CACHE_HOME`, or `~/.cache`); `None`
    where that fails, with a warning if they are `needed`.
    """
    built = _build()
    if isinstance(built, str):
        if needed:
            warnings.warn(f"`fused=True`: {built}; torch's own kernels are used.", stacklevel=2)
        return None
    return built


def is_usable(local: LocalTensor) -> bool:
    """Whether the kernels can take a tensor: float32 throughout, on a CPU, and not told otherwise."""
    group, tensors = local.group, (local.flat, local.grad, *local.moments)
    return (
        group["fused"] is not False
        and not group["foreach"]
        and local.flat.device.type == "cpu"
        and not group["capturable"]
        and not isinstance(group["lr"], torch.Tensor)
        and all(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)
        and compiled_library(group["fused"] is True) is not None
    )


def _options(local: LocalTensor) -> _Options:
    group, (beta1, beta2) = local.group, local.group["betas"]
    return _Options(
        beta1, beta2, 1 - beta1, 1 - beta2, group["eps"], (1 - beta2**local.step) ** -0.5, 1 / (1 - beta1**local.step),
        -1.0 if group["maximize"] else 1.0, group["lr"], group["nesterov"],
    )  # fmt: skip


def _at(tensor: torch.Tensor | None, element: int) -> ctypes.c_void_p:
    assert tensor is not None
    return ctypes.c_void_p(tensor.data_ptr() + element * tensor.element_size())


def _tensors_at(local: LocalTensor, place: int) -> list[ctypes.c_void_p]:
    return [_at(tensor, place) for tensor in (local.flat, local.grad, *local.moments)]


def _pieces(numel: int) -> list[tuple[int, int]]:
    """Stretches of equal size, one for each of torch's threads."""
    num_threads = max(1, min(torch.get_num_threads(), numel // MIN_PER_THREAD))
    size = -(-numel // num_threads)
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads)


def _run(tasks: list) -> list:
    """Calls functions, at the same time if there are several; ctypes lets go of the interpreter's lock."""
    return [tasks[0]()] if len(tasks) == 1 else list(_pool(len(tasks)).map(lambda task: task(), tasks))


def _rows_of(weight: Weight) -> tuple[int, int]:
    """Size of a row, and the column of the first element here; one row where rows don't count."""
    if weight.by_rows:
        return weight.shard.row_size, weight.shard.offset % weight.shard.row_size
    return weight.numel, 0


def measure(weight: Weight, keep: float | None = None, old: torch.Tensor | None = None) -> None:
    """
    Updates a weight's moments and writes its dot products. With `keep`, the share that weight decay leaves, takes the
    step of AdamW as well and keeps the weights from before it in `old`, shape `(numel,)`.
    """
    kernels, local, (row_size, column) = compiled_library(), weight.local, _rows_of(weight)
    assert kernels is not None
    options = _options(local)

    def piece(start: int, stop: int) -> tuple[int, torch.Tensor]:
        row, first_column = divmod(column + start, row_size)
        num_rows = (column + stop - 1) // row_size - row + 1
        dots, place = torch.zeros(num_rows, 4, dtype=torch.float64), weight.shard.start + start
        arguments = [
            *map(ctypes.c_int64, (stop - start, row_size, first_column)), *_tensors_at(local, place), options,
            _at(dots, 0),
        ]  # fmt: skip
        if keep is None:
            kernels.measure(*arguments)
        else:
            kernels.move(*arguments, ctypes.c_float(keep), _at(old, start))
        return row, dots

    found = _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    # Autograd is told, as by torch's own operations
    increment_version([*local.moments, *([] if keep is None else [local.flat])])
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
    kernels, group, dots = compiled_library(), weight.local.group, weight.dots.t().contiguous()
    assert kernels is not None
    limits = [threshold(group["delta"], size) for size in (weight.shard.row_size, weight.numel)]
    totals = torch.zeros(4, 1, dtype=torch.float64)
    doubles = map(ctypes.c_double, (*limits, group["eps"]))
    level = (None, *LEVELS)[kernels.test(ctypes.c_int64(len(dots)), _at(dots, 0), *doubles, _at(totals, 0))]
    if level == "layer":
        weight.dots, weight.by_rows = totals, False
    return level


def apply(weight: Weight, scale: torch.Tensor | float, coefficient: torch.Tensor) -> None:
    """
    Applies decay (`scale`, shape `()`) and the projected update with the radial `coefficient` of each local row or of
    all, shape `(R,)` or `(1,)`. Starts from the old weights where [`measure`] kept them.
    """
    kernels, local, (row_size, column) = compiled_library(), weight.local, _rows_of(weight)
    assert kernels is not None
    if coefficient.numel() == 1:
        row_size, column = weight.numel, 0
    options, coefficient = _options(local), coefficient.float().contiguous()

    def piece(start: int, stop: int) -> None:
        row, first_column = divmod(column + start, row_size)
        arguments = [
            *map(ctypes.c_int64, (stop - start, row_size, first_column)),
            *_tensors_at(local, weight.shard.start + start), options, ctypes.c_float(float(scale)),
        ]  # fmt: skip
        if weight.old is None:
            kernels.apply(*arguments, _at(coefficient, row))
        else:
            kernels.apply_to(*arguments, _at(weight.old, start), _at(coefficient, row))

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    increment_version(local.flat)
