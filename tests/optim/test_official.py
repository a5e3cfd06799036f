"""AdamP and SGDP against the authors' package."""

import adamp
import pytest
import torch

from tests.helpers.optim import assert_close, assert_equal, gradients, run, tensors
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.adamp import adamp_
from trl_ext.optim.sgdp import sgdp_


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


@pytest.mark.parametrize("options", ADAM)
def test_the_default_step_is_the_equation(options):
    """`adamp_` called by hand, against what a user gets who sets nothing."""
    found, _ = run(lambda params: AdamP(params, lr=1e-3, **options), steps=20)
    expected = tensors()
    moments = {name: (torch.zeros_like(param), torch.zeros_like(param)) for name, param in expected.items()}
    group = AdamP(expected.values(), lr=1e-3, **options).param_groups[0]
    settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")}
    beta1, beta2 = group["betas"]
    for step in range(20):
        for name, grad in gradients(expected, step).items():
            adamp_(expected[name], grad, *moments[name], step + 1, beta1=beta1, beta2=beta2, **settings)
    assert_close({name: param.detach() for name, param in found.items()}, expected)


@pytest.mark.parametrize("options", SGD)
def test_the_default_step_of_sgdp_is_the_equation(options):
    found, _ = run(lambda params: SGDP(params, lr=1e-2, **options), steps=20)
    expected = tensors()
    momenta = {name: torch.zeros_like(param) for name, param in expected.items()}
    group = SGDP(expected.values(), lr=1e-2, **options).param_groups[0]
    names = ("lr", "momentum", "weight_decay", "dampening", "nesterov", "eps", "delta", "wd_ratio", "project_momentum")
    for step in range(20):
        for name, grad in gradients(expected, step).items():
            sgdp_(expected[name], grad, momenta[name], **{option: group[option] for option in names})
    assert_close({name: param.detach() for name, param in found.items()}, expected)
