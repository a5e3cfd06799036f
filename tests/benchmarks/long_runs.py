r"""Whether a long run stays as it began: resident memory, open files and time a step, of tiny models on a CPU.

The commands are those of `tests/faults`, each in a process of its own that is looked at from outside.

python -m tests.benchmarks.long_runs [--commands sparse-po constrained-ppo] [--steps 3000]
python -m tests.benchmarks.long_runs --steps 50 --vocabulary 256000
python -m tests.benchmarks.long_runs --commands constrained-ppo --steps 1 --overrides --max_completion_length 8192 \
    --generation_kwargs '{"min_new_tokens": 8192}' --per_device_train_batch_size 2 --num_iterations 1
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from trl_ext.core.quiet import VERBOSE_VARIABLE


LOGGED_EVERY = 10


class Sample(NamedTuple):
    """What a process has at a moment."""

    step: int
    seconds: float
    megabytes: float
    files: int


def samples(bench, command: str, steps: int, overrides: list[str]) -> list[Sample]:
    every = min(LOGGED_EVERY, max(1, steps // 4))
    fixed = ["--max_steps", str(steps), "--save_strategy", "no", "--logging_steps", str(every)]
    run = bench.start(command, bench.folder / f"long-{command}", *fixed, *overrides)
    process, found, begun = psutil.Process(run.pid), [], time.monotonic()
    while os.waitpid(run.pid, os.WNOHANG) == (0, 0):
        step = every * run.said().count("{'loss'")
        if step and (not found or step > found[-1].step):
            memory = process.memory_info().rss / 2**20
            if memory:  # a process that has just ended has none
                found.append(Sample(step, time.monotonic() - begun, memory, process.num_fds()))
        time.sleep(0.1)
    assert found and found[-1].step >= steps - every, run.said()[-3000:]
    return found


def row(command: str, found: list[Sample]) -> str:
    """The state after a fifth of the steps and at the end, and the time a step in both fifths."""
    fifth, last = found[-1].step / 5, found[-1]
    early = next(sample for sample in found if sample.step >= fifth)
    late = next(sample for sample in found if sample.step >= 4 * fifth)
    first = found[0]
    paces = [1000 * (b.seconds - a.seconds) / max(1, b.step - a.step) for a, b in ((first, early), (late, last))]
    return (
        f"{command:20} {last.step:6} steps  {early.megabytes:6.0f} -> {last.megabytes:6.0f} MB  "
        f"{early.files:3} -> {last.files:3} files  {paces[0]:7.1f} -> {paces[1]:7.1f} ms a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", nargs="+")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--vocabulary", type=int, help="rows of the model's embeddings; default: those of its words")
    parser.add_argument("--overrides", nargs=argparse.REMAINDER, default=[], help="further arguments of the commands")
    options = parser.parse_args()
    # What is counted below is the log as a whole
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", VERBOSE_VARIABLE: "1"}
    from transformers import AutoModelForCausalLM

    from tests.faults.__main__ import import_libraries
    from tests.faults.commands import COMMANDS, Bench
    from tests.helpers.tiny import tokenizer_of_size

    import_libraries()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        if options.vocabulary:
            model = AutoModelForCausalLM.from_pretrained(bench.folder / "model")
            model.resize_token_embeddings(options.vocabulary)
            model.save_pretrained(bench.folder / "model")
            tokenizer_of_size(options.vocabulary).save_pretrained(bench.folder / "model")
        for command in options.commands or COMMANDS:
            print(row(command, samples(bench, command, options.steps, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
