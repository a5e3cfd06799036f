import cmath
import math

import pytest
import torch

from tests.helpers.equilibrium import scaled
from tests.helpers.equilibrium_reference import PHI, fixed_point, implicit_error, network_of, read_out, whole_matrix
from trl_ext import EPHead
from trl_ext.equilibrium.gradient import Estimator, error_vectors
from trl_ext.equilibrium.relaxation import EquilibriumError


TIGHT = {"tolerance": 1e-13, "max_steps": 2000}


def make_head(seed=0, widths=(10, 8), **settings):
    torch.manual_seed(seed)
    head = EPHead(5, list(widths), 3, **{**TIGHT, **settings}).double()
    for name, parameter in head.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return head


def data(seed=1, rows=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 5, generator=generator, dtype=dtype)
    return hidden.requires_grad_(), torch.randn(rows, 3, generator=generator, dtype=dtype)


def gradients(head, hidden, target):
    head.zero_grad()
    hidden.grad = None
    (head(hidden) - target).square().mean().backward()
    named = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    return {**named, "hidden": hidden.grad.clone()}


def unrolled_gradients(head, hidden, target):
    head.zero_grad()
    hidden.grad = None
    (read_out(head, fixed_point(head, hidden, steps=400)) - target).square().mean().backward()
    named = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    return {**named, "hidden": hidden.grad.clone()}


def relative_error(one, other):
    difference = sum((one[name] - other[name]).square().sum() for name in other)
    return (difference / sum(value.square().sum() for value in other.values())).sqrt().item()


@pytest.mark.parametrize("settings", [{}, {"feedback": "asymmetric", "feedback_angle": 60.0}])
def test_exact_gradient_equals_finite_differences(settings):
    head = make_head(estimator="exact", **settings)
    hidden, target = data()
    exact = gradients(head, hidden, target)
    step = 1e-5
    for name, value in [*head.named_parameters(), ("hidden", hidden)]:
        flat = value.detach().view(-1)
        for index in torch.linspace(0, flat.numel() - 1, 4).long().tolist():
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    flat[index] += sign * step
                    losses.append((head(hidden) - target).square().mean().item())
                    flat[index] -= sign * step
            difference = (losses[0] - losses[1]) / (2 * step)
            assert exact[name].view(-1)[index].item() == pytest.approx(difference, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "dsilu"])
@pytest.mark.parametrize("widths", [(10,), (10, 8), (10, 8, 6)])
def test_exact_gradient_equals_backpropagation_through_the_relaxation(activation, widths):
    head = make_head(widths=widths, activation=activation, estimator="exact")
    hidden, target = data()
    if len(widths) == 1:
        exact = gradients(head, hidden, target)
        hidden.grad = None
        head.zero_grad()
        top = PHI[activation](hidden @ head.input_weight.T + head.input_bias)
        (top @ head.readout_weight.T + head.readout_bias - target).square().mean().backward()
        unrolled = {**{name: p.grad for name, p in head.named_parameters()}, "hidden": hidden.grad}
    else:
        exact, unrolled = gradients(head, hidden, target), unrolled_gradients(head, hidden, target)
    assert relative_error(exact, unrolled) < 1e-10


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "dsilu"])
@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"estimator": "one_sided"}, 1),
        ({"estimator": "symmetric"}, 2),
        ({"num_points": 1, "rotated": False}, 1),
        ({"num_points": 1}, 1),
        ({"num_points": 2}, 2),
        ({"num_points": 2, "rotated": False}, 2),
        ({"num_points": 3}, 3),
        ({"num_points": 4}, 4),
        ({"num_points": 4, "rotated": False}, 4),
        ({"num_points": 6, "rotated": False}, 6),
    ],
)
def test_error_falls_as_radius_to_the_number_of_points(activation, settings, order):
    hidden, target = data()
    scale = 4.0 if activation == "dsilu" else 1.0

    def estimate(**settings):
        # Of half the spectral norm: nearer to the bound the radius of convergence is smaller
        head = scaled(make_head(activation=activation, **settings), 0.5)
        return gradients(head, hidden, target)

    exact = estimate(estimator="exact")
    radii = [0.1 * scale, 0.05 * scale]
    errors = [relative_error(estimate(radius=radius, **settings), exact) for radius in radii]
    assert errors[0] < 0.05 * scale
    assert math.log(errors[0] / errors[1], 2) == pytest.approx(order, abs=0.25)


def test_tangent_is_the_limit():
    hidden, target = data()
    exact = gradients(make_head(estimator="exact"), hidden, target)
    assert relative_error(gradients(make_head(estimator="tangent"), hidden, target), exact) < 1e-12


def test_estimates_equal_fixed_points_of_the_whole_nudged_network():
    """Against complex fixed points of the dense network, relaxed without any of the head's shortcuts."""
    head = scaled(make_head(widths=(7, 6, 5)), 0.5)
    hidden, _ = data()
    hidden = hidden.detach()
    nudge = torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1)
    network, u0 = network_of(head), fixed_point(head, hidden).detach()
    parts = u0.split([7, 6, 5], dim=1)
    constants = [network.activation.constants(torch.tanh(part), part) for part in parts]
    cases = [(1, False, 0.3), (2, True, 0.6), (2, False, 0.6), (3, True, 0.5), (4, True, 0.6), (5, False, 0.4)]
    for num_points, rotated, radius in [*cases, (4, False, 0.6), (8, False, 0.6)]:
        expected = torch.zeros_like(u0)
        for k in range(num_points):
            beta = radius * cmath.exp(1j * math.pi * (2 * k + rotated) / num_points)
            u = fixed_point(head, hidden, beta * nudge, steps=400)
            expected += ((torch.tanh(u) - torch.tanh(u0)) / beta).real / num_points
        estimator = Estimator("holomorphic", num_points, rotated, radius)
        estimate = error_vectors(network, constants, nudge, estimator, 1e-13, 2000)
        torch.testing.assert_close(torch.cat(estimate.layers, dim=1), expected.detach(), rtol=1e-9, atol=1e-11)


def test_points_use_conjugate_symmetry():
    assert Estimator("holomorphic", 2).points() == [(1j, 1.0)]
    assert Estimator("holomorphic", 2, rotated=False).points() == [(1 + 0j, 0.5), (-1 + 0j, 0.5)]
    assert Estimator("symmetric", 7).points() == Estimator("holomorphic", 2, rotated=False).points()
    assert Estimator("one_sided", 7).points() == [(1 + 0j, 1.0)]
    assert [weight for _, weight in Estimator("holomorphic", 4, rotated=False).points()] == [0.25, 0.5, 0.25]
    for num_points in range(1, 9):
        for rotated in (False, True):
            points = Estimator("holomorphic", num_points, rotated).points()
            assert sum(weight for _, weight in points) == pytest.approx(1.0)
            assert all(point.imag >= 0 for point, _ in points) and len(points) <= num_points // 2 + 1


@pytest.mark.parametrize("correction", ["none", "asymep"])
def test_rotated_pair_equals_the_adjoint_in_float32(correction):
    feedback = {"feedback": "asymmetric", "feedback_angle": 90.0} if correction == "asymep" else {}
    torch.manual_seed(0)
    head = EPHead(64, [256, 256], 4, correction=correction, tolerance=5e-7, max_steps=300, **feedback)
    hidden, target = torch.randn(32, 64, requires_grad=True), torch.randn(32, 4)
    estimate = gradients(head, hidden, target)
    head.estimator = "exact"
    in_float32 = gradients(head, hidden, target)
    assert relative_error(estimate, in_float32) < 1e-6
    head, hidden = head.double(), hidden.detach().double().requires_grad_()
    head.tolerance = 1e-12
    exact = gradients(head, hidden, target.double())
    # The network is near the contraction bound: rounding is multiplied by up to 20
    assert relative_error({name: value.double() for name, value in estimate.items()}, exact) < 5e-6


@pytest.mark.parametrize("estimator", ["one_sided", "symmetric", "holomorphic"])
def test_small_real_nudges_do_not_cancel_in_float32(estimator):
    """At this radius the difference of two float32 states has no correct digit."""
    torch.manual_seed(0)
    head = EPHead(64, [64, 64], 4, estimator=estimator, rotated=False, radius=1e-6, tolerance=1e-6, max_steps=300)
    hidden, target = torch.randn(32, 64, requires_grad=True), torch.randn(32, 4)
    estimate = gradients(head, hidden, target)
    head.estimator = "exact"
    assert relative_error(estimate, gradients(head, hidden, target)) < 5e-6


def test_more_points_do_not_help_beyond_the_radius_of_convergence():
    hidden, target = data(rows=12)
    settings = {"activation": "sigmoid", "widths": (16, 16), "max_steps": 200}

    def error(num_points, radius):
        heads = [
            scaled(make_head(estimator=name, num_points=num_points, radius=radius, **settings), 1.8)
            for name in ("exact", "holomorphic")
        ]
        try:
            exact, estimate = (gradients(head, hidden, target) for head in heads)
        except EquilibriumError:
            return math.inf
        return relative_error(estimate, exact)

    inside, outside = [error(n, 0.05) for n in (2, 8)], [error(n, 1.5) for n in (2, 8)]
    assert inside[1] < 1e-3 * inside[0]
    assert outside[1] > 0.05 and outside[1] > 0.05 * min(outside[0], 1.0)


@pytest.mark.parametrize("angle", [30.0, 60.0, 90.0])
def test_bias_of_asymmetric_feedback_is_what_the_paper_says(angle):
    head = make_head(feedback="asymmetric", feedback_angle=angle, estimator="tangent")
    hidden, _ = data()
    nudge = torch.nn.functional.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1)
    u = fixed_point(head, hidden).detach()
    network = network_of(head)
    parts = u.split([10, 8], dim=1)
    constants = [network.activation.constants(torch.tanh(part), part) for part in parts]

    def estimate(name, correction="none"):
        chosen = Estimator(name, radius=1e-4, correction=correction)
        return torch.cat(error_vectors(network, constants, nudge, chosen, 1e-14, 3000).layers, dim=1)

    delta = implicit_error(head, u, nudge)
    torch.testing.assert_close(estimate("exact"), delta)
    assert (estimate("tangent") - delta).norm() > 0.05 * delta.norm()
    # d_beta r = J^-1 J^T delta, in activities J = W - D^-1
    slopes = 1 - torch.tanh(u).square()
    for row in range(6):
        jacobian = whole_matrix(head).detach() - torch.diag(1 / slopes[row])
        expected = torch.linalg.solve(jacobian, jacobian.T @ delta[row])
        torch.testing.assert_close(estimate("tangent")[row], expected)
    for name in ("tangent", "holomorphic", "symmetric"):
        corrected = estimate(name, "asymep")
        assert (corrected - delta).norm() < 1e-6 * delta.norm()


def test_bias_is_to_first_order_the_antisymmetric_part():
    """`d_beta u = delta - 2 S^-1 A delta + o(A)`: the rest falls with the square of the asymmetry."""
    rests = []
    for angle in (4.0, 2.0):
        head = make_head(feedback="asymmetric", feedback_angle=angle)
        hidden, _ = data(rows=1)
        nudge = torch.nn.functional.normalize(torch.ones(1, 8, dtype=torch.float64), dim=-1)
        u = fixed_point(head, hidden).detach()
        delta = implicit_error(head, u, nudge)[0]
        response = implicit_error(head, u, nudge, transpose=False)[0]
        jacobian = whole_matrix(head).detach() - torch.diag(1 / (1 - torch.tanh(u[0]).square()))
        symmetric, antisymmetric = (jacobian + jacobian.T) / 2, (jacobian - jacobian.T) / 2
        first_order = delta - 2 * torch.linalg.solve(symmetric, antisymmetric @ delta)
        rests.append((response - first_order).norm() / (response - delta).norm())
    assert rests[0] < 0.2 and rests[0] / rests[1] == pytest.approx(2.0, abs=0.3)


@pytest.mark.parametrize("estimator", ["exact", "holomorphic", "one_sided"])
def test_estimate_does_not_depend_on_the_scale_of_the_loss(estimator):
    head = make_head(estimator=estimator, radius=0.1)
    hidden, target = data()
    first = gradients(head, hidden, target)
    for scale in (1e-20, 2.0**16, 1e20):
        head.zero_grad()
        hidden.grad = None
        ((head(hidden) - target).square().mean() * scale).backward()
        scaled_gradients = {name: parameter.grad / scale for name, parameter in head.named_parameters()}
        assert relative_error(scaled_gradients, {name: first[name] for name in scaled_gradients}) < 1e-12


def test_rows_without_gradient_are_not_relaxed(monkeypatch):
    import trl_ext.equilibrium.function as module

    seen = []

    def spy(network, constants, nudge, *rest):
        seen.append(len(nudge))
        return error_vectors(network, constants, nudge, *rest)

    monkeypatch.setattr(module, "error_vectors", spy)
    head = make_head()
    hidden = torch.randn(4, 9, 5, dtype=torch.float64, requires_grad=True)
    head(hidden)[:, -1].square().sum().backward()
    sparse = {name: parameter.grad.clone() for name, parameter in head.named_parameters()}
    assert seen == [4] and torch.count_nonzero(hidden.grad[:, :-1]) == 0 and hidden.grad[:, -1].abs().min() > 0
    head.zero_grad()
    last = hidden.detach()[:, -1].clone().requires_grad_()
    head(last).square().sum().backward()
    assert relative_error(sparse, {name: parameter.grad for name, parameter in head.named_parameters()}) < 1e-11
    torch.testing.assert_close(last.grad, hidden.grad[:, -1])
    (head(hidden) * 0).sum().backward()
    assert seen[-1] == 0


def test_bradley_terry_and_finite_differences():
    head = make_head(estimator="holomorphic", num_points=2, radius=1e-4)
    hidden, _ = data(rows=8)

    def loss():
        rewards = head(hidden)[:, 0]
        return -torch.nn.functional.logsigmoid(rewards[:4] - rewards[4:]).mean()

    loss().backward()
    step = 1e-5
    for index in [(0, 0), (3, 2), (6, 4)]:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                hidden[index] += sign * step
                values.append(loss().item())
                hidden[index] -= sign * step
        assert hidden.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)
