"""One run for an output folder: a lock with host and process, and what a new run may find there."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import psutil
from accelerate.logging import get_logger

from .checkpoint import checkpoints, clear_remains, remove, step_of
from .status import RunError


logger = get_logger(__name__)
LOCK_FILE = ".trl_ext_lock.json"


class RunLock:
    """
    Says that a run writes to a folder. The lock of a process that has died is taken over: of one on this machine at
    once, and of one on another when it has given no sign of life for a while.

    Args:
        folder (`Path`):
            Output folder; made where missing.
        beat (`float`, *optional*, defaults to `15.0`):
            Seconds between two signs of life.
        patience (`float`, *optional*, defaults to `50.0`):
            How long the holder on another machine is watched, in seconds, before it is taken for dead.
    """

    def __init__(self, folder: Path, beat: float = 15.0, patience: float = 50.0):
        self.path, self.beat, self.patience = folder / LOCK_FILE, beat, patience
        self._own = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time(),
            "id": uuid.uuid4().hex,
        }  # fmt: skip
        self._released = threading.Event()

    def acquire(self) -> None:
        """
        Raises:
            RunError: If another run writes to the folder, or nothing can be written there.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = self._holder()
                self._refuse_if_alive(holder)
                self._take_away(holder)
        except OSError as error:
            raise RunError(
                f"`output_dir` {self.path.parent} cannot be written to ({error.strerror}). Choose another one."
            ) from error
        threading.Thread(target=self._give_signs_of_life, daemon=True).start()

    def release(self) -> None:
        """Gives the folder free, if this lock still holds it."""
        self._released.set()
        if self._holder() == self._own:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the lock is this run's now. It appears with its content: nobody reads half a lock."""
        aside = self._aside()
        aside.write_text(json.dumps(self._own))
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if self.path.exists():
                return False
            aside.rename(self.path)
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _aside(self) -> Path:
        return self.path.with_name(f"{LOCK_FILE}.{self._own['id']}")

    def _holder(self) -> dict[str, Any] | None:
        return _read(self.path)

    def _refuse_if_alive(self, holder: dict[str, Any] | None) -> None:
        if not holder or not {"host", "pid", "started"} <= holder.keys():
            return
        if holder["host"] == self._own["host"]:
            alive = runs(holder["pid"], holder["started"])
        else:
            alive = self._gives_signs_of_life()
        if alive:
            raise RunError(
                f"`output_dir` {self.path.parent} is written to by another run, process {holder['pid']} on "
                f"{holder['host']}. Wait for it or end it, or choose another `output_dir`. If there is no such "
                f"process, delete {self.path}."
            )
        # The plain logger: a pipeline's process has no accelerate state, and one process alone takes a lock
        logger.logger.warning(
            f"The run of process {holder['pid']} on {holder['host']} ended without giving {self.path.parent} free; "
            "its lock is taken over."
        )

    def _gives_signs_of_life(self) -> bool:
        """Watches the lock's time of change, which is compared with nothing but itself: clocks differ."""
        first, end = self._changed(), time.monotonic() + self.patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self.patience / 10))
            if self._changed() != first:
                return True
        return False

    def _changed(self) -> int:
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _take_away(self, stale: dict[str, Any] | None) -> None:
        """Removes a stale lock, and puts back one that another process has put into its place since."""
        aside = self._aside()
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if _read(aside) != stale:
                with contextlib.suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink()

    def _give_signs_of_life(self) -> None:
        while not self._released.wait(self.beat):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):  # gone, or no lock of ours
        return None
    return holder if isinstance(holder, dict) else None


def runs(pid: int, started: float) -> bool:
    """
    Whether a process of this machine runs.

    Args:
        pid (`int`):
            Its number.
        started (`float`):
            When it began, as `psutil` says: numbers are given again.

    Returns:
        `bool`
    """
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 1.0
    except psutil.AccessDenied:
        return True
    except (psutil.Error, OverflowError, TypeError, ValueError):
        return False


def prepare_folder(
    folder: Path, resumed_from: Path | None, overwrite: bool, passed_over: Collection[Path] = ()
) -> None:
    """
    Sees to it that a folder has the checkpoints of one run, which this one will go on with.

    Args:
        folder (`Path`):
            Output folder.
        resumed_from (`Path` or `None`):
            Checkpoint that the run goes on from; `None` for a new run.
        overwrite (`bool`):
            Whether checkpoints of another run, or of steps after the one resumed from, are deleted.
        passed_over (`Collection[Path]`, *optional*, defaults to `()`):
            Damaged checkpoints, which may stay: nothing resumes from them, and the run writes its own in their place.

    Raises:
        RunError: If there are such, and `overwrite` is false.
    """
    clear_remains(folder)
    found = [path for path in checkpoints(folder) if path not in passed_over]
    if resumed_from is not None:
        own = resumed_from.parent.resolve() == folder.resolve()
        found = [path for path in found if not own or step_of(path) > step_of(resumed_from)]
    if not found:
        return
    names = ", ".join(path.name for path in found[:3]) + (", ..." if len(found) > 3 else "")
    if overwrite:
        logger.warning(f"`overwrite`: {names} of {folder} are deleted.", main_process_only=True)
        for path in found:
            remove(path)
        return
    if resumed_from is None:
        raise RunError(
            f"`output_dir` {folder} has the checkpoints of another run: {names}. Go on from them with "
            "`resume_from_checkpoint: true`, choose another `output_dir`, or delete them with `overwrite: true`."
        )
    raise RunError(
        f"`output_dir` {folder} has checkpoints that do not come before {resumed_from}: {names}. A run has one "
        "history: go on from the newest with `resume_from_checkpoint: true`, choose another `output_dir`, or delete "
        "them with `overwrite: true`."
    )
