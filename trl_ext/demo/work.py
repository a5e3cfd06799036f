"""The demo's trainings, several at a time: each on one thread, in a process that keeps what it has imported."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Task:
    """
    One piece of work.

    Args:
        title (`str`):
            What it is.
        log (`Path`):
            File for what it says.
        function (`Callable`):
            Function of a module.
        arguments (`tuple`, *optional*):
            Its arguments.
    """

    title: str
    log: Path
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass
class Part:
    """
    A part of the demo.

    Args:
        title (`str`):
            What it is.
        tasks (`list[Task]`):
            Its work.
        show (`Callable`):
            Takes the tasks' results in their order, and prints and draws them.
    """

    title: str
    tasks: list[Task]
    show: Callable[[list[Any]], Any]
    results: dict[int, Any] = field(default_factory=dict)
    seconds: float = 0.0


def default_workers() -> int:
    """Number of trainings at a time: one for each core, up to four."""
    return min(4, os.cpu_count() or 1)


def run_parts(parts: Sequence[Part], workers: int, say: Callable[[str], None]) -> None:
    """
    Runs all tasks, those that take long first among them, and shows each part as soon as it is done.

    Args:
        parts (`Sequence[Part]`):
            Parts, in the order in which their tasks begin.
        workers (`int`):
            Tasks at a time; with 1 they run in this process.
        say (`Callable`):
            Prints a line.

    Raises:
        RuntimeError: If a task fails; it names the log.
    """
    for part, position, seconds, result in _results(parts, workers):
        part.results[position] = result
        part.seconds += seconds
        say(f"{part.title}: {part.tasks[position].title}, {seconds:.0f} seconds")
        if len(part.results) == len(part.tasks):
            part.show([part.results[index] for index in range(len(part.tasks))])


def _results(parts: Sequence[Part], workers: int) -> Iterator[tuple[Part, int, float, Any]]:
    places = [(part, position) for part in parts for position in range(len(part.tasks))]
    if workers == 1:
        for part, position in places:
            yield (part, position, *_run(part.tasks[position]))
        return
    with _one_thread(), ProcessPoolExecutor(workers, get_context("spawn"), _import_quietly) as pool:
        running: dict[Future, tuple[Part, int]] = {
            pool.submit(_run, part.tasks[position]): (part, position) for part, position in places
        }
        try:
            for future in as_completed(running):
                yield (*running[future], *future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _import_quietly() -> None:
    """Lets libraries say what they say when they are imported, before a task is unpickled and imports them."""
    from ..core.quiet import quiet_run

    with quiet_run():
        pass


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets processes that start meanwhile calculate on one thread, which sums depend on."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _run(task: Task) -> tuple[float, Any]:
    """Seconds and result of a task, whose words go to its log."""
    from ..core.quiet import quiet_run

    start = time.monotonic()
    task.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with task.log.open("w") as file, _said_to(file), quiet_run():
            result = task.function(*task.arguments)
    except Exception as error:
        raise RuntimeError(
            f"{task.title} of the demo failed with {type(error).__name__}: {error}. What it said is in {task.log}."
        ) from error
    return time.monotonic() - start, result


@contextlib.contextmanager
def _said_to(file: Any) -> Iterator[None]:
    """Sends to a file what this process and those that it starts say."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        file.flush()
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)
