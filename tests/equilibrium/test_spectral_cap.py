import pytest
import torch

from trl_ext import EPHead
from trl_ext.equilibrium.spectral_cap import SUBSPACE_SIZE, cap_singular_values


def spectrum(values, rows=24, columns=16):
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    values = torch.tensor([*values, *torch.linspace(0.5, 0.1, columns - len(values)).tolist()], dtype=torch.float64)
    return (left * values) @ right.T, left, values, right


@pytest.mark.parametrize("above", [0, 1, 3, SUBSPACE_SIZE, SUBSPACE_SIZE + 4])
def test_caps_every_singular_value_above_and_leaves_the_others(above):
    weight, left, values, right = spectrum(torch.linspace(3.0, 1.2, above).tolist())
    start = torch.randn(16, SUBSPACE_SIZE, dtype=torch.float64)
    for _ in range(6):
        capped, start = cap_singular_values(weight, start, 0.9)
        assert start.shape == (16, SUBSPACE_SIZE)
    torch.testing.assert_close(capped, (left * values.clamp_max(0.9)) @ right.T, rtol=1e-6, atol=1e-6)


def test_gradient_has_no_part_along_a_capped_direction():
    weight, left, _, right = spectrum([2.0, 1.5])
    weight.requires_grad_()
    capped, _ = cap_singular_values(weight, right[:, :4].clone(), 0.9)
    incoming = torch.randn_like(weight)
    capped.backward(incoming)
    along = torch.einsum("ik,ij,jk->k", left, weight.grad, right)
    torch.testing.assert_close(along[:2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(along[2:], torch.einsum("ik,ij,jk->k", left, incoming, right)[2:])


@pytest.mark.parametrize("feedback", ["symmetric", "asymmetric"])
def test_head_relaxes_under_its_cap_whatever_the_weights(feedback):
    torch.manual_seed(0)
    head = EPHead(8, [32, 32], 1, feedback=feedback, spectral_cap=0.5, max_steps=60)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "ward_weight" in name:
                parameter.mul_(8.0)
    hidden = torch.randn(16, 8)
    for _ in range(3):
        head(hidden).sum().backward()
    assert head.statistics.free_sweeps <= 10 and head.statistics.num_unconverged == 0
    forward, backward = head._recurrent_weights(torch.float32)
    assert all(torch.linalg.matrix_norm(weight, 2) < 0.505 for weight in [*forward, *backward])
    assert len(backward) == (feedback == "asymmetric")


def test_gradient_through_the_cap_is_exact_for_a_small_excess():
    torch.manual_seed(0)
    head = EPHead(3, [6, 6], 2, spectral_cap=0.4, estimator="exact", tolerance=1e-13, max_steps=500).double().eval()
    weight, step = head.forward_weight_1, 1e-6
    left, values, right = torch.linalg.svd(weight.detach())
    assert values[0] == pytest.approx(0.4, rel=1e-6)
    head.forward_weight_1_subspace = right.T.contiguous()
    hidden = torch.randn(5, 3, dtype=torch.float64)
    errors = []
    for excess in (0.02, 0.002):
        with torch.no_grad():
            weight.copy_((left * torch.tensor([0.4 + excess, 0.35, 0.3, 0.2, 0.1, 0.05])) @ right)
        weight.grad = None
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
        errors.append(((weight.grad - difference).norm() / difference.norm()).item())
    assert errors[0] < 0.3 and errors[1] < 0.04


def test_fresh_weights_are_within_the_cap():
    for feedback in ("symmetric", "asymmetric"):
        head = EPHead(3, [40, 40], 2, spectral_cap=0.7, feedback=feedback)
        _, forward, backward = head.recurrent_parameters()
        assert all(torch.linalg.matrix_norm(weight, 2) <= 0.7 + 1e-5 for weight in [*forward, *backward])


def test_subspace_is_saved_and_a_loaded_head_goes_on_the_same():
    torch.manual_seed(0)
    head = EPHead(3, [20, 20], 2, spectral_cap=0.4)
    hidden = torch.randn(5, 3)
    before = head.forward_weight_1_subspace.clone()
    head(hidden)
    assert not torch.equal(before, head.forward_weight_1_subspace)
    twin = EPHead(3, [20, 20], 2, spectral_cap=0.4)
    twin.load_state_dict(head.state_dict())
    for module in (head, twin):
        module.train()
    assert torch.equal(head(hidden), twin(hidden)) and torch.equal(head(hidden), twin(hidden))
    frozen = head.eval().forward_weight_1_subspace.clone()
    head(hidden)
    assert torch.equal(frozen, head.forward_weight_1_subspace)
