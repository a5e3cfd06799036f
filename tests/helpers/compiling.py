"""Runs under `torch.compile` among runs without, in one process."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState


# Tracing takes some 20 seconds each time: all but one of the tests run in `make kernels`
slow_to_compile = pytest.mark.skipif(os.environ.get("TRL_EXT_ALL_CASES") != "1", reason="for `make kernels`")


@contextmanager
def compiled_training() -> Iterator[dict[str, str]]:
    """
    Settings of a trainer made and run until the context ends: accelerate keeps what the first trainer of a process
    said, and transformers writes it to the environment. No code is generated, which takes a minute: the model is
    traced, and what was traced runs operation by operation.
    """
    # What trainers before have said is theirs again at the end
    with mock.patch.dict(os.environ), mock.patch.dict(AcceleratorState._shared_state):
        _forget()
        before = torch._dynamo.utils.counters["frames"]["ok"]
        try:
            with warnings.catch_warnings():  # of torch's own tracing
                warnings.simplefilter("ignore", DeprecationWarning)
                yield {"torch_compile_backend": "eager"}
            assert torch._dynamo.utils.counters["frames"]["ok"] > before, "nothing was compiled"
        finally:
            _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=False)
    torch.compiler.reset()
