"""How far a step turns a weight: the effective step size of scale-invariant weights, for any optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .projection import find_level


@dataclass(frozen=True)
class StepGeometry:
    """
    One step of one weight.

    Attributes:
        norm (`float`):
            Norm of the weight after the step.
        angle (`float`):
            Angle between the weight before and after, in radians: what a step changes in a weight whose norm does not
            matter (the paper's effective step size, section 2.2).
        cosine (`float`):
            Cosine between gradient and weight, times the root of the weight's size: below `delta` in size, the
            projection's test passes at the layer level.
        level (`str`, *optional*):
            `"channel"` or `"layer"`: the level at which the weight counts as scale-invariant; `None` where at none.
    """

    norm: float
    angle: float
    cosine: float
    level: str | None


class StepRecorder:
    """
    Measures the step that an optimizer takes between two calls, whatever the optimizer: [`before`], then the
    optimizer's step, then [`after`].

    Args:
        parameters (`Mapping[str, torch.nn.Parameter]`):
            Weights to watch, by name; those of fewer than two dimensions are left out.
        delta (`float`, *optional*, defaults to `0.1`):
            Threshold of the test for scale invariance.
        eps (`float`, *optional*, defaults to `1e-8`):
            Smallest norm in that test.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], delta: float = 0.1, eps: float = 1e-8):
        self.parameters = {name: parameter for name, parameter in parameters.items() if parameter.ndim > 1}
        self.delta = delta
        self.eps = eps
        self._before: dict[str, torch.Tensor] = {}
        self._levels: dict[str, tuple[float, str | None]] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Keeps the weights and tests the gradients; called between `backward` and the optimizer's step."""
        self._before = {name: p.detach().clone() for name, p in self.parameters.items() if p.grad is not None}
        self._levels = {}
        for name in self._before:
            p = self.parameters[name]
            assert p.grad is not None
            cosine = torch.nn.functional.cosine_similarity(p.flatten(), p.grad.flatten(), dim=0, eps=self.eps)
            self._levels[name] = (float(cosine) * p.numel() ** 0.5, find_level(p, p.grad, self.delta, self.eps))

    @torch.no_grad()
    def after(self) -> dict[str, StepGeometry]:
        """The step's geometry, by weight."""
        return {
            name: StepGeometry(
                norm=float(self.parameters[name].norm()), angle=angle(before, self.parameters[name]),
                cosine=self._levels[name][0], level=self._levels[name][1],
            )
            for name, before in self._before.items()
        }  # fmt: skip


def angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """
    Angle between two tensors of one shape in radians, exact for small angles too, where the arc cosine of a float32
    cosine is not. 0 where one of them is zero.
    """
    first, second = first.double().flatten(), second.double().flatten()
    norms = first.norm(), second.norm()
    if min(norms) == 0:
        return 0.0
    first, second = first / norms[0], second / norms[1]
    return float(2 * torch.atan2((first - second).norm(), (first + second).norm()))
