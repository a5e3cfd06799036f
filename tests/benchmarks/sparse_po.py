"""Time and peak memory of a SparsePO step against TRL's DPOTrainer, a naive SparsePO of whole softmaxes, and Liger's.

Every variant runs forward and backward on the same batch with the same weights, one after the other in one process, so
ratios hold where absolute times drift; on one CPU thread its own time is taken, which other processes do not lengthen.
Peak memory is what a step adds to what is held before it.

python -m tests.benchmarks.sparse_po steps            one step by the length of its rows, half of them prompt
python -m tests.benchmarks.sparse_po shared_prompts   `share_prompt` by the ratio of prompt to answer
python -m tests.benchmarks.sparse_po sparsity         the head alone, by the share of tokens whose weights are zero
"""

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.benchmarks.peak_memory import PeakMemory
from tests.helpers.tiny import tokenizer_of_size
from trl_ext import SparsePOConfig, SparsePOTrainer, sparse_po_loss
from trl_ext.playground import preference_dataset
from trl_ext.sparse_po.lm_head import paired_log_probs as lm_head


try:  # not a dependency
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
except ImportError:
    LigerFusedLinearDPOLoss = None


VARIANTS = {
    "DPOTrainer (TRL)": None,
    "naive SparsePO, learned": "naive",
    "SparsePO learned": {"mask_type": "learned"},
    "SparsePO activation": {"mask_type": "activation"},
    "SparsePO ones (TDPO1)": {"mask_type": "ones"},
}
LIGER = "DPO, Liger's fused head"


def build(folder: Path, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_of_size(vocab_size).save_pretrained(folder)


def make_batch(
    num_pairs: int, length: int, vocab_size: int, device: torch.device, prompt: int | None = None
) -> dict[str, torch.Tensor]:
    """Pairs of rows of `length` tokens, the first `prompt` of them prompt, half by default."""
    prompt = length // 2 if prompt is None else prompt
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (2 * num_pairs, length), generator=generator)
    ids[num_pairs:, :prompt] = ids[:num_pairs, :prompt]
    completion = torch.zeros_like(ids)
    completion[:, prompt:] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def make_trainer(folder: Path, settings: dict | None, output: Path, bf16: bool):
    data = preference_dataset(1)
    common = {
        "output_dir": str(output), "use_cpu": not torch.cuda.is_available(), "bf16": bf16, "report_to": "none",
        "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "bfloat16" if bf16 else "float32"},
    }  # fmt: skip
    if settings is None:
        return DPOTrainer(str(folder), args=DPOConfig(**common), train_dataset=data)
    return SparsePOTrainer(str(folder), args=SparsePOConfig(**common, **settings), train_dataset=data)


def naive_step(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a direct implementation does: whole log-softmaxes of both models, all hidden states."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"][:, 1:]
    completion = batch["completion_mask"][:, 1:]
    with torch.no_grad():
        output = trainer.ref_model(**inputs, output_hidden_states=True, use_cache=False)
        ref = output.logits[:, :-1].float().log_softmax(-1)
        hidden = torch.stack(output.hidden_states[1:])[:, :, :-1].float()
    mask_module = trainer.masks.learned["common"]
    states = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]).flatten(1, 2)
    mask = mask_module(states).view(labels.shape) * completion
    policy = trainer.model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    log_ratios = (policy - ref).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * completion
    divergences = (ref.exp() * (ref - policy)).sum(-1) * completion
    return sparse_po_loss(log_ratios, divergences, mask, mask, trainer.args.beta)


def liger_step(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """DPO with Liger's fused head, on the models of a `DPOTrainer`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    with torch.no_grad():
        reference = trainer.ref_model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    hidden = trainer.model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    fused = LigerFusedLinearDPOLoss(beta=trainer.args.beta, compiled=hidden.is_cuda)
    heads = trainer.model.lm_head.weight, trainer.ref_model.lm_head.weight
    return fused(heads[0], hidden, labels, ref_input=reference, ref_weight=heads[1])[0]


def now() -> float:
    """Seconds: of this process where it is one CPU thread, else of the clock."""
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def step(kind, trainer, batch) -> float:
    start = now()
    if kind in ("naive", "liger"):
        loss = (naive_step if kind == "naive" else liger_step)(trainer, batch)
    else:
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = now() - start
    trainer.model.zero_grad()
    return seconds


def in_turn(steps: dict[str, Callable[[], float]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every repeat after the first of each of the steps, which take turns, and then their peaks in MiB."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, run in steps.items():
            seconds = run()
            if repeat:
                times[name].append(seconds)
    # Apart from the times, which would hold the CPU time of the thread that watches
    peaks = {}
    for name, run in steps.items():
        with PeakMemory() as memory:
            run()
        peaks[name] = memory.added
    return times, peaks


def ratio(times: dict[str, list[float]], name: str, other: str) -> str:
    return f"{statistics.median(a / b for a, b in zip(times[name], times[other], strict=True)):.2f}"


def measure_steps(options: argparse.Namespace, folder: Path) -> list[str]:
    trainers = {
        name: make_trainer(
            folder / "model", {"mask_type": "learned"} if kind == "naive" else kind, folder / "out", options.bf16
        )
        for name, kind in VARIANTS.items()
    }
    dpo, naive = (list(VARIANTS)[i] for i in (0, 1))
    kinds = dict(VARIANTS)
    if LigerFusedLinearDPOLoss is not None:
        kinds[LIGER], trainers[LIGER] = "liger", trainers[dpo]
    lines = [
        "| tokens in a row | variant | seconds | / DPO | / naive | peak MiB | / DPO | naive / |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in options.lengths:
        batch = make_batch(options.num_pairs, length, options.vocab_size, trainers[dpo].accelerator.device)
        times, peaks = in_turn(
            {name: partial(step, kind, trainers[name], batch) for name, kind in kinds.items()}, options.repeats
        )
        lines += [
            f"| {length} | {name} | {statistics.median(times[name]):.2f} | {ratio(times, name, dpo)} | "
            f"{ratio(times, name, naive)} | {peaks[name]:.0f} | {peaks[name] / peaks[dpo]:.2f} | "
            f"{peaks[naive] / peaks[name]:.1f} |"
            for name in kinds
        ]
    return lines


def measure_shared_prompts(options: argparse.Namespace, folder: Path) -> list[str]:
    dpo, separate = "DPOTrainer (TRL)", "SparsePO learned"
    settings = {dpo: None, separate: {"mask_type": "learned"}}
    settings["SparsePO learned, share_prompt"] = {"mask_type": "learned", "share_prompt": True}
    trainers = {
        name: make_trainer(folder / "model", kind, folder / "out", options.bf16) for name, kind in settings.items()
    }
    lines = [
        "| prompt / answer | tokens in a row | variant | seconds | / unshared | / DPO | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for prompts in options.prompt_ratios:
        prompt, length = prompts * options.answer, (prompts + 1) * options.answer
        batch = make_batch(options.num_pairs, length, options.vocab_size, trainers[dpo].accelerator.device, prompt)
        times, peaks = in_turn(
            {name: partial(step, None, trainer, batch) for name, trainer in trainers.items()}, options.repeats
        )
        lines += [
            f"| {prompts} | {length} | {name} | {statistics.median(times[name]):.2f} | {ratio(times, name, separate)} "
            f"| {ratio(times, name, dpo)} | {peaks[name]:.0f} |"
            for name in trainers
        ]
    return lines


def earlier_head(checkout: str):
    """The module of the head in another checkout, imported beside ours."""
    path = Path(checkout, "trl_ext/sparse_po/lm_head/paired_log_probs.py")
    spec = importlib.util.spec_from_file_location("trl_ext.sparse_po.lm_head.earlier", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def head_step(tensors: list[torch.Tensor], weights: torch.Tensor, head, leave_out: bool = True) -> float:
    """Forward and backward of a head's module, leaving out tokens without gradient or none."""
    hidden, weight, ref_hidden, ref_weight, labels = tensors
    hidden.grad = weight.grad = None
    find_alive, whole = lm_head._alive_tokens, lambda *_gradients: None
    lm_head._alive_tokens = find_alive if leave_out else whole
    try:
        start = now()
        log_probs, _, kl, _ = head.paired_log_probs(
            hidden, weight, ref_hidden, ref_weight, labels, return_statistics=True
        )
        (weights * (log_probs + kl)).sum().backward()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return now() - start
    finally:
        lm_head._alive_tokens = find_alive


def measure_sparsity(options: argparse.Namespace, folder: Path) -> list[str]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    heads = {"none left out": partial(head_step, head=lm_head, leave_out=False)}
    if options.earlier:
        heads["earlier"] = partial(head_step, head=earlier_head(options.earlier))
    heads["now"] = partial(head_step, head=lm_head)
    names = " | ".join(f"{name}, s" for name in heads)
    ratios = " | ".join(f"/ {name}" for name in heads if name != "now")
    lines = [
        f"| vocabulary | tokens | weights of zero | {names} | {ratios} |",
        "|---" * (2 + 2 * len(heads)) + "|",
    ]
    for vocab_size in options.vocab_sizes:
        generator = torch.Generator().manual_seed(0)
        shapes = [(options.num_tokens, options.hidden_size), (vocab_size, options.hidden_size)] * 2
        tensors = [torch.randn(shape, generator=generator).mul_(0.05).to(device, dtype) for shape in shapes]
        tensors[0].requires_grad_()
        tensors[1].requires_grad_()
        tensors.append(torch.randint(0, vocab_size, (options.num_tokens,), generator=generator).to(device))
        draws = torch.rand(options.num_tokens, generator=generator).to(device)
        for zeros in (0.0, 0.5, 0.9):
            weights = (draws >= zeros).float()
            times, _ = in_turn(
                {name: partial(step, tensors, weights) for name, step in heads.items()}, options.repeats
            )
            seconds = " | ".join(f"{statistics.median(times[name]):.2f}" for name in heads)
            shares = " | ".join(ratio(times, "now", name) for name in heads if name != "now")
            lines.append(
                f"| {vocab_size} | {options.num_tokens} | {(weights == 0).float().mean():.2f} | {seconds} | {shares} |"
            )
    return lines


MEASUREMENTS = {
    "steps": measure_steps, "shared_prompts": measure_shared_prompts, "sparsity": measure_sparsity,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("table", nargs="?", choices=MEASUREMENTS, default="steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--prompt_ratios", type=int, nargs="+", default=[1, 3, 7])
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer, where prompts are shared")
    parser.add_argument("--num_tokens", type=int, default=1024, help="response tokens, for the head alone")
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[32000, 150000], help="for the head alone")
    parser.add_argument("--earlier", help="another checkout, whose head is timed too")
    parser.add_argument("--num_pairs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--folder", default="/tmp/sparse_po_benchmark")
    parser.add_argument("--output")
    options = parser.parse_args()
    folder = Path(options.folder)
    facts = f"{options.num_layers} layers of {options.hidden_size}, vocabulary {options.vocab_size}"
    if options.table == "sparsity":
        facts = f"states of {options.hidden_size}"
    else:
        build(folder / "model", options.vocab_size, options.hidden_size, options.num_layers)
    lines = MEASUREMENTS[options.table](options, folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    text = (
        f"{device} ({platform.machine()}); Llama, {facts}; {options.num_pairs} pairs; "
        f"{'bfloat16' if options.bf16 else 'float32'}; median of {options.repeats} steps after one.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
