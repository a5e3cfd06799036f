"""Gradient estimators: the response of the free fixed point to a nudge of the last layer.

    dr/dbeta |0  ~  1/N sum_k (r*(beta_k) - r*(0)) / beta_k        with beta_k = radius exp(i pi (2k + rotated) / N)

[`error_vectors`] runs it: on the mode that all points have in common ([`principal_mode`]), and point by point where
the other modes can matter. tests/equilibrium/test_gradient.py holds it equal to the formula on complex states.

The nudge is the incoming gradient as a constant force, `beta n`. The fixed point is `r = phi(W r + drive + beta n)`,
so `dr/dbeta = (D^-1 - W)^-1 n` with `D = diag(phi')`. For a symmetric `W` that is the error vector
`(D^-1 - W^T)^-1 n` of the exact gradient. Responses are relaxed as deviations from the free state: their size then
sets their precision, and a free state that has not quite converged adds no drift.
"""

import cmath
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .activations import Activation, Constants
from .network import LayeredNetwork
from .relaxation import Dynamics, Relaxation, absolute_tolerance, free_relaxation, relax
from .settings import CorrectionName, EstimatorName


# Points on the unit circle that are nearer than this are one: a cosine and a sine are off by some 1e-16
SAME_POINT = 1e-9
# Below every norm of an error vector in float32: behind a saturated unit it is as small as the unit's slope, which the
# default of `cosine_similarity`, 1e-8, would take for zero
SMALLEST_NORM = 1e-30


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
        The points `beta_k / radius` on the unit circle, each with its weight in the mean. Those with a negative
        imaginary part are left to conjugate symmetry.
        """
        if self.name == "one_sided":
            return [(1 + 0j, 1.0)]
        num_points, rotated = (2, False) if self.name == "symmetric" else (self.num_points, self.rotated)
        points = []
        for k in range(num_points):
            turn = (2 * k + rotated) / num_points
            if turn > 1:
                continue
            # On the axes without rounding
            direction = {0.0: 1 + 0j, 0.5: 1j, 1.0: -1 + 0j}.get(turn, cmath.exp(1j * math.pi * turn))
            points.append((direction, (2 if 0 < turn < 1 else 1) / num_points))
        return points


@dataclass
class ErrorVectors:
    """Estimated `dL/d(drive_l)` of each layer, `(rows, n_l)`, for a nudge of unit norm, and the relaxations needed."""

    layers: list[torch.Tensor]
    relaxations: list[Relaxation]


@dataclass
class _TangentDynamics(Dynamics):
    """Relaxation of the response to an infinitesimal nudge, `r' = D (W r' + n)`."""

    def __post_init__(self) -> None:
        self.slopes = [self.network.activation.slope(constants) for constants in self.constants]

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        return current.mul_(self.slopes[layer])


@dataclass
class _PrincipalDynamics(Dynamics):
    """
    Relaxation of the Fourier mode that the estimate consists of.

    The responses at the points `beta_k` are `a_1 beta_k` plus terms of second and higher order in the nudge. Here the
    latter are held at zero, which leaves one row for each sample, whatever the number of points; the activation is
    still taken at every point.
    """

    points: list[tuple[complex, float]]
    largest_currents: list[torch.Tensor] = field(default_factory=list)

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        if check:
            self.largest_currents.append(current.abs().amax())
        return principal_mode(self.network.activation, self.constants[layer], current, self.points)


@dataclass
class _PointsDynamics(Dynamics):
    """
    Relaxation of the responses at all points in one batch.

    Rows are blocks of samples: real points, the real parts of the others, and their imaginary parts. The tolerance is
    relative for the mode that the estimate consists of. The others only move the state at which the response is taken,
    as an error of the free state does, and have its absolute tolerance.
    """

    num_real: int
    mixer: torch.Tensor
    takes_secants: ClassVar[bool] = False  # real and imaginary part of a row go together

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        activation, constants = self.network.activation, self.constants[layer]
        blocks = current.view(len(self.mixer), self.num_samples, current.shape[-1])
        num_complex = (len(blocks) - self.num_real) // 2
        real, a, b = torch.split(blocks, [self.num_real, num_complex, num_complex])
        parts = [activation.difference(constants, real)] if self.num_real else []
        if num_complex:
            parts += activation.complex_difference(constants, a, b)
        return torch.cat(parts).flatten(0, 1)

    def change(self, step: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        largest = step.abs().view(-1, self.num_samples, step.shape[-1]).amax(dim=(0, 2))
        principal = self.mix(step).abs_().amax(dim=-1)
        size = self.mix(new).abs_().amax(dim=-1)
        return torch.maximum(largest, principal.div_(size.clamp_min_(torch.finfo(size.dtype).tiny)))

    def mix(self, rows: torch.Tensor) -> torch.Tensor:
        """The mode that the estimate consists of."""
        return (self.mixer @ rows.view(len(self.mixer), -1)).view(self.num_samples, rows.shape[-1])


def principal_mode(
    activation: Activation, constants: Constants, current: torch.Tensor, points: list[tuple[complex, float]]
) -> torch.Tensor:
    """
    Mean over the [`Estimator.points`] `z_k` of `(phi(u + z_k v) - phi(u)) / z_k`, the mode that they have in common,
    for a real current `v` of shape `(rows, n)`. It has that shape and is real by conjugate symmetry.
    """
    total: torch.Tensor | None = None
    # The negative of a point is a point, or the conjugate of one: each pair has the odd part of the difference
    has_negatives = all(any(abs(point + other.conjugate()) < SAME_POINT for other, _ in points) for point, _ in points)
    for point, weight in points:
        if has_negatives and point.real < 0:
            continue
        if has_negatives and point.real > 0:
            weight = 2 * weight
        if point.imag == 0:
            difference = activation.odd_difference if has_negatives else activation.difference
            part, weight = difference(constants, current * point.real), weight * point.real
        elif point.real == 0:
            part = activation.odd_imaginary_difference(constants, current)
        else:
            complex_difference = activation.odd_complex_difference if has_negatives else activation.complex_difference
            real, part = complex_difference(constants, current * point.real, current * point.imag)
            part = part.mul_(point.imag).add_(real, alpha=point.real)
        if total is None:
            total = part if weight == 1 else part.mul_(weight)
        else:
            total.add_(part, alpha=weight)
    assert total is not None
    return total


def error_vectors(
    network: LayeredNetwork,
    constants: list[Constants],
    nudge: torch.Tensor,
    estimator: Estimator,
    tolerance: float,
    max_steps: int,
    raises: bool = True,
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
        raises (`bool`, *optional*, defaults to `True`):
            Whether a nudged state that oscillates or diverges raises an error; else its error vector is zero.

    Returns:
        [`ErrorVectors`].

    Raises:
        EquilibriumError: If a nudged state oscillates or diverges.
    """
    if estimator.transposes:
        network = network.transposed()
    num_samples = len(nudge)
    if num_samples == 0:
        return ErrorVectors([nudge.new_empty(0, layer[0].shape[-1]) for layer in constants], [])
    silent: list[torch.Tensor | None] = [None] * (network.num_layers - 1)
    if estimator.name in ("tangent", "exact"):
        tangent = _TangentDynamics(network, [*silent, nudge], num_samples, constants)
        relaxation = relax(tangent, tolerance, max_steps, raises=raises)
        relaxation.silence_failed()
        return ErrorVectors(relaxation.activities, [relaxation])

    points = estimator.points()
    drive = nudge * estimator.radius
    dynamics = _PrincipalDynamics(network, [*silent, drive], num_samples, constants, points)
    relaxation = relax(dynamics, tolerance, max_steps, raises=raises)
    relaxation.silence_failed()
    principal, relaxations = relaxation.activities, [relaxation]
    # A single real point has one mode; else the others stay at zero where the curvature of `phi` cannot raise them
    higher_modes = network.activation.max_curvature * torch.stack(dynamics.largest_currents).max().square()
    has_others = len(points) > 1 or points[0][0].imag != 0
    if has_others and not higher_modes <= absolute_tolerance(tolerance, nudge.dtype):
        completed = _relax_points(dynamics, drive, principal, tolerance, max_steps, raises)
        principal, relaxations = completed.layers, [*relaxations, *completed.relaxations]
    return ErrorVectors([mode / estimator.radius for mode in principal], relaxations)


def _relax_points(
    dynamics: _PrincipalDynamics,
    drive: torch.Tensor,
    principal: list[torch.Tensor],
    tolerance: float,
    max_steps: int,
    raises: bool,
) -> ErrorVectors:
    """Responses at all points, from a state of the principal mode alone; samples at rest there stay as they are."""
    # Block `p` of the rows is `parts[p]` times the mode; the mode is the mean of the blocks weighted with `mixer`
    real = [(point.real, weight) for point, weight in dynamics.points if point.imag == 0]
    others = [(point, weight) for point, weight in dynamics.points if point.imag != 0]
    parts = [sign for sign, _ in real] + [point.real for point, _ in others] + [point.imag for point, _ in others]
    mixer = [sign * weight for sign, weight in real]
    mixer += [point.real * weight for point, weight in others] + [point.imag * weight for point, weight in others]
    scale = drive.new_tensor(parts).view(-1, 1, 1)
    network, drives = dynamics.network, [*dynamics.drives[:-1], (drive * scale).flatten(0, 1)]
    everything = _PointsDynamics(network, drives, len(drive), dynamics.constants, len(real), drive.new_tensor(mixer))
    start, largest = [], drive.new_zeros(len(drive))
    for layer, mode in enumerate(principal):
        current = network.current(layer, list(principal), dynamics.drives[layer])
        state = everything.activate(layer, (current * scale).flatten(0, 1), False).view(len(parts), *mode.shape)
        largest = torch.maximum(largest, (state - mode * scale).abs_().amax(dim=(0, 2)))
        start.append(state)
    samples = (largest > absolute_tolerance(tolerance, drive.dtype)).nonzero().squeeze(1)
    if len(samples) == 0:
        return ErrorVectors(principal, [])
    chosen = everything.select(samples)
    relaxation = relax(chosen, tolerance, max_steps, [state[:, samples].flatten(0, 1) for state in start], raises)
    modes = [chosen.mix(rows) for rows in relaxation.activities]
    if relaxation.failed is not None:
        modes = [mode.masked_fill(relaxation.failed.unsqueeze(1), 0.0) for mode in modes]
    layers = [mode.index_copy(0, samples, moved) for mode, moved in zip(principal, modes, strict=True)]
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
    """Mean over the rows with a gradient of the cosine between estimated and exact error vector, for each layer."""
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
    return [similarity(e, x, eps=SMALLEST_NORM).mean().item() for e, x in zip(estimated, exact, strict=True)]
