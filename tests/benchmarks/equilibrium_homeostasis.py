"""Jacobian homeostasis on images: the paper's perceptron from feedback at 90 degrees, with and without the objective.

Trains an `EPHead` as the whole classifier on images in the idx format (MNIST's 10,000 test digits: 8,000 to train,
2,000 to test) and prints accuracy, asymmetry and the cosine of each layer's error vectors to the exact ones.

python -m tests.benchmarks.equilibrium_homeostasis --images images.gz --labels labels.gz
"""

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_ext import EPHead
from trl_ext.core.figures import line_style, new_axes, save_figure
from trl_ext.equilibrium.relaxation import EquilibriumError


ARMS: dict[str, dict[str, Any]] = {
    "EP, no objective": {},
    "EP, closed form": {"homeostasis_coef": True},
    "EP, 5 probes a sample": {"homeostasis_coef": True, "probes_per_sample": 5},
    "EP, AsymEP correction": {"correction": "asymep"},
    "exact adjoint, no objective": {"estimator": "exact"},
}
MEASURES = ("accuracy", "loss", "angle", "symmetry", "cosine_1", "cosine_2", "input_cosine", "sweeps", "unconverged")


def read_idx(path: str) -> torch.Tensor:
    with gzip.open(path) as file:
        data = file.read()
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).copy()).view(*shape)


def gradient_of(head: EPHead, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    head.zero_grad()
    torch.nn.functional.cross_entropy(head(images), labels).backward()
    gradient = head.input_weight.grad
    assert gradient is not None
    gradient = gradient.flatten().clone()
    head.zero_grad()
    return gradient


def evaluate(head: EPHead, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    head.eval()
    with torch.no_grad():
        logits = head(images)
    sweeps = head.statistics.free_sweeps
    error = logits.softmax(-1) - torch.nn.functional.one_hot(labels, logits.shape[-1])
    cosines = head.alignment(images[:500], error[:500])
    asymmetry = head.asymmetry()
    estimated = gradient_of(head, images[:500], labels[:500])
    settings = head.estimator, head.correction
    head.estimator, head.correction = "exact", "none"
    exact = gradient_of(head, images[:500], labels[:500])
    head.estimator, head.correction = settings
    head.train()
    return {
        "accuracy": 100 * (logits.argmax(-1) == labels).float().mean().item(),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "angle": asymmetry["ep/weight_angle"],
        "symmetry": asymmetry["ep/symmetry"],
        "cosine_1": cosines[0],
        "cosine_2": cosines[1],
        "input_cosine": torch.nn.functional.cosine_similarity(estimated, exact, dim=0).item(),
        "sweeps": sweeps,
        "unconverged": head.statistics.num_unconverged,
    }


def train(arm: dict, seed: int, data: tuple[torch.Tensor, ...], options: argparse.Namespace) -> list[dict[str, float]]:
    torch.manual_seed(seed)
    arm = dict(arm)
    coef = options.homeostasis_coef if arm.pop("homeostasis_coef", False) else 0.0
    probes = arm.pop("probes_per_sample", 0) * options.batch_size or None
    settings = {"feedback": "asymmetric", "feedback_angle": 90.0, "activation": options.activation, **arm}
    images, labels, test_images, test_labels = data
    head = EPHead(images.shape[1], [256, 256], 10, tolerance=options.tolerance, max_steps=200, **settings)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    history = [evaluate(head, test_images, test_labels)]
    for _ in range(options.epochs):
        for rows in torch.randperm(len(images)).split(options.batch_size):
            loss = torch.nn.functional.cross_entropy(head(images[rows]), labels[rows])
            if coef:
                loss = loss + coef * head.homeostasis_loss(probes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        history.append(evaluate(head, test_images, test_labels))
    return history


def table(results: dict[str, list[list[dict[str, float]]]]) -> str:
    lines = ["| arm | finished | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 2) + "|"]
    for arm, runs in results.items():
        cells = []
        for name in MEASURES:
            values = [run[-1][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3g} +- {spread:.2g}")
        lines.append(f"| {arm} | " + " | ".join([str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def plot(results: dict[str, list[list[dict[str, float]]]], path: str) -> None:
    figure, axes = new_axes(2, 2, width=5.0, height=3.4)
    labels = {"accuracy": "test accuracy (%)", "symmetry": "symmetry |S| / (|S| + |A|)",
              "cosine_1": "cosine to the exact errors, layer 1",
              "cosine_2": "cosine to the exact errors, layer 2"}  # fmt: skip
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for position, (arm, runs) in enumerate(results.items()):
            values = np.array([[epoch[name] for epoch in run] for run in runs])
            mean, spread = values.mean(0), values.std(0)
            style = {**line_style(position), "markersize": 8 - position}  # lines that coincide stay visible
            axis.plot(mean, label=arm, linewidth=1.2, **style)
            axis.fill_between(
                range(len(mean)), mean - spread, mean + spread, alpha=0.2, color=style["color"], linewidth=0
            )
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
    axes[0].set_ylim(bottom=60)
    axes[0].legend(loc="lower right", fontsize=9, frameon=False)  # where no line is
    figure.suptitle("Lines: mean over seeds; bands: standard deviation", x=0.01, ha="left", fontsize=10)
    save_figure(figure, path)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", required=True, help="Images, idx format, gzipped.")
    parser.add_argument("--labels", required=True, help="Labels, idx format, gzipped.")
    parser.add_argument("--num_train", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--homeostasis_coef", type=float, default=10.0)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--activation", default="sigmoid")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--json", help="Where to write every measurement.")
    parser.add_argument("--figure", help="Where to draw it.")
    return parser


def main() -> None:
    options = argument_parser().parse_args()
    torch.set_num_threads(1)
    images = read_idx(options.images).flatten(1).float() / 255
    labels = read_idx(options.labels).long()
    count = options.num_train
    data = images[:count], labels[:count], images[count:], labels[count:]
    results: dict[str, list[list[dict[str, float]]]] = {arm: [] for arm in options.arms}
    start = time.process_time()
    for seed in range(options.seeds):
        for arm in options.arms:
            try:
                results[arm].append(train(ARMS[arm], seed, data, options))
            except EquilibriumError as error:
                print(f"{time.process_time() - start:.0f} s CPU, seed {seed}, {arm}: broke down: {error}", flush=True)
                continue
            last = {name: round(value, 3) for name, value in results[arm][-1][-1].items()}
            print(f"{time.process_time() - start:.0f} s CPU, seed {seed}, {arm}: {last}", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps(results))
    print(table(results))
    if options.figure:
        plot(results, options.figure)


if __name__ == "__main__":
    main()
