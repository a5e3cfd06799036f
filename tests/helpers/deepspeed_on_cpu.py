"""What DeepSpeed wants on CPUs alone; imported before its first use by every script that runs under it."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import deepspeed.comm.torch  # noqa: F401
import torch
from deepspeed.ops import adam


class DeepSpeedCPUAdam(torch.optim.Adam):
    """Stands in for what accelerate puts in an optimizer's place where DeepSpeed offloads it."""

    def __init__(self, params, adamw_mode, **options):
        super().__init__(params, decoupled_weight_decay=adamw_mode, **options)


def _ended(gather: Callable[..., Any]) -> Callable[..., Any]:
    """A gather that has ended when it returns, whoever waits for it."""

    @functools.wraps(gather)
    def gather_and_wait(*args: Any, **kwargs: Any) -> Any:
        handle = gather(*args, **kwargs)
        if handle is not None:
            handle.wait()
        return handle

    return gather_and_wait


_torch = sys.modules["deepspeed.comm.torch"]
# Spare two compilations of 30 to 100 seconds each; gloo carries the collectives instead
adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam
_torch.build_shm_op = lambda: None
# Before 0.19.8 ZeRO-3 waits for the last of several gathers alone: NCCL ends them in their order, gloo in any
for _name in ("all_gather", "all_gather_into_tensor"):
    setattr(_torch.TorchBackend, _name, _ended(getattr(_torch.TorchBackend, _name)))
