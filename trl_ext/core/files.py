"""Disks that do not take what a run writes: a report ends no training, and a full disk is told from other faults."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.logging import get_logger


logger = get_logger(__name__)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# What writers say that don't pass the error's number on; torch's says nothing else where the disk is full
_NO_SPACE_WORDS = (
    "no space left", "os error 28", "disk quota exceeded", "os error 122", "pytorchstreamwriter failed",
    "enforce fail at inline_container", "iostream error",
)  # fmt: skip


@contextmanager
def warn_of_failure(what: str) -> Iterator[None]:
    """
    Turns what goes wrong in a report into a warning.

    Args:
        what (`str`):
            What could not be done, for the warning, said once for each cause.
    """
    try:
        yield
    except Exception as error:  # Drawing fails in many ways, and none of them is the run's
        logger.warning_once(f"{what} ({type(error).__name__}: {error}). Training goes on.")


def is_lack_of_space(error: BaseException) -> bool:
    """
    Whether something could not be written for lack of space.

    Args:
        error (`BaseException`):
            What a writer raised.

    Returns:
        `bool`
    """
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    words = str(error).lower()
    return any(said in words for said in _NO_SPACE_WORDS)
