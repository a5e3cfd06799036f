"""The optimizers' and the paired head's kernels against formulas in float64."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch

from trl_ext import paired_log_probs
from trl_ext.optim import SGDP, AdamP

from .measuring import Record


LR, DECAY, DELTA, EPS, WD_RATIO = 1e-2, 0.1, 0.1, 1e-8, 0.1
BETA1, BETA2, MOMENTUM = 0.9, 0.999, 0.9
STEPS = 3
SHAPES = [(7, 13), (33, 17), (100, 769), (1000, 33), (64, 3, 3, 3), (1, 5000), (5000, 1), (513,), (1027, 2051)]
GRADIENTS = ("generic", "layer", "channel")
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "AdamP": (AdamP, {}),
    "AdamP, Nesterov": (AdamP, {"nesterov": True}),
    "AdamP, capturable": (AdamP, {"capturable": True}),
    "AdamP, named layer": (AdamP, {"projection": "layer"}),
    "AdamP, named channel": (AdamP, {"projection": "channel"}),
    "SGDP": (SGDP, {"momentum": MOMENTUM}),
    "SGDP, Nesterov": (SGDP, {"momentum": MOMENTUM, "nesterov": True}),
}
OPTIMIZER_ERRORS = "optimizers: largest error of a weight over the largest change of one"
HEAD_ERRORS = "paired head: largest error over the largest value"


class Reference:
    """
    AdamP and SGDP as the paper writes them, in float64, on one weight.

    Args:
        weight (`torch.Tensor`):
            Weight before the first step.
        options (`dict`):
            Options of the optimizer that is compared.
        is_adam (`bool`):
            AdamP, or SGDP.
    """

    def __init__(self, weight: torch.Tensor, options: dict[str, Any], is_adam: bool):
        self.weight, self.options, self.is_adam = weight.double().clone(), options, is_adam
        self.first, self.second = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.count = 0

    def rows(self, tensor: torch.Tensor, view: str) -> torch.Tensor:
        return tensor.reshape(tensor.size(0) if view == "channel" else 1, -1)

    def view(self, grad: torch.Tensor) -> str | None:
        """The view that the test finds, or that was named."""
        if self.weight.ndim < 2:
            return None
        named = self.options.get("projection")
        for view in ("channel", "layer"):
            weight, other = self.rows(self.weight, view), self.rows(grad, view)
            cosine = torch.nn.functional.cosine_similarity(weight, other, dim=1, eps=EPS).abs().max()
            if named == view or (named is None and cosine < DELTA / math.sqrt(weight.size(1))):
                return view
        return None

    def step(self, grad: torch.Tensor) -> None:
        grad = grad.double()
        self.count += 1
        nesterov = self.options.get("nesterov", False)
        decay = LR * DECAY
        if self.is_adam:
            self.first = BETA1 * self.first + (1 - BETA1) * grad
            self.second = BETA2 * self.second + (1 - BETA2) * grad.square()
            root = (self.second / (1 - BETA2**self.count)).sqrt() + EPS
            momentum = BETA1 * self.first + (1 - BETA1) * grad if nesterov else self.first
            update = momentum / (1 - BETA1**self.count) / root
        else:
            self.first = MOMENTUM * self.first + grad
            update = grad + MOMENTUM * self.first if nesterov else self.first
            decay /= 1 - MOMENTUM
        view = self.view(grad)
        if view is not None:
            weight, rows = self.rows(self.weight, view), self.rows(update, view)
            unit = weight / (weight.norm(dim=1, keepdim=True) + EPS)
            update = (rows - unit * (unit * rows).sum(dim=1, keepdim=True)).reshape(update.shape)
            decay *= WD_RATIO
        self.weight = self.weight * (1 - decay) - LR * update


def gradient_of(kind: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A gradient that passes in the view `kind`, or in none; float64."""
    weight = weight.double()
    grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64, device=weight.device)
    if weight.ndim < 2:
        return grad
    rows, others = (t.reshape(t.size(0) if kind == "channel" else 1, -1) for t in (weight, grad))
    others = others - rows * ((others * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True))
    if kind == "generic":
        others = others + rows
    return others.reshape(weight.shape)


def placed(tensor: torch.Tensor, place: str) -> torch.Tensor:
    """The same values in memory of their own, behind three other elements, or as columns of a wider matrix."""
    if place == "own":
        return tensor.clone()
    if place == "offset":
        return tensor.new_empty(tensor.numel() + 3)[3:].view(tensor.shape).copy_(tensor)
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.size(-1) + 5)
    return wide[..., 2:-3].copy_(tensor)


class Difference(NamedTuple):
    """Of a weight to float64 after some steps: the largest one, the largest change of a weight, the largest weight."""

    error: float
    change: float
    weight: float

    def share(self) -> float:
        return self.error / self.change

    def agrees(self, dtype: torch.dtype) -> bool:
        # Each step rounds the weight
        share = 1e-4 if dtype == torch.float32 else 0.05
        return self.error < STEPS * torch.finfo(dtype).eps * self.weight + share * self.change


def optimizer_difference(
    name: str, shape: tuple[int, ...], kind: str, place: str, dtype: torch.dtype, device: torch.device, extra: Any
) -> Difference:
    optimizer_class, options = OPTIMIZERS[name]
    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(shape, generator=generator, device=device).to(dtype)
    param = torch.nn.Parameter(placed(start, place))
    common = {"lr": LR, "weight_decay": DECAY, "delta": DELTA, "wd_ratio": WD_RATIO, "eps": EPS}
    optimizer = optimizer_class([param], **common, **options, **extra)
    reference = Reference(start, options, optimizer_class is AdamP)
    for _ in range(STEPS):
        grad = gradient_of(kind, reference.weight, generator).to(dtype)
        param.grad = placed(grad, place)
        optimizer.step()
        reference.step(grad)
    found, before = param.detach().double(), start.double()
    parts = (found - reference.weight, reference.weight - before, before)
    return Difference(*(float(part.abs().max()) for part in parts))


def check_optimizers(record: Record, device: torch.device, dry: bool) -> None:
    """The largest error over shapes and gradients, one row for each optimizer, place and dtype."""
    shapes = [(5, 13)] if dry else SHAPES
    places = ("own", "offset", "columns")
    cases = [(name, place, torch.float32, {}) for name in OPTIMIZERS for place in places]
    if dry:
        cases = [case for case in cases if case[1] == "offset" or case[0] == "AdamP"]
    cases += [("AdamP", "own", torch.bfloat16, {}), ("SGDP", "own", torch.bfloat16, {})]
    cases += [("AdamP", "own", torch.bfloat16, {"state_dtype": torch.float32})]
    for name, place, dtype, extra in cases:
        if place == "columns" and "capturable" in name:
            continue  # Refused with an error
        label = {"optimizer": name, "place": place, "dtype": str(dtype)[6:], "options": str(extra or "-")}
        with record.attempt(OPTIMIZER_ERRORS, **label):
            found = {
                (shape, kind): optimizer_difference(name, shape, kind, place, dtype, device, extra)
                for shape in shapes
                for kind in (GRADIENTS if not dry or (name == "AdamP" and place == "own") else ("channel",))
            }
            (shape, kind), worst = max(found.items(), key=lambda item: item[1].share())
            agrees = all(difference.agrees(dtype) for difference in found.values())
            record.row(
                OPTIMIZER_ERRORS, **label, error=worst.share(), at=f"{shape}, {kind}", cases=len(found),
                agrees="yes" if agrees else "NO",
            )  # fmt: skip


class HeadCase(NamedTuple):
    """Sizes and options of a call of the paired head."""

    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    softcap: float | None = None
    bias: bool = False


def head_errors(case: HeadCase, device: torch.device) -> dict[str, float]:
    """Largest error of each output and gradient, over its largest value in float64."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size, vocab = (case.num_tokens, case.hidden_size), (case.vocab_size, case.hidden_size)
    tensors = [draw(*size), draw(*vocab) / case.hidden_size**0.5, draw(*size), draw(*vocab) / case.hidden_size**0.5]
    if case.bias:
        tensors += [draw(case.vocab_size), draw(case.vocab_size)]
    tensors = [tensor.to(case.dtype) for tensor in tensors]
    labels = torch.randint(0, case.vocab_size, (case.num_tokens,), generator=generator, device=device)
    found = [tensor.clone().requires_grad_() for tensor in tensors]
    options = {"policy_softcap": case.softcap, "ref_softcap": case.softcap, "policy_logit_scale": 0.7}
    if case.bias:
        options |= {"policy_bias": found[4], "ref_bias": found[5]}
    outputs = list(paired_log_probs(*found[:4], labels, **options))
    weights = draw(2, case.num_tokens).double()
    (weights[0].float() * outputs[0] + weights[1].float() * outputs[2]).sum().backward()

    exact = [tensor.double().requires_grad_() for tensor in tensors]

    def log_softmax(hidden: torch.Tensor, weight: torch.Tensor, scale: float, bias: torch.Tensor | None):
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale
        return (logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)).log_softmax(-1)

    biases = exact[4:] or [None, None]
    policy = log_softmax(exact[0], exact[1], 0.7, biases[0])
    ref = log_softmax(exact[2], exact[3], 1.0, biases[1]).detach()
    expected = [logits.gather(1, labels.unsqueeze(1)).squeeze(1) for logits in (policy, ref)]
    expected.append((ref.exp() * (ref - policy)).sum(1))
    (weights[0] * expected[0] + weights[1] * expected[2]).sum().backward()
    pairs = dict(zip(("log_probs", "ref_log_probs", "kl"), zip(outputs, expected, strict=True), strict=True))
    pairs |= {"grad hidden": (found[0].grad, exact[0].grad), "grad weight": (found[1].grad, exact[1].grad)}
    if case.bias:
        pairs["grad bias"] = (found[4].grad, exact[4].grad)
    with torch.no_grad():
        return {
            name: float((one.double() - other).abs().max() / other.abs().max()) for name, (one, other) in pairs.items()
        }


def check_head(record: Record, device: torch.device, dry: bool) -> None:
    cases = [
        HeadCase(37, 64, 1501, torch.float32),
        HeadCase(37, 64, 1501, torch.float32, softcap=3.0),
        HeadCase(37, 64, 1501, torch.float32, bias=True),
        HeadCase(37, 64, 1501, torch.bfloat16),
    ]
    if dry:
        cases = [case._replace(num_tokens=2, hidden_size=8, vocab_size=1100) for case in cases[1:]]
    else:
        cases += [HeadCase(1025, 128, 40009, dtype) for dtype in (torch.float32, torch.bfloat16)]
        cases += [HeadCase(4099, 64, 33001, torch.bfloat16, softcap=30.0)]
    for case in cases:
        label = {"tokens x hidden x vocabulary": f"{case.num_tokens} x {case.hidden_size} x {case.vocab_size}"}
        label |= {"dtype": str(case.dtype)[6:], "softcap": str(case.softcap), "bias": str(case.bias)}
        with record.attempt(HEAD_ERRORS, **label):
            errors = head_errors(case, device)
            limit = 1e-4 if case.dtype == torch.float32 else 2e-2
            record.row(HEAD_ERRORS, **label, **errors, agrees="yes" if max(errors.values()) < limit else "NO")


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Sends tensors on the CPU through the Triton kernels, which the interpreter runs."""
    from trl_ext.optim.kernels import plan
    from trl_ext.sparse_po.lm_head import paired_log_probs

    for_optimizers = mock.patch.object(plan, "DEVICE_TYPES", {"cpu"})
    with for_optimizers, mock.patch.object(paired_log_probs, "_uses_kernels", return_value=True):
        yield


def run(record: Record, device: torch.device, dry: bool) -> None:
    with interpreted_kernels() if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext():
        check_optimizers(record, device, dry)
        check_head(record, device, dry)
