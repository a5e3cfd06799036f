import itertools
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.utils import add_fused_lm_head

from tests.helpers import tiny
from tests.helpers.launching import launch, rank_environments
from tests.helpers.sparse_po import PLAIN, TRANSFORMS, head_inputs, paired
from tests.helpers.tiny import FAMILIES, tiny_model
from trl_ext.sparse_po.lm_head import triton_kernels
from trl_ext.sparse_po.lm_head.paired_log_probs import _uses_kernels, logit_transform, paired_log_probs


def reference(policy_hidden, policy_weight, policy_bias, ref_hidden, ref_weight, ref_bias, labels, transforms):
    """The formulas on whole log-softmaxes."""

    def log_softmax(hidden, weight, bias, scale, softcap):
        logits = hidden @ weight.t()
        if bias is not None:
            logits = logits + bias
        logits = scale * logits
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits, logits.log_softmax(-1)

    logits, policy = log_softmax(policy_hidden, policy_weight, policy_bias, *transforms[0])
    _, ref = log_softmax(ref_hidden, ref_weight, ref_bias, *transforms[1])
    pick = labels.unsqueeze(1)
    return (
        policy.gather(1, pick).squeeze(1),
        ref.gather(1, pick).squeeze(1).detach(),
        (ref.detach().exp() * (ref.detach() - policy)).sum(1),
        -(policy.exp() * policy).sum(1),
        logits.mean(1),
        logits.argmax(1) == labels,
    )


@pytest.mark.parametrize(
    ("transforms", "bias", "tiles"),
    list(itertools.product(TRANSFORMS, [True, False], [(None, None), (3, 10), (11, 37), (1, 1), (4, 64)])),
)
def test_values_and_gradients_equal_the_formulas(transforms, bias, tiles):
    tensors, twins = head_inputs(bias=bias), head_inputs(bias=bias)
    found = paired(tensors, transforms, token_tile=tiles[0], vocab_tile=tiles[1], return_statistics=True)
    found = (*found[:3], *found[3])
    expected = reference(*twins, transforms)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach() if not ours.requires_grad else theirs, rtol=1e-9, atol=1e-9)
    weights = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (weights[0] * found[0] + weights[1] * found[2]).sum().backward()
    (weights[0] * expected[0] + weights[1] * expected[2]).sum().backward()
    for ours, theirs in zip(tensors[:3], twins[:3], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", [0, 2])
def test_gradcheck(which):
    tensors = head_inputs(num_tokens=4, vocab=9)
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: paired([hidden, weight, bias, *tensors[3:]], TRANSFORMS[3], vocab_tile=4)[which],
        tuple(tensors[:3]),
    )


def test_only_the_policy_gets_gradients():
    tensors = head_inputs()
    tensors[3].requires_grad_()
    tensors[4].requires_grad_()
    log_probs, ref_log_probs, kl = paired(tensors)
    assert not ref_log_probs.requires_grad
    (log_probs + kl).sum().backward()
    assert tensors[3].grad is None and tensors[4].grad is None and tensors[0].grad is not None


def test_frozen_head_needs_no_weight_gradient():
    tensors = head_inputs(bias=False)
    tensors[1].requires_grad_(False)
    expected = head_inputs(bias=False)
    paired(tensors)[2].sum().backward()
    paired(expected)[2].sum().backward()
    assert tensors[1].grad is None
    torch.testing.assert_close(tensors[0].grad, expected[0].grad)


def test_no_divergence_gradient_skips_the_reference():
    """The reference's projection is not recomputed when only the log-probabilities have a gradient."""
    tensors = head_inputs()
    log_probs, _, _ = paired(tensors)
    products = []

    class CountProducts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "mm":
                products.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    with CountProducts():
        log_probs.sum().backward()
    assert all(shape[1] != 4 for shape in products) and products


@pytest.mark.parametrize("transforms", [PLAIN, ((0.7, 4.0), (1.0, 2.0))], ids=["plain", "softcap"])
def test_tokens_without_gradient_are_left_out(transforms):
    """Gradients are those of the other tokens alone; the products of the backward pass have as many rows as those."""
    alive = torch.tensor([1, 4, 5, 9])
    weights = torch.zeros(2, 11, dtype=torch.float64)
    weights[0, [1, 4, 9]], weights[1, [4, 5]] = 2.0, -3.0
    tensors, expected = head_inputs(), head_inputs()
    rows = []

    class CountRows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ == "mm":
                rows.append(args[0].size(0))
            return func(*args, **(kwargs or {}))

    log_probs, _, kl = paired(tensors, transforms)
    with CountRows():
        (weights[0] * log_probs + weights[1] * kl).sum().backward()
    assert set(rows) == {4}
    few = [expected[0][alive], *expected[1:3], expected[3][alive], *expected[4:6], expected[6][alive]]
    log_probs, _, kl = paired(few, transforms)
    (weights[0, alive] * log_probs + weights[1, alive] * kl).sum().backward()
    for tensor, other in zip(tensors[:3], expected[:3], strict=True):
        assert torch.equal(tensor.grad, other.grad)


@pytest.mark.parametrize("reached", [True, False])
def test_gradients_hold_nothing_of_the_memory_that_they_are_written_into(reached):
    """torch fills new memory with NaN here; where no token is reached nothing is written, and gradients are zero."""
    tensors = head_inputs()
    log_probs, _, kl = paired(tensors, token_tile=4, vocab_tile=3)
    torch.use_deterministic_algorithms(True)
    try:
        ((log_probs + kl).sum() * float(reached)).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in tensors[:3]:
        assert tensor.grad.isfinite().all() and bool(tensor.grad.any()) == reached


def test_equal_models_have_no_divergence():
    tensors = head_inputs(dtype=torch.float32, ref_hidden=6)
    tensors[3], tensors[4], tensors[5] = (tensor.detach() for tensor in tensors[:3])
    log_probs, ref_log_probs, kl = paired(tensors, vocab_tile=8)
    torch.testing.assert_close(log_probs, ref_log_probs, rtol=0, atol=0)
    assert kl.min() >= 0 and kl.max() < 1e-5


def test_divergence_is_never_negative():
    for seed in range(20):
        tensors = head_inputs(dtype=torch.float32, ref_hidden=6, seed=seed)
        tensors[3], tensors[4] = tensors[0].detach() + 1e-4, tensors[1].detach()
        tensors[5] = tensors[2].detach()
        assert paired(tensors)[2].min() >= 0


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_accumulates_in_float32(autocast):
    exact = head_inputs(num_tokens=64, hidden=64, ref_hidden=64, vocab=500, bias=False)
    rounded = [
        None if x is None else x.detach().to(torch.bfloat16).double() if x.is_floating_point() else x for x in exact
    ]
    dtype = torch.float32 if autocast else torch.bfloat16
    low = [None if x is None else x.to(dtype) if x.is_floating_point() else x for x in rounded]
    low[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = paired(low)
    expected = reference(*rounded, PLAIN)
    for ours, theirs in zip(found, expected, strict=False):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    found[2].sum().backward()
    assert low[0].grad.dtype == dtype


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
def test_agrees_with_trls_fused_head(family, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 32}  # fmt: skip
    extra = {"cohere": {**sizes, "logit_scale": 0.25}, "granite": {**sizes, "logits_scaling": 4.0}}
    monkeypatch.setattr(tiny, "FAMILIES", {**FAMILIES, **extra})
    model = tiny_model(family)
    model.eval()  # no dropout
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    theirs = model(input_ids=ids, labels=ids, fused_lm_head=True)
    hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config.get_text_config())
    log_probs, ref_log_probs, _, statistics = paired_log_probs(
        hidden, head.weight, hidden, head.weight, ids[:, 1:].flatten(), policy_bias=head.bias, ref_bias=head.bias,
        policy_logit_scale=scale, policy_softcap=softcap, ref_logit_scale=scale, ref_softcap=softcap,
        return_statistics=True,
    )  # fmt: skip
    for ours, name in zip((log_probs, *statistics), ("log_probs", "entropy", "mean_logits", "is_top1"), strict=True):
        torch.testing.assert_close(ours, getattr(theirs, name).flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ref_log_probs, log_probs.detach(), rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def test_never_holds_the_logits():
    tensors = head_inputs(num_tokens=128, hidden=4, ref_hidden=4, vocab=1000, dtype=torch.float32)
    with LargestTensor() as mode:
        log_probs, _, kl = paired(tensors, token_tile=16, vocab_tile=100, return_statistics=True)[:3]
        (log_probs + kl).sum().backward()
    assert 0 < mode.largest <= 1000 * 4


def test_no_tokens():
    tensors = head_inputs(num_tokens=0)
    log_probs, _, kl, statistics = paired(tensors, return_statistics=True)
    assert log_probs.shape == kl.shape == statistics.entropy.shape == (0,)
    (log_probs.sum() + kl.sum()).backward()
    assert torch.count_nonzero(tensors[1].grad) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__setitem__(4, t[4][:-1]), "37.*36.*vocabulary"),
        (lambda t: t.__setitem__(3, t[3][:-1]), "11, 10 and 11"),
        (lambda t: t[6].__setitem__(0, -100), r"\[0, 37\).*-100"),
        (lambda t: t[6].__setitem__(0, 37), r"\[0, 37\)"),
    ],
)
def test_wrong_input(change, message):
    tensors = head_inputs(bias=False)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        paired(tensors)


SHARDED = """
    import sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from trl_ext.sparse_po.lm_head.paired_log_probs import paired_log_probs

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Linear(6, 6)
            self.head = torch.nn.Linear(6, 40)
            self.reference = torch.nn.Linear(6, 40)

        def forward(self, x, labels):
            log_probs, _, kl = paired_log_probs(
                self.body(x), self.head.weight, x, self.reference.weight, labels,
                policy_bias=self.head.bias, ref_bias=self.reference.bias, vocab_tile=16,
            )
            return (log_probs + kl).mean()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(8, 6, generator=generator), torch.randint(0, 40, (8,), generator=generator)
    whole = Pair()
    whole(x, labels).backward()
    sharded = Pair()
    fully_shard(sharded)
    for seen in ("in the root's forward", "head sharded as a DTensor"):
        sharded.zero_grad()
        half = slice(4 * rank, 4 * rank + 4)
        if seen.startswith("in"):
            loss = sharded(x[half], labels[half])
        else:
            sharded.reshard()
            assert type(sharded.head.weight).__name__ == "DTensor", type(sharded.head.weight)
            loss = paired_log_probs(x[half], sharded.head.weight, x[half], sharded.reference.weight, labels[half],
                                    policy_bias=sharded.head.bias, ref_bias=sharded.reference.bias)[0].mean()
            full = paired_log_probs(x, whole.head.weight, x, whole.reference.weight, labels,
                                    policy_bias=whole.head.bias, ref_bias=whole.reference.bias)[0].mean()
            gathered = loss.detach().clone()
            dist.all_reduce(gathered)
            torch.testing.assert_close(gathered / 2, full.detach())
            continue
        loss.backward()
        for (name, p), q in zip(whole.named_parameters(), sharded.parameters()):
            if p.grad is not None:
                assert type(q.grad).__name__ == "DTensor"
                torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-5, atol=1e-6, msg=name)
    dist.destroy_process_group()
    print("rank", rank, "agrees")
"""


@pytest.mark.distributed
def test_fsdp2_over_two_processes(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(textwrap.dedent(SHARDED))
    assert launch([script], rank_environments(2)).count("agrees") == 2


def test_triton_kernels_in_the_interpreter():
    """Against torch's tiles in float32, against float64 in bfloat16, and the bytes that they move."""
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "tests.sparse_po.head_cases"], capture_output=True, text=True, timeout=900,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split("\n")[-2] == "kernels agree"


def test_float64_takes_no_kernels():
    """They sum in float32."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        on_gpu = SimpleNamespace(is_cuda=True, dtype=dtype)
        assert _uses_kernels(on_gpu) == (dtype != torch.float64 and triton_kernels.AVAILABLE)
        assert not _uses_kernels(torch.empty(1, dtype=dtype))
