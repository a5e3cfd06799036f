"""How near to the peak of ten noisy functions the threshold search names its best, within 40 evaluations.

python -m tests.benchmarks.threshold_search --seeds 20 --searches published nelder-mead
python -m tests.benchmarks.threshold_search --seeds 5 --searches tpe
"""

import argparse
from functools import cache

import numpy as np

from trl_ext.constrained_ppo.threshold_search.config import ThresholdSearchConfig
from trl_ext.constrained_ppo.threshold_search.search import ThresholdSearch


BUDGET = 40
# Rewards of the policy before training, and their box; functions are given on the unit box
START, LOWER = 0.65, 0.5
NOISES = (0.05, 0.1, 0.2)


def _bump(u, centre, width, height):
    return height * np.exp(-(((u - centre) / width) ** 2).sum(axis=-1) / 2)


def _turned(u, centre):
    a = u - np.array(centre)
    return np.stack([a[..., 0] + a[..., 1], a[..., 0] - a[..., 1]], axis=-1) / np.sqrt(2)


def _cliff(u, t):
    """Gold rises with both rewards, then falls four times as fast: over-optimisation."""
    s = u.sum(axis=-1)
    return np.where(s < 1.2, s, 1.2 - 4 * (s - 1.2)) - 0.8 * (u[..., 0] - u[..., 1] - 0.2) ** 2


# Number of thresholds, and gold of points `(..., K)` of the unit box at a share `t` of the budget
FUNCTIONS = {
    "quadratic, 1": (1, lambda u, t: -((u[..., 0] - 0.6) ** 2)),
    "plateau, 1": (1, lambda u, t: -np.maximum(np.abs(u[..., 0] - 0.65) - 0.1, 0)),
    "two peaks, 1": (1, lambda u, t: _bump(u, 0.25, 0.1, 0.7) + _bump(u, 0.75, 0.12, 1)),
    "quadratic, 2": (2, lambda u, t: -(_turned(u, [0.6, 0.45]) ** 2 @ np.array([1, 3]))),
    "curved valley, 2": (2, lambda u, t: -8 * (u[..., 1] - 0.2 - (u[..., 0] - 0.1) ** 2) ** 2
                         - 0.5 * (0.75 - u[..., 0]) ** 2),
    "ridge, 2": (2, lambda u, t: -(np.abs(_turned(u, [0.65, 0.6])) @ np.array([0.3, 1]))),
    "two peaks, 2": (2, lambda u, t: _bump(u, 0.3, 0.12, 0.7) + _bump(u, np.array([0.7, 0.65]), 0.18, 1)),
    "cliff, 2": (2, _cliff),
    "drift, 2": (2, lambda u, t: -(((u - np.array([0.5, 0.45]) - 0.15 * t) / 0.5) ** 2).sum(axis=-1) - 0.5 * t),
    "quadratic, 3": (3, lambda u, t: -(((u - np.array([0.6, 0.45, 0.55])) / [0.5, 0.6, 0.4]) ** 2).sum(axis=-1)),
}  # fmt: skip
SEARCHES = {
    "published": {"on_convergence": "stop"},
    "nelder-mead": {},
    "tpe": {"sampler": "tpe"},
}


@cache
def scaled(name):
    """The number of thresholds and the function with a range of 1, which ends with its peak at 1."""
    count, function = FUNCTIONS[name]
    axes = [np.linspace(0, 1, {1: 2001, 2: 201, 3: 41}[count])] * count
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, count)
    values = function(grid, 1.0)
    return count, lambda u, t: (function(u, t) - values.min()) / np.ptp(values)


def search(name, noise, seed, settings):
    """
    One search whose proposals are reached at once.

    Args:
        name: Function.
        noise: Standard error of an evaluation, of the function's range.
        seed: Seed of noise and proposals.
        settings: Of [`ThresholdSearchConfig`].

    Returns:
        Evaluations used, and regrets, of the function's range: of the thresholds of highest single score (those of
        the policy that a run ends with), and of those named best.
    """
    count, function = scaled(name)
    generator = np.random.default_rng(1000 + seed)
    rewards = [f"r{index}" for index in range(count)]
    config = ThresholdSearchConfig(
        max_gold_evaluations=BUDGET,
        seed=seed,
        lower=dict.fromkeys(rewards, LOWER),
        upper=dict.fromkeys(rewards, LOWER + 1),
        initial_range=0.35 / START,
        **settings,
    )

    def gold(thresholds, evaluations):
        at = function(np.array(thresholds) - LOWER, evaluations / BUDGET)
        return float(at + noise * generator.standard_normal())

    searching = ThresholdSearch(config, rewards, ["=="] * count, total_steps=10_000)
    searching.start([START] * count, gold([START] * count, 0))
    step = 0
    while searching.finished is None:
        step += 1
        asked = searching.thresholds
        searching.observe_evaluation(step, asked, gold(asked, searching.num_gold_evaluations))
    ends = (searching.best.thresholds, searching.named_best()[0])
    return [searching.num_gold_evaluations, *(1 - float(function(np.array(end) - LOWER, 1.0)) for end in ends)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    options = parser.parse_args()
    print(
        "| search | noise | evaluations | regret, single score | regret, named best |",
        *FUNCTIONS,
        sep=" | ",
        end=" |\n",
    )
    print("|---" * (5 + len(FUNCTIONS)) + "|")
    for name in options.searches:
        for noise in NOISES:
            runs = np.array(
                [[search(one, noise, seed, SEARCHES[name]) for seed in range(options.seeds)] for one in FUNCTIONS]
            )  # (functions, seeds, 3)
            used, single, named = runs.mean(axis=(0, 1))
            each = " | ".join(f"{regret:.2f}" for regret in runs[..., 2].mean(axis=1))
            print(f"| {name} | {noise:.0%} | {used:.1f} | {single:.3f} | {named:.3f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
