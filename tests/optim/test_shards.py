"""Layouts that can't be read; those that can are in tests/distributed/test_optimizer_shards.py."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Partial, Shard

from tests.helpers.optim import params_of
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.shards import RowPieces, UnknownShardsError, _in_order_of_cutting


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


@pytest.mark.parametrize(
    "placements",
    [(Partial(), Shard(0)), (SimpleNamespace(dim=0, split_factor=3), Shard(0))],
    ids=["a sum", "cut by what is not there"],
)
def test_distributed_tensors_that_are_cut_otherwise(placements):
    param = SimpleNamespace(
        shape=(8, 4), dtype=torch.float32, placements=placements, device_mesh=SimpleNamespace(size=lambda dim: 2)
    )
    with pytest.raises(UnknownShardsError, match="placements"):
        _in_order_of_cutting(param, list(enumerate(placements)))


def test_pieces_of_rows():
    """The second half of the columns of the last three of five rows."""
    shard = RowPieces(0, (5, 4), 0, 4, 6, (0,), None, region=(slice(2, 5), slice(2, 4)))
    whole = torch.arange(20).view(5, 4)
    assert shard.cut(whole).tolist() == [10, 11, 14, 15, 18, 19]
    assert (shard.row_size, shard.whole_row_size, shard.whole_numel, list(shard.cut_rows)) == (2, 4, 20, [*range(5)])
    found = torch.zeros(5, 4, dtype=torch.int64)
    shard.paste(shard.cut(whole), found)
    assert torch.equal(found[2:, 2:], whole[2:, 2:]) and found.sum() == whole[2:, 2:].sum()
