"""The methods of the long comparison, each with the same number of trials for its tuning."""

from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from trl_ext import ConstrainedGRPOConfig, ConstrainedGRPOTrainer, ConstrainedPPOConfig, ConstrainedPPOTrainer


NUM_TRIALS = 4
# Share of positive words and similarity: where both were high in runs of tuned weights, and where the gold metric
# peaked in runs that maximise one of them
TOGETHER, APART = (0.19, 0.80), (0.196, 0.584)


@dataclass(frozen=True)
class Arm:
    """
    A method.

    Args:
        trainer (`type`): Trainer.
        config (`type`): Its configuration.
        trials (`tuple[dict[str, Any], ...]`): Settings that the tuning chooses from.
    """

    trainer: type
    config: type
    trials: tuple[dict[str, Any], ...]

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


def _published(method: str) -> Arm:
    """The paper's form: gains in the rewards' own units."""
    gains = [(40.0, 0.5), (10.0, 0.1)]
    return _ppo(
        *(
            _held(method, thresholds, multiplier_proportional=proportional, multiplier_learning_rate=rate)
            for thresholds in (TOGETHER, APART)
            for proportional, rate in gains
        )
    )


def _by_thresholds(method: str, *kl_coefs: float, **settings: Any) -> Arm:
    return _ppo(
        *(
            _held(method, thresholds, kl_coef=kl_coef, **settings)
            for thresholds in (TOGETHER, APART)
            for kl_coef in kl_coefs
        )
    )


ARMS: dict[str, Arm] = {
    "ppo, equal weights": _ppo({"method": "ppo", "kl_coef": 0.001}),
    "ppo, tuned weights": _ppo(
        *(_weighted(second, method="ppo", kl_coef=kl_coef) for second in (0.1, 0.25) for kl_coef in (0.003, 0.01))
    ),
    "sat": _by_thresholds("sat", 0.001, 0.01),
    "all": _by_thresholds("all", 0.001, 0.01),
    "mu": _by_thresholds("mu", 0.2, 0.05),
    "xi": _by_thresholds("xi", 0.2, 0.05),
    "xi, multipliers up to 10": _by_thresholds("xi", 0.2, 0.05, multiplier_max=10.0),
    "all, paper's form": _published("all-paper"),
    "mu, paper's form": _published("mu-paper"),
    "xi, paper's form": _published("xi-paper"),
    "GRPO": _grpo(*(_weighted(second, beta=beta) for second in (0.1, 0.25) for beta in (0.05, 0.01))),
    "GDPO": _grpo(
        *(
            _weighted(second, beta=beta, multi_objective_aggregation="normalize_then_sum")
            for second in (0.25, 0.5)
            for beta in (0.05, 0.01)
        )
    ),
    "constrained GRPO": _constrained_grpo(
        *(_held("xi", thresholds, beta=beta) for thresholds in (TOGETHER, APART) for beta in (0.05, 0.01))
    ),
}
