"""Error of the equilibrium-propagation gradient against the exact one, in float64.

For every number of points and radius, the relative error of all parameter gradients of an `EPHead` with symmetric
feedback; and for feedback at every angle, the cosine of the error vectors and of the gradients to the exact ones, with
and without the AsymEP correction.

python -m tests.benchmarks.equilibrium_gradients --folder docs/results
"""

import argparse
import math
from pathlib import Path

import torch

from trl_ext import EPHead
from trl_ext.core.figures import line_style, new_axes, save_figure
from trl_ext.equilibrium.relaxation import EquilibriumError


RADII = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]
POINTS = {
    "one-sided": {"estimator": "one_sided"},
    "N=2": {"num_points": 2, "rotated": False},
    "N=2 rotated": {"num_points": 2},
    "N=4": {"num_points": 4, "rotated": False},
    "N=4 rotated": {"num_points": 4},
    "N=8": {"num_points": 8, "rotated": False},
}
ANGLES = [0, 15, 30, 45, 60, 75, 90]


def gradients(head: EPHead, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    head.zero_grad()
    torch.nn.functional.cross_entropy(head(hidden), labels).backward()
    names = [name for name, _ in head.named_parameters() if not name.startswith("readout")]
    return torch.cat([getattr(head, name).grad.flatten() for name in names])


def make_head(seed: int, dtype: torch.dtype = torch.float64, **settings) -> EPHead:
    torch.manual_seed(seed)
    limits = (
        {"tolerance": 1e-13, "max_steps": 1000} if dtype == torch.float64 else {"tolerance": 1e-6, "max_steps": 300}
    )
    return EPHead(32, [64, 64], 10, **limits, **settings).to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(32, 32, generator=generator, dtype=dtype), torch.randint(0, 10, (32,), generator=generator)


def errors_of(activation: str, seeds: int, dtype: torch.dtype = torch.float64) -> dict[str, list[float]]:
    """Median over the seeds of the relative error; infinite where a nudged state has no fixed point."""
    table: dict[str, list[float]] = {}
    for name, settings in POINTS.items():
        table[name] = []
        for radius in RADII:
            values = []
            for seed in range(seeds):
                hidden, labels = data(seed, dtype)
                reference = make_head(seed, activation=activation, estimator="exact")
                exact = gradients(reference, hidden.double(), labels)
                try:
                    head = make_head(seed, dtype, activation=activation, radius=radius, **settings)
                    estimate = gradients(head, hidden, labels).double()
                    values.append(((estimate - exact).norm() / exact.norm()).item())
                except EquilibriumError:
                    values.append(math.inf)
            table[name].append(sorted(values)[len(values) // 2])
    return table


def cosines_of(activation: str, seeds: int, correction: str) -> list[dict[str, float]]:
    rows = []
    for angle in ANGLES:
        found: dict[str, list[float]] = {"layer 1": [], "layer 2": [], "parameters": [], "input": []}
        for seed in range(seeds):
            hidden, labels = data(seed)
            settings = {"feedback": "asymmetric", "feedback_angle": float(angle), "activation": activation}
            head = make_head(seed, correction=correction, **settings)
            logits = head(hidden).detach()
            error = logits.softmax(-1) - torch.nn.functional.one_hot(labels, 10)
            first, second = head.alignment(hidden, error)
            found["layer 1"].append(first)
            found["layer 2"].append(second)
            per_input = []
            head.homeostasis_loss()
            for chosen in (head, make_head(seed, estimator="exact", **settings)):
                leaf = hidden.clone().requires_grad_()
                per_input.append((gradients(chosen, leaf, labels), leaf.grad.flatten()))
            for name, one, other in zip(("parameters", "input"), *per_input, strict=True):
                found[name].append(torch.nn.functional.cosine_similarity(one, other, dim=0).item())
        rows.append({name: sum(values) / len(values) for name, values in found.items()})
    return rows


def plot_errors(tables: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, axes = new_axes(2, 2, width=5.0, height=3.4, sharex=True, sharey=True)
    for axis, (title, table) in zip(axes, tables.items(), strict=True):
        for position, (name, values) in enumerate(table.items()):
            axis.loglog(RADII, values, label=name, markersize=5, linewidth=1.2, **line_style(position))
        axis.set_title(title, loc="left", fontsize=10)
    for axis in axes[2:]:
        axis.set_xlabel("radius of the nudge")
    for axis in axes[::2]:
        axis.set_ylabel("relative error of the gradient")
    axes[-1].legend(fontsize=9, frameon=False, title="N: points on the circle")
    save_figure(figure, path)


def plot_cosines(tables: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = new_axes(1, len(tables), width=3.4, height=3.4, sharey=True)
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        for position, name in enumerate(rows[0]):
            style = {**line_style(position), "markersize": 8 - 2 * position}  # lines that coincide stay visible
            axis.plot(ANGLES, [row[name] for row in rows], label=name, linewidth=1.2, **style)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("angle of the feedback (degrees)")
    axes[0].set_ylabel("cosine to the exact gradient")
    axes[0].legend(fontsize=9, frameon=False, title="gradient of")
    save_figure(figure, path)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", default=".", help="Where to draw the figures.")
    return parser


def main() -> None:
    options = argument_parser().parse_args()
    torch.set_num_threads(1)
    tables = {f"{name}, float64": errors_of(name, options.seeds) for name in ("tanh", "sigmoid", "dsilu")}
    tables["tanh, float32"] = errors_of("tanh", options.seeds, torch.float32)
    for title, table in tables.items():
        print(f"\n{title}\n| radius | " + " | ".join(table) + " |\n" + "|---" * (len(table) + 1) + "|")
        for index, radius in enumerate(RADII):
            cells = [f"{values[index]:.1e}" for values in table.values()]
            print(f"| {radius} | " + " | ".join(cells) + " |")
    cosines = {
        "tanh": cosines_of("tanh", options.seeds, "none"),
        "sigmoid": cosines_of("sigmoid", options.seeds, "none"),
        "tanh, AsymEP": cosines_of("tanh", options.seeds, "asymep"),
    }
    for title, rows in cosines.items():
        print(f"\n{title}\n| angle | " + " | ".join(rows[0]) + " |\n" + "|---" * (len(rows[0]) + 1) + "|")
        for angle, row in zip(ANGLES, rows, strict=True):
            print(f"| {angle} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    folder = Path(options.folder)
    plot_errors(tables, folder / "equilibrium_gradient_errors.png")
    plot_cosines(cosines, folder / "equilibrium_gradient_cosines.png")


if __name__ == "__main__":
    main()
