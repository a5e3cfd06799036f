"""The demo's part on equilibrium propagation: a reward model whose head starts with feedback at 90 degrees."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table


# Run: overrides of the recipe. The first is launched as a user would launch it
RUNS: dict[str, list[str]] = {
    "with homeostasis": [],
    "without": ["--homeostasis_coef", "0"],
}
NUM_PAIRS = 1000


def demonstrate_equilibrium(
    output_dir: str | Path, console: Console | None = None, max_steps: int | None = None
) -> list[dict[str, Any]]:
    """
    Trains reward models with and without the homeostasis objective, prints one table and draws gradient cosine and
    weight angle through training.

    Args:
        output_dir (`str` or `Path`):
            Folder; each run has its own below it, and the picture is `alignment.png`.
        console ([`~rich.console.Console`], *optional*):
            Console to print on.
        max_steps (`int`, *optional*):
            Steps of each run, to try it quickly.

    Returns:
        `list[dict]`: a row of the table for each run.
    """
    from ..equilibrium.report import draw_alignment

    console, start, output_dir = console or Console(), time.monotonic(), Path(output_dir)
    rows, histories = [], {}
    for name, overrides in RUNS.items():
        console.rule(f"Equilibrium propagation, feedback at 90 degrees, {name}")
        folder = output_dir / name.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        steps = [] if max_steps is None else ["--max_steps", str(max_steps)]
        _train(folder, [*overrides, *steps], launch=not overrides)
        histories[name] = json.loads((folder / "alignment.json").read_text())
        rows.append({"run": name, **histories[name][-1], **reward_quality(folder)})
    console.print(equilibrium_table(rows))
    draw_alignment(histories, output_dir / "alignment.png")
    (output_dir / "results.json").write_text(json.dumps(rows, indent=1))
    console.print(f"Picture: {output_dir / 'alignment.png'}. {time.monotonic() - start:.0f} seconds.")
    return rows


def _train(folder: Path, overrides: list[str], launch: bool) -> None:
    arguments = ["--config", "equilibrium/playground_reward", "--output_dir", str(folder), *overrides]
    if launch:
        subprocess.run([sys.executable, "-m", "trl_ext.cli", "equilibrium-reward", *arguments], check=True)
        return
    from ..scripts.equilibrium_reward import main, make_parser

    main(*make_parser().parse_args_and_config(arguments))


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


def equilibrium_table(rows: list[dict[str, Any]]) -> Table:
    """The runs as a table."""
    table = Table(
        title=f"Reward models with an equilibrium-propagation head on the playground ({NUM_PAIRS} test pairs)",
        caption="cosine: of estimated and exact error vectors, first and last layer; angle: between forward and "
        "feedback weights; correlation: of reward and exact sentiment",
    )
    for column in ("homeostasis", "accuracy", "correlation", "cosine", "angle"):
        table.add_column(column, justify="left" if column == "homeostasis" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["run"],
            f"{row['accuracy']:.3f}",
            f"{row['correlation']:.2f}",
            f"{row['cosines'][0]:.2f} / {row['cosines'][-1]:.2f}",
            f"{row['weight_angle']:.0f}\N{DEGREE SIGN}",
        )
    return table
