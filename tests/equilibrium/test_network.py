import itertools
import math

import pytest
import torch

from tests.helpers.equilibrium_reference import PHI, fixed_point, network_of, whole_matrix
from trl_ext import EPHead
from trl_ext.equilibrium.activations import ACTIVATIONS
from trl_ext.equilibrium.network import LayeredNetwork, cap_singular_values, contraction_bound, vector_field
from trl_ext.equilibrium.relaxation import EquilibriumError, FreeDynamics, free_relaxation, relax


NAMES = sorted(ACTIVATIONS)


def numbers(seed, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(4000, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", NAMES)
def test_activation_and_its_differences_equal_the_formula_on_complex_numbers(name):
    activation, phi = ACTIVATIONS[name], PHI[name]
    u, a, b = numbers(0, 2.0), numbers(1, 0.3), numbers(2, 0.15)
    torch.testing.assert_close(activation.value(u), phi(u))
    constants = activation.constants(activation.value(u), u)
    v = torch.complex(a, b)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(activation.difference(constants, a), phi(u + a) - phi(u), **close)
    torch.testing.assert_close(activation.odd_difference(constants, a), (phi(u + a) - phi(u - a)) / 2, **close)
    expected = phi(u + v) - phi(u)
    real, imaginary = activation.complex_difference(constants, a, b)
    torch.testing.assert_close(torch.complex(real, imaginary), expected, **close)
    real, imaginary = activation.odd_complex_difference(constants, a, b)
    torch.testing.assert_close(torch.complex(real, imaginary), (phi(u + v) - phi(u - v)) / 2, **close)
    expected = ((phi(u + 1j * b) - phi(u - 1j * b)) / 2j).real
    torch.testing.assert_close(activation.odd_imaginary_difference(constants, b), expected, **close)


@pytest.mark.parametrize("name", NAMES)
def test_slope_and_its_bounds(name):
    activation = ACTIVATIONS[name]
    u = torch.linspace(-6, 6, 20001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(PHI[name](u).sum(), u, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), u)
    slope, point = slope.detach(), u.detach()
    torch.testing.assert_close(activation.slope(activation.constants(activation.value(point), point)), slope)
    assert slope.max() == pytest.approx(activation.max_slope, rel=1e-6)
    assert curvature.abs().max() <= activation.max_curvature <= 1.1 * curvature.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_small_differences_do_not_cancel_in_float32(name, size):
    """Subtracting two activations in float32 would be wrong by 10 % at 1e-6."""
    activation = ACTIVATIONS[name]
    u, v = numbers(0).float(), numbers(1, size).float()
    constants = activation.constants(activation.value(u), u)
    double = u.double(), v.double()
    expected = PHI[name](double[0] + double[1]) - PHI[name](double[0])
    error = (activation.difference(constants, v) - expected).norm() / expected.norm()
    assert error < 5e-7
    subtracted = activation.value(u + v) - activation.value(u)
    assert (subtracted - expected).norm() / expected.norm() > 100 * error if size == 1e-6 else True
    expected = ((PHI[name](double[0] + 1j * double[1]) - PHI[name](double[0])) / 1j).real
    assert (activation.odd_imaginary_difference(constants, v) - expected).norm() / expected.norm() < 5e-7


@pytest.mark.parametrize("feedback", ["symmetric", "asymmetric"])
def test_field_and_matrix(feedback):
    torch.manual_seed(0)
    angle = 70.0 if feedback == "asymmetric" else 0.0
    head = EPHead(5, [7, 4, 6], 2, feedback=feedback, feedback_angle=angle).double()
    network = network_of(head)
    torch.testing.assert_close(network.weight_matrix(), whole_matrix(head))
    torch.testing.assert_close(network.transposed().weight_matrix(), whole_matrix(head).T)
    hidden = torch.randn(3, 5, dtype=torch.float64)
    u = fixed_point(head, hidden).detach()
    biases, _, _ = head.recurrent_parameters()
    drives = [hidden @ head.input_weight.T + head.input_bias, *biases]
    field = vector_field(network, list(u.split([7, 4, 6], dim=1)), drives)
    assert max(part.abs().max() for part in field) < 1e-12
    moved = vector_field(network, list((u + 0.1).split([7, 4, 6], dim=1)), drives)
    expected = torch.tanh(u + 0.1) @ whole_matrix(head).T + (u - torch.tanh(u) @ whole_matrix(head).T) - (u + 0.1)
    torch.testing.assert_close(torch.cat(moved, 1), expected)
    # What a relaxation runs: the current of each layer, which its membrane is equal to where the field is zero
    membranes = list((u + 0.1).split([7, 4, 6], dim=1))
    activities = [torch.tanh(membrane) for membrane in membranes]
    for layer, (membrane, drive) in enumerate(zip(membranes, drives, strict=True)):
        torch.testing.assert_close(network.current(layer, list(activities), drive) - membrane, moved[layer])


def test_safe_cap_makes_the_whole_matrix_contract():
    """A chain of weights that all have this norm, in the same direction, has the norm 1."""
    for depth in (2, 3, 5):
        head = EPHead(2, [1] * depth, 1).double()
        network = network_of(head)
        for weight in network.forward_weights:
            weight.fill_(network.safe_spectral_cap())
        assert torch.linalg.matrix_norm(network.weight_matrix(), 2) == pytest.approx(1.0)
    assert network_of(EPHead(2, [3, 3], 1)).safe_spectral_cap() == pytest.approx(1.0)
    sigmoid = network_of(EPHead(2, [3, 3, 3], 1, activation="dsilu"))
    assert sigmoid.safe_spectral_cap() == pytest.approx(1 / math.sqrt(2) / 0.42767051)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("feedback", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6])
def test_every_sweep_contracts_as_the_proof_says(depth, feedback, activation):
    """In the proof's own norm, from states far apart, with weights at the cap and in directions that add up."""
    torch.manual_seed(depth)
    phi, widths = ACTIVATIONS[activation], [6, 9, 4, 7, 5, 8][:depth]
    share = 0.9
    cap = share * contraction_bound(depth, phi)
    first = [cap * torch.randn(width, 1).sign().double() / math.sqrt(width) for width in widths]
    forward = [above @ below.T / cap for below, above in itertools.pairwise(first)]
    signs = -1 if feedback == "asymmetric" else 1
    network = LayeredNetwork(forward, [signs * weight.T for weight in forward], phi)
    assert network.spectral_norms() == pytest.approx([cap] * (2 * depth - 2))
    drives = [0.2 * torch.randn(width, dtype=torch.float64) for width in widths]
    drives[0] = drives[0].expand(8, -1)
    states = [[torch.randn(8, width, dtype=torch.float64) * 0.3 + 0.5 for width in widths] for _ in range(2)]

    def distance(one, other):
        scale = [math.sin(math.pi * layer / (depth + 1)) for layer in range(1, depth + 1)]
        return torch.stack([(a - b).norm(dim=1) / s for a, b, s in zip(one, other, scale, strict=True)]).amax(0)

    before = distance(*states)
    for sweep in range(1, 4):
        states = [relax(FreeDynamics(network, drives, 8), 1e-30, 1, state).activities for state in states]
        assert (distance(*states) <= share ** (2 * sweep) * before * (1 + 1e-9)).all()


def test_bound_is_the_largest_and_below_one_is_not_enough_at_three_layers(monkeypatch):
    assert [round(contraction_bound(depth, ACTIVATIONS["tanh"]), 3) for depth in range(1, 7)] == [
        math.inf, 1.0, 0.707, 0.618, 0.577, 0.555
    ]  # fmt: skip
    turn = 0.9 * torch.eye(1)
    weights = [turn, turn], [-turn, -turn]
    drive, biases = torch.zeros(1, 1), [torch.full((1,), 1e-3)] * 2
    monkeypatch.setattr(FreeDynamics, "takes_secants", False)
    with pytest.raises(EquilibriumError, match="below 0.707 for all of them, at 3 layers"):
        free_relaxation(LayeredNetwork(*weights, ACTIVATIONS["tanh"]), drive, biases, 1e-6, 100)
    capped = [[cap_singular_values(weight, 0.98 / math.sqrt(2)) for weight in side] for side in weights]
    network = LayeredNetwork(*capped, ACTIVATIONS["tanh"])
    assert free_relaxation(network, drive, biases, 1e-6, 500).residuals.max() <= 1e-6
    # Weights of this norm, in one direction, have no single fixed point above the bound
    two = [LayeredNetwork([c * torch.eye(1)] * 4, [c * torch.eye(1)] * 4, ACTIVATIONS["tanh"]) for c in (0.57, 0.60)]
    for network, is_one in zip(two, (True, False), strict=True):
        tops = [
            free_relaxation(network, torch.full((1, 1), sign * 1e-3), [torch.zeros(1)] * 4, 1e-7, 3000).activities[2]
            for sign in (1, -1)
        ]
        assert ((tops[0] - tops[1]).abs() < 0.1).item() == is_one
