"""
Accuracy against depth, with and without Jacobian homeostasis (https://huggingface.co/papers/2309.02214): perceptrons
and equilibrium-propagation heads of two to six layers as the whole classifier of MNIST's test digits.

python -m recipes.experiments.equilibrium_depth.run \
    --config recipes/experiments/equilibrium_depth/config.yaml --images_dir DATA/images
"""

import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from trl_ext.core.figures import line_style, new_axes, save_figure
from trl_ext.equilibrium import EPHead
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..adamp_scale_invariance.run import load_images
from ..runner import FinishedRuns, markdown_table


console = Console(highlight=False)
ASYMMETRIC = {"feedback": "asymmetric", "feedback_angle": 90.0}
# Settings of the head, `None` for a perceptron of the same layers; whether the homeostasis objective is in the loss
ARMS: dict[str, tuple[dict[str, Any] | None, bool]] = {
    "perceptron": (None, False),
    "EP, symmetric": ({}, False),
    "EP from 90 degrees, no objective": (ASYMMETRIC, False),
    "EP from 90 degrees, homeostasis": (ASYMMETRIC, True),
}


@dataclass
class DepthArguments:
    """
    Arguments of the experiment.

    Args:
        images_dir (`str`):
            Folder with `mnist_t10k_images.gz` and `mnist_t10k_labels.gz` in the idx format; the first 8,000 images are
            trained on, the rest is tested on.
        depths, seeds (`list[int]`):
            Numbers of layers between input and readout, and seeds of weights and order of the data.
        arms (`list[str]`):
            Among those of `ARMS`.
        width, epochs, batch_size (`int`):
            Units of each layer, passes over the images, images of a batch.
        learning_rate, homeostasis_coef (`float`):
            Of AdamW; weight of the homeostasis objective.
        output_dir (`str`):
            Folder of the results.

    Raises:
        ValueError: If an arm is unknown.
    """

    images_dir: str = field(metadata={"help": "Folder with the idx files of MNIST's test images."})
    depths: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6], metadata={"help": "Numbers of layers."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "Seeds."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "What is compared."})
    width: int = field(default=64, metadata={"help": "Units of each layer."})
    epochs: int = field(default=3, metadata={"help": "Passes over the images."})
    batch_size: int = field(default=50, metadata={"help": "Images of a batch."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of AdamW."})
    homeostasis_coef: float = field(default=10.0, metadata={"help": "Weight of the homeostasis objective."})
    output_dir: str = field(default="outputs/equilibrium_depth", metadata={"help": "Folder of the results."})

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"`arms` has {unknown}; the experiment knows {list(ARMS)}.")


def perceptron(in_features: int, width: int, depth: int) -> nn.Sequential:
    """Layers of tanh and a readout, as many and as wide as the head's; orthogonal weights, as the head's are."""
    layers: list[nn.Module] = []
    for layer in range(depth):
        linear = nn.Linear(width if layer else in_features, width)
        if layer:
            nn.init.orthogonal_(linear.weight)
        else:
            nn.init.normal_(linear.weight, std=in_features**-0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    readout = nn.Linear(width, 10)
    nn.init.normal_(readout.weight, std=width**-0.5)
    nn.init.zeros_(readout.bias)
    return nn.Sequential(*layers, readout)


def train(
    arm: str, depth: int, seed: int, images: torch.Tensor, labels: torch.Tensor, args: DepthArguments
) -> dict[str, Any]:
    """One run: accuracy on the held-out images in percent, and for a head its angle, first cosine and sweeps."""
    torch.manual_seed(seed)
    settings, has_objective = ARMS[arm]
    size = images.shape[1]
    model: Any = (
        perceptron(size, args.width, depth)
        if settings is None
        else EPHead(size, [args.width] * depth, 10, estimator="tangent", tolerance=1e-3, max_steps=200, **settings)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    count = len(images) * 4 // 5
    start = time.process_time()
    for _ in range(args.epochs):
        for rows in torch.randperm(count).split(args.batch_size):
            loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
            if has_objective:
                loss = loss + args.homeostasis_coef * model.homeostasis_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        logits = model(images[count:])
    row: dict[str, Any] = {"arm": arm, "depth": depth, "seed": seed, "seconds": round(seconds, 2)}
    row["accuracy"] = 100 * (logits.argmax(-1) == labels[count:]).float().mean().item()
    if isinstance(model, EPHead):
        error = logits.softmax(-1) - nn.functional.one_hot(labels[count:], 10)
        row["sweeps"] = model.statistics.free_sweeps
        row["unconverged"] = model.statistics.num_unconverged
        row["angle"] = model.asymmetry()["ep/weight_angle"]
        row["cosine"] = model.alignment(images[count:], error)[0]
    return row


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(rows: list[dict[str, Any]], entry: str, digits: int = 1) -> str:
    """An entry of the runs, arms by depths, as Markdown."""
    depths = sorted({row["depth"] for row in rows})
    cells = []
    for arm in dict.fromkeys(row["arm"] for row in rows if entry in row):
        own = [[r[entry] for r in rows if (r["arm"], r["depth"]) == (arm, depth)] for depth in depths]
        cells.append([arm, *(spread(values, digits) if values else "" for values in own)])
    return markdown_table(["", *(f"{depth} layers" for depth in depths)], cells)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy, and the cosine of estimated and exact error vectors of the first layer, against depth."""
    figure, axes = new_axes(1, 2, width=4.6, height=3.4, dpi=110)
    for axis, entry, title in zip(
        axes, ("accuracy", "cosine"), ("test accuracy (%)", "cosine to the exact errors, first layer"), strict=True
    ):
        for position, arm in enumerate(ARMS):
            own = [row for row in rows if row["arm"] == arm and entry in row]
            depths = sorted({row["depth"] for row in own})
            values = [[row[entry] for row in own if row["depth"] == depth] for depth in depths]
            if values:
                means, spreads = [np.mean(v) for v in values], [np.std(v) for v in values]
                axis.errorbar(depths, means, spreads, **line_style(position), capsize=3, label=arm)
        axis.set(xlabel="layers", ylabel=title, xticks=sorted({row["depth"] for row in rows}))
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_title("mean and standard deviation over seeds", loc="left", fontsize=10)
    save_figure(figure, path)


def main(args: DepthArguments) -> None:
    """Runs what is missing and writes `results.md` and `results.png`."""
    torch.set_num_threads(1)
    folder = Path(args.output_dir)
    finished = FinishedRuns(folder)
    pixels, labels = load_images(args.images_dir)
    images = pixels.flatten(1)
    for seed, depth, arm in itertools.product(args.seeds, args.depths, args.arms):
        if finished.has(arm=arm, depth=depth, seed=seed):
            continue
        finished.add(train(arm, depth, seed, images, labels, args))
        console.print(finished.rows[-1])
    tables = {
        "Test accuracy (%)": table(finished.rows, "accuracy"),
        "Cosine of estimated and exact error vectors, first layer": table(finished.rows, "cosine", 2),
        "Angle between forward and feedback weights (degrees)": table(finished.rows, "angle"),
        "Sweeps of the slowest held-out digit": table(finished.rows, "sweeps", 0),
        "Processor time of a run (seconds)": table(finished.rows, "seconds"),
    }
    (folder / "results.md").write_text("\n\n".join(f"{title}:\n\n{text}" for title, text in tables.items()) + "\n")
    plot(finished.rows, folder / "results.png")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((DepthArguments,))


if __name__ == "__main__":
    run_strictly(make_parser, main)
