"""Time and peak memory of a SparsePO step against TRL's DPOTrainer and a naive full-softmax SparsePO.

Every variant runs forward and backward on the same batch with the same weights, one after the other in one process, so
ratios hold where absolute times drift. Peak memory is what a step adds to what is held before it.

python -m tests.benchmarks.sparse_po --output docs/results/sparse_po_benchmark.md
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.benchmarks.peak_memory import PeakMemory
from trl_ext import SparsePOConfig, SparsePOTrainer, sparse_po_loss
from trl_ext.playground import preference_dataset


VARIANTS = {
    "DPOTrainer (TRL)": None,
    "naive SparsePO, learned": "naive",
    "SparsePO learned": {"mask_type": "learned"},
    "SparsePO activation": {"mask_type": "activation"},
    "SparsePO ones (TDPO1)": {"mask_type": "ones"},
}


def build(folder: Path, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    from trl_ext.playground import build_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def make_batch(num_pairs: int, length: int, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pairs whose first half is the prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (2 * num_pairs, length), generator=generator)
    ids[num_pairs:, : length // 2] = ids[:num_pairs, : length // 2]
    completion = torch.zeros_like(ids)
    completion[:, length // 2 :] = 1
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


def step(kind, trainer, batch) -> float:
    start = time.perf_counter()
    loss = naive_step(trainer, batch) if kind == "naive" else trainer.compute_loss(trainer.model, batch)
    loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    trainer.model.zero_grad()
    return seconds


def measure(folder: Path, lengths: list[int], num_pairs: int, repeats: int, output: Path, bf16: bool) -> list[str]:
    vocab_size = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size
    assert AutoTokenizer.from_pretrained(folder).pad_token is not None
    trainers = {
        name: make_trainer(folder, {"mask_type": "learned"} if kind == "naive" else kind, output, bf16)
        for name, kind in VARIANTS.items()
    }
    lines = [
        "| tokens in a row | variant | seconds | / DPO | / naive | peak MiB | / DPO | naive / |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in lengths:
        device = next(trainers["SparsePO learned"].model.parameters()).device
        batch = make_batch(num_pairs, length, vocab_size, device)
        times, peaks = {name: [] for name in VARIANTS}, dict.fromkeys(VARIANTS, 0.0)
        for repeat in range(repeats + 1):
            for name, kind in VARIANTS.items():
                with PeakMemory() as memory:
                    seconds = step(kind, trainers[name], batch)
                if repeat:
                    times[name].append(seconds)
                    peaks[name] = max(peaks[name], memory.added)
        first, naive = (list(VARIANTS)[i] for i in (0, 1))
        for name in VARIANTS:
            ratios = [
                statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
                for other in (first, naive)
            ]
            lines.append(
                f"| {length} | {name} | {statistics.median(times[name]):.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | "
                f"{peaks[name]:.0f} | {peaks[name] / peaks[first]:.2f} | {peaks[naive] / peaks[name]:.1f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
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
    build(folder / "model", options.vocab_size, options.hidden_size, options.num_layers)
    lines = measure(
        folder / "model", options.lengths, options.num_pairs, options.repeats, folder / "out", options.bf16
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    facts = (
        f"{device} ({platform.machine()}); Llama with {options.num_layers} layers of {options.hidden_size}, "
        f"vocabulary {options.vocab_size}; {options.num_pairs} pairs, half of every row is completion; "
        f"{'bfloat16' if options.bf16 else 'float32'}; median of {options.repeats} steps after one."
    )
    text = f"{facts}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text)


if __name__ == "__main__":
    main()
