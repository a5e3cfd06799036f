import math

import pytest
import torch

from tests.helpers.equilibrium_reference import network_of, whole_matrix
from trl_ext import EPHead
from trl_ext.equilibrium.head import at_angle
from trl_ext.equilibrium.homeostasis import homeostasis_loss, jacobian_product, symmetry_measure, weight_angle


def make_head(angle=70.0, widths=(7, 5, 6)):
    torch.manual_seed(0)
    return EPHead(3, list(widths), 2, feedback="asymmetric", feedback_angle=angle).double()


def test_closed_form_is_the_norm_of_the_antisymmetric_part():
    head = make_head()
    jacobian = whole_matrix(head).detach() - torch.eye(18, dtype=torch.float64)
    paper = jacobian.square().sum() - torch.trace(jacobian @ jacobian)
    antisymmetric = (jacobian - jacobian.T) / 2
    loss = head.homeostasis_loss()
    torch.testing.assert_close(loss.detach(), paper / 18)
    torch.testing.assert_close(loss.detach(), 2 * antisymmetric.square().sum() / 18)


def test_probes_equal_the_closed_form_in_the_mean():
    head = make_head()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([head.homeostasis_loss(20, generator).detach() for _ in range(2000)])
    exact = head.homeostasis_loss().item()
    error = draws.std().item() / math.sqrt(len(draws))
    assert abs(draws.mean().item() - exact) < 4 * error < 0.05 * exact
    # By hand from the paper's formula, with the same probes
    vectors = [torch.randn(20, width, generator=generator.manual_seed(7), dtype=torch.float64) for width in (7,)]
    generator.manual_seed(7)
    once = head.homeostasis_loss(20, generator).item()
    generator.manual_seed(7)
    probes = torch.cat([torch.randn(20, w, generator=generator, dtype=torch.float64) for w in (7, 5, 6)], dim=1)
    assert torch.equal(vectors[0], probes[:, :7])
    jacobian = whole_matrix(head).detach() - torch.eye(18, dtype=torch.float64)
    moved = probes @ jacobian.T
    expected = (moved.square().sum() - (probes * (moved @ jacobian.T)).sum()) / (20 * 18)
    assert once == pytest.approx(expected.item())


def test_jacobian_product_is_that_of_the_field():
    head = make_head()
    network = network_of(head)
    vectors = [torch.randn(2, width, dtype=torch.float64) for width in (7, 5, 6)]
    product = jacobian_product(network.forward_weights, network.backward_weights, vectors)
    jacobian = whole_matrix(head).detach() - torch.eye(18, dtype=torch.float64)
    torch.testing.assert_close(torch.cat(product, 1), torch.cat(vectors, 1) @ jacobian.T)


def test_gradient_is_local_to_the_pair():
    head = make_head()
    head.homeostasis_loss().backward()
    for layer in (1, 2):
        forward, backward = getattr(head, f"forward_weight_{layer}"), getattr(head, f"backward_weight_{layer}")
        torch.testing.assert_close(forward.grad, 2 * (forward - backward.T).detach() / 18)
        torch.testing.assert_close(backward.grad, -forward.grad.T)
    assert head.input_weight.grad is None and head.bias_2.grad is None


def test_objective_closes_the_gap_and_raises_the_cosine():
    head = make_head(90.0, (32, 32))
    hidden = torch.randn(40, 3, dtype=torch.float64)
    before, asymmetry = head.alignment(hidden), head.asymmetry()
    optimizer = torch.optim.SGD(head.parameters(), lr=4.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = head.homeostasis_loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-4 * losses[0]
    assert before[0] < 0.5 < 0.999 < head.alignment(hidden)[0]
    assert asymmetry["ep/weight_angle"] == pytest.approx(90.0) and head.asymmetry()["ep/weight_angle"] < 1.0
    assert asymmetry["ep/symmetry"] < 0.8 < 0.99 < head.asymmetry()["ep/symmetry"]


def test_symmetric_feedback_has_no_loss_and_no_gradient():
    head = EPHead(3, [7, 5], 2)
    loss = head.homeostasis_loss()
    loss.backward()
    assert loss == 0 and torch.count_nonzero(head.forward_weight_1.grad) == 0
    assert head.asymmetry() == {"ep/symmetry": 1.0, "ep/weight_angle": pytest.approx(0.0, abs=1e-4)}
    # A single layer has no recurrence
    single = EPHead(3, 7, 2)
    assert single.homeostasis_loss() == 0
    assert single.asymmetry() == {"ep/symmetry": 1.0, "ep/weight_angle": 0.0}


def test_loss_is_float32_in_a_bf16_head_under_autocast():
    head = make_head().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.homeostasis_loss()
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.forward_weight_1.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0, 180.0])
def test_initial_angle_is_exact(angle):
    weight = 0.7 * torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64)).Q.T
    turned = at_angle(weight, angle)
    singular = torch.linalg.svdvals(turned)
    assert singular.max() < 0.7 + 1e-6  # of the norm of the weight at most, and at right angles nearly orthogonal
    assert singular.min() > (0.6 if angle % 90 == 0 else 0.01)
    assert weight_angle(weight, turned.T) == pytest.approx(angle, abs=1e-5)


def test_symmetry_measure_by_hand():
    matrix = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    # J = W - 1 = [[0, 2], [0, 0]]: symmetric and antisymmetric parts have the same norm
    assert symmetry_measure(matrix) == pytest.approx(0.5)


def test_wrong_number_of_probes():
    with pytest.raises(ValueError, match="num_probes.*got 0"):
        homeostasis_loss([torch.ones(2, 2)], [torch.ones(2, 2)], num_probes=0)
