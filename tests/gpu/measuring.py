"""What the sections share: where results are kept as they come, times, launches and peak memory."""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch


Row = dict[str, Any]
# Calls of the CUDA runtime and driver that start a kernel, and those that make the host wait
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
COPIES = ("cudaMemcpyAsync", "cudaMemsetAsync")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Record:
    """
    Tables of one section, written to a file after every row, so that a section that is stopped keeps what it has.

    Args:
        path (`Path`):
            JSON file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.tables: dict[str, list[Row]] = {}

    def row(self, table: str, **values: Any) -> None:
        """Adds a row to a table."""
        self.tables.setdefault(table, []).append(values)
        self.path.write_text(json.dumps(self.tables))

    @contextmanager
    def attempt(self, table: str, **names: Any) -> Iterator[None]:
        """Turns an error into a row of the table, so that the measurements after it still run."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.row(table, **names, error=f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            release()


class Timing(NamedTuple):
    """Medians in milliseconds: between two events on the device, and of the host's part of the step."""

    device: float
    host: float


def release() -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_one(step: Callable[[], Any], device: torch.device) -> Timing:
    """One step, by CUDA events on a GPU and by the clock elsewhere."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        elapsed = 1e3 * (time.perf_counter() - start)
        return Timing(elapsed, elapsed)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    first.record()
    step()
    last.record()
    host = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    return Timing(first.elapsed_time(last), host)


def time_in_turn(
    steps: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warmup: int = 2
) -> dict[str, Timing]:
    """Medians over the rounds, the steps taking turns."""
    times: dict[str, list[Timing]] = {name: [] for name in steps}
    for turn in range(rounds + warmup):
        for name, step in steps.items():
            found = time_one(step, device)
            if turn >= warmup:
                times[name].append(found)
    return {name: Timing(*map(statistics.median, zip(*found, strict=True))) for name, found in times.items()}


def count_calls(step: Callable[[], Any]) -> dict[str, int]:
    """Launches, copies and waits of one step, counted by the profiler; all zero on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
    counts = {event.key: event.count for event in profile.key_averages()}
    groups = {"launches": LAUNCHES, "copies": COPIES, "waits": WAITS}
    return {group: sum(counts.get(name, 0) for name in names) for group, names in groups.items()}


def peak_mib(step: Callable[[], Any]) -> float:
    """MiB that a step adds to what is held before it, at most."""
    from tests.benchmarks.peak_memory import PeakMemory

    release()
    with PeakMemory() as memory:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return memory.added
