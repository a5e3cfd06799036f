import pytest
import torch

from trl_ext import EPHead
from trl_ext.equilibrium.network import cap_singular_values


SHAPES = [(16, 16), (24, 16), (16, 24)]


def spectrum(values, shape=(24, 16)):
    torch.manual_seed(0)
    size = min(shape)
    left, _ = torch.linalg.qr(torch.randn(shape[0], size, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], size, dtype=torch.float64))
    values = torch.tensor([*values, *torch.linspace(0.5, 0.1, size - len(values)).tolist()], dtype=torch.float64)
    return (left * values) @ right.T, left, values, right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("above", [0, 1, 3, 12, 16])
def test_caps_every_singular_value_above_and_leaves_the_others(above, shape):
    weight, left, values, right = spectrum(torch.linspace(3.0, 1.2, above).tolist(), shape)
    capped = cap_singular_values(weight, 0.9)
    torch.testing.assert_close(capped, (left * values.clamp_max(0.9)) @ right.T, rtol=1e-12, atol=1e-13)
    assert (capped is weight) == (above == 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "values", [[1.5], [2.0, 1.5], [2.0, 1.5, 1.5, 1.2, 0.95, 0.91], [3.0] * 16, [0.9001, 0.8999, 0.8]], ids=str
)
def test_gradient_equals_finite_differences(values, shape):
    """With any number of directions above the cap, equal ones, and pairs that the cap lies between."""
    weight = spectrum(values, shape)[0].requires_grad_()
    direction, cotangent = torch.randn_like(weight), torch.randn_like(weight)
    (gradient,) = torch.autograd.grad(cap_singular_values(weight, 0.9), weight, cotangent)
    step = 1e-6
    with torch.no_grad():
        ahead, back = (cap_singular_values(weight + sign * step * direction, 0.9) for sign in (1, -1))
    expected = ((ahead - back) / (2 * step) * cotangent).sum()
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_a_capped_direction_has_no_gradient_along_it():
    weight, left, _, right = spectrum([2.0, 1.5])
    weight.requires_grad_()
    incoming = torch.randn_like(weight)
    cap_singular_values(weight, 0.9).backward(incoming)
    along = torch.einsum("ik,ij,jk->k", left, weight.grad, right)
    torch.testing.assert_close(along[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(along[2:], torch.einsum("ik,ij,jk->k", left, incoming, right)[2:])


@pytest.mark.parametrize("feedback", ["symmetric", "asymmetric"])
def test_head_relaxes_under_its_cap_whatever_the_weights(feedback):
    torch.manual_seed(0)
    head = EPHead(8, [32, 32], 1, feedback=feedback, spectral_cap=0.5, max_steps=60)
    hidden = torch.randn(16, 8)
    # Also in evaluation, right after weights that it has never seen
    for training in (True, False):
        head.train(training)
        with torch.no_grad():
            for name, parameter in head.named_parameters():
                if "ward_weight" in name:
                    parameter.copy_(torch.randn_like(parameter))
        head(hidden).sum().backward()
        assert head.statistics.free_sweeps <= 10 and head.statistics.num_unconverged == 0
        forward, backward = head._recurrent_weights(torch.float32)
        assert all(torch.linalg.matrix_norm(weight, 2) < 0.5 + 1e-5 for weight in [*forward, *backward])
        assert len(backward) == (feedback == "asymmetric")


def test_gradient_of_a_head_through_its_cap_equals_finite_differences():
    torch.manual_seed(0)
    head = EPHead(3, [6, 6, 6], 2, spectral_cap=0.4, estimator="exact", tolerance=1e-13, max_steps=500).double()
    weight, step = head.forward_weight_1, 1e-6
    with torch.no_grad():
        weight.copy_(torch.randn_like(weight))
    assert (torch.linalg.svdvals(weight) > 0.4).sum() >= 4
    hidden = torch.randn(5, 3, dtype=torch.float64)
    head(hidden).square().sum().backward()
    difference = torch.zeros_like(weight)
    for index in [(i, j) for i in range(6) for j in range(6)]:
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
                losses.append(head(hidden).square().sum().item())
                weight[index] -= sign * step
        difference[index] = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(weight.grad, difference, rtol=1e-5, atol=1e-8)


def test_fresh_weights_are_within_the_cap():
    for feedback in ("symmetric", "asymmetric"):
        head = EPHead(3, [40, 40], 2, spectral_cap=0.7, feedback=feedback)
        _, forward, backward = head.recurrent_parameters()
        assert all(torch.linalg.matrix_norm(weight, 2) <= 0.7 + 1e-5 for weight in [*forward, *backward])


def test_weights_saved_with_a_subspace_load_and_the_cap_keeps_nothing():
    torch.manual_seed(0)
    head = EPHead(3, [20, 20], 2, spectral_cap=0.4)
    earlier = {**head.state_dict(), "forward_weight_1_subspace": torch.randn(20, 8)}
    twin = EPHead(3, [20, 20], 2, spectral_cap=0.4)
    twin.load_state_dict(earlier)
    hidden = torch.randn(5, 3)
    assert torch.equal(head(hidden), twin(hidden)) and torch.equal(head(hidden), twin.eval()(hidden))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head(hidden)
    assert before.keys() == earlier.keys() - {"forward_weight_1_subspace"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())
