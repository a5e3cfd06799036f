"""Equilibrium-propagation, linear and perceptron heads on text: IMDB sentiment and two sets of preference pairs.

python -m tests.benchmarks.equilibrium_language --imdb_dir DATA/imdb --hh_file DATA/hh_harmless_test.jsonl.gz \
    --model_name_or_path DATA/stories260k > results.jsonl
python -m tests.benchmarks.equilibrium_language --table results.jsonl
"""

import argparse
import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from trl_ext.equilibrium.head import EPHead
from trl_ext.equilibrium.modeling import EPModelForSequenceClassification, last_token_states
from trl_ext.playground import preference_dataset


WIDTHS = [64, 64]
# Head: settings of the equilibrium head, or None for a head of another kind
HEADS: dict[str, dict | None] = {
    "linear": None,
    "perceptron": None,
    "EP": {},
    "EP, 90 degrees": {"feedback": "asymmetric", "feedback_angle": 90.0},
    "EP, 90 degrees, homeostasis": {
        "feedback": "asymmetric", "feedback_angle": 90.0, "homeostasis_coef": 10.0,
    },
    "EP, 90 degrees, AsymEP": {"feedback": "asymmetric", "feedback_angle": 90.0, "correction": "asymep"},
    "EP, exact adjoint": {"estimator": "exact"},
    "EP's weights without feedback": None,
    "perceptron 64-64": None,
    "EP, weights of perceptron 64-64": {},
}  # fmt: skip
# To find a cause: the adjoint in place of the estimate, the same weights without feedback, torch's initial weights
CONTROLS = ("EP, exact adjoint", "EP's weights without feedback", "perceptron 64-64",
            "EP, weights of perceptron 64-64")  # fmt: skip
FROZEN_HEADS = [head for head in HEADS if head not in CONTROLS]
TRAINED_HEADS = ["linear", "perceptron", "EP", "EP, 90 degrees, homeostasis"]
BACKBONES = {"frozen": True, "trained": False}
TASKS = ("IMDB", "playground", "HH harmless")


@dataclass
class Task:
    """
    Token ids and labels of one task; preference pairs have no labels and lie as chosen, rejected, chosen, ...

    Attributes:
        name (`str`): Name.
        num_labels (`int`): Outputs.
        train (`list[list[int]]`): Token ids.
        validation (`list[list[int]]`): Token ids, for the choice of learning rates.
        test (`list[list[int]]`): Token ids.
        labels (`dict[str, torch.Tensor]`): Classes by split, empty for pairs.
    """

    name: str
    num_labels: int
    train: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]
    labels: dict[str, torch.Tensor]

    @property
    def paired(self) -> bool:
        return not self.labels


def encode(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """The last `max_length` tokens of each text."""
    return [ids[-max_length:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def imdb_task(folder: Path, tokenizer, max_length: int, sizes: tuple[int, int, int]) -> Task:
    """Reviews and their sentiment, drawn at random from the files."""
    train = load_dataset("parquet", data_files=str(folder / "imdb_train.parquet"), split="train").shuffle(seed=0)
    test = load_dataset("parquet", data_files=str(folder / "imdb_test.parquet"), split="train").shuffle(seed=0)
    rows = {
        "train": train.select(range(sizes[0])),
        "validation": train.select(range(sizes[0], sizes[0] + sizes[1])),
        "test": test.select(range(sizes[2])),
    }
    texts = {split: encode(tokenizer, list(part["text"]), max_length) for split, part in rows.items()}
    labels = {split: torch.tensor(part["label"]) for split, part in rows.items()}
    return Task("IMDB", 2, **texts, labels=labels)


def pairs_task(name: str, rows: Dataset, tokenizer, max_length: int, sizes: tuple[int, int, int]) -> Task:
    """Preference pairs, each as two texts."""
    texts = [row.get("prompt", "") + row[side] for row in rows for side in ("chosen", "rejected")]
    ids, ends = encode(tokenizer, texts, max_length), np.cumsum([0, *sizes]) * 2
    train, validation, test = (ids[start:end] for start, end in pairwise(ends))
    return Task(name, 1, train, validation, test, {})


def perceptron(in_features: int, out_features: int, num_parameters: int) -> nn.Module:
    """Two layers with tanh and, as nearly as can be, a given number of parameters."""
    hidden = round((num_parameters - out_features) / (in_features + 1 + out_features))
    return nn.Sequential(nn.Linear(in_features, hidden), nn.Tanh(), nn.Linear(hidden, out_features))


def linear_maps(head: EPHead) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Weight and bias of every map from the input to the output, feedback left out."""
    biases, forward, _ = head.recurrent_parameters()
    ends = (head.input_weight, head.input_bias), (head.readout_weight, head.readout_bias)
    return [ends[0], *zip(forward, biases, strict=True), ends[1]]


def layered_perceptron(head: EPHead) -> nn.Sequential:
    """A perceptron of the layers of an equilibrium head, with torch's initial weights."""
    parts: list[nn.Module] = []
    for weight, _ in linear_maps(head):
        parts += [nn.Linear(weight.shape[1], weight.shape[0]), nn.Tanh()]
    return nn.Sequential(*parts[:-1])


@torch.no_grad()
def share_weights(head: EPHead, layers: Any, to_head: bool) -> None:
    """Copies all weights from a layered perceptron to the head, or the other way."""
    for (weight, bias), linear in zip(linear_maps(head), layers[::2], strict=True):
        pairs = (weight, linear.weight), (bias, linear.bias)
        for own, other in pairs:
            (own if to_head else other).copy_(other if to_head else own)


def build_model(path: str, head: str, num_labels: int) -> Any:
    """The backbone with one of `HEADS`."""
    settings = HEADS[head] or {}
    model: Any = EPModelForSequenceClassification.from_pretrained(
        path, num_labels=num_labels, hidden_features=WIDTHS, spectral_cap=0.9, dtype=torch.float32, **settings
    )
    width = model.config.get_text_config().hidden_size
    if head == "linear":
        model.score = nn.Linear(width, num_labels)
    elif head == "perceptron":
        model.score = perceptron(width, num_labels, count(model.score))
    elif head in CONTROLS and head != "EP, exact adjoint":
        layers = layered_perceptron(model.score)
        if head != "perceptron 64-64":
            share_weights(model.score, layers, to_head=head.startswith("EP, "))
        if not head.startswith("EP, "):
            model.score = layers
    return model


def count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, padded on the right."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.size(1)) < lengths[:, None]).long()


@torch.no_grad()
def features(model, rows: list[list[int]], pad: int) -> torch.Tensor:
    """Last states `(N, H)` of a backbone."""
    parts = []
    for start in range(0, len(rows), 64):
        ids, mask = padded(rows[start : start + 64], pad)
        parts.append(last_token_states(model.model(ids, attention_mask=mask).last_hidden_state, ids, pad))
    return torch.cat(parts)


def objective(logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy, or Bradley-Terry for rows in pairs."""
    if labels is not None:
        return F.cross_entropy(logits, labels)
    return -F.logsigmoid(logits[0::2, 0] - logits[1::2, 0]).mean()


def accuracy(logits: torch.Tensor, labels: torch.Tensor | None) -> float:
    """Share of right classes, or of pairs in the right order."""
    right = (logits.argmax(-1) == labels) if labels is not None else (logits[0::2, 0] > logits[1::2, 0])
    return right.float().mean().item()


def batches(task: Task, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Rows of each batch of one epoch; pairs stay together."""
    if task.labels:
        return list(torch.randperm(len(task.train), generator=generator).split(batch_size))
    pairs = torch.randperm(len(task.train) // 2, generator=generator).split(batch_size // 2)
    return [torch.stack([2 * pair, 2 * pair + 1], dim=1).flatten() for pair in pairs]


@dataclass
class Budget:
    """
    What every head of a comparison gets.

    Attributes:
        frozen (`bool`): Whether the head alone trains, on states computed once.
        steps (`int`): Optimizer steps.
        batch_size (`int`): Texts of a batch.
        learning_rates (`list[float]`): Tried on the first seed; its validation accuracy decides.
        seeds (`list[int]`): Of head and order.
        head_factor (`float`): Learning rate of the head over that of the backbone.
    """

    frozen: bool
    steps: int
    batch_size: int
    learning_rates: list[float]
    seeds: list[int]
    head_factor: float = 1.0


def optimise(model, budget: Budget, rate: float):
    """AdamW with a cosine schedule."""
    head = list(model.score.parameters())
    groups: list[dict[str, Any]] = [{"params": head, "lr": rate * budget.head_factor}]
    if not budget.frozen:
        owned = {id(parameter) for parameter in head}
        groups.append({"params": [p for p in model.parameters() if id(p) not in owned]})
    optimizer, steps = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01), budget.steps
    return optimizer, get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)


def train(model, task: Task, budget: Budget, rate: float, seed: int, cache: dict[str, torch.Tensor]) -> list[float]:
    """Trains one model, on states from `cache` if the backbone is frozen, and returns the loss of every step."""
    generator, pad = torch.Generator().manual_seed(seed), model.config.get_text_config().pad_token_id
    model.train()
    trained = model.score if budget.frozen else model
    optimizer, scheduler = optimise(model, budget, rate)
    losses: list[float] = []
    queue: list[torch.Tensor] = []
    while len(losses) < budget.steps:
        queue = queue or batches(task, budget.batch_size, generator)
        rows = queue.pop(0)
        if budget.frozen:
            states = cache["train"][rows]
        else:
            ids, mask = padded([task.train[row] for row in rows], pad)
            states = last_token_states(model.model(ids, attention_mask=mask).last_hidden_state, ids, pad)
        loss = objective(model.score(states), task.labels["train"][rows] if task.labels else None)
        losses.append(loss.item())
        if model.config.homeostasis_coef > 0:
            loss = loss + model.config.homeostasis_coef * model.score.homeostasis_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def run(path: str, task: Task, head: str, budget: Budget, rate: float, seed: int, cache: dict) -> dict:
    """Trains one model and measures it on both other splits."""
    start = time.process_time()
    set_seed(seed)
    model = build_model(path, head, task.num_labels)
    losses = train(model, task, budget, rate, seed, cache)
    model.eval()
    pad = model.config.get_text_config().pad_token_id
    scores = {}
    for split in ("validation", "test"):
        states = cache[split] if budget.frozen else features(model, getattr(task, split), pad)
        with torch.no_grad():
            scores[split] = accuracy(model.score(states), task.labels.get(split))
    if isinstance(model.score, EPHead):
        scores["weight_angle"] = model.score.asymmetry()["ep/weight_angle"]
    return {
        "task": task.name,
        "frozen": budget.frozen,
        "head": head,
        "learning_rate": rate,
        "head_factor": budget.head_factor,
        "seed": seed,
        **scores,
        "losses": [round(float(part.mean()), 4) for part in np.array_split(losses, min(8, len(losses)))],
        "steps": budget.steps,
        "parameters": count(model.score),
        "seconds": time.process_time() - start,
    }


def compare(path: str, task: Task, heads: list[str], budget: Budget) -> None:
    """Every head on one task, one line of JSON for each run: all rates on the first seed, the best on the others."""
    cache: dict[str, torch.Tensor] = {}
    if budget.frozen:
        model = build_model(path, "linear", task.num_labels)
        pad = model.config.get_text_config().pad_token_id
        cache = {split: features(model, getattr(task, split), pad) for split in ("train", "validation", "test")}
    for head in heads:
        tried = []
        for rate in budget.learning_rates:
            tried.append(run(path, task, head, budget, rate, budget.seeds[0], cache))
            print(json.dumps(tried[-1]), flush=True)
        rate = best(tried)["learning_rate"]
        for seed in budget.seeds[1:]:
            print(json.dumps(run(path, task, head, budget, rate, seed, cache)), flush=True)


def best(results: list[dict]) -> dict:
    """The run with the highest validation accuracy, the first of equal ones."""
    return max(results, key=lambda result: result["validation"])


def load_tasks(options: argparse.Namespace, path: str) -> list[Task]:
    """The tasks that were asked for."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    sizes, length = (options.num_train, 400, 1000), options.max_length
    halves = (options.num_train // 2, 200, 500)
    tasks = []
    if "IMDB" in options.tasks:
        tasks.append(imdb_task(options.imdb_dir, tokenizer, length, sizes))
    if "playground" in options.tasks:
        tasks.append(pairs_task("playground", preference_dataset(sum(halves)), tokenizer, length, halves))
    if "HH harmless" in options.tasks:
        rows = load_dataset("json", data_files=options.hh_file, split="train").shuffle(seed=0)
        smaller = (min(halves[0], len(rows) - sum(halves[1:])), *halves[1:])
        tasks.append(pairs_task("HH harmless", rows, tokenizer, length, smaller))
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imdb_dir", type=Path)
    parser.add_argument("--hh_file")
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--table", nargs="+", help="print what earlier runs wrote as tables, and run nothing")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--num_train", type=int, default=2560, help="texts, or twice the pairs")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--head_factor", type=float, default=1.0, help="learning rate of head over that of backbone")
    parser.add_argument("--heads", nargs="+", choices=HEADS, help="by default six, or four with a trained backbone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frozen_steps", type=int, default=600)
    parser.add_argument("--frozen_batch_size", type=int, default=64)
    parser.add_argument("--frozen_learning_rates", type=float, nargs="+", default=[1e-3, 5e-3])
    parser.add_argument("--trained_steps", type=int, default=160)
    parser.add_argument("--trained_batch_size", type=int, default=32)
    parser.add_argument("--trained_learning_rates", type=float, nargs="+", default=[5e-4, 1e-3])
    options = parser.parse_args()
    if options.table:
        print(
            tables(
                [
                    json.loads(line)
                    for file in options.table
                    for line in Path(file).read_text().splitlines()
                    if line.startswith("{")
                ]
            )
        )
        return
    torch.set_num_threads(1)
    path = options.model_name_or_path
    tasks = load_tasks(options, path)
    for backbone in options.backbones:
        chosen = {name: getattr(options, f"{backbone}_{name}") for name in ("steps", "batch_size", "learning_rates")}
        budget = Budget(BACKBONES[backbone], seeds=options.seeds, head_factor=options.head_factor, **chosen)
        for task in tasks:
            compare(path, task, options.heads or (FROZEN_HEADS if budget.frozen else TRAINED_HEADS), budget)


def of_head(results: list[dict], head: str, task: str) -> list[dict]:
    """The runs of a head on a task at its learning rate."""
    own = [result for result in results if result["head"] == head and result["task"] == task]
    if not own:
        return []
    rate = best([result for result in own if result["seed"] == own[0]["seed"]])["learning_rate"]
    return [result for result in own if result["learning_rate"] == rate]


def cell(results: list[dict]) -> str:
    """Mean test accuracy and standard deviation over the seeds, and the learning rate."""
    if not results:
        return "not run"
    scores = [result["test"] for result in results]
    spread = f" ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.3f}{spread} ({results[0]['learning_rate']:g})"


def tables(results: list[dict]) -> str:
    """Markdown: a table for frozen and one for trained backbones."""
    parts = []
    for name, frozen in BACKBONES.items():
        rows = [result for result in results if result["frozen"] is frozen]
        tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
        if not rows:
            continue
        lines = [
            f"| {name} backbone | parameters | {' | '.join(tasks)} | s per run |",
            "|---|" + "---|" * (len(tasks) + 2),
        ]
        for head in HEADS:
            own = [row for row in rows if row["head"] == head]
            if own:
                cells = [cell(of_head(own, head, task)) for task in tasks]
                parameters = " / ".join(f"{n:,}" for n in sorted({row["parameters"] for row in own}))
                seconds = np.mean([row["seconds"] for row in own])
                lines.append(f"| {head} | {parameters} | {' | '.join(cells)} | {seconds:.1f} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
