"""Evaluations of finished or interrupted runs, read from their trainer states."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measurements:
    """Rewards and the gold metric, measured together in M evaluations of the policies of several runs."""

    names: list[str]  # Of the K rewards
    rewards: np.ndarray  # (M, K), means
    gold: np.ndarray  # (M,)
    kl: np.ndarray  # (M,), of a response from the reference in nats, NaN where it was not logged
    run: np.ndarray  # (M,), int64, number of the run
    step: np.ndarray  # (M,), int64, optimizer step

    def of_runs(self, runs: Sequence[int]) -> "Measurements":
        """The measurements of some runs."""
        own = np.isin(self.run, runs)
        return Measurements(self.names, self.rewards[own], self.gold[own], self.kl[own], self.run[own], self.step[own])


def read_runs(
    folders: Sequence[str | Path],
    rewards: Sequence[str] | None = None,
    gold_key: str = "eval_gold",
    reward_key: str = "eval_rewards/{}/mean",
    kl_key: str = "eval_kl/per_response",
) -> Measurements:
    """
    Reads the evaluations of runs, given the output folder of each or one of its checkpoints. `rewards` defaults to all
    that every run has; `reward_key` has a pair of braces in place of a reward's name.
    """
    if not folders:
        raise ValueError("`runs` is empty. Name the output folders of at least one run.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError(f"`runs` names a folder twice, and its evaluations would count twice: {_listed(folders)}.")
    if reward_key.count("{}") != 1:
        raise ValueError(f"`reward_key` must have one pair of braces for the reward's name, got {reward_key!r}.")
    logs = [_evaluations(_trainer_state(Path(folder)), gold_key, folder) for folder in folders]
    pattern = re.compile("(.+)".join(re.escape(part) for part in reward_key.split("{}")))
    found = [_rewards_in(entries, pattern) for entries in logs]
    names = list(rewards) if rewards else [name for name in found[0] if all(name in others for others in found)]
    if not names:
        listed = {str(folder): own for folder, own in zip(folders, found, strict=True)}
        raise ValueError(f"The runs have no reward in common under {reward_key!r}: {listed}. Give `rewards`.")
    for folder, own in zip(folders, found, strict=True):
        missing = [name for name in names if name not in own]
        if missing:
            raise ValueError(f"The run {folder} has no rewards {missing} under {reward_key!r}. It has {own}.")
    keys = [*(reward_key.format(name) for name in names), gold_key]
    rows = [
        [run, entry["step"], float(entry.get(kl_key, math.nan)), *(float(entry[key]) for key in keys)]
        for run, entries in enumerate(logs)
        for entry in entries
        if all(math.isfinite(entry.get(key, math.nan)) for key in keys)
    ]
    if not rows:
        raise ValueError(f"No evaluation of {_listed(folders)} has finite numbers under all of {keys}.")
    table = np.array(rows, dtype=np.float64)
    return Measurements(
        names, table[:, 3:-1], table[:, -1], table[:, 2], table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    )


def _trainer_state(folder: Path) -> dict[str, Any]:
    """The state of a run that went furthest: its own, or that of a checkpoint."""
    states = []
    for path in (folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")):
        if path.is_file():
            try:
                states.append(json.loads(path.read_text()))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is no whole trainer state ({error}). Remove it to read another.") from None
    if not states:
        raise FileNotFoundError(
            f"{folder} has no trainer_state.json and no checkpoint with one. Give a run's output folder; a run keeps "
            "its log with `save_strategy`, or by `trainer.save_state()`."
        )
    return max(states, key=lambda state: state.get("global_step", 0))


def _evaluations(state: dict[str, Any], gold_key: str, folder: str | Path) -> list[dict[str, Any]]:
    """Entries with the gold metric, merged by step: an evaluation may be logged in parts."""
    by_step: dict[int, dict[str, Any]] = {}
    for entry in state.get("log_history", []):
        by_step.setdefault(int(entry.get("step", 0)), {}).update(entry)
    entries = [{"step": step, **by_step[step]} for step in sorted(by_step)]
    keys = sorted({key for entry in entries for key in entry if key.startswith("eval_")})
    entries = [entry for entry in entries if gold_key in entry]
    if not entries:
        raise ValueError(
            f"The run {folder} has no evaluation with the gold metric `{gold_key}`. Train it with a `gold_reward` and "
            f"`eval_strategy`, or name another key as `gold_key`; its evaluations have {keys}."
        )
    return entries


def _rewards_in(entries: list[dict[str, Any]], pattern: re.Pattern[str]) -> list[str]:
    matches = (pattern.fullmatch(key) for entry in entries for key in entry)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _listed(folders: Sequence[str | Path]) -> str:
    return ", ".join(map(str, folders))
