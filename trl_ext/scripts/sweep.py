# /// script
# dependencies = ["trl-ext"]
# ///
"""
Train plain PPO once for each of several fixed weights of the rewards, then find the proxy points of all the runs.

# The corners and the middle of two rewards' weights
python -m trl_ext.scripts.sweep --config recipe.yaml --reward_weights 1,0 0.5,0.5 0,1 --output_dir outputs/sweep

# A grid of five weights, with two KL coefficients and two seeds
python -m trl_ext.scripts.sweep --config recipe.yaml --num_weights 5 --kl_coefs 0.001 0.003 --seeds 0 1
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..core.checks import shown
from .recipe.usage import description


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns its exit status, of a failed run its own."""
    from .proxy_points import main as proxy_points

    options, passed_on = make_parser(prog).parse_known_args(arguments)
    recipe = _recipe(options.config, passed_on)
    runs = planned_runs(options, recipe)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for number, (folder, settings) in enumerate(runs.items(), start=1):
        if is_finished(folder):
            console.print(f"Run {number} of {len(runs)} is finished: {folder}")
            continue
        console.print(f"Run {number} of {len(runs)}: {folder}")
        status = train(options.config, passed_on, folder, settings)
        if status:
            console.print(f"The run {folder} ended with status {status}. The same command goes on from here.")
            return status
    output_dir = str(Path(options.output_dir) / "proxy_points")
    return proxy_points(["--runs", *map(str, runs), "--output_dir", output_dir])


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command's own options; all others are the recipe's."""
    parser = argparse.ArgumentParser(
        prog, description=description(__doc__, prog), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", required=True, help="recipe of `trl-ext constrained-ppo` with `method: ppo`, a `gold_reward` and "
        "`eval_strategy: steps`")  # fmt: skip
    add("--output_dir", default="outputs/sweep", help="folder of the runs and of the proxy points")
    add("--reward_weights", nargs="+", type=_weights, default=None, metavar="W1,W2", help="weights of each run, in "
        "the order of `reward_funcs`; default: a grid whose weights sum to 1")  # fmt: skip
    add("--num_weights", type=int, default=5, help="weights of one reward in the grid, from 0 to 1")
    add("--kl_coefs", nargs="+", type=float, default=[None], help="KL coefficients; default: the recipe's")
    add("--seeds", nargs="+", type=int, default=[None], help="seeds; default: the recipe's")
    return parser


def _weights(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(","))


def _recipe(config: str, passed_on: Sequence[str]) -> dict[str, Any]:
    """The recipe with what the command line changes of the settings that a sweep looks at."""
    from .recipe.overrides import take_option
    from .recipe.strict_parser import load_recipe

    recipe, rest = dict(load_recipe(config)), list(passed_on)
    for name in ("method", "gold_reward", "eval_strategy"):
        value = take_option(rest, f"--{name}")
        recipe |= {} if value is None else {name: yaml.safe_load(value)}
    if not isinstance(recipe.get("reward_funcs", []), list):
        raise ValueError(f"`reward_funcs` in {config} must be a list, got {shown(recipe['reward_funcs'])}.")
    if recipe.get("method") != "ppo" or recipe.get("constraints"):
        raise ValueError(
            f"`sweep` trains with fixed weights, and {config} has `method: {recipe.get('method')}`. Give a recipe "
            "with `method: ppo` and no `constraints`."
        )
    for name, remedy in (("gold_reward", "the metric that the rewards stand in for"), ("eval_strategy", "`steps`")):
        if recipe.get(name) in (None, "no", False):
            raise ValueError(f"A sweep measures the gold metric while it trains, and {config} has no `{name}`. "
                             f"Give it {remedy}.")  # fmt: skip
    return recipe


def planned_runs(options: argparse.Namespace, recipe: dict[str, Any]) -> dict[Path, dict[str, list[str]]]:
    """
    The folder of each run and the settings that make it.

    Raises:
        ValueError: If there are not as many weights as rewards, or a run would be made twice.
    """
    count = len(recipe.get("reward_funcs", []))
    weights = options.reward_weights or weight_grid(count, options.num_weights)
    wrong = [one for one in weights if len(one) != count]
    if wrong:
        raise ValueError(f"`--reward_weights {','.join(f'{w:g}' for w in wrong[0])}` must have one weight for each of "
                         f"the {count} rewards {recipe.get('reward_funcs', [])}.")  # fmt: skip
    runs = {}
    for one, kl_coef, seed in itertools.product(weights, options.kl_coefs, options.seeds):
        settings = {"reward_weights": [f"{weight:g}" for weight in one]}
        settings |= {} if kl_coef is None else {"kl_coef": [f"{kl_coef:g}"]}
        settings |= {} if seed is None else {"seed": [str(seed)]}
        name = "-".join("_".join([key.removeprefix("reward_"), *values]) for key, values in settings.items())
        folder = Path(options.output_dir) / name
        if folder in runs:
            raise ValueError(f"The run {name} is asked for twice. Leave one out.")
        runs[folder] = settings
    return runs


def weight_grid(num_rewards: int, num_weights: int) -> list[tuple[float, ...]]:
    """
    All weights of `num_rewards` rewards that are multiples of `1 / (num_weights - 1)` and sum to 1.

    Raises:
        ValueError: If there are fewer than two weights or rewards.
    """
    if num_weights < 2 or num_rewards < 2:
        raise ValueError(
            f"A grid of weights takes at least two rewards and `--num_weights 2`, got {num_rewards} rewards and "
            f"{num_weights}. Give `--reward_weights`."
        )
    parts = num_weights - 1
    grid = itertools.product(range(parts + 1), repeat=num_rewards)
    return [tuple(part / parts for part in point) for point in grid if sum(point) == parts]


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end: only then is its state written beside its checkpoints."""
    path = folder / "trainer_state.json"
    return path.is_file() and bool(json.loads(path.read_text())["log_history"])


def train(config: str, passed_on: Sequence[str], folder: Path, settings: dict[str, list[str]]) -> int:
    """One run of `trl-ext constrained-ppo`, resumed where it was interrupted; returns its exit status."""
    own = [word for name, values in settings.items() for word in (f"--{name}", *values)]
    output = ["--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    command = [sys.executable, "-m", "trl_ext.cli", "constrained-ppo", "--config", config, *passed_on, *own, *output]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
