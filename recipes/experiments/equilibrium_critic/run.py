"""
Critics of constrained PPO on the playground: linear heads, a perceptron, and equilibrium-propagation heads, on the
policy's hidden states.

Every critic is tried at every rate and seed; value loss, explained variance and the exact gold metric are reported at
each critic's best rate. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.equilibrium_critic.run --config recipes/experiments/equilibrium_critic/config.yaml
"""

import itertools
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from trl_ext import ConstrainedPPOConfig, ConstrainedPPOTrainer
from trl_ext.playground import base_model_path, count_positive_words, load_playground_dataset, playground_gold
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)

# Critic: settings beside those of the recipe
CRITICS: dict[str, dict[str, Any]] = {
    "linear": {},
    "perceptron": {},
    "EP": {"critic_head": "equilibrium"},
    "EP, 90 degrees, homeostasis": {
        "critic_head": "equilibrium", "critic_feedback": "asymmetric", "critic_feedback_angle": 90.0,
        "critic_homeostasis_coef": 10.0,
    },
}  # fmt: skip


@dataclass
class CriticArguments:
    """
    Arguments of the experiment, beside those of [`ConstrainedPPOConfig`].

    Args:
        critics (`list[str]`):
            Names in `CRITICS`.
        widths (`list[int]`):
            Of the layers of perceptron and equilibrium heads.
        rates (`list[float]`):
            Learning rates of the critic, the same for all.
        seeds (`list[int]`):
            Seeds.
        num_prompts (`int`):
            Prompts on which gold is measured at the end.
    """

    critics: list[str] = field(default_factory=lambda: list(CRITICS), metadata={"help": "Critics."})
    widths: list[int] = field(default_factory=lambda: [64, 64], metadata={"help": "Widths of the layers."})
    rates: list[float] = field(default_factory=lambda: [1e-3, 5e-3], metadata={"help": "Rates of the critic."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds."})
    num_prompts: int = field(default=64, metadata={"help": "Prompts on which gold is measured."})

    def __post_init__(self):
        unknown = sorted(set(self.critics) - set(CRITICS))
        if unknown:
            raise ValueError(f"`critics` has {unknown}; the experiment knows {list(CRITICS)}.")


def perceptron(hidden_size: int, widths: list[int], num_heads: int, seed: int) -> nn.Module:
    """A perceptron with tanh whose values start at zero, as those of all critics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for below, above in itertools.pairwise([hidden_size, *widths]):
            parts += [nn.Linear(below, above), nn.Tanh()]
        last = nn.Linear(widths[-1], num_heads)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*parts, last)


def run(config: ConstrainedPPOConfig, args: CriticArguments, setting: dict[str, Any]) -> dict[str, Any]:
    """One run; the critic's measures are means over the second half of the updates."""
    start = time.process_time()
    own = dict(CRITICS[setting["critic"]])
    if own:
        own["critic_hidden_features"] = list(args.widths)
    # What the first construction filled in, and the second would refuse as given
    own |= {"beta": 0.0, "generation_batch_size": None}
    config = replace(config, seed=setting["seed"], critic_learning_rate=setting["rate"], **own)
    path, data = base_model_path(show_progress=False), load_playground_dataset(num_test=args.num_prompts)
    width = AutoConfig.from_pretrained(path).hidden_size
    critic = perceptron(width, args.widths, 2, setting["seed"]) if setting["critic"] == "perceptron" else None
    trainer = ConstrainedPPOTrainer(
        str(path), reward_funcs=[count_positive_words], args=config,
        train_dataset=data["train"].select_columns("prompt"),
        eval_dataset=data["test"].select_columns("prompt"), gold_reward=playground_gold, critic_model=critic,
        processing_class=AutoTokenizer.from_pretrained(path),
    )  # fmt: skip
    trainer.train()
    gold = trainer.evaluate()["eval_gold"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    half = logs[len(logs) // 2 :]

    def late(name: str) -> float:
        return float(np.mean([float(entry[name]) for entry in half if name in entry]))  # a rollout's, not every step's

    return {
        **setting,
        "gold": float(gold),
        "value_loss": late("critic/count_positive_words/loss"),
        "explained_variance": late("critic/count_positive_words/explained_variance"),
        "reward": late("rewards/count_positive_words/mean"),
        "seconds": time.process_time() - start,
    }


def at_best_rate(rows: list[dict[str, Any]], critic: str) -> list[dict[str, Any]]:
    """Runs of a critic, one a seed, at the rate of the highest mean explained variance."""
    own = [row for row in rows if row["critic"] == critic]
    rates = sorted({row["rate"] for row in own})
    means = [np.mean([row["explained_variance"] for row in own if row["rate"] == rate]) for rate in rates]
    chosen = [row for row in own if row["rate"] == rates[int(np.argmax(means))]] if own else []
    return sorted(chosen, key=lambda row: row["seed"])


def table(rows: list[dict[str, Any]]) -> str:
    """Each critic at its best rate, as Markdown: means, and every seed."""
    lines = []
    for critic in CRITICS:
        own = at_best_rate(rows, critic)
        if own:
            cells = [
                f"{np.mean([row[name] for row in own]):.3f} ({', '.join(f'{row[name]:.3f}' for row in own)})"
                for name in ("value_loss", "explained_variance", "reward", "gold")
            ]
            lines.append([critic, f"{own[0]['rate']:g}", *cells, f"{np.mean([row['seconds'] for row in own]):.0f}"])
    columns = ["critic", "rate", "value loss", "explained variance", "reward (threshold 3)", "gold", "s"]
    return markdown_table(columns, lines)


def main(config: ConstrainedPPOConfig, args: CriticArguments) -> None:
    """Runs what is missing of the experiment and writes `results.md`."""
    torch.set_num_threads(1)
    finished = FinishedRuns(config.output_dir)
    for seed, critic, rate in itertools.product(args.seeds, args.critics, args.rates):
        setting = {"critic": critic, "rate": rate, "seed": seed}
        if not finished.has(**setting):
            finished.add(run(config, args, setting))
            console.print(finished.rows[-1])
    (Path(config.output_dir) / "results.md").write_text(table(finished.rows) + "\n")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, CriticArguments))


if __name__ == "__main__":
    run_strictly(make_parser(), main)
