"""Tensors that are not what they were, or no plain memory: each gets a step or a clear error, and no crash."""

import subprocess
import sys

import adamp
import pytest
import torch

from tests.helpers.optim import copy_of, local_of, params_of, update_in_c
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.kernels import cpu
from trl_ext.optim.kernels.compilation import compiled_library


class Wrapper(torch.Tensor):
    """Two tensors in the guise of one, as quantised weights are; it has no memory of its own."""

    @staticmethod
    def __new__(cls, first, second):
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype)

    def __init__(self, first, second):
        self.first, self.second = first, second

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        first = [arg for arg in torch.utils._pytree.tree_leaves((args, kwargs or {})) if isinstance(arg, Wrapper)]
        opened = torch.utils._pytree.tree_map_only(Wrapper, lambda t: t.first + t.second, (args, kwargs or {}))
        result = function(*opened[0], **opened[1])
        if function._schema.name.endswith("_") and first and isinstance(args[0], Wrapper):
            args[0].first, args[0].second = opened[0][0], torch.zeros_like(opened[0][0])
            return args[0]
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: Wrapper(t, torch.zeros_like(t)) if first else t, result
        )


def resized(optimizer, param, change):
    """Structured pruning or growth: the weight and its state change in their place."""
    param.data = change(param.data)
    state = optimizer.state[param]
    for name in optimizer.MOMENTS:
        state[name] = change(state[name])
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(7))


def shrunk():
    for rows, kept in ((60_000, 600), (4000, 3), (40, 39)):
        for in_place in (False, True):
            weight = torch.nn.Parameter(torch.randn(rows, 30))
            weight.grad = torch.randn_like(weight)
            optimizer = AdamP([weight])
            optimizer.step()
            resized(optimizer, weight, lambda t, n=kept, c=in_place: t[:n] if c else t[:n].clone())
            optimizer.step()
            optimizer.step()
            assert torch.isfinite(weight).all() and optimizer.report()["0.0"]["steps"] == 3


def freed():
    def zero_storage(tensor):
        tensor.untyped_storage().resize_(0)

    def half_storage(tensor):
        size = tensor.untyped_storage().nbytes()
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(size // 2)

    for cls in (AdamP, SGDP):
        for change in (zero_storage, half_storage):
            for what in ("weight", "grad", *cls.MOMENTS):
                weight = torch.nn.Parameter(torch.randn(300, 30))
                weight.grad = torch.randn_like(weight)
                optimizer = cls([weight], **({"momentum": 0.9} if cls is SGDP else {}))
                optimizer.step()
                tensors = {"weight": weight.data, "grad": weight.grad, **optimizer.state[weight]}
                change(tensors[what])
                with pytest.raises(RuntimeError, match="does not hold it"):
                    optimizer.step()


def wrapped():
    for options in ({}, {"fused": True}, {"foreach": False, "fused": False}):
        inner, start = torch.randn(6, 5), torch.randn(6, 5)
        weight = torch.nn.Parameter(Wrapper(start.clone(), torch.zeros(6, 5)))
        plain = torch.nn.Parameter(start.clone())
        weight.grad, plain.grad = Wrapper(inner, torch.zeros(6, 5)), inner.clone()
        optimizer, reference = AdamP([weight], **options), AdamP([plain])
        try:
            optimizer.step()
        except (RuntimeError, NotImplementedError, TypeError) as error:  # What a subclass can't do, it says itself
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            continue
        reference.step()
        torch.testing.assert_close((weight.first + weight.second).detach(), plain.detach())
    weight = torch.nn.Parameter(Wrapper(torch.randn(6, 5), torch.zeros(6, 5)))
    weight.grad = torch.randn(6, 5)
    optimizer = AdamP([weight], capturable=True)
    with pytest.raises(RuntimeError, match="not plain memory"):
        optimizer.step()


def odd():
    """Negated, expanded, misaligned and overlapping tensors, and a gradient in another order."""
    weight = torch.nn.Parameter(torch.randn(8, 8))
    grads = [
        torch.randn(8, 8, dtype=torch.complex64).conj().imag, torch.randn(1, 1).expand(8, 8), torch.randn(8, 8).t(),
        torch.randn(100).as_strided((8, 8), (1, 1)), weight.detach(),
    ]  # fmt: skip
    other = torch.nn.Parameter(weight.detach().clone())
    optimizer, reference = AdamP([weight], lr=1e-3), adamp.AdamP([other], lr=1e-3)
    for grad in grads:
        other.grad = grad.resolve_neg().clone(memory_format=torch.contiguous_format)
        weight.grad = grad
        optimizer.step()
        reference.step()
        if grad is not grads[-1]:
            torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-5, atol=1e-6)
    raw = bytearray(4 * 64 + 2)
    for cls, options in ((AdamP, {}), (SGDP, {"momentum": 0.9})):
        crooked = torch.nn.Parameter(torch.frombuffer(raw, dtype=torch.float32, count=64, offset=2).view(8, 8))
        crooked.grad = torch.ones(8, 8)
        cls([crooked], **options).step()


CASES = {case.__name__: case for case in (shrunk, freed, wrapped, odd)}


def test_no_input_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "tests.optim.test_memory", *CASES],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-len(CASES) :] == list(CASES)


@pytest.mark.parametrize("execution", [{}, {"foreach": False, "fused": False}])
@pytest.mark.parametrize("rows", [3, 9])
def test_a_weight_that_was_cut_or_grown_steps_as_the_official_one(rows, execution):
    def change(tensor):
        grown = torch.cat([tensor, torch.full_like(tensor, 0.01)])
        return grown[:rows].clone()

    ours, theirs = params_of((6, 5))[0], params_of((6, 5))[0]
    optimizer, official = AdamP([ours], lr=1e-2, **execution), adamp.AdamP([theirs], lr=1e-2)
    official.MOMENTS = AdamP.MOMENTS  # For `resized`
    for step in range(6):
        if step == 3:
            resized(optimizer, ours, change)
            resized(official, theirs, change)
        for each in (optimizer, official):
            each.step()
    assert ours.shape == (rows, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# Columns of the table, with what no tensor allows
WRONG = {
    "WEIGHT": 0, "FIRST": 0, "SECOND": 0, "STEP": 0, "WEIGHT_LENGTH": 100, "GRAD_LENGTH": 209, "FIRST_LENGTH": 0,
    "SECOND_LENGTH": -1, "SIZE": 1000, "ROW_SIZE": 0, "OFFSET": 7, "NUMEL": 217, "LEVEL": 9, "DTYPE": 4, "GROUP": 1,
}  # fmt: skip


def test_the_kernels_refuse_what_does_not_fit():
    if compiled_library() is None:
        pytest.skip("no C compiler")
    local = local_of((30, 7))
    crooked = {"WEIGHT": local.flat.data_ptr() + 2, "STEP": 3, "GRAD": 3}
    for column, value in [*WRONG.items(), ("GROUP", -1), ("LEVEL", 0), ("SIZE", -7), ("OFFSET", -7), *crooked.items()]:
        copied = copy_of(local)
        found, hits, _ = update_in_c(copied, **{column: value})
        assert found == -1 and hits == [0, 0], column
        assert torch.equal(copied.flat, local.flat), column
        with pytest.raises(RuntimeError, match="smaller than its layout"):
            cpu._check(found)
    copied = copy_of(local)
    assert update_in_c(copied, GRAD=0) == (0, [0, 0], 0) and torch.equal(copied.flat, local.flat)
    assert update_in_c(copied)[0] == 1 and not torch.equal(copied.flat, local.flat)


def test_one_optimizer_for_each_parameter_shares_its_work_memory():
    params = params_of(*[(64, 64)] * 8)
    optimizers = [AdamP([param], delta=1e6, fused=False) for param in params]
    for optimizer in optimizers:
        optimizer.step()
    held = {tensor.data_ptr() for optimizer in optimizers for tensor in optimizer._scratch.tensors.values()}
    assert len(held) == 1
    assert len({id(optimizer._scratch) for optimizer in optimizers}) == 1


if __name__ == "__main__":
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        CASES[name]()
        sys.stdout.write(f"{name}\n")
