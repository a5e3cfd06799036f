"""The methods of the long comparison, each with the same number of trials for its tuning."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer, ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext.constrained_ppo.ensemble import RewardEnsemble
from trl_ext.playground import positive_word_share, reference_similarity


NUM_TRIALS = 4
# Share of positive words and similarity: where both were high in runs of tuned weights, and where the gold metric
# peaked in runs that maximise one of them
TOGETHER, APART = (0.19, 0.80), (0.196, 0.584)
# Mean and spread over responses of both rewards before training
BEFORE = ((0.05, 0.06), (0.52, 0.17))


@dataclass(frozen=True)
class Arm:
    """
    A method.

    Args:
        trainer (`type`): Trainer.
        config (`type`): Its configuration.
        trials (`tuple[dict[str, Any], ...]`): Settings that the tuning chooses from.
        rewards (`Callable`, *optional*): Makes the reward functions, where they are not the two of the task.
    """

    trainer: type
    config: type
    trials: tuple[dict[str, Any], ...]
    rewards: Callable[[], list[Any]] | None = None

    def __post_init__(self) -> None:
        if len(self.trials) not in (1, NUM_TRIALS):
            raise ValueError(f"`trials` must be {NUM_TRIALS}, or 1 where nothing is tuned, got {len(self.trials)}.")


def constraints(thresholds: tuple[float, float]) -> list[dict[str, Any]]:
    """A constraint on each reward."""
    names = ("positive_word_share", "reference_similarity")
    return [{"reward": name, "threshold": value} for name, value in zip(names, thresholds, strict=True)]


def _ppo(*trials: dict[str, Any]) -> Arm:
    return Arm(ConstrainedPPOTrainer, ConstrainedPPOConfig, trials)


def _grpo(*trials: dict[str, Any]) -> Arm:
    return Arm(GRPOTrainer, GRPOConfig, trials)


def _constrained_grpo(*trials: dict[str, Any]) -> Arm:
    return Arm(ConstrainedGRPOTrainer, ConstrainedGRPOConfig, trials)


def _weighted(second: float, **settings: Any) -> dict[str, Any]:
    return {"reward_weights": [1.0 - second, second], **settings}


def _held(method: str, thresholds: tuple[float, float], **settings: Any) -> dict[str, Any]:
    return {"method": method, "constraints": constraints(thresholds), **settings}


def share_deviations(completions: list[Any], **columns: Any) -> list[float]:
    """The share of positive words, in its spreads above the base model."""
    mean, spread = BEFORE[0]
    return [(value - mean) / spread for value in positive_word_share(completions, **columns)]


def similarity_deviations(completions: list[Any], **columns: Any) -> list[float]:
    """The similarity to the reference, in its spreads above the base model."""
    mean, spread = BEFORE[1]
    return [(value - mean) / spread for value in reference_similarity(completions, **columns)]


def proxy_ensemble() -> list[Any]:
    """The mean of both proxies on one scale, and their disagreement, whose negative weight makes it cautious."""
    both = RewardEnsemble([share_deviations, similarity_deviations], name="both")
    return [both, both.disagreement]


def _ensemble(*trials: dict[str, Any]) -> Arm:
    return Arm(ConstrainedPPOTrainer, ConstrainedPPOConfig, trials, rewards=proxy_ensemble)


def _searching(width: float, kl_coef: float) -> dict[str, Any]:
    """Thresholds that are searched for from those of the base model, upwards by shares of it."""
    ranges = {"positive_word_share": 3.0 * width, "reference_similarity": 0.5 * width}
    search = {"max_gold_evaluations": 30, "initial_range": ranges, "after_search": "train"}
    # Evaluated when the search asks, and at the end; the policies measured are kept
    evaluated = {"eval_strategy": "steps", "eval_steps": 128, "save_strategy": "best", "save_total_limit": 1}
    return _held("xi", TOGETHER, kl_coef=kl_coef, search=search, per_device_eval_batch_size=128, **evaluated)


def _published(method: str) -> Arm:
    """The paper's form: gains in the rewards' own units."""
    gains = [(40.0, 0.5), (10.0, 0.1)]
    return _ppo(
        *(
            _held(method, thresholds, multiplier_proportional=proportional, multiplier_learning_rate=rate)
            for proportional, rate in gains
            for thresholds in (TOGETHER, APART)
        )
    )


def _by_thresholds(method: str, *kl_coefs: float, **settings: Any) -> Arm:
    return _ppo(
        *(
            _held(method, thresholds, kl_coef=kl_coef, **settings)
            for kl_coef in kl_coefs
            for thresholds in (TOGETHER, APART)
        )
    )


ARMS: dict[str, Arm] = {
    "ppo, equal weights": _ppo({"method": "ppo", "kl_coef": 0.001}),
    "ppo, tuned weights": _ppo(
        *(_weighted(second, method="ppo", kl_coef=kl_coef) for second in (0.1, 0.25) for kl_coef in (0.003, 0.01))
    ),
    "ppo, cautious ensemble": _ensemble(
        *(
            {"method": "ppo", "reward_weights": [1.0, -caution], "kl_coef": kl_coef}
            for kl_coef in (0.03, 0.1)
            for caution in (1.0, 0.5)
        )
    ),
    "sat": _by_thresholds("sat", 0.001, 0.01),
    "all": _by_thresholds("all", 0.001, 0.01),
    "mu": _by_thresholds("mu", 0.2, 0.05),
    "xi": _by_thresholds("xi", 0.2, 0.05),
    "all, paper's form": _published("all-paper"),
    "mu, paper's form": _published("mu-paper"),
    "xi, paper's form": _published("xi-paper"),
    "xi, thresholds searched": _ppo(*(_searching(width, kl_coef) for width in (1.0, 0.5) for kl_coef in (0.2, 0.05))),
    "GRPO": _grpo(*(_weighted(second, beta=beta) for second in (0.1, 0.25) for beta in (0.05, 0.01))),
    "GDPO": _grpo(
        *(
            _weighted(second, beta=beta, multi_objective_aggregation="normalize_then_sum")
            for second in (0.25, 0.5)
            for beta in (0.05, 0.01)
        )
    ),
    "constrained GRPO": _constrained_grpo(
        *(_held("xi", thresholds, beta=beta) for beta in (0.05, 0.01) for thresholds in (TOGETHER, APART))
    ),
}
# Controllers that were compared before the default was fixed, on seeds of no run that is reported
CONTROLLERS: dict[str, Arm] = {
    f"xi, drift {drift:g}, up to {maximum:g}, gain {gain:g}, KL {kl_coef:g}": _ppo(
        _held(
            "xi",
            TOGETHER,
            multiplier_drift=drift,
            multiplier_max=maximum,
            multiplier_proportional=gain,
            kl_coef=kl_coef,
        )
    )
    for drift, maximum, gain, kl_coef in (
        (0.05, 5.0, 3.0, 0.2),
        (0.2, 5.0, 3.0, 0.2),
        (0.5, 5.0, 3.0, 0.2),
        (0.2, 10.0, 3.0, 0.2),
        (0.2, 10.0, 6.0, 0.2),
        (0.2, 5.0, 3.0, 0.5),
        (0.2, 2.0, 3.0, 0.2),
        (0.2, 2.0, 1.5, 0.2),
    )
}
