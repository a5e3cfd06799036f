"""A training step of the equilibrium-propagation head against one of a perceptron of its size."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from trl_ext import EPHead

from .measuring import Record, count_calls, peak_mib, time_in_turn


ESTIMATORS = {"default": {}, "exact": {"estimator": "exact"}, "spectral cap 0.9": {"spectral_cap": 0.9}}


def perceptron(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear maps with tanh between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def forward_backward(head: nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        head.zero_grad()
        head(hidden).square().mean().backward()

    return step


def run(record: Record, device: torch.device, dry: bool) -> None:
    torch.manual_seed(0)
    for shape in ((16, 8, 8, 2),) if dry else ((256, 256, 256, 10), (896, 1024, 1024, 2)):
        for batch in (4,) if dry else (64, 1024):
            hidden = torch.randn(batch, shape[0], device=device)
            heads: dict[str, nn.Module] = {"perceptron": perceptron(shape).to(device)}
            for estimator, settings in ESTIMATORS.items():
                heads[estimator] = EPHead(shape[0], list(shape[1:-1]), shape[-1], **settings).to(device)
            steps = {key: forward_backward(head, hidden) for key, head in heads.items()}
            times = time_in_turn(steps, 2 if dry else 30, device)
            for key, head in heads.items():
                sweeps = "-"
                if isinstance(head, EPHead):
                    sweeps = f"{head.statistics.free_sweeps} + {head.statistics.nudged_sweeps}"
                record.row(
                    "forward and backward", widths="-".join(map(str, shape)), batch=batch, head=key,
                    ms=times[key].device, host_ms=times[key].host,
                    ratio=times[key].device / times["perceptron"].device, sweeps=sweeps,
                    **count_calls(steps[key]), peak_mib=peak_mib(steps[key]),
                )  # fmt: skip
