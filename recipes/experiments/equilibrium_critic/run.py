"""
Critics of constrained PPO on the playground: linear heads, a perceptron, and equilibrium-propagation heads, on the
policy's hidden states.

Every critic is tried at every rate with the first seed, and runs with the other seeds at the rate of the highest
explained variance; value loss, explained variance, reward and the exact gold metric are reported. Finished runs are
kept in `runs.jsonl`, so an interrupted experiment goes on where it stopped.

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
from trl_ext.core.figures import line_style, new_axes, save_figure
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
    own: dict[str, Any] = dict(CRITICS[setting["critic"]])
    if own:
        own["critic_hidden_features"] = list(args.widths)
    # What the first construction filled in, and the second would refuse as given
    own |= {"beta": 0.0, "generation_batch_size": None}
    own |= {"seed": setting["seed"], "critic_learning_rate": setting["rate"]}
    config = replace(config, **own)
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
    names = {
        "loss": "critic/count_positive_words/loss",
        "explained_variance": "critic/count_positive_words/explained_variance",
        "reward": "rewards/count_positive_words/mean",  # a rollout's: not in the log of every step
    }
    history = [
        {"step": entry["step"], **{short: float(entry[name]) for short, name in names.items()}}
        for entry in trainer.state.log_history
        if all(name in entry for name in names.values())
    ]
    late = {short: float(np.mean([point[short] for point in history[len(history) // 2 :]])) for short in names}
    return {
        **setting,
        "gold": float(gold),
        "value_loss": late["loss"],
        "explained_variance": late["explained_variance"],
        "reward": late["reward"],
        "seconds": time.process_time() - start,
        "history": history,
    }


def best_rate(rows: list[dict[str, Any]], critic: str, seed: int) -> float:
    """The rate at which the critic explained most of the returns' variance in the run of that seed."""
    own = [row for row in rows if row["critic"] == critic and row["seed"] == seed]
    return float(max(own, key=lambda row: row["explained_variance"])["rate"])


def table(rows: list[dict[str, Any]], critics: list[str], tuning_seed: int) -> str:
    """Each critic at its best rate, as Markdown: mean and standard deviation over the seeds, and every seed."""
    lines = []
    for critic in critics:
        rate = best_rate(rows, critic, tuning_seed)
        own = sorted(
            (row for row in rows if (row["critic"], row["rate"]) == (critic, rate)), key=lambda row: row["seed"]
        )
        cells = []
        for name in ("value_loss", "explained_variance", "reward", "gold"):
            values = [row[name] for row in own]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread} ({', '.join(f'{value:.3f}' for value in values)})")
        lines.append([critic, f"{rate:g}", *cells, f"{np.mean([row['seconds'] for row in own]):.0f}"])
    columns = ["critic", "rate", "value loss", "explained variance", "reward (threshold 3)", "gold", "s"]
    return markdown_table(columns, lines)


def main(config: ConstrainedPPOConfig, args: CriticArguments) -> None:
    """Runs what is missing of the experiment, the first seed at all rates, and writes `results.md` and the picture."""
    torch.set_num_threads(1)
    finished = FinishedRuns(config.output_dir)
    for seed, critic in itertools.product(args.seeds, args.critics):
        first = seed == args.seeds[0]
        rates = args.rates if first else [best_rate(finished.rows, critic, args.seeds[0])]
        for rate in rates:
            setting = {"critic": critic, "rate": rate, "seed": seed}
            if not finished.has(**setting):
                finished.add(run(config, args, setting))
                console.print({name: value for name, value in finished.rows[-1].items() if name != "history"})
    output_dir = Path(config.output_dir)
    (output_dir / "results.md").write_text(table(finished.rows, args.critics, args.seeds[0]) + "\n")
    draw(finished.rows, args.critics, args.seeds[0], output_dir / "results.png")


def draw(rows: list[dict[str, Any]], critics: list[str], tuning_seed: int, path: Path) -> None:
    """Explained variance and value loss against updates, mean of the seeds and their range."""
    figure, axes = new_axes(1, 3, width=3.5, height=3.4)
    panels = {
        "explained_variance": "explained variance",
        "loss": "value loss",
        "reward": "positive words in a response",
    }
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for index, critic in enumerate(critics):
            rate = best_rate(rows, critic, tuning_seed)
            own = [row["history"] for row in rows if (row["critic"], row["rate"]) == (critic, rate)]
            steps = [point["step"] for point in own[0]]
            values = np.array([[point[name] for point in history] for history in own])
            (line,) = axis.plot(steps, values.mean(0), label=critic, **line_style(index), markersize=5)
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(xlabel="update", ylabel=label)
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle("Lines: mean over seeds; bands: their range", x=0.01, ha="left", fontsize=10)
    save_figure(figure, path)


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ConstrainedPPOConfig, CriticArguments))


if __name__ == "__main__":
    run_strictly(make_parser, main)
