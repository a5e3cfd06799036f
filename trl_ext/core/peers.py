"""Who the processes of a run are, so that one that waits for another in vain says for which."""

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
from accelerate import PartialState
from accelerate.utils import gather_object

from .._upstream import set_exchange_timeout
from .run_folder import runs
from .status import RunError


# Of errors of an exchange between processes, of gloo and of NCCL
_OF_AN_EXCHANGE = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was likely closed)|broken pipe|timed? ?out|remote (peer|process)|"
    r"sendbytes|recvbytes|recvvalue|process group",
    re.IGNORECASE,
)
# Seconds that a process gets to end whose connection is closed already
_PATIENCE = 2.0


class Peer(NamedTuple):
    """A process of a run."""

    rank: int
    host: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """Whether it has ended, as far as this machine can tell."""
        return self.host == socket.gethostname() and not runs(self.pid, self.started)


@contextmanager
def naming_lost_peers(timeout: float) -> Iterator[None]:
    """
    Lets an exchange that fails because another process has ended, or does not answer in time, say which.

    Args:
        timeout (`float`):
            `ddp_timeout`, in seconds, for the error.

    Raises:
        RunError: In the place of the error of an exchange; all other errors pass as they are.
    """
    state = PartialState()
    if state.num_processes == 1:
        yield
        return
    own = Peer(state.process_index, socket.gethostname(), os.getpid(), psutil.Process().create_time())
    set_exchange_timeout(timeout)
    others = [peer for peer in (Peer(*one) for one in gather_object([tuple(own)])) if peer.rank != own.rank]
    try:
        yield
    except RuntimeError as error:
        if _OF_AN_EXCHANGE.search(str(error)) is None:
            raise
        raise RunError(_what_is_wrong(own, others, timeout, error)) from error


def _what_is_wrong(own: Peer, others: list[Peer], timeout: float, error: RuntimeError) -> str:
    end = time.monotonic() + _PATIENCE
    while not (gone := [peer for peer in others if peer.is_gone()]) and time.monotonic() < end:
        time.sleep(0.05)
    said = str(error).splitlines()[0][:200]
    if gone:
        return (
            f"{', '.join(map(str, gone))} has ended, and rank {own.rank} cannot go on without it. Its own messages "
            f"say why; `resume_from_checkpoint: true` goes on from the newest whole checkpoint. ({said})"
        )
    away = [peer for peer in others if peer.host != own.host] or others
    return (
        f"Rank {own.rank} got no answer from the others, and waits at most `ddp_timeout` = {timeout:g} s. Look at "
        f"{', '.join(map(str, away[:8]))}{', ...' if len(away) > 8 else ''}. ({said})"
    )
