"""
Heads on the frozen features of a real sentence encoder, all-MiniLM-L6-v2: sentiment of IMDB reviews and preference of
HH pairs, with a linear head, a perceptron, and equilibrium-propagation heads with symmetric feedback and with feedback
from 90 degrees, with and without homeostasis.

Every text is embedded once; every head gets the same features, rates and seeds. Its rate is chosen on validation data
and its accuracy reported on test data, with intervals of the difference to the perceptron of the same layers. Finished
runs are kept in `runs.jsonl`, so an interrupted experiment goes on where it stopped.

python -m recipes.experiments.equilibrium_minilm.run --config recipes/experiments/equilibrium_minilm/config.yaml
"""

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, get_cosine_schedule_with_warmup

from trl_ext.core.figures import COLORS, new_axes, save_figure
from trl_ext.equilibrium import EPHead
from trl_ext.equilibrium.modeling import pooled_states
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)

TASKS = ("imdb", "hh")
TITLES = {"imdb": "IMDB sentiment", "hh": "HH harmless preference"}
ASYMMETRIC = {"feedback": "asymmetric", "feedback_angle": 90.0}
# Head: settings of the equilibrium head; `None` is another kind
HEADS: dict[str, dict[str, Any] | None] = {
    "linear": None,
    "perceptron": None,
    "EP": {},
    "EP, 90 degrees": ASYMMETRIC,
    "EP, 90 degrees, homeostasis": ASYMMETRIC,
}
SPLITS = ("train", "validation", "test")


@dataclass
class MiniLMArguments:
    """
    Arguments of the experiment.

    Args:
        model_name_or_path (`str`):
            Sentence encoder whose states are averaged over the tokens.
        imdb_dir (`str`):
            Folder with `imdb_train.parquet` and `imdb_test.parquet` (columns `text` and `label`).
        hh_file (`str`):
            Preference pairs (`chosen`, `rejected`), JSON lines, maybe gzipped.
        tasks (`list[str]`):
            `"imdb"`, `"hh"`.
        heads (`list[str]`):
            Names in `HEADS`.
        depths (`list[int]`):
            Numbers of layers of perceptrons and equilibrium heads.
        width (`int`):
            Width of every layer.
        learning_rates (`list[float]`):
            The same for every head.
        seeds (`list[int]`):
            Of weights and order.
        homeostasis_coef (`float`):
            Weight of the homeostasis objective, of the head that has it.
        max_steps, batch_size (`int`):
            Steps; texts, or pairs, of a step.
        max_length (`int`):
            Tokens of a review from its start, of a dialogue from its end.
        num_train, num_validation, num_test (`int`):
            Reviews; of pairs half as many, and for training no more than there are.
        output_dir (`str`):
            Folder of the results.
    """

    model_name_or_path: str = field(metadata={"help": "Sentence encoder."})
    imdb_dir: str = field(metadata={"help": "Folder with imdb_train.parquet and imdb_test.parquet."})
    hh_file: str = field(metadata={"help": "Preference pairs, JSON lines."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks."})
    heads: list[str] = field(default_factory=lambda: list(HEADS), metadata={"help": "Heads."})
    depths: list[int] = field(default_factory=lambda: [2, 4], metadata={"help": "Numbers of layers."})
    width: int = field(default=64, metadata={"help": "Width of every layer."})
    learning_rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3], metadata={"help": "Rates."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    homeostasis_coef: float = field(default=10.0, metadata={"help": "Weight of the homeostasis objective."})
    max_steps: int = field(default=400, metadata={"help": "Steps of a run."})
    batch_size: int = field(default=64, metadata={"help": "Texts, or pairs, of a step."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a text."})
    num_train: int = field(default=2400, metadata={"help": "Reviews to train on; half as many pairs."})
    num_validation: int = field(default=600, metadata={"help": "Reviews to choose rates on; half as many pairs."})
    num_test: int = field(default=1200, metadata={"help": "Reviews to test on; half as many pairs."})
    output_dir: str = field(default="outputs/equilibrium_minilm", metadata={"help": "Folder of the results."})

    def __post_init__(self):
        for name, known in (("tasks", TASKS), ("heads", HEADS)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"`{name}` has {unknown}; the experiment knows {list(known)}.")


def read_texts(args: MiniLMArguments, task: str) -> dict[str, tuple[list[str], torch.Tensor]]:
    """Texts and labels of each split; pairs lie as chosen, rejected, chosen, ..., without labels."""
    sizes = [args.num_train, args.num_validation, args.num_test]
    if task == "imdb":
        frames = [
            pd.read_parquet(Path(args.imdb_dir) / f"imdb_{name}.parquet").sample(frac=1, random_state=0)
            for name in ("train", "test")
        ]
        parts = [frames[0][: sizes[0]], frames[0][sizes[0] : sizes[0] + sizes[1]], frames[1][: sizes[2]]]
        return {
            split: ([text.replace("<br />", " ") for text in part["text"]], torch.tensor(part["label"].to_numpy()))
            for split, part in zip(SPLITS, parts, strict=True)
        }
    pairs = pd.read_json(args.hh_file, lines=True).sample(frac=1, random_state=0)
    ends = np.cumsum([0, sizes[2] // 2, sizes[1] // 2, min(sizes[0] // 2, len(pairs) - (sizes[1] + sizes[2]) // 2)])
    parts = [pairs[start:end] for start, end in itertools.pairwise(ends)][::-1]
    nothing = torch.zeros(0, dtype=torch.long)
    return {
        split: ([text for pair in zip(part["chosen"], part["rejected"], strict=True) for text in pair], nothing)
        for split, part in zip(SPLITS, parts, strict=True)
    }


@torch.no_grad()
def embed(args: MiniLMArguments, texts: list[str], from_end: bool) -> torch.Tensor:
    """Mean states `(N, H)` of the texts, float32, longest batches first."""
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, truncation_side="left" if from_end else "right")
    model = AutoModel.from_pretrained(args.model_name_or_path, dtype=torch.float32).eval()
    encoded = tokenizer(texts, truncation=True, max_length=args.max_length)["input_ids"]
    order = sorted(range(len(texts)), key=lambda row: -len(encoded[row]))
    states = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
        states[rows] = pooled_states(model(**batch), "mean", batch["input_ids"], batch["attention_mask"])
    return states


def features(args: MiniLMArguments, task: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Features and labels of each split, kept in the output folder. Every head gets them centred and scaled by the mean
    and spread of the training texts.
    """
    path = Path(args.output_dir) / f"{task}_features.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
    else:
        start = time.process_time()
        kept = {
            split: (embed(args, texts, from_end=task == "hh"), labels)
            for split, (texts, labels) in read_texts(args, task).items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
        console.print(
            f"{task}: {sum(len(part[0]) for part in kept.values())} texts, {time.process_time() - start:.0f} s"
        )
    mean, spread = kept["train"][0].mean(dim=0), kept["train"][0].std(dim=0)
    return {split: ((states - mean) / spread, labels) for split, (states, labels) in kept.items()}


def build_head(args: MiniLMArguments, name: str, depth: int, in_features: int, out_features: int) -> nn.Module:
    """A head of `HEADS`; a perceptron has the layers of the equilibrium head, without its feedback."""
    widths = [args.width] * depth
    settings = HEADS[name]
    if settings is not None:
        return EPHead(in_features, widths, out_features, **settings)
    if name == "linear":
        return nn.Linear(in_features, out_features)
    parts: list[nn.Module] = []
    for below, above in itertools.pairwise([in_features, *widths]):
        parts += [nn.Linear(below, above), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], out_features))


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or Bradley-Terry of pairs."""
    return F.cross_entropy(logits, labels) if len(labels) else -F.logsigmoid(logits[::2, 0] - logits[1::2, 0]).mean()


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each text's class, or each pair's order, is right, `bool`."""
    return logits.argmax(dim=1) == labels if len(labels) else logits[::2, 0] > logits[1::2, 0]


def train(
    args: MiniLMArguments, data: dict[str, tuple[torch.Tensor, torch.Tensor]], setting: dict[str, Any]
) -> dict[str, Any]:
    """Trains one head and measures it; `right` has a digit for each test answer."""
    start = time.process_time()
    states, labels = data["train"]
    size = 1 if len(labels) else 2
    torch.manual_seed(setting["seed"])
    head = build_head(args, setting["head"], setting["depth"], states.shape[1], 2 if len(labels) else 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=setting["learning_rate"], weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.max_steps // 20, args.max_steps)
    order = torch.Generator().manual_seed(setting["seed"])
    coefficient = args.homeostasis_coef if "homeostasis" in setting["head"] else 0.0
    for _ in range(args.max_steps):
        rows = torch.randint(len(states) // size, (args.batch_size,), generator=order)
        rows = (rows.unsqueeze(1) * size + torch.arange(size)).flatten()  # both texts of a pair
        loss = loss_of(head(states[rows]), labels[rows] if len(labels) else labels)
        if coefficient:
            loss = loss + coefficient * head.homeostasis_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        right = {split: right_answers(head.eval()(data[split][0]), data[split][1]) for split in SPLITS}
    found: dict[str, Any] = {f"{split}_accuracy": answers.float().mean().item() for split, answers in right.items()}
    if isinstance(head, EPHead):
        found["weight_angle"] = head.asymmetry()["ep/weight_angle"]
        found["sweeps"] = head.metrics()["ep/free_sweeps"]
    return {
        **setting,
        **found,
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "seconds": time.process_time() - start,
        "right": "".join(str(int(answer)) for answer in right["test"]),
    }


def at_best_rate(rows: list[dict[str, Any]], **setting: Any) -> list[dict[str, Any]]:
    """The runs of a setting, one a seed, at the rate of the highest mean validation accuracy."""
    own = [row for row in rows if setting.items() <= row.items()]
    rates = sorted({row["learning_rate"] for row in own})
    means = [np.mean([row["validation_accuracy"] for row in own if row["learning_rate"] == rate]) for rate in rates]
    chosen = [row for row in own if row["learning_rate"] == rates[int(np.argmax(means))]] if own else []
    return sorted(chosen, key=lambda row: row["seed"])


def difference(
    rows: list[dict[str, Any]], others: list[dict[str, Any]], draws: int = 2000
) -> tuple[float, float, float]:
    """
    Mean difference of accuracy, and the 95% interval of a bootstrap over test answers and seeds, which are paired.

    Args:
        rows (`list[dict]`):
            Runs.
        others (`list[dict]`):
            Those of another head with the same seeds.
        draws (`int`, *optional*, defaults to `2000`):
            Draws of the bootstrap.

    Returns:
        `tuple[float, float, float]`: mean, lower and upper end.
    """
    gaps = np.array(
        [
            np.array(list(row["right"]), dtype=float) - np.array(list(other["right"]), dtype=float)
            for row, other in zip(rows, others, strict=True)
        ]
    )
    generator = np.random.default_rng(0)
    answers = generator.multinomial(gaps.shape[1], np.full(gaps.shape[1], 1 / gaps.shape[1]), size=draws)
    seeds = generator.multinomial(len(gaps), np.full(len(gaps), 1 / len(gaps)), size=draws)
    means = np.einsum("da,sa,ds->d", answers, gaps, seeds) / gaps.size
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gaps.mean()), float(low), float(high)


def arms(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Head and depth of every arm that was run, in the order of `HEADS`; a linear head has no layers."""
    found = {(row["head"], row["depth"]) for row in rows}
    return [
        (name, depth) for depth in sorted({depth for _, depth in found}) for name in HEADS if (name, depth) in found
    ]


def table(rows: list[dict[str, Any]], task: str) -> str:
    """One task as Markdown: accuracies by seed at the best rate, and the difference to its perceptron."""
    lines = []
    for name, depth in arms([row for row in rows if row["task"] == task]):
        own = at_best_rate(rows, task=task, head=name, depth=depth)
        # A linear head is held against the shallowest perceptron
        others = [
            at_best_rate(rows, task=task, head="perceptron", depth=d) for n, d in arms(rows) if n == "perceptron"
        ]
        same = at_best_rate(rows, task=task, head="perceptron", depth=depth) or (others[0] if others else [])
        against = "-"
        if same and name != "perceptron":
            mean, low, high = difference(own, same)
            against = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        accuracies = [row["test_accuracy"] for row in own]
        angle = f"{np.mean([row['weight_angle'] for row in own]):.0f}" if "weight_angle" in own[0] else "-"
        lines.append([
            name, str(depth or "-"), f"{own[0]['learning_rate']:g}", f"{np.mean(accuracies):.3f}",
            ", ".join(f"{accuracy:.3f}" for accuracy in accuracies), against,
            f"{np.mean([row['train_accuracy'] for row in own]):.3f}", angle,
            f"{np.mean([row['seconds'] for row in own]):.1f}",
        ])  # fmt: skip
    columns = ["head", "layers", "rate", "test accuracy", "by seed", "against the perceptron", "training accuracy",
               "angle at the end", "s"]  # fmt: skip
    return f"**{TITLES[task]}**\n\n{markdown_table(columns, lines)}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Test accuracy against depth, a panel for each task, every seed a dot."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure, panels = new_axes(1, len(tasks), width=5, height=4)
    for axes, task in zip(panels, tasks, strict=True):
        for color, name in zip(COLORS, HEADS, strict=False):
            depths = [depth for arm, depth in arms(rows) if arm == name]
            chosen = [at_best_rate(rows, task=task, head=name, depth=depth) for depth in depths]
            means = [np.mean([row["test_accuracy"] for row in own]) for own in chosen]
            if depths == [0]:
                axes.axhline(means[0], color=color, linestyle="--", label=name)
                continue
            axes.plot(depths, means, marker="o", color=color, label=name)
            for depth, own in zip(depths, chosen, strict=True):
                axes.plot([depth] * len(own), [row["test_accuracy"] for row in own], ".", color=color, alpha=0.5)
        axes.set(xlabel="layers", ylabel="test accuracy", title=TITLES[task])
        axes.set_xticks(sorted({row["depth"] for row in rows if row["depth"]}))
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def main(args: MiniLMArguments) -> None:
    """Runs what is missing of the experiment and writes `results.md` and `results.png`."""
    finished = FinishedRuns(args.output_dir)
    for task in args.tasks:
        data = features(args, task)
        for seed, rate, name in itertools.product(args.seeds, args.learning_rates, args.heads):
            for depth in [0] if name == "linear" else args.depths:
                setting = {"task": task, "head": name, "depth": depth, "learning_rate": rate, "seed": seed}
                if not finished.has(**setting):
                    finished.add(train(args, data, setting))
                    shown = finished.rows[-1]
                    console.print(*setting.values(), f"{shown['test_accuracy']:.3f}", f"{shown['seconds']:.1f} s")
    folder = Path(args.output_dir)
    tables = [table(finished.rows, task) for task in args.tasks]
    (folder / "results.md").write_text("\n\n".join(tables) + "\n")
    plot(finished.rows, folder / "results.png")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((MiniLMArguments,))


if __name__ == "__main__":
    run_strictly(make_parser(), main)
