"""What a checkpoint that is whole or not there costs beside transformers' own, at the size of SmolLM2-135M.

    held     how long a save holds training up
    whole    until the checkpoint is there: written, flushed to the disk, hashed, renamed; training goes on meanwhile

python -m tests.benchmarks.save_overhead [--layers 30] [--repeats 5] [--folder DIR]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from trl_ext.core.checkpointing import WholeCheckpointsMixin


class WholeTrainer(WholeCheckpointsMixin, Trainer):
    pass


def build(folder: Path, layers: int) -> WholeTrainer:
    """A trainer whose optimizer has its state."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    args = TrainingArguments(
        str(folder), report_to="none", use_cpu=not torch.cuda.is_available(), disable_tqdm=True, max_steps=1,
        per_device_train_batch_size=1, save_strategy="no",
    )  # fmt: skip
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    trainer = WholeTrainer(LlamaForCausalLM(config), args, train_dataset=[row])
    trainer.train()
    return trainer


def timed_save(trainer: WholeTrainer, whole: bool) -> tuple[float, float, int]:
    """Seconds that training is held up, seconds until all is there, and bytes."""
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.sync()  # no writing of an earlier save goes on meanwhile
    begun = time.perf_counter()
    if whole:
        trainer._save_checkpoint(trainer.model, None)
    else:
        super(WholeCheckpointsMixin, trainer)._save_checkpoint(trainer.model, None)
    held = time.perf_counter() - begun
    trainer._finish_publishing()
    done = time.perf_counter() - begun
    return held, done, sum(path.stat().st_size for path in checkpoint.rglob("*"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to be measured; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        trainer = build(Path(folder), options.layers)
        found: dict[bool, list[tuple[float, float, int]]] = {False: [], True: []}
        for whole in [False, True] * (options.repeats + 1):
            found[whole].append(timed_save(trainer, whole))
        plain, own = ([statistics.median(one) for one in zip(*found[whole][1:], strict=True)] for whole in found)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{count / 1e6:.0f}M parameters, {own[2] / 1e6:.0f} MB, medians of {options.repeats} after one")
    print(f"plain: held {plain[0]:.2f} s, nothing flushed or hashed")
    print(f"whole: held {own[0]:.2f} s ({100 * (own[0] / plain[0] - 1):+.1f}%), whole after {own[1]:.2f} s")


if __name__ == "__main__":
    main()
