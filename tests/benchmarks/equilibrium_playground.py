"""Why the playground's reward model learns early or late: what its pooled state holds before training, and how seeds
of the recipe come out.

The first table: a logistic regression on the frozen base model's pooled states, in differences of chosen and rejected.
The second: the recipe with each seed, when it began to learn, and its accuracy.
Finished runs are kept in a file, so an interrupted benchmark goes on.

python -m tests.benchmarks.equilibrium_playground --output_dir outputs/equilibrium_playground_seeds
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from recipes.experiments.runner import FinishedRuns, markdown_table
from trl_ext.demo.equilibrium import reward_quality
from trl_ext.equilibrium.modeling import pooled_states
from trl_ext.playground import base_model_path, preference_dataset
from trl_ext.scripts import equilibrium_reward
from trl_ext.scripts.equilibrium_reward import main as train


LEARNING = 0.6  # a training accuracy above this, over the ten steps of a log, is beyond chance by three deviations
NUM_TEST = 1000


@torch.no_grad()
def pooled(num_pairs: int, split: str, pooling: str) -> torch.Tensor:
    """Pooled states of chosen less those of rejected, `(num_pairs, H)`, of the base model before any training."""
    path = base_model_path()
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    states = {}
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in preference_dataset(num_pairs, split=split)]
        parts = []
        for start in range(0, num_pairs, 100):
            batch = tokenizer(
                texts[start : start + 100], padding=True, return_tensors="pt", return_token_type_ids=False
            )
            outputs = model(**batch, use_cache=False)
            parts.append(
                pooled_states(outputs, pooling, batch["input_ids"], batch["attention_mask"], tokenizer.pad_token_id)
            )
        states[side] = torch.cat(parts)
    return states["chosen"] - states["rejected"]


def probe(pooling: str) -> float:
    """Test accuracy of a logistic regression without intercept on differences of frozen pooled states."""
    from sklearn.linear_model import LogisticRegression

    differences, test = (
        pooled(number, split, pooling).numpy() for number, split in ((2000, "train"), (NUM_TEST, "test"))
    )
    scale = differences.std(0)
    signs = np.where(np.arange(len(differences)) % 2, 1, -1)
    model = LogisticRegression(fit_intercept=False, max_iter=1000).fit(differences / scale * signs[:, None], signs)
    return float((model.decision_function(test / scale) > 0).mean())


def run(overrides: list[str], seed: int, folder: Path) -> dict[str, object]:
    """The recipe once; when it began to learn, and its accuracy on test pairs."""
    start = time.process_time()
    shutil.rmtree(folder, ignore_errors=True)
    arguments = [
        "--config",
        "recipes/equilibrium/playground_reward.yaml",
        "--output_dir",
        str(folder),
        "--seed",
        str(seed),
    ]
    arguments += ["--eval_strategy", "no", "--show_alignment", "0", "--disable_tqdm", "true", *overrides]
    train(*equilibrium_reward.make_parser().parse_args_and_config(arguments))
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    learning = next((entry for entry in log if entry["accuracy"] > LEARNING), {"step": None, "ep/weight_angle": None})
    return {
        "seed": seed,
        "learning": learning["step"],
        "angle": learning["ep/weight_angle"],
        **reward_quality(folder, NUM_TEST),
        "seconds": time.process_time() - start,
    }


def table(rows: list[dict[str, object]], names: list[str]) -> str:
    lines = []
    for name in names:
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"])
        accuracies = [row["accuracy"] for row in own]
        lines.append([
            name, ", ".join(str(row["learning"] or "never") for row in own), f"{np.mean(accuracies):.3f}",
            f"{min(accuracies):.3f} to {max(accuracies):.3f}", ", ".join(f"{value:.3f}" for value in accuracies),
            f"{np.mean([row['correlation'] for row in own]):.2f}", f"{np.mean([row['seconds'] for row in own]):.0f}",
        ])  # fmt: skip
    columns = [
        "recipe",
        f"training accuracy above {LEARNING} at step",
        "accuracy",
        "range",
        "by seed",
        "correlation",
        "s",
    ]
    return markdown_table(columns, lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/equilibrium_playground_seeds"))
    parser.add_argument("--poolings", nargs="*", default=["last", "mean"], help="For the probes.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--name", default="recipe", help="Under which runs are kept.")
    parser.add_argument("overrides", nargs="*", help="Of the recipe, after `--`.")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(1)
    finished = FinishedRuns(options.output_dir)
    for pooling in options.poolings:
        if not finished.has(probe=pooling):
            finished.add({"probe": pooling, "name": "", "accuracy": probe(pooling)})
        print({"probe": pooling, **next(row for row in finished.rows if row.get("probe") == pooling)}, flush=True)
    for seed in options.seeds:
        if not finished.has(name=options.name, seed=seed):
            finished.add({"name": options.name, **run(options.overrides, seed, options.output_dir / "run")})
            print(finished.rows[-1], flush=True)
    runs = [row for row in finished.rows if "probe" not in row]
    print(table(runs, sorted({row["name"] for row in runs})))


if __name__ == "__main__":
    main()
