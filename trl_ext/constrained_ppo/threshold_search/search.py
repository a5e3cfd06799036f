"""Nelder-Mead on the thresholds within one run (NM-PPO, https://huggingface.co/papers/2310.04373, section 5.1)."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .config import ThresholdSearchConfig
from .nelder_mead import NelderMead
from .smoothing import smoothed_scores
from .tree_parzen import TreeParzen


# Random first simplices, of which the one of largest volume is taken: a flat one would search a line only
_NUM_DRAWS = 16
# Edges of the simplex of a restart, of the box: wide enough to leave the hill that the search converged on
_RESTART_WIDTH = 0.5
# Of a score where the best thresholds are named, in lifetimes of the cache: 1 forgets too much on ten noisy functions,
# 3 does as well as an endless one and still follows a drift
_HALF_LIFE = 3


@dataclass
class Trial:
    """One proposal of thresholds."""

    thresholds: list[float]  # In the order of the constraints
    source: str  # "initial" (the policy before training), "measured", "reevaluated" or "cached"
    start_step: int  # When it was proposed
    measured_at: int  # Number of proposals measured before the one whose score this is
    step: int | None = None  # When it was scored
    means: list[float] | None = None  # Rewards on the validation split then
    gold: float | None = None  # Score, higher is better
    reached: bool = False  # Whether the means were at the thresholds


@dataclass
class BestPolicy:
    """The policy of highest gold metric among those evaluated in training."""

    step: int  # Of its checkpoint
    gold: float
    thresholds: list[float]  # Those it was trained at where it had reached them, else its own mean rewards
    means: list[float]  # Rewards on the validation split
    reached: bool  # Whether it had reached the thresholds it was trained at


class ThresholdSearch:
    """
    The search without its trainer: it is told of rollouts and evaluations, and says which thresholds to train at and
    when to evaluate. `names` and `kinds` are those of the constraints; all lists of numbers are in their order.
    """

    def __init__(self, config: ThresholdSearchConfig, names: Sequence[str], kinds: Sequence[str], total_steps: int):
        self.config, self.names, self.kinds = config, list(names), list(kinds)
        config.check_rewards(self.names)
        self.total_steps = total_steps
        self.steps_per_threshold = self._steps_per_threshold()
        self.optimizer: NelderMead | TreeParzen | None = None
        self.num_restarts = 0
        self.history: list[Trial] = []
        self.trial: Trial | None = None
        self.best: BestPolicy | None = None
        self.initial_gold = -math.inf
        self.num_gold_evaluations = 0
        self.finished: str | None = None
        self._rollouts: deque[list[float]] = deque(maxlen=config.rollout_window)

    def _steps_per_threshold(self) -> int:
        steps = self.config.steps_per_threshold
        steps = int(steps * self.total_steps) if steps < 1 else int(steps)
        if not 1 <= steps <= self.total_steps:
            raise ValueError(
                f"`search.steps_per_threshold={self.config.steps_per_threshold}` is {steps} of the {self.total_steps} "
                "steps of this run. Give at least one step and at most all, or raise `max_steps`."
            )
        return steps

    @property
    def started(self) -> bool:
        """Whether the policy before training has been measured."""
        return self.optimizer is not None

    @property
    def thresholds(self) -> list[float]:
        """Thresholds to train at: the proposal's, and after the search those named best."""
        if self.trial is not None:
            return list(self.trial.thresholds)
        return self.named_best()[0]

    def named_best(self) -> tuple[list[float], float]:
        """
        Thresholds of the highest score so far and this score, both averaged over their neighbourhood. A proposal that
        was not reached stands for the rewards that the policy had.
        """
        if self.optimizer is None:
            raise RuntimeError("The search has no thresholds before `start`.")
        measured = [trial for trial in self.history if trial.source != "cached"]
        if not measured:
            return self.optimizer.best_point.tolist(), -math.inf
        points = np.array([trial.thresholds if trial.reached else trial.means for trial in measured])
        scores = smoothed_scores(
            (points - self.optimizer.lower) / (self.optimizer.upper - self.optimizer.lower),
            np.array([trial.gold for trial in measured], dtype=np.float64),
            np.arange(len(measured), dtype=np.float64)[::-1],
            self.config.smoothing,
            _HALF_LIFE * self.config.cache_lifetime,
        )
        best = int(np.argmax(scores))
        return points[best].tolist(), float(scores[best])

    @property
    def num_measured(self) -> int:
        """Proposals measured so far, re-evaluations included."""
        return sum(trial.source in ("measured", "reevaluated") for trial in self.history)

    def start(self, means: Sequence[float], gold: float) -> None:
        """Builds the first simplex around the policy before training, from its means and gold metric in validation."""
        self._check_numbers(means, gold)
        centre = np.array(means, dtype=np.float64)
        simplex, lower, upper = self._first_simplex(centre)
        if self.config.sampler == "tpe":
            self.optimizer = TreeParzen(simplex, lower, upper, self.config.seed)
        else:
            self.optimizer = NelderMead(simplex, lower, upper)
        self.num_gold_evaluations, self.initial_gold = self.num_gold_evaluations + 1, float(gold)
        trial = Trial(centre.tolist(), "initial", 0, 0, 0, centre.tolist(), float(gold), True)
        if np.array_equal(self.optimizer.ask(), centre):
            self.history.append(trial)
            self.optimizer.tell(-float(gold))
        self._advance(0)

    def _first_simplex(self, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        config = self.config
        if config.initial is not None:
            simplex = np.array([[vertex[name] for name in self.names] for vertex in config.initial], dtype=np.float64)
            width = np.ptp(simplex, axis=0)
            lowest, highest = simplex.min(axis=0), simplex.max(axis=0)
        else:
            ranges = config.initial_range
            fractions = [ranges[name] if isinstance(ranges, dict) else ranges for name in self.names]
            width = np.array(fractions) * np.abs(centre)
            lowest, highest = centre, centre + width
        if not (width > 0).all():
            flat = [name for name, size in zip(self.names, width, strict=True) if not size > 0]
            raise ValueError(
                f"The first simplex has no extent in the rewards {flat}: their means before training are "
                f"{dict(zip(self.names, centre.tolist(), strict=True))}. Give vertices as `search.initial`."
            )
        lower = np.array([config.lower.get(name, lowest[i] - width[i]) for i, name in enumerate(self.names)])
        upper = np.array([config.upper.get(name, highest[i] + width[i]) for i, name in enumerate(self.names)])
        if not (lower < upper).all():
            raise ValueError(
                f"The box of the search is empty: from {lower.tolist()} to {upper.tolist()} for {self.names}. Give "
                "both `search.lower` and `search.upper`."
            )
        if config.initial is None:
            simplex = self._perturbed(np.clip(centre, lower, upper), np.minimum(highest, upper))
        return simplex, lower, upper

    def _perturbed(self, centre: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """The centre and random points above it; of several draws, the one of largest volume."""
        generator, count = np.random.default_rng(self.config.seed), len(centre)
        offsets = generator.random((_NUM_DRAWS, count, count))
        fullest = offsets[np.argmax(np.abs(np.linalg.det(offsets)))]
        return np.vstack([centre, centre + fullest * (highest - centre)])

    def observe_rollout(self, means: Sequence[float]) -> None:
        """Takes the mean of each constrained reward over one training rollout, of all processes."""
        self._rollouts.append([float(mean) for mean in means])

    def wants_evaluation(self, step: int) -> bool:
        """Whether an evaluation is due after a step: the proposal seems reached, or its steps are spent."""
        if self.trial is None:
            kept = self.config.after_search == "train" and step >= self.total_steps
            return kept and self.num_gold_evaluations < self.config.max_gold_evaluations
        if self._out_of_steps(step):
            return True
        full = len(self._rollouts) == self.config.rollout_window
        return full and self._is_reached(np.mean(self._rollouts, axis=0), self.trial.thresholds)

    def observe_evaluation(self, step: int, means: Sequence[float], gold: float) -> list[Trial]:
        """
        Takes the mean of each constrained reward and the gold metric on the validation split, and moves on where the
        proposal is done. Returns the proposals scored by it, cached ones included; none where the proposal goes on.
        Numbers that are not finite are refused, and leave the search as it was.
        """
        self._check_numbers(means, gold)
        self.num_gold_evaluations += 1
        self._rollouts.clear()
        means = [float(mean) for mean in means]
        reached = self.trial is not None and self._is_reached(means, self.trial.thresholds)
        if step > 0 and (self.best is None or gold > self.best.gold):
            thresholds = self.trial.thresholds if reached and self.trial is not None else means
            self.best = BestPolicy(step, float(gold), list(thresholds), means, reached)
        if self.trial is None or not (reached or self._out_of_steps(step) or self._budget_spent()):
            return []
        trial, self.trial = self.trial, None
        trial.step, trial.means, trial.gold, trial.reached = step, means, float(gold), reached
        scored = len(self.history)
        self.history.append(trial)
        assert self.optimizer is not None
        if trial.source == "reevaluated" and isinstance(self.optimizer, NelderMead):
            self.optimizer.revalue(-self._mean_score(trial))
        else:
            self.optimizer.tell(-trial.gold)
        self._advance(step)
        return self.history[scored:]

    def _advance(self, step: int) -> None:
        """Sets the next trial, or ends the search."""
        assert self.optimizer is not None
        while True:
            self.finished = self._end(step)
            if self.finished is not None:
                return
            if self._converged():
                self._restart()
            if self._reevaluation_due():
                self._begin(self.optimizer.best_point, "reevaluated", step)
                return
            point = self.optimizer.ask()
            known = self._cached(point)
            if known is None or known.gold is None:
                self._begin(point, "measured", step)
                return
            cached = Trial(point.tolist(), "cached", step, known.measured_at, step, known.means, known.gold, True)
            self.history.append(cached)
            self.optimizer.tell(-known.gold)

    def reopen(self, step: int) -> None:
        """Goes on with a search that had ended, where the run now has more steps or a larger budget."""
        if self.finished is None or self._end(step) is not None:
            return
        self.finished = None
        if self.trial is None:
            self._advance(step)

    def _begin(self, point: np.ndarray, source: str, step: int) -> None:
        self.trial = Trial(point.tolist(), source, step, self.num_measured)
        self._rollouts.clear()

    def _end(self, step: int) -> str | None:
        assert self.optimizer is not None
        if step >= self.total_steps:
            return "steps"
        if self._budget_spent():
            return "budget"
        return "converged" if self.config.on_convergence == "stop" and self._converged() else None

    def _converged(self) -> bool:
        optimizer = self.optimizer
        if not isinstance(optimizer, NelderMead) or not optimizer.at_iteration_start:
            return False
        distances = np.abs(optimizer.simplex - optimizer.best_point)
        return bool((distances <= self._margins(optimizer.best_point, self.config.cache_tolerance)).all())

    def _restart(self) -> None:
        """A wide simplex around the thresholds named best, whose vertices are measured, that of the centre again."""
        assert self.optimizer is not None
        self.num_restarts += 1
        lower, upper = self.optimizer.lower, self.optimizer.upper
        centre = np.clip((np.array(self.named_best()[0]) - lower) / (upper - lower), 0.0, 1.0)
        count = len(centre)
        generator = np.random.default_rng([self.config.seed, self.num_restarts])
        directions = np.linalg.qr(generator.standard_normal((_NUM_DRAWS, count, count)))[0]
        directions *= generator.choice([-1.0, 1.0], size=(_NUM_DRAWS, 1, count))
        edges = _RESTART_WIDTH * directions
        # What leaves the box points the other way; that can flatten a simplex, so the fullest of several is taken
        edges = np.where((centre + edges < 0) | (centre + edges > 1), -edges, edges)
        fullest = edges[np.argmax(np.abs(np.linalg.det(edges)))]
        simplex = np.vstack([centre, centre + fullest])
        self.optimizer = NelderMead(lower + simplex * (upper - lower), lower, upper)

    def _budget_spent(self) -> bool:
        kept = self.config.after_search == "train"
        return self.num_gold_evaluations + kept >= self.config.max_gold_evaluations

    def _out_of_steps(self, step: int) -> bool:
        assert self.trial is not None
        return step - self.trial.start_step >= self.steps_per_threshold or step >= self.total_steps

    def _reevaluation_due(self) -> bool:
        assert self.optimizer is not None
        if not self.config.reevaluate_every or not self.optimizer.at_iteration_start:
            return False
        best = self.optimizer.best_point.tolist()
        measured_at = next(trial.measured_at for trial in reversed(self.history) if trial.thresholds == best)
        return self.num_measured - measured_at > self.config.reevaluate_every

    def _mean_score(self, last: Trial) -> float:
        """The mean of the scores of the same thresholds that are not too old, the last among them."""
        fresh = [
            trial.gold for trial in self.history
            if trial.source != "cached" and trial.thresholds == last.thresholds and trial.gold is not None
            and self.num_measured - trial.measured_at <= self.config.cache_lifetime
        ]  # fmt: skip
        return float(np.mean(fresh))

    def _cached(self, point: np.ndarray) -> Trial | None:
        """The newest reached proposal near a point whose score is neither replaced by a later one nor too old."""
        restarted = isinstance(self.optimizer, NelderMead) and self.num_restarts and not self.optimizer.measured
        if not self.config.cache_tolerance or self.config.sampler != "nelder-mead" or restarted:
            return None
        seen = set()
        for trial in reversed(self.history):
            if trial.source == "cached" or tuple(trial.thresholds) in seen:
                continue
            seen.add(tuple(trial.thresholds))
            fresh = self.num_measured - trial.measured_at <= self.config.cache_lifetime
            known = np.array(trial.thresholds)
            near = (np.abs(point - known) <= self._margins(known, self.config.cache_tolerance)).all()
            if trial.reached and fresh and near:
                return trial
        return None

    def _margins(self, thresholds: Sequence[float] | np.ndarray, tolerance: float) -> np.ndarray:
        assert self.optimizer is not None
        if self.config.tolerance_scale == "range":
            return tolerance * (self.optimizer.upper - self.optimizer.lower)
        return tolerance * np.abs(np.asarray(thresholds, dtype=np.float64))

    def _is_reached(self, means: Sequence[float] | np.ndarray, thresholds: Sequence[float]) -> bool:
        excess = np.asarray(means, dtype=np.float64) - np.asarray(thresholds, dtype=np.float64)
        margins = self._margins(thresholds, self.config.tolerance)
        return all(
            (kind == "<=" or value >= -margin) and (kind == ">=" or value <= margin)
            for kind, value, margin in zip(self.kinds, excess, margins, strict=True)
        )

    def _check_numbers(self, means: Sequence[float], gold: float) -> None:
        if len(means) != len(self.names) or not all(map(math.isfinite, [*means, gold])):
            raise ValueError(
                f"An evaluation gave the rewards {dict(zip(self.names, means, strict=False))} and "
                f"`{self.config.gold_metric}` = {gold}; the search needs finite numbers. Check the reward functions "
                "and the gold metric."
            )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs, of JSON's types, with every trial so far for a reader."""
        return {
            "names": self.names,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "history": [asdict(trial) for trial in self.history],
            "trial": None if self.trial is None else asdict(self.trial),
            "best": None if self.best is None else asdict(self.best),
            "initial_gold": self.initial_gold if self.started else None,
            "num_gold_evaluations": self.num_gold_evaluations,
            "finished": self.finished,
            "num_restarts": self.num_restarts,
            "named_best": None if not self.history else dict(zip(self.names, self.named_best()[0], strict=True)),
            "rollouts": list(self._rollouts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores [`state_dict`]. The search is left as it was where the state is refused."""
        if state["names"] != self.names:
            raise ValueError(
                f"The saved search is over the thresholds of {state['names']}, and the constraints of this run are on "
                f"{self.names}. Resume with the constraints of that run, in their order."
            )
        optimizer: NelderMead | TreeParzen | None = None
        if state["optimizer"] is not None:
            optimizer = self._restored(state["optimizer"])
        history = [Trial(**trial) for trial in state["history"]]
        trial = None if state["trial"] is None else Trial(**state["trial"])
        best = None if state["best"] is None else BestPolicy(**state["best"])
        rollouts, count, finished = list(state["rollouts"]), int(state["num_gold_evaluations"]), state["finished"]
        initial_gold = -math.inf if state["initial_gold"] is None else float(state["initial_gold"])
        self.optimizer, self.history, self.trial, self.best = optimizer, history, trial, best
        self._rollouts = deque(rollouts, maxlen=self.config.rollout_window)
        self.num_gold_evaluations, self.finished, self.initial_gold = count, finished, initial_gold
        # Searches saved before there were restarts have none
        self.num_restarts = int(state.get("num_restarts", 0))

    def _restored(self, state: dict[str, Any]) -> NelderMead | TreeParzen:
        saved = "tpe" if "points" in state else "nelder-mead"
        if saved != self.config.sampler:
            raise ValueError(
                f"The saved search is one with `search.sampler={saved!r}`, and this run has {self.config.sampler!r}. "
                f"Resume with `sampler: {saved}`."
            )
        count = len(self.names)
        simplex = np.vstack([np.zeros(count), np.eye(count)])
        if saved == "tpe":
            optimizer: NelderMead | TreeParzen = TreeParzen(simplex, np.zeros(count), np.ones(count))
        else:
            optimizer = NelderMead(simplex)
        optimizer.load_state_dict(state)
        return optimizer
