"""Time and peak memory of an optimizer step of ConstrainedPPOTrainer against TRL's GRPOTrainer, without generation.

Both trainers run their own `train()` in one process with the same model, prompts, three rewards and completions,
which are fixed and handed over through `rollout_func`. They take turns, a few steps each, and a turn's times are CPU
times of whole steps: scoring, loss, backward, clipping and optimizer. The ratio is the median over pairs of turns that
follow one another; that of the fastest steps, over the turns the fastest first and the fastest second step, is shown
beside it. On a busy machine the two differ, and neither is to be trusted; the floating-point operations of the matrix
products are counted, and their ratio does not depend on the machine. There are three constraints, also in the cases
without a critic.

python -m tests.benchmarks.constrained_ppo --output docs/results/constrained_ppo_benchmark.md
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from tests.benchmarks.sparse_po import PeakMemory
from tests.helpers.tiny import tokenizer_of_size
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    num_tokens: int
    num_responses: int

    def __str__(self) -> str:
        return f"{self.hidden_size} / {self.vocab_size} / {self.num_tokens} x {self.num_responses}"


SIZES = (Size(256, 4, 8192, 64, 8), Size(384, 4, 16384, 128, 4), Size(512, 4, 32768, 256, 2))
NUM_PROMPT_TOKENS = 16
# Case: settings of both and, as `critic`, of ours, KL coefficient, and the largest ratio of times aimed at
CASES = {
    "two epochs, KL": ({"num_iterations": 2}, 0.05, 1.05),
    "two epochs, no KL": ({"num_iterations": 2}, 0.0, 1.05),
    "aligned, KL": ({}, 0.05, 1.4),
    "aligned, no KL": ({}, 0.0, 1.4),
    "no critic, two epochs, KL": ({"num_iterations": 2, "critic": "none"}, 0.05, 1.01),
    "no critic, aligned, no KL": ({"critic": "none"}, 0.0, 1.01),
}
MEMORY_TARGET = 1.1
STEPS = 2


def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def low_ids(completion_ids, **columns):
    return [sum(index < 1000 for index in ids) / len(ids) for ids in completion_ids]


def parity(completion_ids, **columns):
    return [sum(index % 2 for index in ids) / len(ids) for ids in completion_ids]


def fixed_rollouts(size: Size):
    """A `rollout_func` that gives every prompt of every rollout the same completions; no two lengths are the same."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, size.vocab_size, (count,), generator=generator).tolist()

    prompts = [ids(NUM_PROMPT_TOKENS) for _ in range(size.num_responses)]
    completions = [ids(size.num_tokens - 2 * row) for row in range(size.num_responses)]

    def rollout(batch, trainer):
        assert len(batch) == size.num_responses
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    return rollout


class StepTimes(TrainerCallback):
    """CPU seconds of each optimizer step, or the MiB that it adds."""

    def __init__(self):
        self.watch_memory = False
        self.seconds: list[float] = []
        self.peaks: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if self.watch_memory:
            self.memory = PeakMemory().__enter__()
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if self.watch_memory:
            self.memory.__exit__()
            self.peaks.append(self.memory.added)
        else:
            self.seconds.append(time.process_time() - self.start)


def make_trainer(kind: str, folder: Path, size: Size, settings: dict, kl_coef: float):
    own = {name: value for name, value in settings.items() if name == "critic"}
    settings = {name: value for name, value in settings.items() if name not in own}
    common = {
        "output_dir": str(folder / kind), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "per_device_train_batch_size": size.num_responses, "num_generations": 2,
        "max_completion_length": size.num_tokens, "learning_rate": 1e-6, "max_steps": STEPS, "save_strategy": "no",
        "logging_strategy": "no", "loss_type": "dapo", "model_init_kwargs": {"dtype": "float32"}, **settings,
    }  # fmt: skip
    if kind == "GRPO":
        trainer_class, args = GRPOTrainer, GRPOConfig(**common, beta=kl_coef)
    else:
        own |= {"method": "xi", "constraints": [{"reward": index, "threshold": 0.4} for index in range(3)]}
        if own.get("critic") == "none":
            own["objective"] = "rewards"
        own |= {"calibration_samples": 0, "dashboard": False}
        known = {name: value for name, value in own.items() if name in ConstrainedPPOConfig.__dataclass_fields__}
        trainer_class, args = ConstrainedPPOTrainer, ConstrainedPPOConfig(**common, **known, kl_coef=kl_coef)
    trainer = trainer_class(
        str(folder / "model"),
        reward_funcs=[length, low_ids, parity],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "the"} for _ in range(64)]),
        rollout_func=fixed_rollouts(size),
    )
    times = StepTimes()
    trainer.add_callback(times)
    return trainer, times


def build(folder: Path, size: Size) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size, hidden_size=size.hidden_size, intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.num_layers, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer_of_size(size.vocab_size).save_pretrained(folder / "model")


def count_operations(trainer) -> int:
    """Floating-point operations of the matrix products of one turn."""

    # TRL's head accumulates its gradients with it; torch does not count it
    def addmm(_, first, second, **kwargs):
        return 2 * first[0] * first[1] * second[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm}) as counter:
        trainer.train()
    return counter.get_total_flops()


def measure(folder: Path, size: Size, case: str, rounds: int) -> str:
    """One line of the table."""
    settings, kl_coef, target = CASES[case]
    trainers = {kind: make_trainer(kind, folder, size, settings, kl_coef) for kind in ("GRPO", "PPO")}
    turns = {kind: [] for kind in trainers}
    for turn in range(rounds + 1):
        # Whoever follows finds warm caches: they swap
        for kind in sorted(trainers, reverse=bool(turn % 2)):
            trainer, times = trainers[kind]
            times.seconds.clear()
            trainer.train()
            if turn:
                turns[kind].append(list(times.seconds))
    operations = {kind: count_operations(trainer) for kind, (trainer, _) in trainers.items()}
    for trainer, times in [*trainers.values()] * 2:
        times.watch_memory = True
        trainer.train()
    grpo, ppo = turns["GRPO"], turns["PPO"]
    fastest = {kind: sum(map(min, zip(*turns[kind], strict=True))) / STEPS for kind in turns}
    of_fastest = fastest["PPO"] / fastest["GRPO"]
    ratio = statistics.median(sum(b) / sum(a) for a, b in zip(grpo, ppo, strict=True))
    peaks = {kind: statistics.median(times.peaks) for kind, (_, times) in trainers.items()}
    memory = peaks["PPO"] / peaks["GRPO"]
    return (
        f"| {size} | {case} | {fastest['GRPO']:.3f} | {fastest['PPO']:.3f} | {ratio:.3f} | {of_fastest:.3f} | "
        f"{operations['PPO'] / operations['GRPO']:.3f} | {target:.2f} | {peaks['GRPO']:.0f} | {peaks['PPO']:.0f} | "
        f"{memory:.3f} | {'yes' if ratio <= target and memory <= MEMORY_TARGET else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(range(len(SIZES))), help="which sizes")
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "constrained_ppo_benchmark"))
    parser.add_argument("--output")
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    head = [
        "| hidden / vocabulary / tokens x responses | case | GRPO, s | PPO, s | ratio | of fastest | of operations | "
        "target | GRPO, MiB | PPO, MiB | ratio | met |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    lines = []
    for size in (SIZES[index] for index in options.sizes):
        folder = Path(options.folder) / str(size.hidden_size)
        build(folder, size)
        for case in options.cases:
            lines.append(measure(folder, size, case, options.rounds))
            print(lines[-1], flush=True)
    facts = (
        f"CPU, 1 thread ({platform.machine()}), float32; Llama with 4 layers, {NUM_PROMPT_TOKENS} prompt tokens; "
        f"{options.rounds} turns of {STEPS} steps after one."
    )
    if options.output:
        Path(options.output).write_text(f"{facts}\n\n" + "\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
