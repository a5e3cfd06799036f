"""What the processes of a run decide together: all go on or all end with one error, and none waits for ever."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from .status import RunError


Found = TypeVar("Found")
# Seconds in which a thread of gloo frees what it has sent, for which it needs the interpreter's lock
_FREEING = 0.2


def from_main(work: Callable[[], Found]) -> Found:
    """
    What the main process finds, on all processes.

    Args:
        work (`Callable`):
            Called on the main process alone; gives something that can be pickled.

    Returns:
        `Any`: what it gave.

    Raises:
        RunError: On all processes, if it raised one.
    """
    state = PartialState()
    found: list[Any] = [None, None]
    if state.is_main_process:
        try:
            found[0] = work()
        except RunError as error:
            found[1] = str(error)
    if state.num_processes > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise RunError(found[1])
    return found[0]


def first_fault(fault: str | None) -> str | None:
    """
    The fault of the first process that has one, on all processes.

    Args:
        fault (`str` or `None`):
            What is wrong on this process.

    Returns:
        `str` or `None`: with the rank before it where there are several processes; `None` where nothing is wrong.
    """
    state = PartialState()
    if state.num_processes == 1:
        return fault
    faults = gather_object([fault])
    return next((f"rank {rank}: {one}" for rank, one in enumerate(faults) if one is not None), None)


def on_each_node(check: Callable[[], str | None]) -> str | None:
    """
    [`first_fault`] of a check of files, which one process of each machine makes.

    Args:
        check (`Callable`):
            Gives what is wrong, or `None`.

    Returns:
        `str` or `None`
    """
    return first_fault(check() if PartialState().is_local_main_process else None)


def wait_for_all() -> None:
    """A barrier."""
    PartialState().wait_for_everyone()


def end_processes(trainer: Any) -> None:
    """
    Ends the trackers and the group of processes of a trainer that is about to be dropped.

    The last to hold the group is the model under DDP. When it goes, torch waits for the threads of gloo with the
    interpreter's lock in hand, and for ever if one of them needs the lock to free what it has just sent.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer that has saved all it has to.
    """
    trainer.accelerator.end_training()
    if trainer.accelerator.num_processes > 1:
        time.sleep(_FREEING)
