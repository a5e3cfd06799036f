r"""Whether a long run stays as it began: resident memory, open files and time a step, of tiny models on a CPU.

The commands are those of `tests/faults`, each in a process of its own that is looked at from outside. Beside them,
once in a second, the same small work is timed: a machine that others use becomes slower and faster by itself, which
the last column shows.

python -m tests.benchmarks.long_runs [--commands sparse-po constrained-ppo] [--steps 3000] [--calls]
python -m tests.benchmarks.long_runs --steps 50 --vocabulary 256000
python -m tests.benchmarks.long_runs --commands constrained-ppo --steps 1 --overrides --max_completion_length 8192 \
    --generation_kwargs '{"min_new_tokens": 8192}' --per_device_train_batch_size 2 --num_iterations 1
"""

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from trl_ext.core.quiet import VERBOSE_VARIABLE


LOGGED_EVERY = 10
COUNTED_STEPS = 40


class Sample(NamedTuple):
    """What a process has at a moment."""

    step: int
    seconds: float
    megabytes: float
    files: int
    machine: float  # ms that the same work takes


def milliseconds_of_same_work() -> float:
    """What the machine gives at the moment: small products and Python, as in a step of a tiny model."""
    begun, x = time.perf_counter(), torch.eye(32)
    for _ in range(2000):
        x = torch.tanh(x @ x)
    return 1000 * (time.perf_counter() - begun)


def samples(bench, command: str, steps: int, overrides: list[str]) -> list[Sample]:
    every = min(LOGGED_EVERY, max(1, steps // 4))
    fixed = ["--max_steps", str(steps), "--save_strategy", "no", "--logging_steps", str(every)]
    run = bench.start(command, bench.folder / f"long-{command}", *fixed, *overrides)
    process, found, begun = psutil.Process(run.pid), [], time.monotonic()
    torch.set_num_threads(1)
    while os.waitpid(run.pid, os.WNOHANG) == (0, 0):
        step = every * run.said().count("{'loss'")
        if step and (not found or step > found[-1].step):
            memory = process.memory_info().rss / 2**20
            if memory:  # a process that has just ended has none
                seconds, machine = time.monotonic() - begun, milliseconds_of_same_work()
                found.append(Sample(step, seconds, memory, process.num_fds(), machine))
        time.sleep(0.5)
    assert found and found[-1].step >= steps - every, run.said()[-3000:]
    return found


def row(command: str, found: list[Sample]) -> str:
    """The state after a fifth of the steps and at the end; the time a step, and the machine's, in each fifth."""
    ends = [next(sample for sample in found if sample.step >= k * found[-1].step / 5) for k in range(1, 6)]
    paces, machine = [], []
    for first, last in zip([found[0], *ends], ends, strict=False):
        between = [sample.machine for sample in found if first.step <= sample.step <= last.step]
        machine.append(statistics.median(between))
        paces.append(1000 * (last.seconds - first.seconds) / max(1, last.step - first.step))
    early, late = ends[0], ends[-1]
    return (
        f"{command:20} {late.step:6} steps  {early.megabytes:6.0f} -> {late.megabytes:6.0f} MB  "
        f"{early.files:3} -> {late.files:3} files  {' '.join(f'{pace:6.1f}' for pace in paces)} ms a step  "
        f"{' '.join(f'{m:5.1f}' for m in machine)} ms the same work"
    )


def count_calls(steps: int) -> None:
    """Has the run of this process print how many functions a step calls early on and at its end."""
    from transformers import Trainer, TrainerCallback

    calls, counted = [0], []
    counting = {begin + k for begin in (steps // 10, steps - COUNTED_STEPS - 20) for k in range(COUNTED_STEPS)}

    def count(frame, event, argument):
        calls[0] += event in ("call", "c_call")

    class Counter(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            sys.setprofile(None)
            if state.global_step - 1 in counting:
                counted.append(calls[0])
            if len(counted) == COUNTED_STEPS:
                *others, most = sorted(counted)
                print(f"CALLS {statistics.mean(others):.0f} (most {most})", flush=True)
                counted.clear()
            if state.global_step in counting:
                calls[0] = 0
                sys.setprofile(count)

    init = Trainer.__init__

    def with_counter(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(Counter())

    Trainer.__init__ = with_counter


def row_of_calls(bench, command: str, steps: int, overrides: list[str]) -> str:
    fixed = ["--max_steps", str(steps), "--save_strategy", "no", "--logging_steps", str(LOGGED_EVERY)]
    output = bench.folder / f"calls-{command}"
    run = bench.start(command, output, *fixed, *overrides, first=partial(count_calls, steps))
    os.waitpid(run.pid, 0)
    calls = re.findall(r"^CALLS (.*)$", run.said(), re.MULTILINE)
    assert len(calls) == 2, run.said()[-3000:]
    early, late = calls
    return f"{command:20} {steps:6} steps  {early} -> {late} calls a step"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", nargs="+")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--vocabulary", type=int, help="rows of the model's embeddings; default: those of its words")
    parser.add_argument("--calls", action="store_true", help="count calls of functions in place of time and memory")
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
            if options.calls:
                print(row_of_calls(bench, command, options.steps, options.overrides), flush=True)
            else:
                print(row(command, samples(bench, command, options.steps, options.overrides)), flush=True)


if __name__ == "__main__":
    main()
