import warnings

import pytest
import torch

from tests.helpers.equilibrium import scaled
from tests.helpers.equilibrium_reference import PHI, fixed_point, network_of, read_out
from trl_ext import EPHead
from trl_ext.equilibrium.activations import ACTIVATIONS
from trl_ext.equilibrium.network import LayeredNetwork
from trl_ext.equilibrium.relaxation import Dynamics, EquilibriumError, FreeDynamics, free_relaxation, relax


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "dsilu"])
@pytest.mark.parametrize("widths", [[9], [9, 6], [9, 6, 7], [5, 6, 7, 4]])
def test_fixed_point_equals_the_reference(activation, widths):
    torch.manual_seed(0)
    head = EPHead(4, widths, 3, activation=activation, tolerance=1e-13, max_steps=1000).double()
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    flat = hidden.view(6, 4)
    if len(widths) == 1:
        expected = PHI[activation](flat @ head.input_weight.T) @ head.readout_weight.T
    else:
        expected = read_out(head, fixed_point(head, flat))
    torch.testing.assert_close(head(hidden), expected.view(2, 3, 3), rtol=1e-10, atol=1e-11)
    assert head.statistics.free_residual <= 1e-13 and head.statistics.num_unconverged == 0


def test_sweeps_and_residuals_are_those_of_the_equation():
    torch.manual_seed(0)
    network = network_of(EPHead(4, [9, 6, 7, 5], 3).double())
    drives = [torch.randn(5, 9).double(), *(torch.randn(width).double() for width in (6, 7, 5))]

    def update(state, *layers):
        new = list(state)
        for layer in layers:
            new[layer] = torch.tanh(network.current(layer, list(new), drives[layer]))
        return new

    def flat(state):
        return torch.cat([state[1], state[3]], dim=1)

    state = relax(FreeDynamics(network, drives, 5), 1e-30, 0).activities
    ends, steps, last = [], [], torch.full((5, 1), torch.inf)
    for sweep in range(1, 9):
        start = flat(state)
        if sweep > 2 and sweep % 2:
            turn = steps[-1] - steps[-2]
            falls = steps[-1].square().sum(1, keepdim=True) <= 0.99 * last
            share = torch.where(falls, (steps[-1] * turn).sum(1, keepdim=True) / turn.square().sum(1, keepdim=True), 0)
            last = torch.where(falls, steps[-1].square().sum(1, keepdim=True), last)
            start = ends[-1] - share * (ends[-1] - ends[-2])
            state = [state[0], start[:, :6], state[2], start[:, 6:]]
        state = update(state, 0, 2, 1, 3)
        ends.append(flat(state))
        steps.append(ends[-1] - start)
        relaxation = relax(FreeDynamics(network, drives, 5), 1e-30, sweep)
        torch.testing.assert_close(relaxation.residuals, steps[-1].abs().amax(1))
        for found, expected in zip(relaxation.activities, state, strict=True):
            torch.testing.assert_close(found, expected)
    assert relaxation.residuals.max() < 1e-3


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_secants_halve_the_sweeps_near_the_bound(depth, monkeypatch):
    torch.manual_seed(0)
    head = EPHead(8, [24] * depth, 3, max_steps=400)
    hidden = torch.randn(32, 8)
    head(hidden).sum().backward()
    with_secants = head.statistics.free_sweeps, head.statistics.nudged_sweeps
    monkeypatch.setattr(Dynamics, "takes_secants", False)
    head(hidden).sum().backward()
    plain = head.statistics.free_sweeps, head.statistics.nudged_sweeps
    assert all(few < 0.75 * many for few, many in zip(with_secants, plain, strict=True))


def test_rows_that_converge_early_are_dropped_and_come_out_the_same():
    torch.manual_seed(0)
    network = network_of(scaled(EPHead(4, [30, 30], 1).double(), 1.6))
    # Strong inputs saturate the units, which then converge in a few sweeps
    drive = torch.randn(40, 30, dtype=torch.float64) * torch.logspace(-1, 1.5, 40).unsqueeze(1)
    drive = drive[torch.randperm(40)]
    bias = [torch.zeros(30, dtype=torch.float64)]
    rows = []

    class Counting(FreeDynamics):
        def activate(self, layer, current, check):
            rows.append(len(current))
            return super().activate(layer, current, check)

        def select(self, samples):
            return Counting(**vars(super().select(samples)))

    together = relax(Counting(network, [drive, *bias], 40), 1e-10, 500)
    assert min(rows) < 20 and rows == sorted(rows, reverse=True)
    sweeps = []
    for row in range(40):
        alone = free_relaxation(network, drive[row : row + 1], bias, 1e-10, 500)
        sweeps.append(alone.sweeps)
        for one, many in zip(alone.activities, together.activities, strict=True):
            torch.testing.assert_close(one[0], many[row], rtol=0, atol=1e-8)
    assert together.sweeps == max(sweeps) > 3 * min(sweeps)
    assert (together.residuals <= 1e-10).all()


def test_sweeps_do_not_oscillate_where_synchronous_updates_do():
    network = LayeredNetwork([torch.tensor([[-3.0]])], [torch.tensor([[-3.0]])], ACTIVATIONS["tanh"])
    state = torch.tensor([0.9, 0.9])
    for _ in range(100):
        state = torch.tanh(-3 * state.flip(0))
    assert state[0] == state[1] and state.abs().min() > 0.9
    relaxation = free_relaxation(network, torch.tensor([[1e-3]]), [torch.zeros(1)], 1e-6, 200)
    assert relaxation.unconverged == 0
    first, second = relaxation.activities
    torch.testing.assert_close(first, torch.tanh(1e-3 - 3 * second))


def test_a_slow_state_is_counted_and_warned_of_once():
    torch.manual_seed(0)
    head = scaled(EPHead(4, [20, 20], 1, max_steps=4, tolerance=1e-5), 1.4)
    with pytest.warns(UserWarning, match="did not converge within `max_steps` = 4"):
        head(torch.randn(8, 4))
    first = head.statistics.num_unconverged
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(torch.randn(8, 4))
    assert 0 < first <= 8 and head.statistics.num_unconverged > first
    assert head.statistics.free_sweeps == 4 and head.statistics.free_residual > 1e-5


def oscillator(strength):
    """Two neurons that turn around one another."""
    return LayeredNetwork([torch.tensor([[strength]])], [torch.tensor([[-strength]])], ACTIVATIONS["tanh"])


def test_an_oscillating_state_raises_with_the_norm_and_the_remedy():
    drive = torch.tensor([[5.0], [0.0], [0.1]])
    with pytest.raises(EquilibriumError, match=r"of 3 samples \(first: row [12]\) oscillate") as error:
        free_relaxation(oscillator(3.0), drive, [torch.full((1,), 0.01)], 1e-4, 60)
    assert "spectral norm of a recurrent weight is 3;" in str(error.value)
    assert "`spectral_cap='auto'`" in str(error.value) and "below 1 for all of them, at 2 layers" in str(error.value)
    # The same network with weaker weights spirals into its fixed point
    assert free_relaxation(oscillator(0.9), drive, [torch.full((1,), 0.01)], 1e-4, 60).unconverged == 0


@pytest.mark.parametrize("secants", [False, True])
def test_a_state_that_rests_and_then_moves_on_is_not_taken_for_an_oscillation(secants, monkeypatch):
    """Just above the fold of a bistable pair the state passes the ghost of the vanished fixed point."""
    weight = torch.tensor([[1.5]], dtype=torch.float64)
    network = LayeredNetwork([weight], [weight], ACTIVATIONS["tanh"])
    bias = [torch.zeros(1, dtype=torch.float64)]

    def lower_branch(drive):
        start = [torch.full((1, 1), -1.0, dtype=torch.float64)] * 2
        dynamics = FreeDynamics(network, [torch.full((1, 1), drive, dtype=torch.float64), *bias], 1)
        return relax(dynamics, 1e-9, 40, [part.clone() for part in start])

    monkeypatch.setattr(Dynamics, "takes_secants", False)
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if lower_branch(middle).activities[0] < 0 else (low, middle)
    monkeypatch.setattr(Dynamics, "takes_secants", secants)
    relaxation = lower_branch(high + 2e-4)
    assert relaxation.activities[0] > 0.5
    assert relaxation.residuals[0] <= 1e-9, relaxation
    assert relaxation.unconverged == 1 or secants


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    head = EPHead(4, [6, 6], 1)
    head.forward_weight_1.data[2, 3] = value
    with pytest.raises(EquilibriumError, match="not finite.*learning rate"):
        head(torch.randn(8, 4)).sum().backward()


def test_no_rows():
    head = EPHead(4, [6, 6], 2)
    hidden = torch.randn(0, 3, 4, requires_grad=True)
    output = head(hidden)
    assert output.shape == (0, 3, 2)
    output.sum().backward()
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in head.parameters())


def test_tolerance_below_the_resolution_of_float32_is_reached():
    torch.manual_seed(0)
    head = EPHead(16, [32, 32], 1, tolerance=1e-12, max_steps=300)
    head(torch.randn(64, 16)).sum().backward()
    assert head.statistics.num_unconverged == 0 and head.statistics.free_residual < 2e-6
