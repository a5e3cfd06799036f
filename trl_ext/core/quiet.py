"""What a run says by default: its own words, one short line for each logged step, and bars of what takes long."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partialmethod


# Set, it does what `--verbose` does, in every process
VERBOSE_VARIABLE = "TRL_EXT_VERBOSE"
# Seconds after which a bar is shown, but that of the training
BAR_DELAY = 10.0
# Seconds between two states of a bar in a log file
_LOG_INTERVAL = 30.0
# Names that libraries changed under each other, which no user of a command can act on
_CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
# Beginnings of warnings of other kinds that say nothing about the run
_WARNINGS = (
    r"`?torch\.jit\.",
    r".*`?use_reentrant`? parameter should be passed explicitly",
    r"None of the inputs have requires_grad=True",
    r"'pin_memory' argument is set as true but no accelerator is found",
    r".*The AccumulateGrad node's stream does not match",
    r"When using ``?full_state_dict=True",
    r"No device id is provided via `init_process_group`",
    r"Can't initialize NVML",
)
# Logger: what it says of itself and not of the run. A filter can wait for a library that is not imported yet
_LOGGED = {
    "DeepSpeed": r"Setting accelerator to CPU|async_io requires|CUTLASS|sparse_attn|skipping unsupported",
    "accelerate.utils.other": r"Detected kernel version",
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
    "accelerate.commands.launch": r"The following values were not passed|^\t",
    "transformers.generation.configuration_utils": r"generation flags",
    "transformers.generation.utils": r"generation flags|`generation_config` default values|pad_token_id",
    "transformers.trainer": r"The tokenizer has new PAD/BOS/EOS tokens|model's config and generation config",
    "transformers.modeling_utils": r"`use_cache=True` is incompatible|loss_type=None",
    "torch.distributed.run": r"OMP_NUM_THREADS|^\*+$",
    "torch.distributed.elastic.multiprocessing.redirects": r"Redirects are currently not supported",
}


class _Without(logging.Filter):
    """Keeps records back whose message has a pattern."""

    def __init__(self, pattern: str):
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.pattern.search(record.getMessage()) is None


def is_verbose() -> bool:
    """Whether the environment asks for all that is said."""
    return os.environ.get(VERBOSE_VARIABLE, "") not in ("", "0", "false")


def quiet_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """
    Variables for a process that is to be quiet from its first import on.

    Args:
        environment (`Mapping[str, str]`):
            The environment it would have; filters of `PYTHONWARNINGS` in it win.

    Returns:
        `dict[str, str]`
    """
    ignored = [f"ignore::{category.__name__}" for category in _CATEGORIES]
    stated = environment.get("PYTHONWARNINGS")
    return {"PYTHONWARNINGS": ",".join([*ignored, stated] if stated else ignored)}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Until the context ends, keeps back what other libraries warn of and log about themselves."""
    filters = {logging.getLogger(name): _Without(pattern) for name, pattern in _LOGGED.items()}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for category in _CATEGORIES:
            warnings.simplefilter("ignore", category)
        for pattern in _WARNINGS:
            warnings.filterwarnings("ignore", message=pattern)
        for logger, kept_back in filters.items():
            logger.addFilter(kept_back)
            stack.callback(logger.removeFilter, kept_back)
        yield


@contextmanager
def quiet_run(verbose: bool = False) -> Iterator[None]:
    """
    Until the context ends, keeps back what other libraries say of themselves, shows bars only after `BAR_DELAY`
    seconds, and lets trainers made meanwhile print a short line where they would print all that is logged.

    Args:
        verbose (`bool`, *optional*, defaults to `False`):
            Whether to leave all as it is.
    """
    if verbose or is_verbose():
        yield
        return
    with quiet_libraries():
        # Some speak while they are imported
        from .. import _upstream
        from .short_log import ShortLogCallback

        with _late_bars(), _upstream.progress_shown_by(ShortLogCallback):
            yield


@contextmanager
def _late_bars() -> Iterator[None]:
    """Every bar of tqdm appears late and is gone when it is done, unless it asks for something else."""
    from tqdm.std import tqdm

    plain = tqdm.__init__
    rare = {} if sys.stderr.isatty() else {"mininterval": _LOG_INTERVAL}
    tqdm.__init__ = partialmethod(plain, delay=BAR_DELAY, leave=False, **rare)
    try:
        yield
    finally:
        tqdm.__init__ = plain
