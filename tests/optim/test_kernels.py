"""The compiled CPU kernels, and those for GPUs, against the paths in torch."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.gradients import gradient_of
from tests.helpers.optim import copy_of, local_of, update_in_c
from trl_ext.optim import AdamP
from trl_ext.optim.kernels import compilation, cpu
from trl_ext.optim.shards import Shard
from trl_ext.optim.weights import LocalTensor, Weight


def updated(local, by_rows, compiled):
    """Dot products and tensors after both passes, by the kernels or in torch."""
    optimizer, copied = AdamP([torch.nn.Parameter(torch.ones(1))]), copy_of(local)
    weight = Weight(copied, local.shards[0], by_rows=by_rows)
    cpu.measure(weight) if compiled else optimizer._measure(weight)
    coefficient = torch.linspace(-0.5, 0.5, weight.dots.size(1))
    dots = weight.dots.float()
    dots[0] = dots[0].abs()  # The test does not ask for its sign, which `maximize` may turn
    apply = cpu.apply if compiled else optimizer._apply_in_blocks
    apply(weight, torch.tensor(0.9), coefficient)
    return dots, copied.flat, *copied.moments


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    if compilation.compiled_library() is None:
        pytest.skip("no C compiler")


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    ("shape", "offset", "numel"),
    [
        ((30, 7), 0, None),
        ((30, 7), 5, 100),
        ((2, 9000), 0, None),
        ((3, 2, 2), 1, 2),
        ((1, 20), 0, None),
        ((150, 9), 3, 1300),
        ((30, 49), 0, None),
    ],
)
def test_passes(shape, offset, numel, by_rows, options):
    local = local_of(shape, offset, numel, **options)
    for found, expected in zip(updated(local, by_rows, True), updated(local, by_rows, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_rows_step_as_the_reference(dtype):
    """More than one block of rows, of lengths that neither a block nor a vector divides, which pass in turn."""
    shapes = [(700, 1), (400, 1, 1, 3), (150, 1, 3, 3), (70, 16), (50, 25), (45, 3, 3, 3), (30, 1, 7, 7), (12, 127)]
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ours, exact = ([torch.nn.Parameter(start.to(kind)) for start in starts] for kind in (dtype, torch.float64))
    common = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer = AdamP(ours, **common, state_dtype=torch.float32)
    reference = AdamP(exact, **common, foreach=False, fused=False)
    for kind in ("channel", "channel", "layer", "generic", "layer"):
        for param, other in zip(ours, exact, strict=True):
            param.grad = gradient_of(kind, other, generator).to(dtype)
            other.grad = param.grad.double()
        optimizer.step()
        reference.step()
        for param, other in zip(ours, exact, strict=True):
            torch.testing.assert_close(param.double(), other, rtol=float(torch.finfo(dtype).eps) * 4, atol=1e-6)
            other.data.copy_(param.data)  # Rounding would decide between levels
    (plan,) = optimizer._plans
    assert len(plan.items) == len(shapes)
    if dtype == torch.float32:
        rates = [(row["channel"], row["layer"]) for row in optimizer.report().values()]
        assert rates == [(row["channel"], row["layer"]) for row in reference.report().values()]
        assert rates[1:] == [(0.4, 0.4)] * (len(shapes) - 1)


def test_threads_share_a_weight(monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PER_THREAD", 16)
    local = local_of((30, 7), 4, 150)
    expected = updated(local, True, False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(cpu._pieces(150)) == 3
    for found, wanted in zip(updated(local, True, True), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}])
@pytest.mark.parametrize("shape", [(30, 7), (9, 16), (5, 40), (2, 300), (40, 1)])
def test_the_short_way_rounds_as_the_long_one(shape, options):
    """AdamW's step after a test alone, or the dot products first and then the step; and the table as both."""
    local = local_of(shape, weight_decay=0.5, lr=0.1, delta=1e-9, **options)
    short, long = (Weight(copy_of(local), local.shards[0]) for _ in range(2))
    assert cpu.test(short) is None
    cpu.step(short)
    cpu.measure(long)
    assert cpu.find_level(long) is None
    cpu.apply(long, 0.95, torch.zeros(1))
    assert torch.equal(short.local.flat, long.local.flat)
    assert not torch.equal(short.local.flat, local.flat)
    for was_projected in (0, 1):
        copied = copy_of(local)
        assert update_in_c(copied, was_projected) == (1, [0, 0], 0)
        assert torch.equal(copied.flat, long.local.flat)


def test_what_the_last_step_did_has_no_influence():
    """Weights that pass now and then take both ways."""
    found = []
    for always_long in (False, True):
        weight = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
        optimizer = AdamP([weight], lr=1e-2, weight_decay=0.1, delta=1.0)
        generator, ways = torch.Generator().manual_seed(1), []
        for _ in range(30):
            weight.grad = torch.randn(8, 6, generator=generator)
            for plan in optimizer._plans:
                if always_long:
                    plan.was_projected[:] = 1
                ways.append(int(plan.was_projected[0]))
            optimizer.step()
        assert 0.2 < next(iter(optimizer.report().values()))["layer"] < 0.9
        assert always_long or {0, 1} == set(ways)
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("delta", [0.0, 1e6])
def test_autograd_notices_the_step(delta):
    """A step between forward and backward, projected or not."""
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = AdamP([weight], delta=delta)
    inputs = torch.ones(2, 3, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    for _ in range(2):  # Both ways
        loss = (inputs @ weight.t()).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_sums_are_exact_enough():
    """Ten million products of one sign, where a sum in float32 has lost three digits."""
    torch.manual_seed(0)
    flat, grad = torch.rand(10**7), torch.rand(10**7)
    group = AdamP([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    shard = Shard(0, (10, 10**6), 0, 0, 10**7)
    local = LocalTensor(flat, group, [shard], flat, grad, (torch.zeros(10**7), torch.zeros(10**7)), 1)
    weight = Weight(local, shard, by_rows=False)
    cpu.measure(weight)
    expected = torch.tensor([(grad.double() * flat).sum(), grad.double().square().sum(), flat.double().square().sum()])
    torch.testing.assert_close(weight.totals()[:3].double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false"])
def test_without_a_compiler_torch_does_it(compiler, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation._build.cache_clear()
    compilation.compiled_library.cache_clear()
    try:
        for fused in (None, True):
            weight = torch.nn.Parameter(torch.ones(4, 3))
            weight.grad = torch.ones(4, 3)
            AdamP([weight], fused=fused).step()
            assert float(weight[0, 0]) == pytest.approx(1 - 1e-3)
            warned = [str(warning.message) for warning in recwarn if "torch's own" in str(warning.message)]
            assert len(warned) == (fused is True)
    finally:
        compilation._build.cache_clear()
        compilation.compiled_library.cache_clear()


def test_triton_kernels_in_the_interpreter():
    """The GPU's kernels, step by step on the CPU; `make kernels` takes every case."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.plan_cases"], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == 1 + 7 + 3 + 2 + 3 + 3
