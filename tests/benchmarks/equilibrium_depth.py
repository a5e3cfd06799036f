"""What depth costs: sweeps and processor time of an `EPHead` at two to six layers, with and without secants.

Heads of 64-W-...-W-10 are first trained for some steps, so that their weights are at the cap, on rows of random
features and labels; then every variant takes turns. A perceptron of the same layers stands beside them.

python -m tests.benchmarks.equilibrium_depth --widths 64 256
"""

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from tests.benchmarks.equilibrium import measure_cpu
from trl_ext import EPHead
from trl_ext.equilibrium.relaxation import Dynamics


DEPTHS = (2, 3, 4, 5, 6)
FEEDBACK = {"symmetric": {}, "90 degrees": {"feedback": "asymmetric", "feedback_angle": 90.0}}


def step_of(model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Forward and backward of a batch, the gradient of the input included, as a trained backbone asks for it."""

    def step() -> None:
        model.zero_grad()
        hidden.grad = None
        nn.functional.cross_entropy(model(hidden), labels).backward()

    return step


def plain(step: Callable[[], None]) -> Callable[[], None]:
    """The same without secants."""

    def run() -> None:
        with mock.patch.object(Dynamics, "takes_secants", False):
            step()

    return run


def trained_head(width: int, depth: int, steps: int, **settings) -> tuple[EPHead, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = EPHead(64, [width] * depth, 10, max_steps=300, **settings)
    hidden = torch.randn(64, 64, requires_grad=True)
    labels = (torch.randn(64, 64) @ torch.randn(64, 10)).argmax(1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    step = step_of(head, hidden, labels)
    for _ in range(steps):
        step()
        optimizer.step()
    return head, hidden, labels


def sweeps(head: EPHead, step: Callable[[], None]) -> str:
    step()
    return f"{head.statistics.free_sweeps} + {head.statistics.nudged_sweeps}"


def rows(width: int, steps: int, rounds: int) -> list[str]:
    lines = []
    for depth in DEPTHS:
        layers = [part for layer in range(depth) for part in (nn.Linear(width if layer else 64, width), nn.Tanh())]
        perceptron = nn.Sequential(*layers, nn.Linear(width, 10))
        for name, settings in FEEDBACK.items():
            head, hidden, labels = trained_head(width, depth, steps, **settings)
            secants, feed_forward = step_of(head, hidden, labels), step_of(perceptron, hidden, labels)
            best = measure_cpu({"secants": secants, "plain": plain(secants), "perceptron": feed_forward}, rounds)
            cpu = {variant: value[0] for variant, value in best.items()}
            lines.append(
                f"| {width} | {depth} | {name} | {sweeps(head, plain(secants))} | {sweeps(head, secants)} | "
                f"{cpu['plain']:.1f} | {cpu['secants']:.1f} | {cpu['plain'] / cpu['secants']:.2f} | "
                f"{cpu['perceptron']:.2f} | {cpu['secants'] / cpu['perceptron']:.0f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=30, help="Training steps before.")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("width", "layers", "feedback", "sweeps, plain", "with secants", "CPU ms, plain", "with secants",
               "plain / secants", "perceptron, CPU ms", "head / perceptron")  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for width in options.widths:
        rows(width, options.steps, options.rounds)


if __name__ == "__main__":
    main()
