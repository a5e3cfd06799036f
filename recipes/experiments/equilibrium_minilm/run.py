"""
Heads on a real sentence encoder, all-MiniLM-L6-v2: sentiment of IMDB reviews and preference of HH pairs, with a linear
head, a perceptron, and equilibrium-propagation heads with symmetric feedback and with feedback from 90 degrees, with
and without homeostasis.

Frozen: every text is embedded once, and every head gets the same features, rates, normalisations of its input and
seeds; rate and normalisation are chosen on validation data. Trained: the encoder's last layer learns with the head, at
the settings chosen for that head on frozen features. Accuracies on test data, with intervals of the difference to the
perceptron of the same layers. Finished runs are kept in `runs.jsonl`, so an interrupted experiment goes on.

python -m recipes.experiments.equilibrium_minilm.run --config recipes/experiments/equilibrium_minilm/config.yaml
"""

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from trl_ext.equilibrium import EPHead
from trl_ext.equilibrium.input_norm import normalize, update_statistics
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..runner import FinishedRuns
from .encoder import SPLITS, Encoder, Split, mean_state, read_texts
from .report import HEADS, TASKS, at_best_setting, plot, tables


console = Console(highlight=False)

ASYMMETRIC = {"feedback": "asymmetric", "feedback_angle": 90.0}
# Head: settings of the equilibrium head; `None` is another kind
SETTINGS: dict[str, dict[str, Any] | None] = dict(zip(HEADS, (None, None, {}, ASYMMETRIC, ASYMMETRIC), strict=True))
BACKBONES = ("frozen", "trained")
INPUT_NORMS = ("none", "standardize")


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
        tasks, heads, backbones, input_norms (`list[str]`):
            Among `TASKS`, `HEADS`, `BACKBONES` and `INPUT_NORMS`.
        depths, seeds (`list[int]`):
            Numbers of layers of perceptrons and equilibrium heads; seeds of weights and order.
        width (`int`):
            Width of every layer.
        learning_rates (`list[float]`):
            Of the head, the same for all.
        homeostasis_coef (`float`):
            Weight of the homeostasis objective, of the head that has it.
        max_steps, batch_size (`int`):
            Steps; texts of a step, of both sides of pairs.
        max_length (`int`):
            Tokens of a review from its start, of a dialogue from its end.
        num_train, num_validation, num_test (`int`):
            Texts; half as many pairs.
        trained_learning_rate (`float`):
            Of the encoder's last layer where it learns.
        trained_max_steps, trained_batch_size, trained_max_length, trained_num_train, trained_num_test (`int`):
            The same where it learns; the texts are the first of each split.
        output_dir (`str`):
            Folder of the results.

    Raises:
        ValueError: If a name is unknown, or a number of texts is odd.
    """

    model_name_or_path: str = field(metadata={"help": "Sentence encoder."})
    imdb_dir: str = field(metadata={"help": "Folder with imdb_train.parquet and imdb_test.parquet."})
    hh_file: str = field(metadata={"help": "Preference pairs, JSON lines."})
    tasks: list[str] = field(default_factory=lambda: list(TASKS), metadata={"help": "Tasks."})
    heads: list[str] = field(default_factory=lambda: list(HEADS), metadata={"help": "Heads."})
    backbones: list[str] = field(default_factory=lambda: list(BACKBONES), metadata={"help": "Frozen or trained."})
    input_norms: list[str] = field(default_factory=lambda: list(INPUT_NORMS), metadata={"help": "Normalisations."})
    depths: list[int] = field(default_factory=lambda: [2], metadata={"help": "Numbers of layers."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    width: int = field(default=64, metadata={"help": "Width of every layer."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 5e-3], metadata={"help": "Rates."})
    homeostasis_coef: float = field(default=10.0, metadata={"help": "Weight of the homeostasis objective."})
    max_steps: int = field(default=150, metadata={"help": "Steps of a run."})
    batch_size: int = field(default=64, metadata={"help": "Texts of a step."})
    max_length: int = field(default=64, metadata={"help": "Tokens of a text."})
    num_train: int = field(default=1200, metadata={"help": "Texts to train on; half as many pairs."})
    num_validation: int = field(default=400, metadata={"help": "Texts to choose on; half as many pairs."})
    num_test: int = field(default=800, metadata={"help": "Texts to test on; half as many pairs."})
    trained_learning_rate: float = field(default=1e-4, metadata={"help": "Rate of the encoder's last layer."})
    trained_max_steps: int = field(default=30, metadata={"help": "Steps where the encoder's last layer learns."})
    trained_batch_size: int = field(default=32, metadata={"help": "Texts of such a step."})
    trained_max_length: int = field(default=32, metadata={"help": "Tokens of a text there."})
    trained_num_train: int = field(default=1200, metadata={"help": "Texts to train on there; half as many pairs."})
    trained_num_test: int = field(default=400, metadata={"help": "Texts to test on there; half as many pairs."})
    output_dir: str = field(default="outputs/equilibrium_minilm", metadata={"help": "Folder of the results."})

    def __post_init__(self) -> None:
        known = {"tasks": TASKS, "heads": HEADS, "backbones": BACKBONES, "input_norms": INPUT_NORMS}
        for name, names in known.items():
            unknown = sorted(set(getattr(self, name)) - set(names))
            if unknown:
                raise ValueError(f"`{name}` has {unknown}; the experiment knows {list(names)}.")
        for name in ("batch_size", "num_train", "num_validation", "num_test", "trained_batch_size",
                     "trained_num_train", "trained_num_test"):  # fmt: skip
            if getattr(self, name) % 2 or getattr(self, name) < 2:
                raise ValueError(f"`{name}` is {getattr(self, name)}; of pairs half as many are taken: even, from 2.")


class InputNorm(nn.Module):
    """The equilibrium head's `input_norm="standardize"` before another kind of head."""

    def __init__(self, num_features: int):
        super().__init__()
        self.mean, self.variance = torch.zeros(num_features), torch.ones(num_features)
        self.num_batches = torch.zeros((), dtype=torch.int64)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `(N, n)` less their running mean, over their running standard deviation."""
        if self.training:
            update_statistics(self.mean, self.variance, self.num_batches, rows.detach())
        return normalize(rows, self.mean, self.variance)


class Classifier(nn.Module):
    """A head on features `(N, H)`, or on the mean state of a layer that learns with it."""

    def __init__(self, head: nn.Module, layer: nn.Module | None):
        super().__init__()
        self.head, self.layer = head, layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits `(N, out)` of features `(N, H)`, or of states `(N, T, H)` and mask `(N, T)`."""
        return self.head(inputs[0] if self.layer is None else mean_state(self.layer, *inputs))


def build_head(args: MiniLMArguments, setting: dict[str, Any], in_features: int, out_features: int) -> nn.Module:
    """A head of `HEADS`; a perceptron has the layers of the equilibrium head, and orthogonal weights as well."""
    name, widths = setting["head"], [args.width] * setting["depth"]
    settings = SETTINGS[name]
    if settings is not None:
        return EPHead(
            in_features, widths, out_features, estimator="tangent", tolerance=1e-3,
            input_norm=setting["input_norm"], **settings,
        )  # fmt: skip
    parts: list[nn.Module] = [InputNorm(in_features)] if setting["input_norm"] != "none" else []
    for below, above in itertools.pairwise([in_features, *widths]):
        parts += [nn.Linear(below, above), nn.Tanh()]
    parts.append(nn.Linear(widths[-1] if widths else in_features, out_features))
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    for place, linear in enumerate(linears):
        if 0 < place < len(linears) - 1:
            nn.init.orthogonal_(linear.weight)
        else:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(*parts)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or Bradley-Terry of pairs."""
    return F.cross_entropy(logits, labels) if len(labels) else -F.logsigmoid(logits[::2, 0] - logits[1::2, 0]).mean()


@torch.no_grad()
def right_answers(model: nn.Module, split: Split) -> torch.Tensor:
    """Whether each text's class, or each pair's order, is right, `bool`."""
    parts = [model(*batch) for batch in zip(*(tensor.split(64) for tensor in split.inputs), strict=True)]
    logits = torch.cat(parts)
    return logits.argmax(dim=1) == split.labels if len(split.labels) else logits[::2, 0] > logits[1::2, 0]


def train(
    args: MiniLMArguments, data: dict[str, Split], setting: dict[str, Any], layer: nn.Module | None
) -> dict[str, Any]:
    """Trains one head, and a layer below it if there is one; `right` has a digit for each test answer."""
    start = time.process_time()
    split = data["train"]
    labels, size = split.labels, split.size
    steps, batch = (args.max_steps, args.batch_size) if layer is None else (
        args.trained_max_steps, args.trained_batch_size)  # fmt: skip
    torch.manual_seed(setting["seed"])
    head = build_head(args, setting, split.inputs[0].shape[-1], 2 if len(labels) else 1)
    model = Classifier(head, layer)
    groups = [{"params": list(head.parameters()), "lr": setting["learning_rate"]}]
    if layer is not None:
        groups.append({"params": list(layer.parameters()), "lr": args.trained_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    order = torch.Generator().manual_seed(setting["seed"])
    coefficient = args.homeostasis_coef if "homeostasis" in setting["head"] else 0.0
    for _ in range(steps):
        rows = torch.randint(len(split.texts) // size, (batch // size,), generator=order)
        rows = (rows.unsqueeze(1) * size + torch.arange(size)).flatten()  # both texts of a pair
        logits = model(*(tensor[rows] for tensor in split.inputs))
        loss = loss_of(logits, labels[rows] if len(labels) else labels)
        if coefficient:
            loss = loss + coefficient * cast(Any, head).homeostasis_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    model.eval()
    measured = SPLITS if layer is None else ("test",)
    right = {name: right_answers(model, data[name]) for name in measured}
    found: dict[str, Any] = {f"{name}_accuracy": answers.float().mean().item() for name, answers in right.items()}
    if isinstance(head, EPHead):
        found |= {"weight_angle": head.asymmetry()["ep/weight_angle"], "sweeps": head.metrics()["ep/free_sweeps"]}
    parameters = sum(parameter.numel() for parameter in head.parameters())
    digits = "".join(str(int(answer)) for answer in right["test"])
    return {**setting, **found, "parameters": parameters, "seconds": time.process_time() - start, "right": digits}


def report(row: dict[str, Any]) -> None:
    """Prints a finished run."""
    console.print(*itertools.islice(row.values(), 7), f"{row['test_accuracy']:.3f}", f"{row['seconds']:.1f} s")


def run_frozen(args: MiniLMArguments, task: str, data: dict[str, Split], finished: FinishedRuns) -> None:
    """All heads on features that are computed once and kept in the output folder."""
    for name, split in data.items():
        path = Path(args.output_dir) / f"{task}_{name}_features.pt"
        if not path.is_file():
            start = time.process_time()
            encoder = Encoder(args.model_name_or_path, args.max_length, from_end=task == "hh")
            torch.save(encoder.features(split.texts), path)
            console.print(f"{task}, {name}: {len(split.texts)} texts, {time.process_time() - start:.0f} s")
        split.inputs = (torch.load(path, weights_only=True),)
    for seed, rate, norm, name in itertools.product(args.seeds, args.learning_rates, args.input_norms, args.heads):
        for depth in [0] if name == "linear" else args.depths:
            setting = {"task": task, "backbone": "frozen", "head": name, "depth": depth, "input_norm": norm,
                       "learning_rate": rate, "seed": seed}  # fmt: skip
            if not finished.has(**setting):
                finished.add(train(args, data, setting, None))
                report(finished.rows[-1])


def run_trained(args: MiniLMArguments, task: str, data: dict[str, Split], finished: FinishedRuns) -> None:
    """The heads of the first depth with the encoder's last layer, at the settings chosen on frozen features."""
    settings = []
    for name, seed in itertools.product(args.heads, args.seeds):
        depth = 0 if name == "linear" else args.depths[0]
        chosen = at_best_setting(finished.rows, task=task, backbone="frozen", head=name, depth=depth)[0]
        setting = {"task": task, "backbone": "trained", "head": name, "depth": depth}
        if not finished.has(**setting, seed=seed):
            settings.append(
                setting | {"input_norm": chosen["input_norm"], "learning_rate": chosen["learning_rate"], "seed": seed}
            )
    if not settings:
        return
    start = time.process_time()
    encoder = Encoder(args.model_name_or_path, args.trained_max_length, from_end=task == "hh")
    counts = {"train": args.trained_num_train, "test": args.trained_num_test}
    short = {name: data[name].first(count) for name, count in counts.items()}
    for split in short.values():
        split.inputs = encoder.states_before_last_layer(split.texts)
    console.print(f"{task}: states before the last layer, {time.process_time() - start:.0f} s")
    for setting in settings:
        finished.add(train(args, short, setting, encoder.last_layer()))
        report(finished.rows[-1])


def main(args: MiniLMArguments) -> None:
    """Runs what is missing of the experiment and writes `results.md` and `results.png`."""
    torch.set_num_threads(1)
    finished = FinishedRuns(args.output_dir)
    for backbone, run in (("frozen", run_frozen), ("trained", run_trained)):
        for task in args.tasks if backbone in args.backbones else []:
            sizes = (args.num_train, args.num_validation, args.num_test)
            run(args, task, read_texts(task, args.imdb_dir, args.hh_file, sizes), finished)
    folder = Path(args.output_dir)
    (folder / "results.md").write_text(tables(finished.rows) + "\n")
    plot(finished.rows, folder / "results.png")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((MiniLMArguments,))


if __name__ == "__main__":
    run_strictly(make_parser, main)
