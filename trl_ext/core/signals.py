"""A run that is told to end: what it saves, and the status it ends with."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from .status import REQUEUE_STATUS, STATUS_FILE_VARIABLE


_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
logger = get_logger(__name__)


class RequeueCallback(TrainerCallback):
    """
    Saves and ends a run after the step in which one of its processes got SIGTERM or SIGUSR1. The processes agree on
    it after every step, with a sum of one number.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.received: int | None = None
        self.ends = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the context lasts. Only a main thread can; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told = torch.tensor([self.received is not None], dtype=torch.float32, device=self.accelerator.device)
        if not self.accelerator.reduce(told, reduction="sum").item() or state.global_step >= state.max_steps:
            return
        self.ends = True
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.ends:
            return
        logger.warning(
            f"The run was told to end. It is saved at step {state.global_step} and ends with status {REQUEUE_STATUS}; "
            "`resume_from_checkpoint: true` goes on.",
            main_process_only=True,
        )
        status_file = os.environ.get(STATUS_FILE_VARIABLE)
        if status_file:
            Path(status_file).write_text(str(REQUEUE_STATUS))
        raise SystemExit(REQUEUE_STATUS)
