import math

import pytest
import torch

from recipes.experiments.adamp_scale_invariance.run import OPTIMIZERS, normalised_network, rayleigh_quotient, run_toy
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.step_geometry import StepRecorder, angle


def test_angle():
    first = torch.tensor([[1.0, 0.0]])
    assert angle(first, torch.tensor([[0.0, 3.0]])) == pytest.approx(math.pi / 2)
    assert angle(first, 5 * first) == 0.0
    assert angle(first, torch.tensor([[1.0, 1e-6]])) == pytest.approx(1e-6, rel=1e-5)  # the arc cosine would say 0
    assert angle(first, torch.zeros(1, 2)) == 0.0


def test_recorder_by_hand():
    """w = (3, 4), gradient (-4, 3) is orthogonal; SGD with rate 1 goes to (7, 1): norm sqrt(50), angle atan(1)."""
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = torch.nn.Parameter(torch.zeros(1))
    recorder, optimizer = StepRecorder({"weight": weight, "bias": bias}), torch.optim.SGD([weight], lr=1.0)
    weight.grad = torch.tensor([[-4.0, 3.0]])
    recorder.before()
    optimizer.step()
    steps = recorder.after()
    assert set(steps) == {"weight"}
    assert steps["weight"].norm == pytest.approx(math.sqrt(50))
    assert steps["weight"].angle == pytest.approx(math.pi / 4)
    assert steps["weight"].cosine == pytest.approx(0.0, abs=1e-6) and steps["weight"].level == "channel"
    weight.grad = weight.detach().clone()
    recorder.before()
    assert recorder.after()["weight"].level is None


def test_rayleigh_quotient_is_scale_invariant():
    eigenvalues = torch.tensor([1.0, 3.0])
    assert rayleigh_quotient(torch.tensor([[2.0, 0.0]]), eigenvalues) == 1.0
    assert rayleigh_quotient(torch.tensor([[5.0, 5.0]]), eigenvalues) == 2.0


@pytest.mark.parametrize(("plain", "projected", "rate"), [("SGD", "SGDP", 0.2), ("Adam", "AdamP", 0.03)])
def test_the_phenomenon_of_the_paper(plain, projected, rate):
    """Momentum inflates the norm, larger norms make smaller turns, and the projection hinders both."""
    one, other = (run_toy(name, rate, 150, seed=0) for name in (plain, projected))
    assert one["norm"][-1] > 2 > 1.3 > other["norm"][-1] > 1
    assert one["angle"][20] < other["angle"][20]
    assert other["gap"][-1] < 0.5 * one["gap"][-1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_convolutions_before_batch_normalisation_pass_at_channel_level(name):
    torch.manual_seed(0)
    network = normalised_network()
    convolutions = {key: p for key, p in network.named_parameters() if p.ndim == 4}
    optimizer = OPTIMIZERS[name](network.parameters(), 1e-2)
    recorder = StepRecorder(convolutions)
    images, labels = torch.rand(32, 1, 28, 28), torch.randint(10, (32,))
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        recorder.before()
        optimizer.step()
        steps = recorder.after()
        assert [step.level for step in steps.values()] == ["channel"] * 3
    assert isinstance(optimizer, AdamP | SGDP) == name.endswith("P")
