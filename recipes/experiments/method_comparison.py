"""
What the experiments of constrained PPO share: the same task trained by every method, over seeds, on a few processes.

First come the runs that maximise one reward each without KL, whose proxy points give the thresholds; plain PPO; and
the tuning of its fixed weights, with as many runs as the proxy points took. Then come the methods that need their
outcome. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes on where it stopped.
"""

import itertools
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_ext import ConstrainedPPOTrainer
from trl_ext.constrained_ppo.constrained_ppo_config import PRESET_FIELDS
from trl_ext.constrained_ppo.proxy_points.logged_runs import Measurements
from trl_ext.scripts import proxy_points as proxy_points_command

from .method_comparison_report import compute_used, write_report
from .runner import FinishedRuns


# Coefficient that leaves the KL without effect and has it logged
WITHOUT_KL = 1e-6
TUNED = "ppo, tuned weights"
CONSTRAINED = ("sat", "all", "mu", "xi", "ppo-lag")
SEARCH = "NM"
# Filled by presets, so each run starts without them
_PRESET_FIELDS: dict[str, Any] = {**dict.fromkeys(PRESET_FIELDS), "constraints": []}


@dataclass(frozen=True)
class Task:
    """
    What is trained.

    Args:
        model (`str`):
            Policy before training.
        train (`~datasets.Dataset`):
            Prompts to train on, with the columns that the rewards need.
        validation (`~datasets.Dataset`):
            Prompts of the gold metric while training, from which thresholds and weights are chosen.
        test (`~datasets.Dataset`):
            Prompts of the gold metric after training.
        rewards (`tuple[Callable, ...]`):
            Reward functions.
        gold (`Callable`):
            Gold metric, with the signature of a reward function.
    """

    model: str
    train: Any
    validation: Any
    test: Any
    rewards: tuple[Callable[..., list[float]], ...]
    gold: Callable[..., list[float]]

    @property
    def reward_names(self) -> list[str]:
        return [reward.__name__ for reward in self.rewards]


@dataclass
class ComparisonArguments:
    """
    Arguments that the experiments share.

    Args:
        methods (`list[str]`):
            Methods beyond the runs on each reward alone and plain PPO.
        seeds (`list[int]`):
            Seeds of training.
        num_processes (`int`):
            Runs at a time, each on one thread.
        weight_grid (`list[float]`):
            Weights of the second reward that are tried for plain PPO; the first has 1 minus that.
        kl_grid (`list[float]`):
            KL coefficients that are tried for plain PPO.
        proxy_degree (`int`):
            Degree of the polynomial that proxy points are read from.
        search_budget (`int`):
            Evaluations of the gold metric of the threshold search.
        search_range (`list[float]`, *optional*):
            For each reward, how far above the base model's the search starts, as a fraction of it. Defaults to the
            search's own.
    """

    methods: list[str] = field(
        default_factory=lambda: [TUNED, *CONSTRAINED, SEARCH], metadata={"help": "Methods beyond plain PPO."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds of training."})
    num_processes: int = field(default=2, metadata={"help": "Runs at a time, each on one thread."})
    weight_grid: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 0.75], metadata={"help": "Weights of the second reward."}
    )
    kl_grid: list[float] = field(
        default_factory=lambda: [0.001, 0.003], metadata={"help": "KL coefficients tried for plain PPO."}
    )
    proxy_degree: int = field(default=3, metadata={"help": "Degree of the polynomial behind the proxy points."})
    search_budget: int = field(default=30, metadata={"help": "Gold evaluations of the threshold search."})
    search_range: list[float] | None = field(
        default=None, metadata={"help": "For each reward, how far above the base model's the search starts."}
    )


@dataclass(frozen=True)
class Run:
    """
    One training run.

    Args:
        name (`str`): Method, as it stands in the table.
        seed (`int`): Seed.
        settings (`dict[str, Any]`): Fields of [`ConstrainedPPOConfig`] that make the method.
    """

    name: str
    seed: int
    settings: dict[str, Any]


def alone(reward: str) -> str:
    """Name of the runs that maximise one reward without KL."""
    return f"{reward} alone, no KL"


def first_runs(task: Task, config: Any, arguments: ComparisonArguments) -> list[Run]:
    """The runs that need no thresholds: each reward alone, plain PPO and the tuning of its weights."""
    runs = []
    for seed in arguments.seeds:
        for index, name in enumerate(task.reward_names):
            weights = [float(position == index) for position in range(len(task.rewards))]
            runs.append(Run(alone(name), seed, {"method": "ppo", "kl_coef": WITHOUT_KL, "reward_weights": weights}))
        runs.append(Run("ppo", seed, {"method": "ppo", "kl_coef": config.kl_coef}))
    return runs + tuning_runs(task, arguments)


def tuning_runs(task: Task, arguments: ComparisonArguments) -> list[Run]:
    """One run for each point of the grid of weights and KL coefficients, no more than the proxy points took."""
    if TUNED not in arguments.methods:
        return []
    grid = list(itertools.product(arguments.weight_grid, arguments.kl_grid))
    allowed = len(task.rewards) * len(arguments.seeds)
    if len(grid) > allowed:
        raise ValueError(
            f"`weight_grid` and `kl_grid` make {len(grid)} runs and the proxy points take {allowed}. Shorten a grid, "
            "so that both have equal compute."
        )
    return [
        Run(f"tuning {weight:g} {kl_coef:g}", 0, _weighted(weight, kl_coef, len(task.rewards)))
        for weight, kl_coef in grid
    ]


def _weighted(weight: float, kl_coef: float, num_rewards: int) -> dict[str, Any]:
    weights = [1.0 - weight, *([weight / (num_rewards - 1)] * (num_rewards - 1))]
    return {"method": "ppo", "kl_coef": kl_coef, "reward_weights": weights}


def later_runs(
    task: Task, config: Any, arguments: ComparisonArguments, thresholds: dict[str, float], finished: list[dict]
) -> list[Run]:
    """The runs of the methods, at the thresholds and at the best weights of the tuning."""
    runs = []
    for seed, name in itertools.product(arguments.seeds, arguments.methods):
        if name == TUNED:
            settings = best_tuning(finished)["settings"]
        else:
            method = "xi" if name == SEARCH else name
            kind = {"kind": "<="} if method == "ppo-lag" else {}
            constraints = [{"reward": reward, "threshold": value, **kind} for reward, value in thresholds.items()]
            settings = {"method": method, "constraints": constraints}
            if name == SEARCH:
                steps = 2 * config.max_steps
                search = _search(task, arguments, seed)
                settings |= {"max_steps": steps, "search": search, "eval_steps": steps, "save_strategy": "best"}
        runs.append(Run(name, seed, settings))
    return runs


def _search(task: Task, arguments: ComparisonArguments, seed: int) -> dict[str, Any]:
    search = {"max_gold_evaluations": arguments.search_budget, "seed": seed, "after_search": "train"}
    if arguments.search_range is not None:
        search["initial_range"] = dict(zip(task.reward_names, arguments.search_range, strict=True))
    return search


def best_tuning(finished: list[dict]) -> dict[str, Any]:
    """The run of the tuning with the highest gold metric at its end, on the validation split."""
    tuning = [result for result in finished if result["name"].startswith("tuning ")]
    return max(tuning, key=lambda result: result["curve"][-1]["gold"])


def train(task: Task, config: Any, run: Run, folder: Path) -> dict[str, Any]:
    """
    Trains once, into `folder`, which is emptied before and of checkpoints after.

    Returns:
        `dict` with `name`, `seed`, `settings`, `curve` (evaluations on the validation split), `test` (the same on the
        test split, at the end), `average` (over rollouts), `multipliers`, `stop_reason`, `gold_evaluations`,
        `seconds` and `cpu_seconds`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    start, cpu_start = time.monotonic(), time.process_time()
    trainer = ConstrainedPPOTrainer(
        model=task.model,
        reward_funcs=list(task.rewards),
        args=configured(config, run, folder),
        train_dataset=task.train,
        eval_dataset=task.validation,
        gold_reward=task.gold,
    )
    trainer.train()
    trainer.save_state()
    history = list(trainer.state.log_history)
    test = evaluation({"step": trainer.state.global_step, **trainer.evaluate(task.test)}, task.reward_names)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    curve = [evaluation(entry, task.reward_names) for entry in history if "eval_gold" in entry]
    # A gold metric of a whole set keeps what it is made of; the last call was on the test split
    measured = getattr(task.gold, "measured", [])[-len(curve) - 1 :]
    for point, measures in zip([*curve, test], measured, strict=bool(measured)):
        point["measures"] = measures
    averages = [entry for entry in history if any(key.startswith("average/") for key in entry)]
    multipliers = trainer.multipliers
    return {
        "name": run.name,
        "seed": run.seed,
        "settings": run.settings,
        "curve": curve,
        "test": test,
        "average": {key: averages[-1][f"average/{key}"] for key in (*task.reward_names, "kl")} if averages else {},
        "multipliers": None if multipliers is None else multipliers.state_dict(),
        "stop_reason": trainer.stop_reason,
        "gold_evaluations": trainer.num_gold_evaluations,
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - cpu_start,
    }


def configured(config: Any, run: Run, folder: Path) -> Any:
    """The settings of all runs with those of one run in their place."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.init}
    # Filled by `__post_init__`, which would refuse them as given
    given |= {"beta": 0.0, "generation_batch_size": None, **_PRESET_FIELDS}
    given |= {**run.settings, "seed": run.seed, "output_dir": str(folder), "eval_on_start": run.name != SEARCH}
    return type(config)(**given)


def evaluation(entry: dict[str, Any], reward_names: Sequence[str]) -> dict[str, Any]:
    """What the experiments keep of one evaluation."""
    return {
        "step": entry["step"],
        "gold": entry["eval_gold"],
        "kl": entry["eval_kl/per_response"],
        "length": entry["eval_completions/mean_length"],
        **{name: entry[f"eval_rewards/{name}/mean"] for name in reward_names},
    }


def proxy_points(results: list[dict], reward_names: list[str], folder: Path, degree: int) -> dict[str, float]:
    """
    Thresholds from the runs on each reward alone, as `trl-ext proxy-points` finds them: the joint peak or, where that
    lies at the edge of the data and so can't be trusted, the peak of each reward's own curve. The report and its
    pictures go into `folder`.
    """
    own = [(name, result) for name in reward_names for result in results if result["name"] == alone(name)]
    rows = [(run, point) for run, (_, result) in enumerate(own) for point in result["curve"]]
    measurements = Measurements(
        reward_names,
        rewards=np.array([[point[name] for name in reward_names] for _, point in rows]),
        gold=np.array([point["gold"] for _, point in rows]),
        kl=np.array([point["kl"] for _, point in rows]),
        run=np.array([run for run, _ in rows]),
        step=np.array([point["step"] for _, point in rows]),
    )
    options = proxy_points_command.make_parser().parse_args(["--runs", "", "--degree", str(degree)])
    report = proxy_points_command.analyse(measurements, [name for name, _ in own], options)
    proxy_points_command.write(report, measurements, folder)
    joint = report["joint"]
    own_peaks = [float(report["independent"][name].point[0]) for name in reward_names]
    peaks = own_peaks if joint is None or joint.at_edge else joint.point.tolist()
    return {name: float(f"{peak:.4g}") for name, peak in zip(reward_names, peaks, strict=True)}


def run_all(
    make_task: Callable[[Any], Task], arguments: Any, config: Any, runs: Iterable[Run], folder: Path
) -> list[dict[str, Any]]:
    """
    Trains what is missing of `runs`, `num_processes` at a time, each kept as it ends; returns all finished runs of the
    experiment. `make_task`, a function of a module, makes the task from the arguments in each process.
    """
    finished = FinishedRuns(folder)
    missing = [run for run in runs if not finished.has(name=run.name, seed=run.seed)]
    if not missing:
        return finished.rows
    prepare = partial(_start_worker, make_task, arguments)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.num_processes, mp_context=context, initializer=prepare) as pool:
        futures = [pool.submit(_train_in_worker, config, run, folder) for run in missing]
        for future in as_completed(futures):
            finished.add(future.result())
    return finished.rows


def compare(
    make_task: Callable[[Any], Task],
    arguments: Any,
    config: Any,
    folder: Path,
    gold: str,
    rescore: Callable[[Path, list[str]], list[dict[str, Any]]] | None = None,
) -> str:
    """
    The whole experiment: trains what is missing and writes `thresholds.json`, `methods.png`, `overoptimization.png`
    and `results.md`.

    Args:
        make_task (`Callable`):
            Function of a module that makes the task from the arguments.
        arguments ([`ComparisonArguments`]):
            Arguments.
        config ([`ConstrainedPPOConfig`]):
            Settings of all runs.
        folder (`Path`):
            Folder of the experiment.
        gold (`str`):
            Name of the gold metric, for the pictures.
        rescore (`Callable`, *optional*):
            Called with the folder and the rewards' names after the first runs; returns them with their gold metric,
            where that is known only then.

    Returns:
        `str`: the tables, Markdown.
    """
    start, task = time.monotonic(), make_task(arguments)
    results = run_all(make_task, arguments, config, first_runs(task, config, arguments), folder)
    if rescore is not None:
        results = rescore(folder, task.reward_names)
    thresholds = proxy_points(results, task.reward_names, folder / "proxy_points", arguments.proxy_degree)
    (folder / "thresholds.json").write_text(json.dumps(thresholds, indent=1))
    later = later_runs(task, config, arguments, thresholds, results)
    results = run_all(make_task, arguments, config, later, folder)
    minutes = (time.monotonic() - start) / 60
    cost = f"{compute_used(results, arguments.num_processes)} The runs of this call took {minutes:.1f} minutes."
    return write_report(results, {name: alone(name) for name in task.reward_names}, folder, gold, cost)


def _start_worker(make_task: Callable[[Any], Task], arguments: Any) -> None:
    torch.set_num_threads(1)
    global _worker_task
    _worker_task = cache(partial(make_task, arguments))


def _train_in_worker(config: Any, run: Run, folder: Path) -> dict[str, Any]:
    slug = "".join(letter if letter.isalnum() else "_" for letter in run.name)
    return train(_worker_task(), config, run, folder / "runs" / f"{slug}_{run.seed}")


_worker_task: Callable[[], Task]
