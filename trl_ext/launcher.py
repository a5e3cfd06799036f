"""
Runs a launcher for `trl-ext`, so that whoever ends `trl-ext` ends the training too, and learns how it ended:

    trl-ext                      SIGTERM, SIGINT, SIGHUP, SIGUSR1 are handed on to the training processes
      accelerate launch          heeds none of them, and ends when the training has ended
        python -m ...            ends at once or, with `save_on_signal`, saves first

In the place of `trl-ext`, where `accelerate launch` needs more options, as in recipes/launch.slurm:

python -m trl_ext.launcher accelerate launch --config_file ddp.yaml -m trl_ext.scripts.sparse_po --config recipe.yaml
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from .core.status import STATUS_FILE_VARIABLE


# Handed on; the launcher itself would die of them and leave the training alone
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
# Set for the training processes, which then end with the process that started them
END_WITH_PARENT_VARIABLE = "TRL_EXT_END_WITH_PARENT"
# Seconds that processes get to end before they are killed, unless they are saving
PATIENCE = 10.0
_PR_SET_PDEATHSIG = 1


def run_launcher(command: list[str], environment: dict[str, str], patience: float | None = PATIENCE) -> int:
    """
    Runs a command to its end; signals are handed on to the processes that it starts.

    Args:
        command (`list[str]`):
            Command line of the launcher.
        environment (`dict[str, str]`):
            Its environment.
        patience (`float`, *optional*, defaults to `PATIENCE`):
            Seconds after a signal at which what still runs is killed; `None` waits for as long as it takes. A second
            signal kills at once.

    Returns:
        `int`: the command's exit status, that which a training process has left, or 128 and the signal's number.
    """
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        process = subprocess.Popen(
            command,
            env={**environment, STATUS_FILE_VARIABLE: str(status_file), END_WITH_PARENT_VARIABLE: "1"},
            start_new_session=True,
            preexec_fn=_become_launcher,
        )
        relay = _Relay(process.pid, patience)
        with relay.listening():
            status = relay.wait(process)
        _end(_descendants(process.pid) + relay.known)
        if status_file.is_file() and status_file.read_text().strip().isdigit():
            return int(status_file.read_text())
    if relay.received is not None and status != 0:
        return 128 + relay.received
    return status


def end_with_parent() -> None:
    """
    Lets a training process that `trl-ext` has started get SIGTERM when its launcher is gone; nothing elsewhere.
    """
    if os.environ.pop(END_WITH_PARENT_VARIABLE, None) is None:
        return
    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    _get_signal_at_parents_death()
    if os.getppid() == 1:
        raise SystemExit("The launcher has ended before the training began.")


def _become_launcher() -> None:
    """In the new process: the launcher heeds no signal that is handed on, and gets one when `trl-ext` is gone."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _get_signal_at_parents_death(signal.SIGKILL)


def _get_signal_at_parents_death(number: int = signal.SIGTERM) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))


def accelerate_configs() -> list[str]:
    """Names of the accelerate configs in the package."""
    folder = files("trl_ext") / "accelerate_configs"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


class _Relay:
    """Hands signals on, and waits for the launcher."""

    def __init__(self, pid: int, patience: float | None):
        self.pid, self.patience = pid, patience
        self.received: int | None = None
        self.known: list[psutil.Process] = []
        self._untold: list[psutil.Process] = []
        self._deadline: float | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._hand_on) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hand_on(self, number: int, _frame: Any) -> None:
        self.known = _descendants(self.pid)
        if self.received is not None:
            _end(self.known)
            return
        self.received = number
        self._deadline = None if self.patience is None else time.monotonic() + self.patience
        self._untold = list(self.known)
        self._tell()

    def _tell(self) -> None:
        """Hands the signal to those who take it; a process that is just starting does not heed it yet."""
        assert self.received is not None
        for process in list(self._untold):
            with contextlib.suppress(psutil.Error):
                if _ignores(process.pid, self.received):
                    continue
                process.send_signal(self.received)
            self._untold.remove(process)

    def wait(self, process: subprocess.Popen) -> int:
        """The launcher's exit status; what outlives the patience is killed, launcher included."""
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if self._untold:
                    self._tell()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._deadline = None
                    _end([*_descendants(self.pid), psutil.Process(self.pid)])


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal, where the system tells."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")), 0)
    return bool(mask >> (number - 1) & 1)


def _end(processes: list[psutil.Process]) -> None:
    """Kills processes that are still there; `psutil` sees to it that none of another owner of the number is."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


if __name__ == "__main__":
    sys.exit(run_launcher(sys.argv[1:], dict(os.environ), None))
