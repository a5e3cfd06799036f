"""Gradient estimators: the response of the free fixed point to a nudge of the last layer.

The nudge is the incoming gradient as a constant force, `beta n`. The fixed point is `r = phi(W r + drive + beta n)`,
so `dr/dbeta = (D^-1 - W)^-1 n` with `D = diag(phi')`. For a symmetric `W` that is the error vector
`(D^-1 - W^T)^-1 n` of the exact gradient. Responses are relaxed as deviations from the free state: their size then sets
their precision, and a free state that has not quite converged adds no drift.
"""

import cmath
import math
from dataclasses import dataclass, field
from typing import Literal

import torch

from .network import Constants, LayeredNetwork
from .relaxation import Relaxation, absolute_tolerance, free_relaxation, relax, select_rows


EstimatorName = Literal["holomorphic", "symmetric", "one_sided", "tangent", "exact"]
CorrectionName = Literal["none", "asymep"]


@dataclass(frozen=True)
class Estimator:
    """
    How the error vectors are estimated.

    Attributes:
        name (`str`):
            `"one_sided"`: `(r(beta) - r(0)) / beta`. `"symmetric"`: `(r(beta) - r(-beta)) / (2 beta)`.
            `"holomorphic"`: the mean of `(r(beta_k) - r(0)) / beta_k` over `N` points of a circle around zero, a
            Cauchy integral. `"tangent"`: the limit `beta -> 0`. `"exact"`: the adjoint, with the transposed weights.
        num_points (`int`, *optional*, defaults to `2`):
            `N`. Used by `"holomorphic"`.
        rotated (`bool`, *optional*, defaults to `True`):
            Whether the circle's first point is at the angle `pi / N` rather than 0. Two rotated points are
            `+- i radius`.
        radius (`float`, *optional*, defaults to `1e-3`):
            Size of the nudge.
        correction (`str`, *optional*, defaults to `"none"`):
            `"asymep"` relaxes nudged states under `F - 2 A (r - r0)` with the antisymmetric part `A` of the weights,
            that is, with the transposed weights: no bias from asymmetric feedback is left.
    """

    name: EstimatorName
    num_points: int = 2
    rotated: bool = True
    radius: float = 1e-3
    correction: CorrectionName = "none"

    @property
    def transposes(self) -> bool:
        """Whether the response is that of the transposed network."""
        return self.name == "exact" or self.correction == "asymep"

    def points(self) -> list[tuple[complex, float]]:
        """
        The nudges to relax, each with its weight in the mean: those with a negative imaginary part are left to
        conjugate symmetry.
        """
        if self.name == "one_sided":
            return [(complex(self.radius), 1.0)]
        num_points, rotated = (2, False) if self.name == "symmetric" else (self.num_points, self.rotated)
        points = []
        for k in range(num_points):
            turn = (2 * k + rotated) / num_points
            if turn > 1:
                continue
            # On the axes without rounding
            direction = {0.0: 1 + 0j, 0.5: 1j, 1.0: -1 + 0j}.get(turn, cmath.exp(1j * math.pi * turn))
            points.append((self.radius * direction, (2 if 0 < turn < 1 else 1) / num_points))
        return points


@dataclass
class ErrorVectors:
    """
    Estimated error vectors.

    Attributes:
        layers (`list[torch.Tensor]` of shapes `(rows, n_l)`):
            `dL/d(drive_l)` of each layer for a nudge of unit norm.
        relaxations (`list[Relaxation]`):
            The relaxations that were needed.
    """

    layers: list[torch.Tensor]
    relaxations: list[Relaxation]


@dataclass
class TangentDynamics:
    """Relaxation of the response to an infinitesimal nudge, `r' = D (W r' + n)`."""

    network: LayeredNetwork
    drives: list[torch.Tensor | None]
    num_samples: int
    constants: list[Constants]
    bottom_up: bool = False

    def __post_init__(self) -> None:
        self.slopes = [self.network.activation.slope(constants) for constants in self.constants]

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        return current.mul_(self.slopes[layer])

    def change(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return relative_change(old, new, self.num_samples)

    def select(self, samples: torch.Tensor) -> "TangentDynamics":
        return TangentDynamics(self.network, *_select(self.drives, self.constants, samples, self.num_samples))


@dataclass
class NudgedDynamics:
    """
    Relaxation of the deviations from the free state under finite nudges, all points in one batch.

    Rows are blocks of samples: real points, the real parts of the complex points, their imaginary parts and, last,
    the imaginary part of a purely imaginary point. The real part of that point's response is of second order in the
    nudge and is held at zero here; `real_parts` are the largest ones that were met.
    """

    network: LayeredNetwork
    drives: list[torch.Tensor | None]
    num_samples: int
    constants: list[Constants]
    num_real: int
    num_complex: int
    real_parts: list[torch.Tensor] = field(default_factory=list)
    bottom_up: bool = False

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        activation, constants = self.network.activation, self.constants[layer]
        blocks = current.view(-1, self.num_samples, current.shape[-1])
        real, a, b, imaginary = blocks.split(
            [self.num_real, self.num_complex, self.num_complex, len(blocks) - self.num_real - 2 * self.num_complex]
        )
        parts = []
        if len(real):
            parts.append(activation.difference(constants, real))
        if len(a):
            parts += activation.complex_difference(constants, a, b)
        if len(imaginary):
            second_order, part = activation.imaginary_difference(constants, imaginary)
            parts.append(part)
            if check:
                self.real_parts.append(second_order.abs_().amax())
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)

    def change(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return relative_change(old, new, self.num_samples)

    def select(self, samples: torch.Tensor) -> "NudgedDynamics":
        selected = _select(self.drives, self.constants, samples, self.num_samples)
        return NudgedDynamics(self.network, *selected, self.num_real, self.num_complex, self.real_parts)


@dataclass
class ImaginaryDynamics:
    """
    Relaxation under a purely imaginary nudge, real and imaginary parts as two blocks of rows.

    Only the imaginary part enters the estimate. The real part moves the state at which the response is taken, as an
    error of the free state does, and has the same absolute tolerance.
    """

    network: LayeredNetwork
    drives: list[torch.Tensor | None]
    num_samples: int
    constants: list[Constants]
    bottom_up: bool = False

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        real, imaginary = current.view(2, self.num_samples, -1)
        parts = self.network.activation.complex_difference(self.constants[layer], real, imaginary)
        return torch.cat(parts)

    def change(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        count = self.num_samples
        real = (old[:count] - new[:count]).abs_().amax(dim=-1)
        return torch.maximum(real, relative_change(old[count:], new[count:], count))

    def select(self, samples: torch.Tensor) -> "ImaginaryDynamics":
        return ImaginaryDynamics(self.network, *_select(self.drives, self.constants, samples, self.num_samples))


def relative_change(old: torch.Tensor, new: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Largest change of a sample's row over its largest entry; overwrites `old`."""
    change = old.sub_(new).abs_().view(-1, num_samples, old.shape[-1]).amax(dim=(0, 2))
    size = new.abs().view(-1, num_samples, new.shape[-1]).amax(dim=(0, 2))
    return change.div_(size.clamp_min_(torch.finfo(size.dtype).tiny))


def _select(
    drives: list[torch.Tensor | None], constants: list[Constants], samples: torch.Tensor, num_samples: int
) -> tuple[list[torch.Tensor | None], int, list[Constants]]:
    return (
        [drive if drive is None else select_rows(drive, samples, num_samples) for drive in drives],
        len(samples),
        [tuple(constant[samples] for constant in layer) for layer in constants],
    )


def error_vectors(
    network: LayeredNetwork,
    constants: list[Constants],
    nudge: torch.Tensor,
    estimator: Estimator,
    tolerance: float,
    max_steps: int,
) -> ErrorVectors:
    """
    Estimates the error vectors of all layers for a linear loss of the last layer's activity.

    Args:
        network ([`LayeredNetwork`]):
            Weights.
        constants (`list` of [`Activation.constants`], of shapes `(rows, n_l)`):
            What the activation needs of the free state.
        nudge (`torch.Tensor` of shape `(rows, n_L)`):
            Gradient of the loss at the last activity, of unit norm in each row.
        estimator ([`Estimator`]):
            How to estimate.
        tolerance (`float`):
            Largest change of a response in a sweep, over its largest entry.
        max_steps (`int`):
            Most sweeps.

    Returns:
        [`ErrorVectors`].

    Raises:
        EquilibriumError: If a nudged state oscillates or diverges.
    """
    if estimator.transposes:
        network = network.transposed()
    num_samples = len(nudge)
    silent: list[torch.Tensor | None] = [None] * (network.num_layers - 1)
    if estimator.name in ("tangent", "exact"):
        relaxation = relax(TangentDynamics(network, [*silent, nudge], num_samples, constants), tolerance, max_steps)
        return ErrorVectors(relaxation.activities, [relaxation])

    points = estimator.points()
    real = [(point.real, weight) for point, weight in points if point.imag == 0]
    imaginary = [(point.imag, weight) for point, weight in points if point.real == 0]
    complex_points = [(point, weight) for point, weight in points if point.real != 0 and point.imag != 0]
    sizes = [point for point, _ in real] + [point.real for point, _ in complex_points]
    sizes += [point.imag for point, _ in complex_points] + [size for size, _ in imaginary]
    drive = (nudge * nudge.new_tensor(sizes).view(-1, 1, 1)).flatten(0, 1)
    dynamics = NudgedDynamics(network, [*silent, drive], num_samples, constants, len(real), len(complex_points))
    relaxations = [relax(dynamics, tolerance, max_steps)]
    responses = [rows.view(-1, num_samples, rows.shape[-1]) for rows in relaxations[0].activities]
    if imaginary and torch.stack(dynamics.real_parts).max() > absolute_tolerance(tolerance, nudge.dtype):
        start = [blocks[-1] for blocks in responses]
        completed = complete_imaginary_point(network, constants, nudge * imaginary[0][0], start, tolerance, max_steps)
        relaxations += completed.relaxations
        responses = [
            torch.cat([blocks[:-1], last[None]]) if len(blocks) > 1 else last[None]
            for blocks, last in zip(responses, completed.layers, strict=True)
        ]
    weights = [weight / point for point, weight in real]
    weights += [weight * point.real / abs(point) ** 2 for point, weight in complex_points]
    weights += [weight * point.imag / abs(point) ** 2 for point, weight in complex_points]
    weights += [weight / size for size, weight in imaginary]
    mixer = nudge.new_tensor(weights)
    if len(weights) == 1:
        return ErrorVectors([blocks[0] * mixer for blocks in responses], relaxations)
    return ErrorVectors([torch.einsum("p,pbn->bn", mixer, blocks) for blocks in responses], relaxations)


def complete_imaginary_point(
    network: LayeredNetwork,
    constants: list[Constants],
    drive: torch.Tensor,
    start: list[torch.Tensor],
    tolerance: float,
    max_steps: int,
) -> ErrorVectors:
    """
    Relaxes a purely imaginary nudge from a state whose imaginary part has converged with the real part held at zero.

    Samples whose real part is stationary there, within the absolute tolerance, have converged already: small nudges
    need no second relaxation.

    Args:
        network ([`LayeredNetwork`]):
            Weights.
        constants (`list` of [`Activation.constants`]):
            The free state.
        drive (`torch.Tensor` of shape `(rows, n_L)`):
            Imaginary part of the nudge.
        start (`list[torch.Tensor]` of shapes `(rows, n_l)`):
            Imaginary parts of the response.
        tolerance (`float`), max_steps (`int`):
            See [`error_vectors`].

    Returns:
        [`ErrorVectors`]: the imaginary parts of the response, and the relaxation if there was one.
    """
    real_parts, largest = [], drive.new_zeros(len(drive))
    for layer in range(len(start)):
        current = network.current(layer, list(start), drive if layer == len(start) - 1 else None)
        real, _ = network.activation.imaginary_difference(constants[layer], current)
        real_parts.append(real)
        largest = torch.maximum(largest, real.abs().amax(dim=-1))
    samples = (largest > absolute_tolerance(tolerance, drive.dtype)).nonzero().squeeze(1)
    if len(samples) == 0:
        return ErrorVectors(start, [])
    silent: list[torch.Tensor | None] = [None] * (network.num_layers - 1)
    both = torch.cat([torch.zeros_like(drive[samples]), drive[samples]])
    dynamics = ImaginaryDynamics(
        network, [*silent, both], len(samples), [tuple(c[samples] for c in layer) for layer in constants]
    )
    state = [torch.cat([real[samples], part[samples]]) for real, part in zip(real_parts, start, strict=True)]
    relaxation = relax(dynamics, tolerance, max_steps, state)
    layers = [
        part.index_copy(0, samples, rows[len(samples) :])
        for part, rows in zip(start, relaxation.activities, strict=True)
    ]
    return ErrorVectors(layers, [relaxation])


def layer_cosines(
    network: LayeredNetwork,
    drive: torch.Tensor,
    biases: list[torch.Tensor],
    gradient: torch.Tensor,
    estimator: Estimator,
    tolerance: float,
    max_steps: int,
) -> list[float]:
    """
    Mean over the rows of the cosine between the estimated and the exact error vector of each layer.

    Args:
        network, drive, biases, tolerance, max_steps:
            See [`free_relaxation`].
        gradient (`torch.Tensor` of shape `(rows, n_L)`):
            Gradient of the loss at the last activity. Rows of zeros are left out.
        estimator ([`Estimator`]):
            What to compare.

    Returns:
        `list[float]`: one for each layer.
    """
    rows = gradient.abs().amax(dim=-1).nonzero().squeeze(1)
    drive, nudge = drive[rows], torch.nn.functional.normalize(gradient[rows], dim=-1)
    activities = free_relaxation(network, drive, biases, tolerance, max_steps).activities
    drives = [drive, *biases]
    constants = [
        network.activation.constants(activity, network.current(layer, list(activities), drives[layer]))
        for layer, activity in enumerate(activities)
    ]
    estimated = error_vectors(network, constants, nudge, estimator, tolerance, max_steps).layers
    exact = error_vectors(network, constants, nudge, Estimator("exact"), tolerance, max_steps).layers
    similarity = torch.nn.functional.cosine_similarity
    # Error vectors may be as small as the slope of a saturated unit: the default `eps` would shrink their cosine
    return [similarity(e, x, eps=1e-30).mean().item() for e, x in zip(estimated, exact, strict=True)]
