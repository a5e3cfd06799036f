"""A whole SparsePO step against TRL's DPO step at half a billion parameters, and the paired head alone."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from tests.benchmarks.sparse_po import VARIANTS, make_batch, make_trainer, step
from tests.helpers.tiny import tokenizer_of_size
from trl_ext import paired_log_probs

from .measuring import Record, peak_mib, time_in_turn


QWEN2_0_5B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True, "max_position_embeddings": 256,
}  # fmt: skip
HEAD = "paired head, forward and backward"
STEP = "SparsePO step over TRL's DPO step"


def folder(dry: bool) -> Path:
    return Path(tempfile.gettempdir()) / f"gpu_evidence_{'tiny' if dry else 'half_billion'}"


def prepare(dry: bool) -> None:
    """Writes the model, while another section has the GPU."""
    torch.manual_seed(0)
    config = Qwen2Config(**(TINY if dry else QWEN2_0_5B), bos_token_id=None, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder(dry))
    tokenizer_of_size(config.vocab_size).save_pretrained(folder(dry))


def naive_head(tensors: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Whole log-softmaxes of both models in float32."""
    policy = (tensors[0] @ tensors[1].t()).float().log_softmax(-1)
    with torch.no_grad():
        ref = (tensors[2] @ tensors[3].t()).float().log_softmax(-1)
    log_probs, ref_log_probs = (logits.gather(1, labels.unsqueeze(1)).squeeze(1) for logits in (policy, ref))
    return (log_probs - ref_log_probs).sum() + (ref.exp() * (ref - policy)).sum()


def trl_log_probs(tensors: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """What TRL's DPO does: log-probabilities of both, with entropy, mean logit and accuracy of the policy's."""
    outputs = ("entropy", "mean_logits", "is_top1")
    policy = ChunkedLogProbFunction.apply(tensors[0], tensors[1], None, labels, 1.0, 32768, None, 1.0, outputs)[0]
    with torch.no_grad():
        ref = ChunkedLogProbFunction.apply(tensors[2], tensors[3], None, labels, 1.0, 32768, None, 1.0, ())[0]
    return (policy - ref).sum()


def heads(tensors: list[torch.Tensor], labels: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    def paired(statistics: bool) -> torch.Tensor:
        log_probs, ref_log_probs, kl, *_ = paired_log_probs(*tensors, labels, return_statistics=statistics)
        return (log_probs - ref_log_probs).sum() + kl.sum()

    def divergence() -> torch.Tensor:
        return ChunkedDivergenceFunction.apply(tensors[0], tensors[1], None, tensors[2], tensors[3], None, 0.0)[
            0
        ].sum()

    return {
        "paired_log_probs": lambda: paired(False),
        "paired_log_probs, statistics": lambda: paired(True),
        "naive": lambda: naive_head(tensors, labels),
        "trl: log-probabilities of both": lambda: trl_log_probs(tensors, labels),
        "trl: forward KL": divergence,
    }


def products(tensors: list[torch.Tensor], tile: int) -> None:
    """The six matrix products alone, tile by tile: two projections, twice, and two gradients."""
    hidden, weight, ref_hidden, ref_weight = (tensor.detach() for tensor in tensors)
    for start in range(0, weight.size(0), tile):
        own, ref = weight[start : start + tile], ref_weight[start : start + tile]
        for _ in range(2):
            logits = hidden @ own.t()
            ref_hidden @ ref.t()
        logits @ own
        logits.t() @ hidden


def run_head(record: Record, device: torch.device, dry: bool) -> None:
    """Time and memory of the head alone, N tokens x H x V."""
    sizes = [(8, 16, 300)] if dry else [(2048, 896, 151936), (4096, 896, 151936)]
    for num_tokens, hidden_size, vocab_size in sizes:
        torch.manual_seed(0)
        shapes = [(num_tokens, hidden_size), (vocab_size, hidden_size)] * 2
        tensors = [torch.randn(shape, device=device).mul_(0.3).to(torch.bfloat16) for shape in shapes]
        for tensor in tensors[:2]:
            tensor.requires_grad_()
        labels = torch.randint(0, vocab_size, (num_tokens,), device=device)

        def forward_backward(loss: Callable[[], torch.Tensor], tensors: list[torch.Tensor] = tensors) -> None:
            for tensor in tensors[:2]:
                tensor.grad = None
            loss().backward()

        steps: dict[str, Callable[[], Any]] = {"six products alone": lambda: products(tensors, 32768)}  # noqa: B023
        for name, loss in heads(tensors, labels).items():
            with record.attempt(HEAD, head=name, tokens=num_tokens):
                forward_backward(loss)
                steps[name] = lambda loss=loss: forward_backward(loss)
        times = time_in_turn(steps, 2 if dry else 10, device)
        for name, found in times.items():
            base = times["six products alone"].device
            record.row(
                HEAD, head=name, tokens=num_tokens, hidden=hidden_size, vocabulary=vocab_size, ms=found.device,
                over_products=found.device / base,
                other_ns_per_entry=1e6 * (found.device - base) / (num_tokens * vocab_size),
                peak_mib=peak_mib(steps[name]),
            )  # fmt: skip


def run(record: Record, device: torch.device, dry: bool) -> None:
    """Times and peak memory of whole steps, every variant in turn."""
    length, num_pairs, rounds = (32, 1, 1) if dry else (512, 4, 7)
    trainers = {}
    for name, kind in VARIANTS.items():
        with record.attempt(STEP, variant=name):
            settings = {"mask_type": "learned"} if kind == "naive" else kind
            trainers[name] = make_trainer(folder(dry), settings, folder(dry) / "out", bf16=True)
            # As a trainer's own step: under autocast
            context = trainers[name].compute_loss_context_manager
            compute_loss = trainers[name].compute_loss

            def under_autocast(*args: Any, context=context, compute_loss=compute_loss) -> torch.Tensor:
                with context():
                    return compute_loss(*args)

            trainers[name].compute_loss = under_autocast
    model = next(iter(trainers.values())).model
    batch = make_batch(num_pairs, length, model.config.vocab_size, model.device)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 2):
        for name in list(trainers):
            with record.attempt(STEP, variant=name):
                seconds = step(VARIANTS[name], trainers[name], batch)
                if turn > 1:
                    times[name].append(1e3 * seconds)
    for name, trainer in trainers.items():
        peaks[name] = peak_mib(lambda name=name, trainer=trainer: step(VARIANTS[name], trainer, batch))
    first = next(iter(trainers))
    for name, found in times.items():
        ms = statistics.median(found)
        record.row(
            STEP, variant=name, pairs=num_pairs, tokens=length, ms=ms, over_dpo=ms / statistics.median(times[first]),
            peak_mib=peaks[name], peak_over_dpo=peaks[name] / peaks[first],
        )  # fmt: skip
