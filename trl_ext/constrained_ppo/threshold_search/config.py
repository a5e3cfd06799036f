"""Settings of the threshold search, and their checks."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal

from transformers.trainer_utils import SaveStrategy

from ...core.checks import ANY_NUMBER, Range, check_fields, fits, shown


_BY_REWARD = Range(also=Any)  # mappings of rewards, which `_check_thresholds` knows more of
RANGES: dict[str, Range] = {
    "cache_lifetime": Range(at_least=1),
    "cache_tolerance": Range(at_least=0, below=1),
    "gold_metric": Range(empty=False),
    "initial": _BY_REWARD,
    "initial_range": _BY_REWARD,
    "lower": _BY_REWARD,
    "max_gold_evaluations": Range(at_least=1),
    "reevaluate_every": Range(at_least=0),
    "rollout_window": Range(at_least=1),
    "seed": Range(at_least=0),
    "smoothing": Range(at_least=0, below=1),
    "steps_per_threshold": Range(above=0),
    "tolerance": Range(at_least=0, below=1),
    "upper": _BY_REWARD,
}


@dataclass(frozen=True)
class ThresholdSearchConfig:
    """
    Settings of the threshold search, the fields of `search` in [`ConstrainedPPOConfig`] (NM-PPO,
    https://huggingface.co/papers/2310.04373, section 5.1 and appendix A.4).

    Thresholds are named by their reward wherever several are given, so that no order can be mistaken.

    Args:
        sampler (`str`, *optional*, defaults to `"nelder-mead"`):
            What proposes thresholds: `"nelder-mead"`, as in the paper, or `"tpe"`, Optuna's tree-structured Parzen
            estimator, which finds the higher of two peaks more often (`pip install "trl-ext[search]"`).
        max_gold_evaluations (`int`, *optional*, defaults to `40`):
            Budget: evaluations of the gold metric, those of `eval_strategy` and the one before training included.
            The search ends when it is spent.
        on_convergence (`str`, *optional*, defaults to `"restart"`):
            What follows when the simplex has converged before the budget is spent: `"restart"` from a simplex half as
            wide as the box around the best thresholds, which are measured again, or `"stop"`, as in the paper.
        smoothing (`float`, *optional*, defaults to `0.1`):
            Width, of the box, of the kernel that averages scores before the best thresholds are named: the highest of
            many noisy scores is high by luck too. With 0 only scores of the same thresholds are averaged.
        steps_per_threshold (`float`, *optional*, defaults to `0.125`):
            Most optimizer steps spent on one proposal; below 1, as a fraction of all steps (the paper's 1/8). A
            proposal not reached by then is scored where the policy is.
        initial (`list[dict[str, float]]`, *optional*):
            Vertices of the first simplex, one more than there are constraints, each from reward names to thresholds.
            Defaults to the rewards of the policy before training and perturbations of them.
        initial_range (`float` or `dict[str, float]`, *optional*, defaults to `0.25`):
            Perturbations are drawn uniformly between the reward of the policy before training and that plus this
            fraction of its size. Not used with `initial`.
        lower (`dict[str, float]`, *optional*):
            Lowest threshold of each reward. Defaults to one width of the first simplex below it.
        upper (`dict[str, float]`, *optional*):
            Highest threshold of each reward. Defaults to one width of the first simplex above it.
        tolerance (`float`, *optional*, defaults to `0.05`):
            A threshold is reached when the mean reward is this near (an inequality: when it holds by this much),
            relative to `tolerance_scale`.
        cache_tolerance (`float`, *optional*, defaults to `0.05`):
            A proposal of Nelder-Mead this near to a reached one in every coordinate takes its score, and the search
            has converged when the whole simplex is this near to its best vertex. 0 for neither.
        tolerance_scale (`str`, *optional*, defaults to `"threshold"`):
            What both tolerances are relative to: the size of each `"threshold"`, as in the paper, or the `"range"`
            between its bounds, for rewards that come near zero.
        cache_lifetime (`int`, *optional*, defaults to `8`):
            Measured proposals after which a score is too old to be reused: the policy has moved on. After three times
            as many it counts half where the best thresholds are named.
        reevaluate_every (`int`, *optional*, defaults to `4`):
            Measured proposals after which the best vertex is measured again before it is trusted further. 0 for
            never, as in the paper.
        rollout_window (`int`, *optional*, defaults to `4`):
            Rollouts since the last change of thresholds or evaluation whose mean rewards must be near the thresholds
            before an evaluation is spent on confirming it.
        after_search (`str`, *optional*, defaults to `"stop"`):
            What follows when the search ends before the steps do: `"stop"` training, or `"train"` on at the best
            thresholds, with one evaluation kept for the last step.
        gold_metric (`str`, *optional*, defaults to `"eval_gold"`):
            Evaluation metric that is maximised.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the perturbations.

    Raises:
        ValueError: If a field is out of its range.
    """

    sampler: Literal["nelder-mead", "tpe"] = "nelder-mead"
    max_gold_evaluations: int = 40
    on_convergence: Literal["restart", "stop"] = "restart"
    smoothing: float = 0.1
    steps_per_threshold: float = 0.125
    initial: list[dict[str, float]] | None = None
    initial_range: float | dict[str, float] = 0.25
    lower: dict[str, float] = field(default_factory=dict)
    upper: dict[str, float] = field(default_factory=dict)
    tolerance: float = 0.05
    cache_tolerance: float = 0.05
    tolerance_scale: Literal["threshold", "range"] = "threshold"
    cache_lifetime: int = 8
    reevaluate_every: int = 4
    rollout_window: int = 4
    after_search: Literal["stop", "train"] = "stop"
    gold_metric: str = "eval_gold"
    seed: int = 0

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any] | str) -> "ThresholdSearchConfig":
        """The settings of a recipe's `search`, or of the same on a command line, as JSON."""
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except json.JSONDecodeError as error:
                raise ValueError(f"`search` must be a mapping of settings or JSON, got {shown(settings)}.") from error
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"`search` must be a mapping of settings, got {shown(settings)}. `{{}}` takes the defaults."
            )
        names = [f.name for f in fields(cls)]
        for key in settings:
            if key not in names:
                close = get_close_matches(str(key), names, 1)
                hint = f"did you mean `{close[0]}`?" if close else f"The settings are {', '.join(names)}."
                raise ValueError(f"`search` has no setting `{key}`; {hint}")
        return cls(**settings)

    def __post_init__(self) -> None:
        for name in ("tolerance", "cache_tolerance", "smoothing", "steps_per_threshold"):
            _number(name, getattr(self, name))
        check_fields(self, RANGES, label="`search.{}`")
        steps = self.steps_per_threshold
        if steps <= 0 or (steps > 1 and steps != int(steps)):
            raise ValueError(
                "`search.steps_per_threshold` must be a whole number of steps, or a fraction of all steps below 1, "
                f"got {steps}."
            )
        self._check_thresholds()

    def _check_thresholds(self) -> None:
        for name in ("lower", "upper"):
            _check_mapping(name, getattr(self, name))
        ranges = (
            self.initial_range if isinstance(self.initial_range, Mapping) else {"every reward": self.initial_range}
        )
        _check_mapping("initial_range", ranges)
        if any(value <= 0 for value in ranges.values()):
            raise ValueError(f"`search.initial_range` must be positive, got {shown(self.initial_range)}.")
        for reward in set(self.lower) & set(self.upper):
            if self.lower[reward] >= self.upper[reward]:
                raise ValueError(
                    f"`search.lower` of {reward!r}, {self.lower[reward]}, must lie below its `upper`, "
                    f"{self.upper[reward]}."
                )
        if self.initial is None:
            return
        if not isinstance(self.initial, list) or not self.initial:
            raise ValueError(f"`search.initial` must be a list of vertices, got {shown(self.initial)}.")
        for vertex in self.initial:
            _check_mapping("initial", vertex)

    def check_rewards(self, names: list[str]) -> None:
        """Checks the settings against the reward of each constraint, and the budget against their number."""
        if len(set(names)) < len(names):
            raise ValueError(
                f"`search` moves one threshold for each reward, and the constraints are on {names}. Leave one "
                "constraint on each reward."
            )
        groups = {"lower": [self.lower], "upper": [self.upper], "initial": self.initial or []}
        if isinstance(self.initial_range, Mapping):
            groups["initial_range"] = [self.initial_range]
        for name, mappings in groups.items():
            unknown = sorted({key for mapping in mappings for key in mapping} - set(names))
            if unknown:
                raise ValueError(f"`search.{name}` names {unknown}, and the constrained rewards are {names}.")
            whole = name.startswith("initial")
            if whole and any(set(mapping) != set(names) for mapping in mappings):
                raise ValueError(f"`search.{name}` must name each of the rewards {names}, got {mappings}.")
        if self.initial is not None and len(self.initial) != len(names) + 1:
            raise ValueError(
                f"`search.initial` must have {len(names) + 1} vertices for {len(names)} constraints, got "
                f"{len(self.initial)}."
            )
        self.check_budget(len(names))

    def check_budget(self, num_constraints: int) -> None:
        """Refuses a budget that ends before the first simplex is measured."""
        needed = num_constraints + 2 + (self.after_search == "train")
        if self.max_gold_evaluations < needed:
            raise ValueError(
                f"`search.max_gold_evaluations={self.max_gold_evaluations}` does not measure the first simplex of "
                f"{num_constraints} constraints. Give at least {needed}."
            )

    def keep_best_policy(self, args: Any) -> None:
        """Turns on, in place, what applies the best policy again at the end; refuses arguments that keep another."""
        if args.save_strategy == SaveStrategy.NO:
            raise ValueError(
                "`search` applies the best policy again at the end, from its checkpoint, and `save_strategy='no'` "
                "keeps none. Use 'best', or 'steps' to resume in mid-search."
            )
        if args.metric_for_best_model not in (None, "loss", "gold", "eval_gold", self.gold_metric):
            raise ValueError(
                f"`metric_for_best_model={args.metric_for_best_model!r}` is not what `search` maximises, "
                f"{self.gold_metric!r}. Leave it out."
            )
        args.load_best_model_at_end = True
        args.metric_for_best_model, args.greater_is_better = self.gold_metric, True


def _number(name: str, value: Any) -> float:
    if not fits(value, float) or not ANY_NUMBER.holds(value):
        hint = f" YAML reads {value} as text; write {value.replace('e', '.0e', 1)}." if _needs_point(value) else ""
        raise ValueError(f"`search.{name}` must be a finite number, got {shown(value)}.{hint}")
    return float(value)


def _needs_point(value: Any) -> bool:
    try:
        return isinstance(value, str) and "." not in value and "e" in value and math.isfinite(float(value))
    except ValueError:
        return False


def _check_mapping(name: str, mapping: Any) -> None:
    if not isinstance(mapping, Mapping):
        raise ValueError(f"`search.{name}` must map reward names to numbers, got {shown(mapping)}.")
    for reward, value in mapping.items():
        _number(f"{name}[{reward!r}]", value)
