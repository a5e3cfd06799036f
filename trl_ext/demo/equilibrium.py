"""The demo's part on equilibrium propagation: a reward model whose head starts with feedback at 90 degrees."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .work import Part, Task


RECIPE = "equilibrium/playground_reward"
# Of the recipe, in every run: the smaller base model, and half the steps
OVERRIDES = ["--model_name_or_path", "playground-small", "--max_steps", "200"]
# Run: overrides of the recipe
RUNS: dict[str, list[str]] = {
    "with homeostasis": [],
    "without": ["--homeostasis_coef", "0"],
}
SEEDS = (42, 1, 2)
NUM_PAIRS = 1000


def equilibrium_part(output_dir: Path, console: Console, max_steps: int | None = None) -> Part:
    """
    Trains reward models with and without the homeostasis objective, each with [`SEEDS`], prints one table of means and
    draws gradient cosine and weight angle through the first seed's training.

    Args:
        output_dir (`Path`):
            Folder; each training has its own below it, and the picture is `alignment.png`.
        console ([`~rich.console.Console`]):
            Console to print on.
        max_steps (`int`, *optional*):
            Steps of each run, to try it quickly.

    Returns:
        [`Part`], which shows a row of the table for each run.
    """
    steps = [] if max_steps is None else ["--max_steps", str(max_steps)]
    folders = {(name, seed): output_dir / f"{name.replace(' ', '_')}_{seed}" for name in RUNS for seed in SEEDS}
    tasks = [
        Task(
            f"{name}, seed {seed}", folder.with_suffix(".log"), train_and_measure,
            (folder, [*RUNS[name], *OVERRIDES, *steps, *seed_overrides(seed)]),
        )
        for (name, seed), folder in folders.items()
    ]  # fmt: skip

    def show(results: list[dict[str, float]]) -> list[dict[str, Any]]:
        from ..equilibrium.report import draw_alignment

        qualities = dict(zip(folders, results, strict=True))
        rows, histories = [], {}
        for name in RUNS:
            histories[name] = json.loads((folders[name, SEEDS[0]] / "alignment.json").read_text())
            quality = mean_quality([qualities[name, seed] for seed in SEEDS])
            rows.append({"run": name, **histories[name][-1], **quality})
        console.print(equilibrium_table(rows))
        draw_alignment(histories, output_dir / "alignment.png")
        (output_dir / "results.json").write_text(json.dumps(rows, indent=1))
        console.print(f"Picture: {output_dir / 'alignment.png'}.", soft_wrap=True)
        return rows

    return Part("Equilibrium propagation", tasks, show)


def seed_overrides(seed: int) -> list[str]:
    """Overrides of the recipe for a seed: evaluation, and the picture that needs it, are of the first seed alone."""
    others = [] if seed == SEEDS[0] else ["--eval_strategy", "no", "--show_alignment", "0"]
    return ["--seed", str(seed), *others]


def train_and_measure(folder: Path, overrides: list[str]) -> dict[str, float]:
    """Trains one reward model as the recipe says and measures it."""
    from ..scripts.equilibrium_reward import main, make_parser

    shutil.rmtree(folder, ignore_errors=True)
    main(*make_parser().parse_args_and_config(["--config", RECIPE, "--output_dir", str(folder), *overrides]))
    return reward_quality(folder)


@torch.no_grad()
def reward_quality(folder: Path, num_pairs: int = NUM_PAIRS) -> dict[str, float]:
    """Accuracy of a saved reward model on test pairs, and the correlation of its rewards with the exact sentiment."""
    from transformers import AutoTokenizer

    from ..equilibrium import EPModelForSequenceClassification
    from ..playground import preference_dataset, sentiment

    model = EPModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = preference_dataset(num_pairs, split="test")
    rewards: dict[str, np.ndarray] = {}
    truth: dict[str, np.ndarray] = {}
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in rows]
        parts = []
        for start in range(0, num_pairs, 100):
            inputs = tokenizer(
                texts[start : start + 100], padding=True, return_tensors="pt", return_token_type_ids=False
            )
            parts.append(model(**inputs).logits[:, 0].numpy())
        rewards[side] = np.concatenate(parts)
        truth[side] = np.array([sentiment(row[side]) for row in rows])
    all_rewards, all_truth = (np.concatenate([values["chosen"], values["rejected"]]) for values in (rewards, truth))
    return {
        "accuracy": float((rewards["chosen"] > rewards["rejected"]).mean()),
        "correlation": float(np.corrcoef(all_rewards, all_truth)[0, 1]),
    }


def mean_quality(qualities: list[dict[str, float]]) -> dict[str, Any]:
    """Means over the seeds of what [`reward_quality`] measures, and every seed's accuracy as `accuracies`."""
    means = {name: float(np.mean([quality[name] for quality in qualities])) for name in qualities[0]}
    return {**means, "accuracies": [quality["accuracy"] for quality in qualities]}


def equilibrium_table(rows: list[dict[str, Any]]) -> Table:
    """The runs as a table."""
    table = Table(
        title=f"Reward models with an equilibrium-propagation head on the playground ({NUM_PAIRS:,} test pairs)",
        caption=f"accuracy: mean and range over {len(SEEDS)} seeds; correlation: of reward and exact sentiment, mean; "
        "cosine: of estimated and exact error vectors, first and last layer; angle: between forward and "
        "feedback weights; both of the first seed",
    )
    for column in ("homeostasis", "accuracy", "correlation", "cosine", "angle"):
        table.add_column(column, justify="left" if column == "homeostasis" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["run"],
            f"{row['accuracy']:.3f} ({min(row['accuracies']):.2f} to {max(row['accuracies']):.2f})",
            f"{row['correlation']:.2f}",
            f"{row['cosines'][0]:.2f} / {row['cosines'][-1]:.2f}",
            f"{row['weight_angle']:.0f}\N{DEGREE SIGN}",
        )
    return table
