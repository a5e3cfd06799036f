"""Red-black Gauss-Seidel relaxation of a layered network to a fixed point.

    r_l <- phi(Wf_{l-1} r_{l-1} + Wb_l r_{l+1} + drive_l)        for the layers l of one parity, then of the other

which stands still where [`vector_field`] is zero; tests/equilibrium/test_relaxation.py holds the result equal to a
damped iteration of all neurons. The responses of gradient.py relax by the same sweeps, with another `activate`.

A chain of layers is bipartite: layers of one parity depend on those of the other only. A sweep of both takes half the
sweeps of simultaneous updates and has none of their orbits of period two. A sweep is thus a map `z -> g(z)` of the
layers `z` that it updates last, and every second one starts from the secant of the two before, for each row on its own

    z  =  g_k - a (g_k - g_{k-1})        a = <f_k, f_k - f_{k-1}> / |f_k - f_{k-1}|^2        f_k = g_k - z_k

which is Anderson acceleration with a memory of one, and needs half the sweeps where weights are near the contraction
bound; after every sweep it costs more and saves less. A row for which `|f_k|` has not fallen since its last secant
takes `z = g_k` instead, a plain sweep: so where sweeps contract, no row can fail to converge.

Each sample stops at the first check that finds its own change within the tolerance, so its state does not depend on
the other samples, but for the rounding of a matrix product of another size.
"""

import functools
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
# A row takes a secant where its squared step is at most this share of that at its last one
SECANT_BELOW = 0.99
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
    takes_secants: ClassVar[bool] = True

    def activate(self, layer: int, current: torch.Tensor, check: bool) -> torch.Tensor:
        """Activity at this current, which may be overwritten; `check` is whether this sweep is checked."""
        raise NotImplementedError

    def change(self, step: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Size of a layer's step for each sample, here over the largest new entry, as the tolerance."""
        change = step.abs().view(-1, self.num_samples, step.shape[-1]).amax(dim=(0, 2))
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
    checked, `(num_samples,)`, how many samples have one that is above the tolerance and falls, and which samples
    oscillate or diverge, `(num_samples,)`, if any do.
    """

    activities: list[torch.Tensor]
    sweeps: int
    residuals: torch.Tensor
    unconverged: int
    failed: torch.Tensor | None = None

    def silence_failed(self) -> None:
        """Puts zero in place of a response that has no limit."""
        if self.failed is not None:
            self.activities = [rows.masked_fill(self.failed.unsqueeze(1), 0.0) for rows in self.activities]


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

    def change(self, step: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return step.abs().amax(dim=-1)


def relax(
    dynamics: Dynamics,
    tolerance: float,
    max_steps: int,
    start: list[torch.Tensor] | None = None,
    raises: bool = True,
) -> Relaxation:
    """
    Sweeps until every sample's change in a sweep is within the tolerance.

    A sample's state is that of the check which found it so. Samples that have converged are dropped when at least half
    of those left have. Samples that have not after `max_steps`, and whose change no longer falls, are swept ten times
    as long, without secants, before they are given up.

    Args:
        dynamics ([`Dynamics`]):
            What to relax.
        tolerance (`float`):
            Bound on [`Dynamics.change`]. It is at least four times the machine epsilon.
        max_steps (`int`):
            Most sweeps.
        start (`list[torch.Tensor]`, *optional*):
            State to start from; else one pass through the layers from the driven end.
        raises (`bool`, *optional*, defaults to `True`):
            Whether a sample that oscillates or diverges raises an error; else it is told by `failed` of the result.

    Returns:
        [`Relaxation`].

    Raises:
        EquilibriumError: If a sample oscillates or diverges, or, whatever `raises` says, a weight is not finite.
    """
    state = start if start is not None else _one_pass(dynamics)
    if dynamics.num_samples == 0:
        return Relaxation(state, 0, state[0].new_zeros(0), 0)
    tolerance = absolute_tolerance(tolerance, state[0].dtype)
    moving = _MovingSamples(dynamics, state, raises)
    sweeps = moving.sweep(tolerance, max_steps, 1 if start is not None else CHECK_EVERY)
    if sweeps is not None:
        return moving.finish(sweeps, 0)
    waiting = ~moving.settled
    stuck = (waiting & moving.stuck()).nonzero().squeeze(1)
    if len(stuck):
        moving.replace(stuck, _sweep_alone(moving, stuck, tolerance, PATIENCE * max_steps))
    return moving.finish(max_steps, int(waiting.sum().item()))


def fixed_sweeps(network: LayeredNetwork, drives: list[torch.Tensor], num_steps: int) -> torch.Tensor:
    """
    Activity `(rows, n_L)` of the last layer after so many sweeps: [`relax`] without a test of convergence, so that the
    operations are the same for all values. Drives are `(rows, n_1)` and, of the others, `(n_l,)`.
    """
    dynamics = FreeDynamics(network, list(drives), 0)
    moving = _MovingSamples(dynamics, _one_pass(dynamics), raises=True)
    for _ in range(num_steps):
        moving.sweep_once(check=False)
    return moving.state[-1]


def residual_curve(
    network: LayeredNetwork, drive: torch.Tensor, biases: list[torch.Tensor], num_sweeps: int
) -> torch.Tensor:
    """
    Change of each row in every sweep of the free relaxation, `(num_sweeps, rows)`, where [`relax`] looks at some and
    stops; under a drive `(rows, n_1)` of the first layer and the others' biases.
    """
    dynamics = FreeDynamics(network, [drive, *biases], len(drive))
    moving, residuals = _MovingSamples(dynamics, _one_pass(dynamics), raises=True), []
    for _ in range(num_sweeps):
        moving.sweep_once(check=False)
        changes = [dynamics.change(*pair) for pair in zip(moving.steps, moving.sweep_ends, strict=True)]
        residuals.append(functools.reduce(torch.maximum, changes))
    return torch.stack(residuals)


def _sweep_alone(moving: "_MovingSamples", samples: torch.Tensor, tolerance: float, max_steps: int) -> Relaxation:
    """Sweeps the given samples alone, plainly; raises, or tells, if one still does not approach a fixed point."""
    num_samples = moving.dynamics.num_samples
    state = [_select_rows(rows, samples, num_samples) for rows in moving.state]
    alone = _MovingSamples(moving.dynamics.select(samples), state, moving.raises)
    alone.takes_secants = False  # which can go round and round where there is no fixed point near
    if alone.sweep(tolerance, max_steps, CHECK_EVERY) is None:
        stuck = ~alone.settled & alone.stuck()
        if stuck.any() and not moving.raises:
            alone.fail(stuck.nonzero().squeeze(1))
        elif stuck.any():
            rows = samples if moving.samples is None else moving.samples[samples]
            rows = rows if alone.samples is None else rows[alone.samples]
            raise EquilibriumError(
                f"{int(stuck.sum())} of {moving.num_samples} samples (first: row {rows[stuck][0].item()}) oscillate "
                f"or diverge: the change of an activity in a sweep is {alone.residuals[stuck].max().item():.2g} and "
                f"does not fall. {_remedy(moving.dynamics.network)}"
            )
    return alone.finish(max_steps, 0)


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
    """The samples that are swept, of which some have settled, and the stored state of those that have."""

    def __init__(self, dynamics: Dynamics, state: list[torch.Tensor], raises: bool):
        self.dynamics, self.raises = dynamics, raises
        self.takes_secants = dynamics.takes_secants
        self.state = list(state)
        self.num_samples = dynamics.num_samples
        self.samples: torch.Tensor | None = None
        self.stored: list[torch.Tensor] = []
        self.residuals = state[0].new_full((self.num_samples,), math.inf)
        self.stored_residuals = self.residuals
        self.settled = torch.zeros_like(self.residuals, dtype=torch.bool)
        self.failed: torch.Tensor | None = None
        # Of the layers that a sweep updates last: their step in it and where it ended, of the sweep before it as well
        self.steps: list[torch.Tensor] = []
        self.sweep_ends: list[torch.Tensor] = []
        self.earlier: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_sweeps = 0
        self.last_secant = torch.full_like(state[0][:, :1], math.inf)
        self.envelopes = [torch.zeros_like(self.residuals), torch.zeros_like(self.residuals)]

    def sweep(self, tolerance: float, max_steps: int, check_every: int) -> int | None:
        """Sweeps until all have converged and returns the number of sweeps, or `None` after `max_steps`."""
        for sweep in range(1, max_steps + 1):
            check = sweep % check_every == 0 or sweep == max_steps
            self.sweep_once(check)
            if check:
                changes = [self.dynamics.change(*pair) for pair in zip(self.steps, self.sweep_ends, strict=True)]
                if self.record(functools.reduce(torch.maximum, changes), tolerance, sweep, max_steps):
                    return sweep
        return None

    def sweep_once(self, check: bool) -> None:
        """One sweep, every second one from the secant of the two before; no operation depends on values."""
        last = self.dynamics.network.num_layers - 1
        first = 0 if self.dynamics.bottom_up else last % 2
        # Those of one parity, then the others, from which the next sweep starts; a single layer depends on no other
        mapped = range(1 - first, last + 1, 2) or range(1)
        before = [self.state[layer] for layer in mapped]
        if self.takes_secants and self.num_sweeps >= 2 and self.num_sweeps % 2 == 0:
            before = self.secant(before)
            for layer, start in zip(mapped, before, strict=True):
                self.state[layer] = start
        for layer in (*range(first, last + 1, 2), *range(1 - first, last + 1, 2)):
            current = self.dynamics.network.current(layer, list(self.state), self.dynamics.drives[layer])
            self.state[layer] = self.dynamics.activate(layer, current, check)
        self.num_sweeps += 1
        self.earlier = list(zip(self.steps, self.sweep_ends, strict=True))
        self.sweep_ends = [self.state[layer] for layer in mapped]
        self.steps = [new - old for new, old in zip(self.sweep_ends, before, strict=True)]

    def secant(self, ends: list[torch.Tensor]) -> list[torch.Tensor]:
        """Where the next sweep starts, from the ends of the last two; see the equation above."""
        totals: list[torch.Tensor] | None = None
        for step, (earlier_step, _) in zip(self.steps, self.earlier, strict=True):
            turn = step - earlier_step
            sums = [torch.linalg.vecdot(a, b).unsqueeze(-1) for a, b in ((step, turn), (turn, turn), (step, step))]
            totals = sums if totals is None else [total + part for total, part in zip(totals, sums, strict=True)]
        assert totals is not None
        along, square, total = totals
        falls = total <= SECANT_BELOW * self.last_secant
        self.last_secant = torch.where(falls, total, self.last_secant)
        share = torch.where(falls, along / square.clamp_min(torch.finfo(square.dtype).tiny), 0.0)
        return [
            torch.addcmul(end, share, end - earlier, value=-1)
            for end, (_, earlier) in zip(ends, self.earlier, strict=True)
        ]

    def record(self, change: torch.Tensor, tolerance: float, sweep: int, max_steps: int) -> bool:
        """Whether all have converged; stores those that just have, and drops all that have if they are many."""
        self.residuals = torch.where(self.settled, self.residuals, change)
        if sweep > EARLIER_QUARTER * max_steps:
            later = int(sweep > LATER_QUARTER * max_steps)
            self.envelopes[later] = torch.maximum(self.envelopes[later], change)
        settles = ~self.settled & (change <= tolerance)
        waiting = ~self.settled & ~settles
        lost = ~self.settled & ~change.isfinite()
        num_settling, num_waiting, num_lost = torch.stack([settles.sum(), waiting.sum(), lost.sum()]).tolist()
        if num_lost:
            self.lose(lost)
            settles, waiting = settles | lost, waiting & ~lost
            num_settling, num_waiting = num_settling + num_lost, num_waiting - num_lost
        if num_waiting == 0 and not self.stored:
            return True
        if num_settling:
            self.store(settles.nonzero().squeeze(1))
            self.settled = ~waiting
        if 0 < num_waiting <= NARROW_BELOW * len(change):
            self.narrow(waiting.nonzero().squeeze(1))
        return bool(num_waiting == 0)

    def lose(self, lost: torch.Tensor) -> None:
        """Gives up samples whose state is not finite, or raises."""
        weights = [*self.dynamics.network.forward_weights, *self.dynamics.network.backward_weights]
        if self.raises or self.dynamics.bottom_up or not all(weight.isfinite().all() for weight in weights):
            raise EquilibriumError(f"The state is not finite. {_remedy(self.dynamics.network)}")
        self.fail(lost.nonzero().squeeze(1))

    def fail(self, samples: torch.Tensor) -> None:
        if self.failed is None:
            self.failed = torch.zeros(self.num_samples, dtype=torch.bool, device=samples.device)
        self.failed[self.places(samples)] = True

    def places(self, samples: torch.Tensor) -> torch.Tensor:
        """Where swept samples stand among all."""
        return samples if self.samples is None else self.samples[samples]

    def narrow(self, waiting: torch.Tensor) -> None:
        select = functools.partial(_select_rows, samples=waiting, num_samples=self.dynamics.num_samples)
        self.state = [select(rows) for rows in self.state]
        self.steps, self.sweep_ends = [select(rows) for rows in self.steps], [select(rows) for rows in self.sweep_ends]
        self.earlier = [(select(step), select(end)) for step, end in self.earlier]
        self.last_secant = select(self.last_secant)
        self.samples = self.places(waiting)
        self.residuals, self.settled = self.residuals[waiting], self.settled[waiting]
        self.envelopes = [envelope[waiting] for envelope in self.envelopes]
        self.dynamics = self.dynamics.select(waiting)

    def store(self, samples: torch.Tensor) -> None:
        """Writes the state of swept samples to their place among all."""
        if not self.stored:
            self.stored, self.stored_residuals = [rows.clone() for rows in self.state], self.residuals.clone()
            return
        places = self.places(samples)
        for stored, rows in zip(self.stored, self.state, strict=True):
            width = rows.shape[-1]
            chosen = rows.view(-1, self.dynamics.num_samples, width).index_select(1, samples)
            stored.view(-1, self.num_samples, width).index_copy_(1, places, chosen)
        self.stored_residuals.index_copy_(0, places, self.residuals[samples])

    def finish(self, sweeps: int, unconverged: int) -> Relaxation:
        if not self.stored:
            return Relaxation(self.state, sweeps, self.residuals, unconverged, self.failed)
        self.store((~self.settled).nonzero().squeeze(1))
        return Relaxation(self.stored, sweeps, self.stored_residuals, unconverged, self.failed)

    def stuck(self) -> torch.Tensor:
        """For each moving sample, whether its change has not fallen from the third quarter to the last."""
        earlier, later = self.envelopes
        return (earlier > 0) & (later > STUCK_ABOVE * earlier)

    def replace(self, samples: torch.Tensor, others: Relaxation) -> None:
        """Takes over the state of samples that went on alone."""
        for rows, activities in zip(self.state, others.activities, strict=True):
            blocks = rows.view(-1, self.dynamics.num_samples, rows.shape[-1])
            blocks.index_copy_(1, samples, activities.view(-1, len(samples), rows.shape[-1]))
        self.residuals = self.residuals.index_copy(0, samples, others.residuals)
        if others.failed is not None:
            self.fail(samples[others.failed])


def _remedy(network: LayeredNetwork) -> str:
    """The spectral norm seen, and what to do about it."""
    weights = [*network.forward_weights, *network.backward_weights]
    if not all(weight.isfinite().all() for weight in weights):
        return "A recurrent weight is not finite: lower the learning rate or clip the gradient."
    return (
        f"The largest spectral norm of a recurrent weight is {max(network.spectral_norms(), default=0.0):.3g}; below "
        f"{network.safe_spectral_cap():.3g} for all of them, at {network.num_layers} layers, the relaxation always "
        "converges. Set `spectral_cap='auto'`, which keeps them there, lower the learning rate or `radius`, or set "
        "`on_oscillation='warn'` to go on without these rows."
    )


def free_relaxation(
    network: LayeredNetwork,
    drive: torch.Tensor,
    biases: list[torch.Tensor],
    tolerance: float,
    max_steps: int,
    raises: bool = True,
) -> Relaxation:
    """[`relax`] to the free fixed point, under a drive `(rows, n_1)` of the first layer and the others' biases."""
    return relax(FreeDynamics(network, [drive, *biases], drive.shape[0]), tolerance, max_steps, raises=raises)
