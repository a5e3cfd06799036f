"""Sharded matrices on one process; under wrappers Muon on them is tests/distributed/test_optimizer_shards.py's."""

import pytest
import torch

from recipes.experiments.minimal.muon import Muon, orthogonalized
from tests.helpers.optim import params_of
from trl_ext.optim import ShardedMatrices


def test_matrices_and_the_rest():
    matrix, vector, without = params_of((4, 3), (5,), (2, 2))
    without.grad = None
    optimizer = torch.optim.SGD([("a", matrix), ("b", vector), ("c", without)])
    matrices = ShardedMatrices(optimizer)
    (found,) = matrices.read()
    assert (found.name, found.shape, found.is_whole) == ("a", (4, 3), True)
    assert torch.equal(matrices.gather(found, matrix.grad), matrix.grad)
    found.part(matrix).zero_()
    assert not matrix.any()
    assert torch.equal(found.cut(torch.arange(12.0).view(4, 3)), torch.arange(12.0))
    (total,) = matrices.sums([found], [found.part(matrix.grad).square().sum().view(1)])
    torch.testing.assert_close(total.sum(), matrix.grad.square().sum())
    (rest,) = matrices.rest()
    assert rest.param is vector and torch.equal(rest.part(vector.grad), vector.grad)


def test_groups_that_come_later():
    first, second = params_of((4, 3), (3, 2))
    optimizer = torch.optim.SGD([first])
    matrices = ShardedMatrices(optimizer)
    optimizer.add_param_group({"params": [second]})
    assert [matrix.shape for matrix in matrices.read()] == [(4, 3), (3, 2)]


def test_elements_in_another_order_are_refused():
    weight = torch.nn.Parameter(torch.randn(3, 4).t())
    weight.grad = torch.ones(4, 3)
    (found,) = ShardedMatrices(torch.optim.SGD([weight])).read()
    with pytest.raises(RuntimeError, match="row by row"):
        found.part(weight)


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8), (4, 3, 2)])
def test_muon_turns_singular_values_to_one(shape):
    """What the iteration is made for: all of them between 0.6 and 1.3, times the root of the shape's ratio."""
    torch.manual_seed(0)
    update = orthogonalized(torch.randn(shape))
    assert update.shape == shape
    rows, columns = update.flatten(1).shape
    values = torch.linalg.svdvals(update.flatten(1)) / max(1, rows / columns) ** 0.5
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3


def test_muon_on_one_process():
    """Against its own words with whole tensors."""
    params, others = params_of((6, 4), (5,)), params_of((6, 4), (5,))
    optimizer, momenta = Muon(params, lr=0.1, momentum=0.9), [torch.zeros_like(other) for other in others]
    for step in range(3):
        for number, (param, other) in enumerate(zip(params, others, strict=True)):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * step + number))
            momenta[number].mul_(0.9).add_(param.grad, alpha=0.1)
            update = orthogonalized(momenta[number]) if other.ndim > 1 else momenta[number]
            other.data -= 0.1 * update
        optimizer.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other)
