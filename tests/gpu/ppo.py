"""A step of ConstrainedPPO against one of TRL's GRPO, on completions that are given."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.benchmarks.constrained_ppo import CASES, STEPS, Size, build, fixed_rollouts, length, low_ids, parity
from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer

from .measuring import Record, peak_mib


TABLE = "ConstrainedPPO step over TRL's GRPO step, without generation"


class StepTimes(TrainerCallback):
    """Milliseconds of each optimizer step, the device's work included."""

    def __init__(self):
        self.milliseconds: list[float] = []

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.milliseconds.append(self.now() - self.start)


def size_of(dry: bool) -> Size:
    return Size(32, 4, 256, 12, 2) if dry else Size(1024, 4, 65536, 384, 8)


def folder(dry: bool) -> Path:
    return Path(tempfile.gettempdir()) / f"gpu_evidence_ppo_{'tiny' if dry else 'full'}"


def prepare(dry: bool) -> None:
    """Writes the model, while another section has the GPU."""
    build(folder(dry), size_of(dry))


def make_trainer(kind: str, dry: bool, settings: dict[str, Any], kl_coef: float) -> Any:
    size, on_gpu = size_of(dry), torch.cuda.is_available()
    common = {
        "output_dir": str(folder(dry) / kind), "use_cpu": not on_gpu, "bf16": on_gpu, "report_to": "none",
        "disable_tqdm": True, "gradient_checkpointing": False, "per_device_train_batch_size": size.num_responses,
        "num_generations": 2, "max_completion_length": size.num_tokens, "learning_rate": 1e-6, "max_steps": STEPS,
        "save_strategy": "no", "logging_strategy": "no", "loss_type": "dapo",
        "model_init_kwargs": {"dtype": "float32"}, **settings,
    }  # fmt: skip
    if kind == "GRPO":
        trainer_class, args = GRPOTrainer, GRPOConfig(**common, beta=kl_coef)
    else:
        constraints = [{"reward": index, "threshold": 0.4} for index in range(3)]
        own = {"method": "xi", "constraints": constraints, "calibration_samples": 0, "dashboard": False}
        trainer_class, args = ConstrainedPPOTrainer, ConstrainedPPOConfig(**common, **own, kl_coef=kl_coef)
    trainer = trainer_class(
        str(folder(dry) / "model"),
        reward_funcs=[length, low_ids, parity],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "the"} for _ in range(64)]),
        rollout_func=fixed_rollouts(size),
    )
    times = StepTimes()
    trainer.add_callback(times)
    return trainer, times


def run(record: Record, device: torch.device, dry: bool) -> None:
    rounds = 1 if dry else 4
    for case, (settings, kl_coef, target) in list(CASES.items())[: 1 if dry else None]:
        with record.attempt(TABLE, case=case):
            trainers = {kind: make_trainer(kind, dry, settings, kl_coef) for kind in ("GRPO", "PPO")}
            turns: dict[str, list[float]] = {kind: [] for kind in trainers}
            for turn in range(rounds + 1):
                for kind, (trainer, times) in trainers.items():
                    times.milliseconds.clear()
                    trainer.train()
                    if turn:
                        turns[kind].append(sum(times.milliseconds) / len(times.milliseconds))
            peaks = {kind: peak_mib(trainer.train) for kind, (trainer, _) in trainers.items()}
            grpo, ppo = (statistics.median(turns[kind]) for kind in ("GRPO", "PPO"))
            record.row(
                TABLE, size=str(size_of(dry)), case=case, grpo_ms=grpo, ppo_ms=ppo, ratio=ppo / grpo, target=target,
                grpo_peak_mib=peaks["GRPO"], ppo_peak_mib=peaks["PPO"], peak_ratio=peaks["PPO"] / peaks["GRPO"],
            )  # fmt: skip
            del trainers, trainer
