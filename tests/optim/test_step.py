"""AdamP and SGDP as torch optimizers: conventions, execution, checkpoints and the report."""

import copy
import pickle

import adamp
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.optim import assert_close, assert_equal, gradients, params_of, run, tensors
from trl_ext.optim import SGDP, AdamP


BOTH = [(AdamP, {}), (SGDP, {"momentum": 0.9})]


class HostReads(TorchDispatchMode):
    """Counts what copies a value from a device to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function) or "is_nonzero" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("cls", "options"), BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capturable", [False, True])
def test_host_is_read_once_for_all_tensors(cls, options, dtype, capturable, monkeypatch):
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    params = [torch.nn.Parameter(tensor) for tensor in tensors(dtype).values()]
    # On a CPU compiled kernels read what they like, on a GPU nothing may
    monkeypatch.setattr(cls, "CPU_KERNELS", None)
    optimizer = cls(params, lr=1e-3, capturable=capturable, **options)
    for step in range(3):
        for param, grad in zip(params, gradients(tensors(dtype), step).values(), strict=True):
            param.grad = grad
        with HostReads() as reads:
            optimizer.step()
        assert reads.count == 0
        assert len(lists) == (0 if capturable else step + 1)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1}])
def test_channels_last_equals_contiguous(options):
    shapes = (4, 3, 2, 2)
    plain = params_of(shapes)[0]
    last = torch.nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    found = {}
    for name, param in (("plain", plain), ("last", last)):
        optimizer = AdamP([param], lr=1e-2, **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            grad = torch.randn(shapes, generator=generator)
            rows, weight = grad.flatten(1), param.detach().flatten(1)
            rows -= weight * ((rows * weight).sum(1) / weight.square().sum(1)).unsqueeze(1)
            param.grad = rows.view(shapes).contiguous()  # Not in the parameter's own order
            optimizer.step()
        found[name] = param.detach()
        assert optimizer.report()["0.0"]["channel"] == 1
    torch.testing.assert_close(found["last"], found["plain"], rtol=1e-5, atol=1e-6)
    assert found["last"].is_contiguous(memory_format=torch.channels_last)


def test_transposed_weights_take_the_reference():
    weight = torch.nn.Parameter(torch.randn(5, 6).t())
    official = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    ours, theirs = AdamP([weight], weight_decay=0.1), adamp.AdamP([official], weight_decay=0.1)
    for step in range(5):
        grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
        weight.grad, official.grad = grad, grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(weight, official)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_maximize_and_closure(cls, options):
    first, second = params_of((4, 3)), params_of((4, 3))
    up, down = cls(first, lr=1e-2, maximize=True, **options), cls(second, lr=1e-2, **options)

    def closure():
        assert torch.is_grad_enabled()
        up.zero_grad()
        loss = first[0].square().sum()
        loss.backward()
        return loss

    expected = float(first[0].detach().square().sum())
    second[0].grad = -2 * second[0].detach()
    assert float(up.step(closure).detach()) == pytest.approx(expected)
    down.step()
    torch.testing.assert_close(first[0], second[0])


@pytest.mark.parametrize("execution", [{"foreach": False, "fused": False}, {}, {"capturable": True}])
def test_tensor_learning_rate(execution):
    expected, _ = run(lambda params: AdamP(params, lr=1e-2, weight_decay=0.1), steps=10)
    found, _ = run(lambda params: AdamP(params, lr=torch.tensor(1e-2), weight_decay=0.1, **execution), steps=10)
    assert_close(found, expected, atol=2e-6)


def test_differentiable():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def updated(weight, grad):
        param = weight.clone()
        param.grad = grad
        AdamP([param], lr=0.1, weight_decay=0.1, differentiable=True).step()
        return param

    assert torch.autograd.gradcheck(updated, (weight, grad))


def test_without_projection_it_is_adamw():
    found, _ = run(lambda params: AdamP(params, lr=1e-2, weight_decay=0.1, projection="none"))
    expected, _ = run(lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1))
    assert_close(found, expected, atol=5e-6)


@pytest.mark.parametrize("view", ["layer", "channel"])
@pytest.mark.parametrize("execution", [{}, {"foreach": False, "fused": False}])
def test_known_view_is_a_test_that_always_passes(view, execution):
    """`delta` so large that the channel view always passes is the official optimizer's way to say so."""

    def make(params, **options):
        return AdamP(
            [{"params": [p for p in params if p.ndim == 2]}], lr=1e-3, weight_decay=0.1, **options, **execution
        )

    found, optimizer = run(lambda params: make(params, projection=view))
    assert all(row[view] == 1 for row in optimizer.report().values())
    if view == "channel":
        expected, _ = run(lambda params: make(params, delta=1e6))
        assert_close({name: found[name] for name in ("matrix", "row_invariant")}, expected | {} and {
            name: expected[name] for name in ("matrix", "row_invariant")
        })  # fmt: skip
    weight = found["layer_invariant"].detach()
    assert torch.isfinite(weight).all()


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("execution", [{"foreach": False, "fused": False}, {}, {"capturable": True}])
def test_state_comes_from_and_goes_to_the_official_package(execution):
    options = {"lr": 1e-2, "weight_decay": 0.1}
    params, official = run(lambda p: adamp.AdamP(p, **options), steps=5)
    ours = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    optimizer = AdamP(ours.values(), **options, **execution)
    optimizer.load_state_dict(copy.deepcopy(official.state_dict()))
    back = {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}
    again = adamp.AdamP(back.values(), **options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(5, 10):
        for name, grad in gradients(params, step).items():
            params[name].grad, ours[name].grad, back[name].grad = grad, grad.clone(), grad.clone()
        official.step()
        optimizer.step()
        again.step()
    assert_close(ours, params, atol=2e-6)
    assert_close(back, params, atol=2e-6)


@pytest.mark.parametrize(("cls", "options"), BOTH)
@pytest.mark.parametrize("execution", [{}, {"capturable": True}])
def test_resumed_run_equals_the_uninterrupted_one(cls, options, execution):
    options = {"lr": 1e-2, "weight_decay": 0.1, **options, **execution}
    whole, _ = run(lambda p: cls(p, **options), steps=10)
    params, first = run(lambda p: cls(p, **options), steps=5)
    second = cls(params.values(), **options)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    for step in range(5, 10):
        for name, grad in gradients(params, step).items():
            params[name].grad = grad
        second.step()
    assert_equal(params, whole)


def test_copies_and_pickles():
    _, optimizer = run(lambda params: AdamP(params, lr=1e-2), steps=2)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in again.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        again.step()
        assert again.state[again.param_groups[0]["params"][0]]["step"] == 3


def test_float32_state_of_bf16_parameters():
    params, optimizer = run(lambda p: AdamP(p, lr=1e-3, state_dtype=torch.float32), steps=3, dtype=torch.bfloat16)
    for param in params.values():
        assert param.dtype == torch.bfloat16 and optimizer.state[param]["exp_avg_sq"].dtype == torch.float32
    again = AdamP(params.values(), lr=1e-3, state_dtype=torch.float32)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param in params.values():
        assert torch.equal(again.state[param]["exp_avg"], optimizer.state[param]["exp_avg"])
        assert again.state[param]["exp_avg"].dtype == torch.float32


def test_float32_state_makes_the_update_of_float32_arithmetic():
    """From one bf16 weight, one step, rounded to the nearest."""
    weights = tensors(torch.bfloat16)
    for step in range(3):
        grads = gradients(weights, step)
        low = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
        high = {name: torch.nn.Parameter(w.float()) for name, w in weights.items()}
        for name, grad in grads.items():
            low[name].grad, high[name].grad = grad, grad.float()
        AdamP(low.values(), lr=1e-1, weight_decay=0.1, state_dtype=torch.float32).step()
        adamp.AdamP(high.values(), lr=1e-1, weight_decay=0.1).step()
        for name in weights:
            torch.testing.assert_close(low[name], high[name].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (512, 8)])
def test_stochastic_rounding_keeps_small_updates_on_average(shape):
    """An update of a tenth of a unit in the last place is lost when rounded to the nearest; kernels and torch."""
    num_steps = 40
    for stochastic in (False, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = AdamP([param], lr=2**-8 / 10, state_dtype=torch.float32, stochastic_rounding=stochastic)
        for _ in range(num_steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved = 1 - float(param.detach().float().mean())
        assert moved == (pytest.approx(num_steps * 2**-8 / 10, rel=0.05) if stochastic else 0)


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_stochastic_rounding_does_not_depend_on_the_random_state(cls, options):
    """Replicas whose random states differ, one of them stopped and resumed on the way."""
    found = []
    for seed in (0, 1):
        param = torch.nn.Parameter(torch.linspace(-1, 1, 600, dtype=torch.bfloat16).view(20, 30))
        bias = torch.nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.bfloat16))
        settings = {"lr": 1e-3, "state_dtype": torch.float32, "stochastic_rounding": True, **options}
        optimizer, rounded = cls([param, bias], **settings), []
        torch.manual_seed(seed)
        for step in range(6):
            generator = torch.Generator().manual_seed(step)
            for tensor in (param, bias):
                tensor.grad = torch.randn(tensor.shape, generator=generator).bfloat16()
            optimizer.step()
            rounded.append(param.detach().clone())
            if seed and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = cls([param, bias], **settings)
                optimizer.load_state_dict(state)
        found.append(rounded)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_noise_is_new_at_each_step():
    for cls, options in BOTH:
        param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = cls([param], lr=2**-9, state_dtype=torch.float32, stochastic_rounding=True, **options)
        moved = []
        for _ in range(3):
            before = param.detach().clone()
            param.grad = torch.full_like(param, 0.5)
            optimizer.step()
            moved.append(before != param.detach())
        assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])


# ---------------------------------------------------------------- report


def test_report():
    params, optimizer = run(lambda p: AdamP(p, lr=1e-2, weight_decay=0.1), steps=30)
    names = list(params)
    report = {names[int(key.split(".")[1])]: row for key, row in optimizer.report().items()}
    assert "vector" not in report
    assert report["row_invariant"]["channel"] == 1
    # A few rows may pass by chance as well
    assert report["layer_invariant"]["channel"] + report["layer_invariant"]["layer"] == pytest.approx(1)
    assert report["layer_invariant"]["layer"] > 0.9
    assert report["matrix"]["channel"] == 0 and report["matrix"]["layer"] < 0.5
    for name, row in report.items():
        assert row["steps"] == 30
        assert row["weight_norm"] == pytest.approx(float(params[name].norm()), rel=1e-5)
    # The angle that a step without new gradients turns the weight by, from the weights themselves
    state = optimizer.state[params["matrix"]]
    update = (state["exp_avg"] / (1 - 0.9**30)) / ((state["exp_avg_sq"] / (1 - 0.999**30)).sqrt() + 1e-8)
    weight = params["matrix"].detach()
    tangential = update - weight * (update * weight).sum() / weight.square().sum()
    expected = 1e-2 * float(tangential.norm() / weight.norm())
    assert report["matrix"]["effective_step_size"] == pytest.approx(expected, rel=1e-4)
    optimizer.projection_counts.reset()
    assert next(iter(optimizer.report().values()))["steps"] == 0


def test_projection_holds_the_norm_back():
    """The paper's phenomenon: momentum inflates the norm of a scale-invariant weight, the projection does not."""
    norms = {}
    for name, cls in (("SGDP", SGDP), ("SGD", torch.optim.SGD)):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(8, 8) / 8)
        optimizer = cls([weight], lr=0.1, momentum=0.9)
        for _ in range(100):
            optimizer.zero_grad()
            (weight / weight.norm() * torch.randn(8, 8)).sum().backward()
            optimizer.step()
        norms[name] = float(weight.norm())
    assert norms["SGDP"] < 0.8 * norms["SGD"]


def test_step_before_backward_does_nothing():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = AdamP([weight])
    optimizer.step()
    assert not optimizer.state and torch.equal(weight, torch.ones(2, 2))
    assert optimizer.report() == {}
