"""
The phenomenon behind AdamP and SGDP (https://huggingface.co/papers/2006.08217, sections 2 and 3): momentum inflates
the norm of scale-invariant weights, and a larger norm makes the same update a smaller turn.

Two problems, with SGD, SGDP, Adam and AdamP: a scale-invariant function whose optimum is known, and a small network
with batch normalisation on images of digits.

python -m recipes.experiments.adamp_scale_invariance.run \
    --config recipes/experiments/adamp_scale_invariance/config.yaml --images_dir DATA/images
"""

import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import get_scheduler

from trl_ext.core.figures import line_style, new_axes, save_figure
from trl_ext.optim import SGDP, AdamP
from trl_ext.optim.step_geometry import StepRecorder
from trl_ext.scripts.recipe.strict_parser import StrictParser, run_strictly

from ..runner import markdown_table


console = Console(highlight=False)
STYLES = {name: line_style(position) for position, name in enumerate(("SGD", "SGDP", "Adam", "AdamP"))}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "SGDP": lambda params, lr: SGDP(params, lr=lr, momentum=0.9),
    "Adam": lambda params, lr: torch.optim.Adam(params, lr=lr),
    "AdamP": lambda params, lr: AdamP(params, lr=lr),
}


@dataclass
class ScaleInvarianceArguments:
    """
    Arguments of the experiment.

    Args:
        images_dir (`str`):
            Folder with `mnist_t10k_images.gz` and `mnist_t10k_labels.gz` in the idx format; the first 8,000 images are
            trained on, the rest is tested on.
        seeds (`list[int]`):
            Seeds of the network and of the order of its data; the toy problem uses the first.
        epochs (`int`):
            Passes over the images.
        schedules (`list[str]`):
            Schedules of the network's learning rate: `"constant"`, as in the paper's analysis, and `"cosine"`, to 0.
        sgd_learning_rates, adam_learning_rates (`list[float]`):
            Learning rates of the network, for SGD and SGDP and for Adam and AdamP.
        toy_steps (`int`):
            Steps of the toy problem.
        output_dir (`str`):
            Folder of the results.
    """

    images_dir: str = field(metadata={"help": "Folder with the idx files of MNIST's test images."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    epochs: int = field(default=8, metadata={"help": "Passes over the images."})
    schedules: list[str] = field(default_factory=lambda: ["constant"], metadata={"help": "Schedules."})
    sgd_learning_rates: list[float] = field(
        default_factory=lambda: [0.01, 0.05, 0.2, 1.0], metadata={"help": "Learning rates of SGD and SGDP."}
    )
    adam_learning_rates: list[float] = field(
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03], metadata={"help": "Learning rates of Adam and AdamP."}
    )
    toy_steps: int = field(default=300, metadata={"help": "Steps of the toy problem."})
    output_dir: str = field(default="outputs/scale_invariance", metadata={"help": "Folder of the results."})


def rayleigh_quotient(weight: torch.Tensor, eigenvalues: torch.Tensor) -> torch.Tensor:
    """`w' A w / w' w` with a diagonal A, `(1, D)` and `(D,)`; its minimum is the smallest eigenvalue."""
    return (eigenvalues * weight.square()).sum() / weight.square().sum()


def run_toy(name: str, learning_rate: float, steps: int, seed: int, size: int = 64) -> dict[str, list[float]]:
    """The distance to the minimum, the norm and the angle of each step."""
    torch.manual_seed(seed)
    eigenvalues = torch.logspace(-3, 0, size)
    weight = nn.Parameter(nn.functional.normalize(torch.randn(1, size)))
    optimizer, recorder = OPTIMIZERS[name]([weight], learning_rate), StepRecorder({"weight": weight})
    trace: dict[str, list[float]] = {"gap": [], "norm": [], "angle": []}
    for _ in range(steps):
        loss = rayleigh_quotient(weight, eigenvalues)
        optimizer.zero_grad()
        loss.backward()
        recorder.before()
        optimizer.step()
        step = recorder.after()["weight"]
        trace["gap"].append(float(loss.detach() - eigenvalues.min()))
        trace["norm"].append(step.norm)
        trace["angle"].append(step.angle)
    return trace


def load_images(folder: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, 1, 28, 28)`, float32 in [0, 1], and labels `(N,)`."""
    with gzip.open(Path(folder) / "mnist_t10k_images.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(Path(folder) / "mnist_t10k_labels.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels / 255.0).float(), torch.from_numpy(labels.astype(np.int64))


def normalised_network() -> nn.Sequential:
    """Three convolutions, each before batch normalisation, which makes their channels scale-invariant."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


def run_network(
    name: str,
    learning_rate: float,
    epochs: int,
    seed: int,
    images: torch.Tensor,
    labels: torch.Tensor,
    schedule: str = "constant",
) -> dict[str, Any]:
    """Accuracy on the held-out images, and norm and angle of the convolutions on every fifth step."""
    torch.manual_seed(seed)
    network = normalised_network()
    convolutions = {key: p for key, p in network.named_parameters() if p.ndim == 4}
    optimizer, recorder = OPTIMIZERS[name](network.parameters(), learning_rate), StepRecorder(convolutions)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=80 * epochs)
    start = float(np.mean([float(p.detach().norm()) for p in convolutions.values()]))
    trace: dict[str, Any] = {"step": [], "growth": [], "angle": [], "passed": []}
    steps = 0
    for _ in range(epochs):
        for batch in torch.randperm(8000).split(100):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if steps % 5 == 0:
                recorder.before()
            optimizer.step()
            scheduler.step()
            if steps % 5 == 0:
                geometry = recorder.after().values()
                trace["step"].append(steps)
                trace["growth"].append(float(np.mean([g.norm for g in geometry])) / start)
                trace["angle"].append(float(np.mean([g.angle for g in geometry])))
                trace["passed"].append(float(np.mean([g.level == "channel" for g in geometry])))
            steps += 1
    network.eval()
    with torch.no_grad():
        accuracy = float((network(images[8000:]).argmax(-1) == labels[8000:]).float().mean())
    setting = {"name": name, "schedule": schedule, "learning_rate": learning_rate, "seed": seed}
    return {**setting, "accuracy": accuracy, **trace}


def network_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy, norm growth and last effective step size of every optimizer and learning rate, as Markdown."""
    columns = ["optimizer", "learning rate", "accuracy, %", "norm, last / first", "effective step at the end"]
    table = []
    for name, rate in dict.fromkeys((row["name"], row["learning_rate"]) for row in rows):
        own = [row for row in rows if (row["name"], row["learning_rate"]) == (name, rate)]
        accuracy = [100 * row["accuracy"] for row in own]
        tail = [np.mean(row["angle"][-len(row["angle"]) // 10 :]) for row in own]
        cells = [
            f"{np.mean(accuracy):.2f} ± {np.std(accuracy, ddof=1) if len(own) > 1 else 0:.2f}",
            f"{np.mean([row['growth'][-1] for row in own]):.2f}",
            f"{np.mean(tail):.4f}",
            f"{np.mean([np.mean(row['passed']) for row in own]):.2f}",
        ]
        table.append([name, f"{rate:g}", *cells])
    return markdown_table([*columns, "test passed"], table)


def toy_table(toys: dict[str, dict[str, list[float]]]) -> str:
    """What is left of the distance to the minimum at a third of the steps and at the end, as Markdown."""
    rows = []
    for name, trace in toys.items():
        gaps = trace["gap"][len(trace["gap"]) // 3], trace["gap"][-1]
        rows.append([name, *(f"{gap:.5f}" for gap in gaps), f"{trace['norm'][-1]:.2f}"])
    return markdown_table(["optimizer", "gap at a third", "gap at the end", "norm at the end"], rows)


def plot(toys: dict[str, dict[str, list[float]]], rows: list[dict[str, Any]], path: Path) -> None:
    """Norm and effective step size of both problems; the network at the first schedule, third learning rate."""
    figure, panels = new_axes(2, 3, width=3.5, height=3.1)
    toy_axes, network_axes = panels[:3], panels[3:]
    for name, trace in toys.items():
        for axis, key in zip(toy_axes, ("norm", "angle", "gap"), strict=True):
            axis.plot(trace[key], **STYLES[name], markevery=0.1, markersize=4, label=name)
    for name, style in STYLES.items():
        own = [row for row in rows if (row["name"], row["schedule"]) == (name, rows[0]["schedule"])]
        rates = sorted({row["learning_rate"] for row in own})
        chosen = [row for row in own if row["learning_rate"] == rates[len(rates) // 2]]
        for axis, key in zip(network_axes, ("growth", "angle"), strict=False):
            axis.plot(chosen[0]["step"], np.mean([row[key] for row in chosen], axis=0), **style,
                      markevery=0.1, markersize=4, label=name)  # fmt: skip
        accuracy = [np.mean([row["accuracy"] for row in own if row["learning_rate"] == rate]) for rate in rates]
        network_axes[2].plot(rates, accuracy, **style, label=name)
    labels = ("norm of the weights", "effective step (radians)", "distance to the minimum")
    for axis, label in zip(panels, labels * 2, strict=True):
        axis.set(xlabel="step", ylabel=label)
    for axis in (*toy_axes[1:], network_axes[1]):
        axis.set(yscale="log")
    toy_axes[0].set(title="scale-invariant function")
    toy_axes[0].legend(frameon=False)
    network_axes[0].set(title="network with batch normalisation", ylabel="norm / first norm")
    network_axes[2].set(xlabel="learning rate", ylabel="test accuracy (from 0.95)", xscale="log", ylim=(0.95, 0.99))
    save_figure(figure, path)


def main(args: ScaleInvarianceArguments) -> None:
    """Runs both problems and writes `results.md`, `results.png` and `runs.json`."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    toy_rates = {"SGD": 0.2, "SGDP": 0.2, "Adam": 0.03, "AdamP": 0.03}
    toys = {name: run_toy(name, rate, args.toy_steps, args.seeds[0]) for name, rate in toy_rates.items()}
    console.print(toy_table(toys))
    images, labels = load_images(args.images_dir)
    rows = []
    for name in OPTIMIZERS:
        rates = args.sgd_learning_rates if name.startswith("SGD") else args.adam_learning_rates
        for schedule, rate in itertools.product(args.schedules, rates):
            rows += [run_network(name, rate, args.epochs, seed, images, labels, schedule) for seed in args.seeds]
            console.print(name, schedule, rate, [row["accuracy"] for row in rows[-len(args.seeds) :]])
    tables = [network_table([row for row in rows if row["schedule"] == schedule]) for schedule in args.schedules]
    (folder / "results.md").write_text("\n\n".join([toy_table(toys), *tables]) + "\n")
    (folder / "runs.json").write_text(json.dumps({"toy": toys, "network": rows}))
    plot(toys, rows, folder / "results.png")


def make_parser() -> StrictParser:
    """The strict parser of the experiment's arguments."""
    return StrictParser((ScaleInvarianceArguments,))


if __name__ == "__main__":
    run_strictly(make_parser, main)
