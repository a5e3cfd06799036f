"""Compiled passes of [`AdamP`] on a CPU, where a C compiler is found."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .weight import LocalTensor, Weight


SOURCE = Path(__file__).with_name("adamp_cpu.c")
FLAGS = [
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
]
# Elements below which a second thread costs more than it brings
MIN_PER_THREAD = 2**19


class _Options(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("beta1", "beta2", "rest1", "rest2", "eps", "inverse_root_correction2")),
        *((name, ctypes.c_float) for name in ("inverse_correction1", "sign", "lr")),
        ("nesterov", ctypes.c_int32),
    ]


@functools.cache
def compiled_library() -> ctypes.CDLL | None:
    """
    The compiled kernels, built once for each machine and source in the cache folder (`XDG_CACHE_HOME`, or
    `~/.cache`); `None`, with a warning, where that fails.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        warnings.warn("`fused=True`: no C compiler was found, torch's own kernels are used.", stacklevel=2)
        return None
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        machine = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True).stdout
        key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + version + machine).hexdigest()[:16]
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
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"`fused=True`: the kernels were not built, torch's own are used: {reason}", stacklevel=2)
        return None


def is_usable(local: LocalTensor) -> bool:
    """Whether the kernels can take a tensor: float32 throughout, on a CPU, with `fused=True`."""
    group, tensors = local.group, (local.flat, local.grad, *local.moments)
    return (
        group["fused"] is True
        and local.flat.device.type == "cpu"
        and not group["capturable"]
        and not isinstance(group["lr"], torch.Tensor)
        and all(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors)
        and compiled_library() is not None
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


def test_dots(weight: Weight) -> torch.Tensor:
    """`<g, w>`, `<g, g>`, `<w, w>` of the part of a weight that is here, shape `(3,)`."""
    kernels, local, first = compiled_library(), weight.local, weight.shard.start
    assert kernels is not None

    def piece(start: int, stop: int) -> torch.Tensor:
        dots, place = torch.zeros(3, dtype=torch.float64), first + start
        kernels.test_dots(ctypes.c_int64(stop - start), _at(local.flat, place), _at(local.grad, place), _at(dots, 0))
        return dots

    found = _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
    return torch.stack(found).sum(0).float()


def _rows_of(weight: Weight) -> tuple[int, int]:
    """Size of a row, and the column of the first element here; one row where rows don't count."""
    if weight.by_rows:
        return weight.shard.row_size, weight.shard.offset % weight.shard.row_size
    return weight.numel, 0


def measure(weight: Weight) -> None:
    """Updates a weight's moments and writes its dot products."""
    kernels, local, (row_size, column) = compiled_library(), weight.local, _rows_of(weight)
    assert kernels is not None
    exp_avg, exp_avg_sq = local.moments
    options = _options(local)

    def piece(start: int, stop: int) -> tuple[int, torch.Tensor]:
        row, first_column = divmod(column + start, row_size)
        num_rows = (column + stop - 1) // row_size - row + 1
        dots, place = torch.zeros(num_rows, 4, dtype=torch.float64), weight.shard.start + start
        kernels.measure(
            *map(ctypes.c_int64, (stop - start, row_size, first_column)), _at(local.flat, place),
            _at(local.grad, place), _at(exp_avg, place), _at(exp_avg_sq, place), options, _at(dots, 0),
        )  # fmt: skip
        return row, dots

    num_rows = weight.num_local_rows if weight.by_rows else 1
    total = torch.zeros(num_rows, 4, dtype=torch.float64)
    for row, dots in _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)]):
        total[row : row + dots.size(0)] += dots
    weight.dots = total.t().float()


def apply(weight: Weight, scale: torch.Tensor, coefficient: torch.Tensor) -> None:
    """Applies decay and the projected update. `scale` of shape `()`, `coefficient` of shape `(R,)` or `(1,)`."""
    kernels, local, (row_size, column) = compiled_library(), weight.local, _rows_of(weight)
    assert kernels is not None
    if coefficient.numel() == 1:
        row_size, column = weight.numel, 0
    exp_avg, exp_avg_sq = local.moments
    options, coefficient = _options(local), coefficient.float().contiguous()

    def piece(start: int, stop: int) -> None:
        row, first_column = divmod(column + start, row_size)
        place = weight.shard.start + start
        kernels.apply(
            *map(ctypes.c_int64, (stop - start, row_size, first_column)), _at(local.flat, place),
            _at(local.grad, place), _at(exp_avg, place), _at(exp_avg_sq, place), options, _at(scale, 0),
            _at(coefficient, row),
        )  # fmt: skip

    _run([functools.partial(piece, *ends) for ends in _pieces(weight.numel)])
