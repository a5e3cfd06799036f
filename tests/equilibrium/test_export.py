"""A head in fixed steps goes through torch's exporters, and is refused there without."""

import io

import pytest
import torch

from trl_ext import EPHead


CLOSE = {"rtol": 0, "atol": 1e-6}
# Torch 2.13 says so of what it still has, and users still call
DEPRECATED = pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")


@pytest.fixture
def head():
    torch.manual_seed(0)
    return EPHead(6, [12, 8, 10], 2, tolerance=1e-7, spectral_cap=0.5).eval()


@DEPRECATED
def test_export_and_trace(head):
    hidden, wider = torch.randn(5, 6), torch.randn(11, 6)
    with head.fixed_steps(30):
        program = torch.export.export(head, (hidden,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
        traced = torch.jit.trace(head, (hidden,))
    saved = io.BytesIO()
    torch.export.save(program, saved)
    saved.seek(0)
    for function in (program.module(), traced, torch.export.load(saved).module()):
        torch.testing.assert_close(function(wider), head(wider).detach(), **CLOSE)


@DEPRECATED
def test_without_fixed_steps_they_are_refused(head):
    hidden = torch.randn(3, 6)
    for kind, call in {
        "torch.jit.trace": lambda: torch.jit.trace(head, (hidden,)),
        "torch.export": lambda: torch.export.export(head, (hidden,)),
        "torch.func": lambda: torch.vmap(head)(hidden),
        "torch.func ": lambda: torch.func.grad(lambda rows: head(rows).sum())(hidden),
    }.items():
        with pytest.raises(RuntimeError, match=rf"{kind}.*fixed_steps"):
            call()


def test_onnx(head, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    hidden = torch.randn(3, 6)
    with head.fixed_steps(30):
        torch.onnx.export(head, (hidden,), tmp_path / "head.onnx", dynamo=True)
    session = runtime.InferenceSession(tmp_path / "head.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: hidden.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), head(hidden).detach(), rtol=0, atol=1e-5)
