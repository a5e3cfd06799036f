"""
The paired head's Triton kernels, in Triton's interpreter, against torch's tiles and float64; started by a test.

python -m tests.sparse_po.head_cases
"""

import sys
import tempfile
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch

from tests.benchmarks.head_traffic import traffic
from tests.helpers.hub_kernels import load, stand_in
from tests.helpers.sparse_po import PLAIN, TRANSFORMS, head_inputs, paired
from trl_ext.integrations import hub_kernels
from trl_ext.sparse_po.lm_head import paired_log_probs as head
from trl_ext.sparse_po.lm_head import triton_kernels


# Three tiles of two rounds or one, none of whole blocks
VOCAB, TILE, BLOCK = 1500, 690, 512


@contextmanager
def kernels(used=True):
    with (
        mock.patch.object(head, "_uses_kernels", lambda hidden: used and hidden.dtype != torch.float64),
        mock.patch.object(triton_kernels, "BLOCK_SIZE", BLOCK),
    ):
        yield


def run(tensors, transforms, weights):
    """Outputs, and gradients of the policy's hidden states, weight and bias."""
    log_probs, ref_log_probs, kl, statistics = paired(tensors, transforms, vocab_tile=TILE, return_statistics=True)
    (weights[0] * log_probs + weights[1] * kl).sum().backward()
    return [log_probs, ref_log_probs, kl, *statistics], [x.grad for x in tensors[:3] if x is not None]


def check_float32():
    """Kernels equal torch's tiles; with a gradient of the log-probabilities alone too."""
    for transforms in (PLAIN, TRANSFORMS[2]):
        found = []
        for used in (False, True):
            with kernels(used):
                tensors = head_inputs(num_tokens=2, vocab=VOCAB, dtype=torch.float32)
                outputs, gradients = run(tensors, transforms, torch.tensor([1.0, -0.3]))
                gradients = [gradient.clone() for gradient in gradients]
                paired(tensors, transforms)[0].sum().backward()
                found.append([*outputs, *gradients, *(x.grad for x in tensors[:3])])
        for torch_tiles, by_kernels in zip(*found, strict=True):
            torch.testing.assert_close(by_kernels, torch_tiles, rtol=1e-4, atol=1e-5)


@contextmanager
def recorded(projections, gradients):
    """Keeps copies of every product, policy's and reference's in turn, and of every gradient of a tile."""
    project, gradient_ = head._Head.projection, triton_kernels.logit_gradient_

    def projection(self, *args):
        projections.append(project(self, *args).clone())
        return project(self, *args)

    def logit_gradient_(*args):
        tile = gradient_(*args)
        gradients.append(tile.clone())
        return tile

    with (
        mock.patch.object(head._Head, "projection", projection),
        mock.patch.object(triton_kernels, "logit_gradient_", logit_gradient_),
    ):
        yield


def exact(policy, ref, biases, labels, transforms, weights):
    """Outputs in float64 from whole projections, and the gradient of the policy's."""
    policy = policy.double().requires_grad_()

    def logits(projection, bias, scale, softcap):
        found = scale * (projection if bias is None else projection + bias.detach().double())
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    z, z_ref = logits(policy, biases[0], *transforms[0]), logits(ref.double(), biases[1], *transforms[1])
    log_p, log_q, pick = z.log_softmax(1), z_ref.log_softmax(1), labels.unsqueeze(1)
    kl = (log_q.exp() * (log_q - log_p)).sum(1)
    outputs = [log_p.gather(1, pick).squeeze(1), log_q.gather(1, pick).squeeze(1), kl, -(log_p.exp() * log_p).sum(1)]
    outputs += [z.mean(1), z.gather(1, pick).squeeze(1) >= z.amax(1)]
    (gradient,) = torch.autograd.grad((weights[0] * outputs[0] + weights[1] * kl).sum(), policy)
    return outputs, gradient


def check_bfloat16(transforms, bias, ref_dtype=torch.bfloat16):
    """
    Tiles are bfloat16, sums float32 and gradients one rounding to bfloat16 away from float64, given the rounded
    products, which are all that bfloat16 costs. Triton's interpreter cuts bits off where a GPU rounds to the nearest.
    """
    tensors = head_inputs(num_tokens=3, hidden=32, ref_hidden=16, vocab=VOCAB, bias=bias, dtype=torch.bfloat16)
    tensors[3], tensors[4] = tensors[3].to(ref_dtype), tensors[4].to(ref_dtype)
    weights = torch.tensor([[1.0, 0.5, -2.0], [0.3, 0.0, 1.5]], dtype=torch.float64)
    projections, gradients = [], []
    with kernels(), recorded(projections, gradients):
        outputs, grads = run(tensors, transforms, weights.float())
    num_tiles = -(-VOCAB // TILE)
    assert {tile.dtype for tile in projections[::2]} == {tile.dtype for tile in gradients} == {torch.bfloat16}
    assert {tile.dtype for tile in projections[1::2]} == {ref_dtype}
    policy, ref = (torch.cat(projections[side : 2 * num_tiles : 2], 1) for side in range(2))
    assert float(policy.float().abs().max()) > 16  # Where bfloat16 is coarse
    expected, gradient = exact(policy, ref, (tensors[2], tensors[5]), tensors[6], transforms, weights)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype).detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(torch.cat(gradients, 1).double(), gradient, rtol=2**-7, atol=2e-6)
    hidden, weight = (tensor.detach().double() for tensor in tensors[:2])
    products = [gradient @ weight, gradient.t() @ hidden, gradient.sum(0)]
    for ours, theirs in zip(grads, products, strict=False):
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 2**-7


def check_not_a_number():
    """A NaN stays in its row."""
    tensors = head_inputs(num_tokens=3, vocab=VOCAB, bias=False, dtype=torch.float32)
    with torch.no_grad():
        tensors[0][1] = torch.nan
    with kernels():
        log_probs, ref_log_probs, kl = paired(tensors)
    assert log_probs.isnan().tolist() == kl.isnan().tolist() == [False, True, False]
    assert not ref_log_probs.isnan().any()


def check_kernel_of_the_hub():
    """It does what the own one does, to the last bit, and the example of its card is right."""
    with tempfile.TemporaryDirectory() as folder:
        kernel = load(hub_kernels.build(Path(folder) / "kernel", hub_kernels.PAIRED_LOG_PROBS))
        other, found = import_module(".sparse_po.lm_head.triton_kernels", kernel.__name__), []
        for module in (triton_kernels, other):
            with (
                kernels(),
                mock.patch.object(head, "_kernels", module),
                mock.patch.object(module, "BLOCK_SIZE", BLOCK),
            ):
                outputs, gradients = run(
                    head_inputs(vocab=VOCAB, dtype=torch.float32), TRANSFORMS[2], torch.tensor([1.0, -0.3])
                )
                found.append([*outputs, *gradients])
        assert all(map(torch.equal, *found))
        assert all(source.startswith(folder) for source in (kernel.fold.__code__.co_filename, other.__file__))
        example = hub_kernels.PAIRED_LOG_PROBS.card.split("```")[1].removeprefix("python\n")
        names = {}
        with mock.patch.dict(sys.modules, {"kernels": stand_in(lambda *_, **__: kernel)}):
            exec(example, names)
        tensors = head_inputs(vocab=VOCAB, bias=False, dtype=torch.float32)
        with torch.no_grad():
            ours = names["log_probs_and_kl"](*tensors[:2], *tensors[3:5], tensors[6], tile=TILE)
            expected = paired(tensors)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def check_traffic():
    """Eight bytes forward and ten backward in bfloat16, whatever is made of the products."""
    for options in ({}, {"policy_logit_scale": 0.5, "policy_softcap": 30.0, "ref_softcap": 20.0}):
        found = traffic(torch.bfloat16, **options)
        assert found == {"forward": {"read": 4, "written": 4}, "backward": {"read": 4, "written": 6, "products": 4}}
    found = traffic(torch.float32)
    assert found == {"forward": {"read": 8, "written": 8}, "backward": {"read": 8, "written": 12, "products": 8}}


def main():
    check_float32()
    for transforms, bias in ((PLAIN, True), (((0.7, 4.0), (1.3, 3.0)), True), (((0.7, 20.0), (1.0, None)), False)):
        check_bfloat16(transforms, bias)
    check_bfloat16(PLAIN, False, torch.float32)
    check_not_a_number()
    check_kernel_of_the_hub()
    check_traffic()
    sys.stdout.write("kernels agree\n")


if __name__ == "__main__":
    main()
