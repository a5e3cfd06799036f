"""Rounding of float32 results to half-precision parameters, to the nearest or at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from ..weights import LocalTensor

# Number of a group's steps, where its parameters' states do not count them
STEPS_KEY = "num_rounded_steps"


class RoundingNoise:
    """
    Random numbers that follow from the number of the step alone: replicas round alike, and a resumed run as the
    uninterrupted one would have.
    """

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def restart(self, tensors: Iterable[LocalTensor]) -> None:
        """Begins a step on some tensors. Where a CUDA graph captures it, torch's global generator is drawn from."""
        self._generators.clear()
        counted: set[int] = set()
        for local in tensors:
            group, device = local.group, local.flat.device
            if not group["stochastic_rounding"] or group["capturable"]:
                continue
            if id(group) not in counted:
                counted.add(id(group))
                group[STEPS_KEY] = group.get(STEPS_KEY, 0) + 1
            if device not in self._generators:
                step = int(local.step) or group[STEPS_KEY]
                self._generators[device] = torch.Generator(device).manual_seed(step)

    def on(self, device: torch.device) -> torch.Generator | None:
        """The generator for a device; `None` for torch's global one."""
        return self._generators.get(device)


def copy_rounded_(
    target: torch.Tensor, value: torch.Tensor, stochastic: bool, generator: torch.Generator | None = None
) -> None:
    """
    Copies float32 values into a tensor of lower precision: to the nearest, or, for `stochastic` and bfloat16, up or
    down at random so that the mean is right, which keeps updates smaller than half a unit in the last place.
    """
    if not stochastic or target.dtype != torch.bfloat16:
        target.copy_(value)
        return
    # bfloat16 is the upper half of float32: a random number added to the lower half carries over with the right odds
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, dtype=bits.dtype, device=bits.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))
