"""AdamO and AdamH against float64 loops over the equations, and as torch optimizers."""

import copy

import pytest
import torch

from tests.helpers.optim import params_of, run
from tests.helpers.tiny import tiny_model
from trl_ext.optim import AdamH, AdamO, hidden_matrices, optimizer_factory


BOTH = [(AdamO, {"radial_ratio": 0.7}), (AdamH, {"adam_ratio": 0.3})]
SHAPES = (6, 4), (4, 3, 2), (5,)
VIEWS = {"layer": lambda shape: (1, -1), "channel": lambda shape: (shape[0], -1), "head/2": lambda s: (s[0] // 2, -1)}


def slow(cls, params, view, num_steps, lr, decay, ratio):
    """Row by row and number by number, from the papers' words."""
    params = [param.detach().double() for param in params]
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for step in range(1, num_steps + 1):
        for number, param in enumerate(params):
            shape = (1, -1) if param.ndim < 2 else VIEWS[view](param.shape)
            rows, grads = param.view(shape), gradient(param, step, number).double().view(shape)
            first, second = (moment.view(shape) for moment in moments[number])
            for row, grad, m, v in zip(rows, grads, first, second, strict=True):
                norm, is_matrix = row.norm(), param.ndim > 1
                unit = row / norm
                radial = grad @ unit
                used = grad - radial * unit if cls is AdamO and is_matrix else grad
                m.copy_(0.9 * m + 0.1 * used)
                v.copy_(0.999 * v + 0.001 * used**2)
                update = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                if not is_matrix:
                    rate = lr * ratio if cls is AdamH else lr
                    row.copy_(row - rate * decay * row - rate * update)
                elif cls is AdamO:
                    tangential = update - (update @ unit) * unit
                    length = norm - lr * ratio * radial - lr * decay * norm
                    row.copy_(length * unit - lr * tangential)
                else:
                    moved = row - lr * norm * update / update.norm()
                    row.copy_(norm * moved / moved.norm())
    return params


def gradient(param, step, number):
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(100 * step + number))


def stepped(cls, params, num_steps=6, **options):
    optimizer = cls(params, lr=0.05, weight_decay=0.1, **options)
    for step in range(1, num_steps + 1):
        for number, param in enumerate(params):
            param.grad = gradient(param, step, number).to(param.dtype)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("cls", "options"), BOTH)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("execution", [{}, {"fused": False}, {"capturable": True}])
def test_the_step_is_the_equation(cls, options, view, execution):
    params = params_of(*SHAPES)
    expected = slow(cls, params, view, 6, 0.05, 0.1, next(iter(options.values())))
    optimizer = stepped(cls, params, projection=None if view == "layer" else view, **options, **execution)
    for found, wanted in zip(params, expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=2e-6)
    level = "layer" if view == "layer" else "channel"
    assert all(row[level] == 1 and row["steps"] == 6 for row in optimizer.report().values())


@pytest.mark.parametrize(("cls", "options"), BOTH)
@pytest.mark.parametrize("execution", [{"maximize": True}, {"state_dtype": torch.float32, "dtype": torch.bfloat16}])
def test_other_executions(cls, options, execution):
    dtype = execution.pop("dtype", torch.float32) if "dtype" in execution else torch.float32
    params, same = params_of(*SHAPES, dtype=dtype), params_of(*SHAPES, dtype=dtype)
    stepped(cls, params, **options, **execution)
    stepped(cls, same, fused=False, **options, **execution)
    for found, wanted in zip(params, same, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-6)


def test_a_sphere_is_not_left():
    params = params_of((30, 20), (7,))
    before = params[0].norm(dtype=torch.float64)
    optimizer = stepped(AdamH, params, 200, adam_ratio=0.3)
    assert float(params[0].norm(dtype=torch.float64) / before) == pytest.approx(1, abs=2e-6)
    assert 0.03 < optimizer.report()["0.0"]["effective_step_size"] <= 0.05


def test_the_radial_gradient_does_not_reach_the_moments():
    """A gradient along the weight is all norm: Adam's part does not move, SGD's does."""
    (weight,) = params_of((4, 3), dtype=torch.float64)
    optimizer, before = AdamO([weight], lr=0.1, radial_ratio=0.5), weight.detach().clone()
    weight.grad = 2 * before
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5 * 2), rtol=1e-6, atol=1e-7)
    assert float(optimizer.state[weight]["exp_avg_sq"].max()) < 1e-24


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_resumed_run_is_the_same(cls, options):
    params = params_of(*SHAPES)
    optimizer = stepped(cls, params, 3, **options)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = cls(others, lr=0.05, weight_decay=0.1, **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, parameters in ((optimizer, params), (resumed, others)):
        for number, param in enumerate(parameters):
            param.grad = gradient(param, 9, number)
        one.step()
    assert all(torch.equal(found, wanted) for found, wanted in zip(others, params, strict=True))


@pytest.mark.parametrize("execution", [{}, {"fused": False}])
def test_a_weight_of_zeros_has_no_sphere(execution):
    weight = torch.nn.Parameter(torch.zeros(3, 4))
    weight.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"adapter.lora_B.* of shape \(3, 4\) is zero.*projection="):
        AdamH([("adapter.lora_B", weight)], **execution).step()
    AdamH([("adapter.lora_B", weight)], projection={"lora_B": "none", "": "layer"}, **execution).step()
    assert bool(weight.all())


def test_without_views_it_is_adamw():
    found, _ = run(lambda params: AdamO(params, lr=1e-2, weight_decay=0.1, projection="none"), steps=10)
    expected, _ = run(lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1), steps=10)
    for name, param in expected.items():
        torch.testing.assert_close(found[name], param, rtol=1e-5, atol=5e-6)


def test_by_name_embeddings_and_heads_are_adamws():
    model = tiny_model()
    optimizer = optimizer_factory("adamh", weight_decay=0.1, lr=0.01)(model)
    model(torch.tensor([[3, 4, 5]])).logits.logsumexp(-1).sum().backward()
    norms = {name: float(param.detach().norm()) for name, param in model.named_parameters()}
    optimizer.step()
    report = optimizer.report()
    kept = {name for name, row in report.items() if row["layer"] == 1}
    matrices = {name for name, param in model.named_parameters() if param.ndim > 1}
    assert matrices - kept == {name for name in matrices if "embed" in name or "lm_head" in name}
    assert matrices - kept
    for name in kept:
        assert report[name]["weight_norm"] == pytest.approx(norms[name], rel=1e-6)
    assert hidden_matrices(torch.nn.Linear(3, 3)) == {"": "layer"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda params: AdamO(params, radial_ratio=-1.0), "`radial_ratio` must be finite and at least 0"),
        (lambda params: AdamH(params, adam_ratio="a"), "`adam_ratio` must be a number"),
        (lambda params: AdamH(params, projection="head/0"), "projection"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make(params_of((3, 3)))
