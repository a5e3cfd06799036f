"""
Which method keeps what it has gained: 128 updates of every method, four times as many as reach the best gold.

Every method is tuned with the same number of trials, on one seed that is not used again, by its mean gold on
validation prompts up to each of two horizons; then it runs on the seeds of the comparison, for each horizon with what
was best for that. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.constrained_ppo_playground.long_run \
    --config recipes/experiments/constrained_ppo_playground/long_run.yaml
"""

import itertools
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from trl_ext import ConstrainedPPOConfig
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly
from trl_ext.sparse_po.evaluation import reward_and_divergence

from ..method_comparison import Task
from ..runner import FinishedRuns
from .arms import ARMS, CONTROLLERS
from .long_run_report import write_report
from .run import OveroptimizationArguments, playground_task


# Fields that every method has, and those of a critic
SHARED = (
    "per_device_train_batch_size", "max_completion_length", "temperature", "num_iterations", "optim", "learning_rate",
    "max_grad_norm", "lr_scheduler_type", "warmup_steps", "max_steps", "use_cpu", "bf16", "gradient_checkpointing",
    "output_dir", "logging_steps", "save_strategy", "report_to", "disable_tqdm",
)  # fmt: skip
CRITIC = ("gamma", "gae_lambda", "critic_learning_rate", "critic_detach")
KNOWN = {**ARMS, **CONTROLLERS}
# What is kept of a trainer's log, by the beginning of its name
LOGGED = ("rewards/", "kl", "weight/", "multiplier/", "threshold/", "spread/", "completions/mean_length", "grad_norm")


@dataclass
class LongRunArguments(OveroptimizationArguments):
    """
    Arguments of the experiment, beside those of [`OveroptimizationArguments`].

    Args:
        arms (`list[str]`):
            Methods, of `ARMS` or `CONTROLLERS`.
        tuning_seed (`int`):
            Seed of the trials.
        num_trials (`int`):
            Trials of every method that has something to choose, the first ones of `ARMS`; with 1 nothing is tuned.
        horizons (`list[int]`):
            Updates for which every method is tuned; the longest is `max_steps`.
        measure_every (`int`):
            Updates between two measurements of the gold metric.
        group_size (`int`):
            Completions of each prompt for the methods without a critic.
    """

    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Methods."})
    tuning_seed: int = field(default=100, metadata={"help": "Seed of the trials."})
    num_trials: int = field(default=4, metadata={"help": "Trials of every method that has something to choose."})
    horizons: list[int] = field(
        default_factory=lambda: [32, 128], metadata={"help": "Updates for which every method is tuned."}
    )
    measure_every: int = field(default=16, metadata={"help": "Updates between two measurements."})
    group_size: int = field(default=8, metadata={"help": "Completions of a prompt where there is no critic."})


class GoldCurve(TrainerCallback):
    """
    Measures the policy on validation and test prompts while it trains, in the same way for every trainer, and keeps
    `points`: dictionaries of `step` and, for each split, `<split>/gold`, `<split>/kl` and `<split>/<reward>`.

    Args:
        task ([`Task`]):
            What is trained.
        every (`int`):
            Updates between two measurements.
        length (`int`):
            Longest response in tokens.
    """

    def __init__(self, task: Task, every: int, length: int):
        self.task, self.every, self.length = task, every, length
        self.reference = AutoModelForCausalLM.from_pretrained(task.model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(task.model)
        self.points: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.measure(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.measure(model, state.global_step)

    def measure(self, model: Any, step: int) -> None:
        """Samples one response for each prompt of both splits, with a seed of the step, and scores them."""
        splits = {"validation": self.task.validation, "test": self.task.test}
        columns = {name: [row[name] for data in splits.values() for row in data] for name in ("prompt", "chosen")}
        drawn = reward_and_divergence(
            model, self.reference, self.tokenizer, columns["prompt"], self.task.gold, max_new_tokens=self.length,
            batch_size=len(columns["prompt"]), seed=step,
        )  # fmt: skip
        scores = {"gold": drawn.rewards, "kl": drawn.divergences}
        for reward in self.task.rewards:
            scores[reward.__name__] = reward(drawn.completions, chosen=columns["chosen"])
        point: dict[str, float] = {"step": step}
        start = 0
        for split, data in splits.items():
            own = slice(start, start + len(data))
            point |= {f"{split}/{name}": float(np.mean(values[own])) for name, values in scores.items()}
            start += len(data)
        self.points.append(point)


def train(
    task: Task, config: Any, arguments: LongRunArguments, name: str, seed: int, trial: int, steps: int
) -> dict[str, Any]:
    """Trains once; returns `name`, `seed`, `trial`, `steps`, `settings`, `curve`, `log` and `cpu_seconds`."""
    arm = KNOWN[name]
    settings = arm.trials[trial]
    curve = GoldCurve(task, arguments.measure_every, config.max_completion_length)
    folder = Path(config.output_dir) / "policy"
    shutil.rmtree(folder, ignore_errors=True)
    # Only a search sees the gold metric while it trains
    judged = {"eval_dataset": task.validation, "gold_reward": task.gold} if "search" in settings else {}
    own = {**settings, "output_dir": str(folder), "max_steps": steps}
    start = time.process_time()
    trainer = arm.trainer(
        model=task.model,
        reward_funcs=list(task.rewards) if arm.rewards is None else arm.rewards(),
        args=configured(arm.config, config, seed, own, arguments.group_size),
        train_dataset=task.train,
        callbacks=[curve],
        **judged,
    )
    trainer.train()
    return {
        "name": name, "seed": seed, "trial": trial, "steps": steps, "settings": settings, "curve": curve.points,
        "log": kept_log(trainer.state.log_history), "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def kept_log(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rewards, KL, weights and multipliers of a trainer's log, to five digits."""
    entries = [
        {name: float(f"{value:.5g}") for name, value in entry.items() if name == "step" or name.startswith(LOGGED)}
        for entry in history
    ]
    return [entry for entry in entries if len(entry) > 1]


def configured(config_class: type, config: Any, seed: int, settings: dict[str, Any], group_size: int) -> Any:
    """The settings that all methods share in the class of one, with those of one run in their place."""
    has_critic = config_class is ConstrainedPPOConfig
    given = {name: getattr(config, name) for name in (*SHARED, *(CRITIC if has_critic else ()))}
    if not has_critic:
        given["num_generations"] = group_size
    if issubclass(config_class, ConstrainedPPOConfig):
        given |= {"dashboard": False, "calibration_samples": config.calibration_samples}
    return config_class(**{**given, "seed": seed, **settings})


def trials_of(name: str, arguments: LongRunArguments) -> list[tuple[str, int, int]]:
    """The tuning of a method as `(name, seed, trial)`; none where there is nothing to choose."""
    number = min(arguments.num_trials, len(KNOWN[name].trials))
    return [(name, arguments.tuning_seed, trial) for trial in range(number)] if number > 1 else []


def mean_gold(result: dict[str, Any], horizon: int) -> float:
    """What a trial is judged by: mean gold on validation prompts over all measurements up to a horizon."""
    return float(np.mean([point["validation/gold"] for point in result["curve"][1:] if point["step"] <= horizon]))


def chosen_trial(results: list[dict[str, Any]], name: str, tuning_seed: int, horizon: int) -> int:
    """The trial with the highest [`mean_gold`]; 0 where nothing was tuned."""
    own = [result for result in results if result["name"] == name and result["seed"] == tuning_seed]
    return int(max(own, key=lambda result: mean_gold(result, horizon))["trial"]) if own else 0


def run_missing(task: Task, config: Any, arguments: LongRunArguments, folder: Path) -> list[dict[str, Any]]:
    """Trains what is missing: first the trials of all methods, then their runs on every seed, longest first."""
    finished = FinishedRuns(folder)

    def complete(name: str, seed: int, trial: int, steps: int) -> None:
        # A longer run with the same settings begins with the shorter
        lengths = [horizon for horizon in arguments.horizons if horizon >= steps]
        if not any(finished.has(name=name, seed=seed, trial=trial, steps=length) for length in lengths):
            finished.add(train(task, config, arguments, name, seed, trial, steps))

    for name in arguments.arms:
        for run in trials_of(name, arguments):
            complete(*run, max(arguments.horizons))
    for seed, name in itertools.product(arguments.seeds, arguments.arms):
        for horizon in sorted(arguments.horizons, reverse=True):
            complete(name, seed, chosen_trial(finished.rows, name, arguments.tuning_seed, horizon), horizon)
    return finished.rows


def main(training_args: ConstrainedPPOConfig, arguments: LongRunArguments) -> None:
    """Runs what is missing and writes the report into the output folder."""
    torch.set_num_threads(1)
    folder = Path(training_args.output_dir)
    results = run_missing(playground_task(arguments), training_args, arguments, folder)
    trials = [result for result in results if result["seed"] == arguments.tuning_seed]
    chosen = {
        (name, horizon): chosen_trial(results, name, arguments.tuning_seed, horizon)
        for name in KNOWN
        for horizon in arguments.horizons
    }
    runs = [result for result in results if result["seed"] in arguments.seeds]
    write_report(runs, trials, chosen, arguments.horizons, folder, mean_gold)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, LongRunArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
