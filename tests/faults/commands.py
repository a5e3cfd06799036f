"""The commands that are put under faults, on tiny models, and processes that run them and can be killed."""

import hashlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from tests.helpers.constrained_ppo import prompts
from tests.helpers.tiny import save_tiny_model, tiny_pairs


STEPS = 6
COMMON = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False,
    "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False, "learning_rate": 0.01,
    "per_device_train_batch_size": 4, "lr_scheduler_type": "linear",
}  # fmt: skip
_REWARDS = {
    "reward_funcs": ["tests.helpers.constrained_ppo.low_ids", "tests.helpers.constrained_ppo.length"],
    "constraints": [{"reward": "low_ids", "threshold": 0.7}, {"reward": "length", "threshold": 0.5}],
    "method": "xi", "max_completion_length": 6, "calibration_samples": 8, "dashboard": False,
}  # fmt: skip
COMMANDS = {
    "sparse-po": {"data": "pairs", "mask_learning_rate": 0.01},
    "constrained-ppo": {"data": "prompts", **_REWARDS, "num_iterations": 2, "critic_learning_rate": 0.01},
    "constrained-grpo": {
        "data": "prompts", **_REWARDS, "method": "mu", "beta": 0.1, "num_generations": 2, "num_iterations": 2,
    },
    "dpo": {"data": "pairs", "optim": "adamp"},
    "equilibrium-reward": {"data": "pairs", "head_hidden_features": [8]},
    "sft": {"data": "texts"},
}  # fmt: skip
# What may take the longest, a run on a busy machine included
PATIENCE = 120.0


class Bench:
    """Data, a tiny model and a recipe for each command, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        model = save_tiny_model(folder / "model")
        pairs = tiny_pairs(24)
        pairs.to_json(folder / "pairs.jsonl")
        prompts(64).to_json(folder / "prompts.jsonl")
        pairs.map(lambda row: {"text": row["prompt"] + row["chosen"]}, remove_columns=pairs.column_names).to_json(
            folder / "texts.jsonl"
        )
        for command, own in COMMANDS.items():
            settings = {**COMMON, "model_name_or_path": model, **own}
            settings["datasets"] = [{"path": "json", "data_files": str(folder / f"{settings.pop('data')}.jsonl")}]
            self.recipe(command).write_text(json.dumps(settings))  # which YAML reads too

    def recipe(self, command: str) -> Path:
        return self.folder / f"{command}.yaml"

    def start(
        self, command: str, output: Path, *overrides: str, log: Path | None = None, first: Callable[[], None] = bool
    ) -> "Run":
        """Starts a command in a process of its own, which calls `first` before anything else."""
        arguments = ["--config", str(self.recipe(command)), "--output_dir", str(output), "--trust_recipe_code"]
        arguments += overrides
        module = f"trl_ext.scripts.{command.replace('-', '_')}"
        return Run(module, arguments, log or output.with_name(f"{output.name}.log"), first)

    def run(self, command: str, output: Path, *overrides: str, log: Path | None = None) -> "Run":
        run = self.start(command, output, *overrides, log=log)
        run.wait()
        return run


class Run:
    """A command in a process that is forked from this one, which has imported the libraries."""

    def __init__(self, module: str, arguments: list[str], log: Path, first: Callable[[], None] = bool):
        self.log, self.begun = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(module, arguments, log, first)
        self.status: int | None = None

    def wait(self, patience: float = PATIENCE) -> int | None:
        """The exit status, or `None` where the process was stuck and had to be killed."""
        end = time.monotonic() + patience
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.seconds = time.monotonic() - self.begun
                break
            if time.monotonic() > end:
                self.kill()
                self.status = None
                return None
            time.sleep(0.005)
        return self.status

    def kill(self) -> bool:
        """Kills the process; whether it still ran."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status == -signal.SIGKILL

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""  # which the process makes


def _become(module: str, arguments: list[str], log: Path, first: Callable[[], None]) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [module, *arguments]
    status = 1
    try:
        first()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(error.code + "\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def what_it_left(output: Path) -> dict[str, str]:
    """What a run has computed: hashes of its weights, and its logged losses."""
    found = {}
    for path in output.glob("*.safetensors"):  # whose metadata stand in any order
        digest = hashlib.sha256()
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        found[path.name] = digest.hexdigest()
    for name in ("multipliers.json", "ppo_state.json"):
        if (output / name).is_file():
            found[name] = (output / name).read_text()
    state = output / "trainer_state.json"
    if state.is_file():
        history = json.loads(state.read_text())["log_history"]
        found["losses"] = str([entry["loss"] for entry in history if "loss" in entry])
    return found


def judged(run: Run, output: Path, expected: dict[str, str], names: tuple[str, ...] = ()) -> str:
    """
    `"same"` as a run without a fault, `"refused"` with a message that has one of `names`, and what must not be:
    `"different"`, `"traceback"`, `"unclear"` or `"stuck"`.
    """
    if run.status is None:
        return "stuck"
    if run.status == 0:
        return "same" if what_it_left(output) == expected else "different"
    said = run.said()
    if "Traceback" in said:
        return "traceback"
    return "refused" if any(name in said for name in names) else "unclear"
