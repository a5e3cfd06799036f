"""Red-black Gauss-Seidel relaxation of a layered network to a fixed point.

    r_l <- phi(Wf_{l-1} r_{l-1} + Wb_l r_{l+1} + drive_l)        for the layers l of one parity, then of the other

which stands still where [`vector_field`] is zero; tests/equilibrium/test_relaxation.py holds the result equal to a
damped iteration of all neurons. The responses of gradient.py relax by the same sweeps, with another `activate`.

A chain of layers is bipartite: layers of one parity depend on those of the other only. A sweep of both takes half the
sweeps of simultaneous updates and has none of their orbits of period two.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch

from .activations import Constants
from .network import LayeredNetwork


# Sweeps from one test of convergence to the next: on a GPU each test waits for its result
CHECK_EVERY = 2
# A copy of the batch costs, so samples leave it only when at most this share of them still moves
NARROW_BELOW = 0.5
# A sample is stuck if its largest change in the last quarter of the sweeps is above this share of that in the quarter
# before. Changes that fall by a factor `q` a sweep fall by `q^25` between quarters of 100: up to 0.999 passes
EARLIER_QUARTER, LATER_QUARTER, STUCK_ABOVE = 0.5, 0.75, 0.98
# A state can rest a while near a fixed point that is about to appear, so stuck samples get this many times `max_steps`
PATIENCE = 10
# Rounding of an update of an activity of size one, in machine epsilons: no change can be told from less
ROUNDING = 4


class EquilibriumError(RuntimeError):
    """A relaxation oscillates or diverges: more steps would not help."""


@dataclass
class Dynamics:
    """
    What a relaxation is of: couplings, and the constant current of each layer, `(rows, n_l)`, `(n_l,)` or `None`. Rows
    are `num_samples` times a whole number, sample by sample within each block; `constants` are what the activation
    needs of a state that responses start from. The drive enters at the first layer if `bottom_up`, else at the last.
    """

    network: LayeredNetwork
    drives: list[torch.Tensor | None]
    num_samples: int
    constants: list[Constants]
    bottom_up: ClassVar[bool] = False

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        """Activity at this current, which may be overwritten; `check` is whether this sweep is checked."""
        raise NotImplementedError

    def change(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Change of a layer for each sample, here over its largest entry, as the tolerance; may overwrite `old`."""
        change = old.sub_(new).abs_().view(-1, self.num_samples, old.shape[-1]).amax(dim=(0, 2))
        size = new.abs().view(-1, self.num_samples, new.shape[-1]).amax(dim=(0, 2))
        return change.div_(size.clamp_min_(torch.finfo(size.dtype).tiny))

    def select(self, samples: torch.Tensor) -> Self:
        """The same for some samples only."""
        drives = [
            drive if drive is None or drive.dim() == 1 else _select_rows(drive, samples, self.num_samples)
            for drive in self.drives
        ]
        constants = [tuple(constant[samples] for constant in layer) for layer in self.constants]
        return replace(self, drives=drives, num_samples=len(samples), constants=constants)


@dataclass
class Relaxation:
    """
    Where a relaxation ended: the state, of shapes `(rows, n_l)`, after so many sweeps, each sample's change when last
    checked, `(num_samples,)`, and how many samples have one that is above the tolerance and falls.
    """

    activities: list[torch.Tensor]
    sweeps: int
    residuals: torch.Tensor
    unconverged: int


def _select_rows(rows: torch.Tensor, samples: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Rows of the given samples, in every block of `num_samples` rows."""
    return rows.view(-1, num_samples, rows.shape[-1]).index_select(1, samples).flatten(0, 1)


@dataclass
class FreeDynamics(Dynamics):
    """Relaxation of the activities themselves under the static input."""

    constants: list[Constants] = field(default_factory=list)
    bottom_up: ClassVar[bool] = True

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        return self.network.activation.value(current)

    def change(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return old.sub_(new).abs_().amax(dim=-1)


def relax(dynamics: Dynamics, tolerance: float, max_steps: int, start: list[torch.Tensor] | None = None) -> Relaxation:
    """
    Sweeps until every sample's change in a sweep is within the tolerance.

    Samples that have converged are dropped when at least half of those left have. Samples that have not after
    `max_steps`, and whose change no longer falls, are swept ten times as long before they are given up.

    Args:
        dynamics ([`Dynamics`]):
            What to relax.
        tolerance (`float`):
            Bound on [`Dynamics.change`]. It is at least four times the machine epsilon.
        max_steps (`int`):
            Most sweeps.
        start (`list[torch.Tensor]`, *optional*):
            State to start from; else one pass through the layers from the driven end.

    Returns:
        [`Relaxation`].

    Raises:
        EquilibriumError: If a state is not finite, or a sample oscillates or diverges.
    """
    state = start if start is not None else _one_pass(dynamics)
    if dynamics.num_samples == 0:
        return Relaxation(state, 0, state[0].new_zeros(0), 0)
    tolerance = absolute_tolerance(tolerance, state[0].dtype)
    moving = _MovingSamples(dynamics, state)
    sweeps = moving.sweep(tolerance, max_steps, 1 if start is not None else CHECK_EVERY)
    if sweeps is not None:
        return moving.finish(sweeps, 0)
    waiting = moving.residuals > tolerance
    stuck = (waiting & moving.stuck()).nonzero().squeeze(1)
    if len(stuck):
        moving.replace(stuck, _sweep_alone(moving, stuck, tolerance, PATIENCE * max_steps))
    return moving.finish(max_steps, int(waiting.sum().item()))


def _sweep_alone(
    moving: "_MovingSamples", samples: torch.Tensor, tolerance: float, max_steps: int
) -> "_MovingSamples":
    """Sweeps the given samples alone; raises if one still does not approach a fixed point."""
    num_samples = moving.dynamics.num_samples
    state = [_select_rows(rows, samples, num_samples) for rows in moving.state]
    alone = _MovingSamples(moving.dynamics.select(samples), state)
    if alone.sweep(tolerance, max_steps, CHECK_EVERY) is None:
        stuck = (alone.residuals > tolerance) & alone.stuck()
        if stuck.any():
            rows = samples if moving.samples is None else moving.samples[samples]
            rows = rows if alone.samples is None else rows[alone.samples]
            raise EquilibriumError(
                f"{int(stuck.sum())} of {moving.num_samples} samples (first: row {rows[stuck][0].item()}) oscillate "
                f"or diverge: the change of an activity in a sweep is {alone.residuals[stuck].max().item():.2g} and "
                f"does not fall. {_remedy(moving.dynamics.network)}"
            )
    alone.store()
    return alone


def absolute_tolerance(tolerance: float, dtype: torch.dtype) -> float:
    """The tolerance, or what the dtype can resolve of an activity of size one."""
    return max(tolerance, ROUNDING * torch.finfo(dtype).eps)


def _one_pass(dynamics: Dynamics) -> list[torch.Tensor]:
    """State after one update of each layer from the driven end, all others silent."""
    num_layers = dynamics.network.num_layers
    state: list[torch.Tensor | None] = [None] * num_layers
    for layer in range(num_layers) if dynamics.bottom_up else reversed(range(num_layers)):
        current = dynamics.network.current(layer, state, dynamics.drives[layer])
        state[layer] = dynamics.activate(layer, current, False)
    return [activity for activity in state if activity is not None]


class _MovingSamples:
    """The samples that have not converged, and the stored state of all."""

    def __init__(self, dynamics: Dynamics, state: list[torch.Tensor]):
        self.dynamics = dynamics
        self.state = list(state)
        self.num_samples = dynamics.num_samples
        self.samples: torch.Tensor | None = None
        self.stored: list[torch.Tensor] = []
        self.stored_residuals: torch.Tensor | None = None
        self.residuals = state[0].new_full((self.num_samples,), math.inf)
        self.envelopes = [torch.zeros_like(self.residuals), torch.zeros_like(self.residuals)]

    def sweep(self, tolerance: float, max_steps: int, check_every: int) -> int | None:
        """Sweeps until all have converged and returns the number of sweeps, or `None` after `max_steps`."""
        last = self.dynamics.network.num_layers - 1
        first_half = range(0 if self.dynamics.bottom_up else last % 2, last + 1, 2)
        order = (*first_half, *range(1 - first_half.start, last + 1, 2))
        for sweep in range(1, max_steps + 1):
            check = sweep % check_every == 0 or sweep == max_steps
            change: torch.Tensor | None = None
            for layer in order:
                current = self.dynamics.network.current(layer, list(self.state), self.dynamics.drives[layer])
                new = self.dynamics.activate(layer, current, check)
                if check and layer in first_half:
                    layer_change = self.dynamics.change(self.state[layer], new)
                    change = layer_change if change is None else torch.maximum(change, layer_change)
                self.state[layer] = new
            if change is not None and self.record(change, tolerance, sweep, max_steps):
                return sweep
        return None

    def record(self, change: torch.Tensor, tolerance: float, sweep: int, max_steps: int) -> bool:
        """Whether all have converged; drops those that have if they are many."""
        self.residuals = change
        if sweep > EARLIER_QUARTER * max_steps:
            later = int(sweep > LATER_QUARTER * max_steps)
            self.envelopes[later] = torch.maximum(self.envelopes[later], change)
        worst = change.max().item()
        if not math.isfinite(worst):
            raise EquilibriumError(f"The state is not finite. {_remedy(self.dynamics.network)}")
        if worst <= tolerance:
            return True
        waiting = (change > tolerance).nonzero().squeeze(1)
        if len(waiting) <= NARROW_BELOW * len(change):
            self.narrow(waiting)
        return False

    def narrow(self, waiting: torch.Tensor) -> None:
        self.store()
        self.state = [_select_rows(rows, waiting, self.dynamics.num_samples) for rows in self.state]
        self.samples = waiting if self.samples is None else self.samples[waiting]
        self.residuals = self.residuals[waiting]
        self.envelopes = [envelope[waiting] for envelope in self.envelopes]
        self.dynamics = self.dynamics.select(waiting)

    def store(self) -> None:
        """Writes the state of the moving samples to its place among all."""
        if self.samples is None or self.stored_residuals is None:
            self.stored, self.stored_residuals = [rows.clone() for rows in self.state], self.residuals.clone()
            return
        for stored, rows in zip(self.stored, self.state, strict=True):
            width = rows.shape[-1]
            blocks = rows.view(-1, len(self.samples), width)
            stored.view(-1, self.num_samples, width).index_copy_(1, self.samples, blocks)
        self.stored_residuals.index_copy_(0, self.samples, self.residuals)

    def finish(self, sweeps: int, unconverged: int) -> Relaxation:
        if self.samples is None or self.stored_residuals is None:
            return Relaxation(self.state, sweeps, self.residuals, unconverged)
        self.store()
        return Relaxation(self.stored, sweeps, self.stored_residuals, unconverged)

    def stuck(self) -> torch.Tensor:
        """For each moving sample, whether its change has not fallen from the third quarter to the last."""
        earlier, later = self.envelopes
        return (earlier > 0) & (later > STUCK_ABOVE * earlier)

    def replace(self, samples: torch.Tensor, others: "_MovingSamples") -> None:
        """Takes over the state of samples that went on alone."""
        assert others.stored_residuals is not None
        for rows, stored in zip(self.state, others.stored, strict=True):
            blocks = rows.view(-1, self.dynamics.num_samples, rows.shape[-1])
            blocks.index_copy_(1, samples, stored.view(-1, len(samples), rows.shape[-1]))
        self.residuals = self.residuals.index_copy(0, samples, others.stored_residuals)


def _remedy(network: LayeredNetwork) -> str:
    """The spectral norm seen, and what to do about it."""
    weights = [*network.forward_weights, *network.backward_weights]
    if not all(weight.isfinite().all() for weight in weights):
        return "A recurrent weight is not finite: lower the learning rate or clip the gradient."
    return (
        f"The largest spectral norm of a recurrent weight is {max(network.spectral_norms(), default=0.0):.3g}; below "
        f"{network.safe_spectral_cap():.3g} for all of them the relaxation always converges. Set `spectral_cap` to at "
        "most that, lower the learning rate or `radius`, or with asymmetric feedback raise `homeostasis_coef`."
    )


def free_relaxation(
    network: LayeredNetwork, drive: torch.Tensor, biases: list[torch.Tensor], tolerance: float, max_steps: int
) -> Relaxation:
    """[`relax`] to the free fixed point, under a drive `(rows, n_1)` of the first layer and the others' biases."""
    return relax(FreeDynamics(network, [drive, *biases], drive.shape[0]), tolerance, max_steps)
