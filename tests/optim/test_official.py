"""AdamP and SGDP against the authors' package."""

import adamp
import pytest
import torch

from trl_ext.optim import SGDP, AdamP


def tensors(dtype=torch.float32):
    """One of each kind: name, shape and how its loss depends on it."""
    torch.manual_seed(0)
    shapes = {
        "vector": (7,), "matrix": (6, 5), "row_invariant": (6, 5), "layer_invariant": (6, 5), "kernel": (4, 3, 2, 2),
        "kernel_invariant": (4, 3, 2, 2), "zero_grad": (3, 4), "zero_weight": (3, 4), "tiny_grad": (3, 4),
    }  # fmt: skip
    params = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    params["zero_weight"].zero_()
    return params


def gradients(params, step):
    """Gradients that are exactly orthogonal to the weight, in rows or as a whole, where the name says so."""
    generator = torch.Generator().manual_seed(1000 + step)
    grads = {}
    for name, param in params.items():
        grad = torch.randn(param.shape, generator=generator)
        weight = param.detach().float()
        if name in ("row_invariant", "kernel_invariant"):
            rows, flat = grad.reshape(len(grad), -1), weight.reshape(len(weight), -1)
            rows -= flat * (rows * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True)
            grad = rows.view(param.shape)
        elif name == "layer_invariant":
            grad -= weight * (grad * weight).sum() / weight.square().sum()
        elif name == "zero_grad":
            grad.zero_()
        elif name == "tiny_grad":
            grad *= 1e-9
        grads[name] = grad.to(param.dtype)
    return grads


def run(make, steps=50, dtype=torch.float32):
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors(dtype).items()}
    optimizer = make(params.values())
    for step in range(steps):
        for name, grad in gradients(params, step).items():
            params[name].grad = grad
        optimizer.step()
    return params, optimizer


def assert_equal(found, expected):
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_close(found, expected, atol=1e-6):
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-6, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


ADAM = [
    {},
    {"weight_decay": 0.1},
    {"nesterov": True, "weight_decay": 0.05, "wd_ratio": 0.3},
    {"delta": 0.5, "betas": (0.5, 0.8), "eps": 1e-3},
]
SGD = [
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "dampening": 0.1, "weight_decay": 0.01},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", ADAM)
def test_adamp_reference_is_the_official_one_to_the_last_bit(options, dtype):
    expected, _ = run(lambda params: adamp.AdamP(params, lr=1e-2, **options), dtype=dtype)
    found, _ = run(lambda params: AdamP(params, lr=1e-2, **options, foreach=False, fused=False), dtype=dtype)
    assert_equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SGD)
def test_sgdp_reference_is_the_official_one_to_the_last_bit(options, dtype):
    expected, _ = run(lambda params: adamp.SGDP(params, lr=1e-2, **options), dtype=dtype)
    found, _ = run(
        lambda params: SGDP(params, lr=1e-2, **options, project_momentum=True, foreach=False, fused=False),
        dtype=dtype,
    )
    assert_equal(found, expected)


@pytest.mark.parametrize("execution", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}])
@pytest.mark.parametrize("options", ADAM)
def test_adamp_production_is_the_official_one(options, execution):
    expected, _ = run(lambda params: adamp.AdamP(params, lr=1e-3, **options), steps=100)
    found, _ = run(lambda params: AdamP(params, lr=1e-3, **options, **execution), steps=100)
    assert_close(found, expected)


@pytest.mark.parametrize("options", ADAM)
def test_adamp_production_in_bf16_is_the_official_one(options):
    expected, _ = run(lambda params: adamp.AdamP(params, lr=1e-2, **options), steps=100, dtype=torch.bfloat16)
    found, _ = run(lambda params: AdamP(params, lr=1e-2, **options), steps=100, dtype=torch.bfloat16)
    assert_equal(found, expected)


@pytest.mark.parametrize("execution", [{}, {"foreach": True}, {"capturable": True}])
@pytest.mark.parametrize("options", SGD)
def test_sgdp_production_is_the_official_one(options, execution):
    expected, _ = run(lambda params: adamp.SGDP(params, lr=1e-2, **options), steps=100)
    found, _ = run(lambda params: SGDP(params, lr=1e-2, **options, project_momentum=True, **execution), steps=100)
    assert_close(found, expected)
