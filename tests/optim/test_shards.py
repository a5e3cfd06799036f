"""Layouts that can't be read; those that can are in tests/distributed/test_optimizer_shards.py."""

import pytest
import torch

from tests.helpers.optim import params_of
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.shards import UnknownShardsError


BOTH = [(AdamP, {}), (SGDP, {"momentum": 0.9})]


def flattened(optimizer):
    """What an unknown wrapper does: all of a group in one tensor."""
    group = optimizer.param_groups[0]
    group["params"] = [torch.nn.Parameter(torch.cat([param.detach().flatten() for param in group["params"]]))]
    group["params"][0].grad = torch.ones_like(group["params"][0])


@pytest.mark.parametrize(("cls", "options"), BOTH)
def test_unknown_shards(cls, options):
    params = params_of((4, 3), (3, 5), (5,))
    optimizer = cls(params, lr=0.1, **options)
    flattened(optimizer)
    with pytest.raises(UnknownShardsError, match=r'shape \(32,\).*on_unknown_shards="adamw"'):
        optimizer.step()
    assert not optimizer.state

    optimizer = cls(params, lr=0.1, on_unknown_shards="adamw", **options)
    flattened(optimizer)
    optimizer.step()
    assert optimizer.report() == {}


def test_a_parameter_flattened_in_place_is_noticed():
    params = params_of((4, 3))
    optimizer = AdamP(params)
    params[0].data = params[0].data.flatten()
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(UnknownShardsError, match="had 2 dimensions"):
        optimizer.step()


def test_replaced_parameters_of_the_same_shapes_are_fine():
    params = params_of((4, 3), (5,))
    optimizer = AdamP(params, lr=0.1)
    optimizer.param_groups[0]["params"] = params_of((4, 3), (5,))
    del params
    optimizer.step()
    assert optimizer.report()["0.0"]["steps"] == 1
