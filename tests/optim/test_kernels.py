"""The compiled CPU kernels, and those for GPUs, against the paths in torch."""

import os
import subprocess
import sys

import pytest
import torch

from trl_ext.optim import AdamP, cpu_kernels
from trl_ext.optim.shards import Shard
from trl_ext.optim.weight import LocalTensor, Weight


def local_of(shape, offset=0, numel=None, **options):
    """Part of a weight in the middle of a flat tensor."""
    generator = torch.Generator().manual_seed(0)
    numel = torch.Size(shape).numel() if numel is None else numel
    flat, grad, exp_avg = (torch.randn(numel + 7, generator=generator) for _ in range(3))
    exp_avg_sq = torch.rand(numel + 7, generator=generator)
    group = {**AdamP([torch.nn.Parameter(torch.ones(1))], fused=True, **options).param_groups[0]}
    shard = Shard(0, shape, 3, offset, numel)
    return LocalTensor(flat, group, [shard], flat, grad, (exp_avg, exp_avg_sq), 5)


def updated(local, by_rows, compiled, num_threads=1):
    """Dot products and tensors after both passes, by the kernels or in torch."""
    optimizer = AdamP([torch.nn.Parameter(torch.ones(1))])
    copied = LocalTensor(
        local.param, {**local.group, "fused": compiled or None}, local.shards, local.flat.clone(), local.grad,
        tuple(moment.clone() for moment in local.moments), local.step,
    )  # fmt: skip
    weight = Weight(copied, local.shards[0], by_rows=by_rows)
    optimizer._measure(weight)
    coefficient = torch.linspace(-0.5, 0.5, weight.dots.size(1))
    dots = weight.dots.clone()
    dots[0] = dots[0].abs()  # The test does not ask for its sign, which `maximize` may turn
    optimizer._apply_blocks(weight, torch.tensor(0.9), coefficient)
    return dots, copied.flat, *copied.moments


@pytest.fixture(autouse=True)
def _needs_a_compiler():
    if cpu_kernels.compiled_library() is None:
        pytest.skip("no C compiler")


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"maximize": True}])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(
    ("shape", "offset", "numel"),
    [((30, 7), 0, None), ((30, 7), 5, 100), ((2, 9000), 0, None), ((3, 2, 2), 1, 2), ((1, 20), 0, None)],
)
def test_passes(shape, offset, numel, by_rows, options):
    local = local_of(shape, offset, numel, **options)
    for found, expected in zip(updated(local, by_rows, True), updated(local, by_rows, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_threads_share_a_weight(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "MIN_PER_THREAD", 16)
    local = local_of((30, 7), 4, 150)
    expected = updated(local, True, False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(cpu_kernels._pieces(150)) == 3
    for found, wanted in zip(updated(local, True, True), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_sums_are_exact_enough():
    """Ten million products of one sign, where a sum in float32 has lost three digits."""
    torch.manual_seed(0)
    flat, grad = torch.rand(10**7), torch.rand(10**7)
    group = AdamP([torch.nn.Parameter(torch.ones(1))], fused=True).param_groups[0]
    shard = Shard(0, (10, 10**6), 0, 0, 10**7)
    weight = Weight(LocalTensor(flat, group, [shard], flat, grad, (), 1), shard)
    expected = torch.tensor([(grad.double() * flat).sum(), grad.double().square().sum(), flat.double().square().sum()])
    torch.testing.assert_close(cpu_kernels.test_dots(weight).double(), expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false"])
def test_without_a_compiler_torch_does_it(compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu_kernels.compiled_library.cache_clear()
    try:
        weight = torch.nn.Parameter(torch.ones(4, 3))
        weight.grad = torch.ones(4, 3)
        with pytest.warns(UserWarning, match="torch's own"):
            AdamP([weight], fused=True).step()
        assert float(weight[0, 0]) == pytest.approx(1 - 1e-3)
    finally:
        cpu_kernels.compiled_library.cache_clear()


def test_triton_kernels_in_the_interpreter():
    """The GPU's kernels, step by step on the CPU."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.triton_kernels"], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) == 7 * 2 * 5
