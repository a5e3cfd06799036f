"""Time and peak memory of an equilibrium-propagation head's step, estimator by estimator.

Every variant runs forward and backward of the same head on the same batch, in turn in one process; the number is the
least CPU time over the rounds, so that ratios hold where a busy machine spoils wall time. The error beside it is that
of all parameter gradients to the exact gradient in float64.

python -m tests.benchmarks.equilibrium
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from tests.benchmarks.official_equilibrium import (
    FREE_STEPS,
    LEARNING_RATE,
    MOMENTUM,
    NUDGED_STEPS,
    RADIUS,
    OfficialCode,
)
from tests.benchmarks.peak_memory import PeakMemory
from trl_ext import EPHead
from trl_ext.equilibrium import gradient, relaxation


VARIANTS = {
    "adjoint (`exact`)": {"estimator": "exact"},
    "tangent": {"estimator": "tangent"},
    "one-sided": {"estimator": "one_sided"},
    "N=2, radius 0.1": {"rotated": False, "radius": 0.1},
    "N=2 rotated (default)": {},
    "N=2 rotated, radius 0.1": {"radius": 0.1},
    "N=4": {"num_points": 4, "rotated": False},
    "N=4, radius 0.1": {"num_points": 4, "rotated": False, "radius": 0.1},
    "N=4 rotated": {"num_points": 4},
    "N=4 rotated, radius 0.1": {"num_points": 4, "radius": 0.1},
    "N=4 rotated, radius 1": {"num_points": 4, "radius": 1.0},
    "N=8 rotated, radius 0.1": {"num_points": 8, "radius": 0.1},
}


def unrolled(head: EPHead, hidden: torch.Tensor, sweeps: int) -> torch.Tensor:
    """Backpropagation through the same sweeps, for a symmetric tanh head of two layers."""
    drive = torch.nn.functional.linear(hidden, head.input_weight, head.input_bias)
    first = torch.tanh(drive)
    second = torch.tanh(torch.nn.functional.linear(first, head.forward_weight_1, head.bias_2))
    for _ in range(sweeps):
        first = torch.tanh(torch.addmm(drive, second, head.forward_weight_1))
        second = torch.tanh(torch.addmm(head.bias_2, first, head.forward_weight_1.T))
    return torch.nn.functional.linear(second, head.readout_weight, head.readout_bias)


def measure_cpu(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Least CPU and wall time in milliseconds over the rounds, the steps taking turns."""
    best = dict.fromkeys(steps, (float("inf"), float("inf")))
    for _ in range(rounds):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            cpu, wall = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
            best[name] = (min(best[name][0], cpu), min(best[name][1], wall))
    return best


def gradients(head: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().double() for parameter in head.parameters()])


def compare_estimators(batch: int, rounds: int, tolerance: float) -> list[str]:
    torch.manual_seed(0)
    base = EPHead(256, [256, 256], 10, tolerance=tolerance)
    hidden, cotangent = torch.randn(batch, 256), torch.randn(batch, 10)
    reference = copy.deepcopy(base).double()
    reference.estimator, reference.tolerance, reference.max_steps = "exact", 1e-12, 1000
    reference(hidden.double()).backward(cotangent.double())
    exact = gradients(reference)
    steps, errors, sweeps = {}, {}, {}

    def add(name: str, head: EPHead, output: Callable[[], torch.Tensor]) -> None:
        def step() -> None:
            head.zero_grad()
            output().backward(cotangent)

        step()
        errors[name] = ((gradients(head) - exact).norm() / exact.norm()).item()
        steps[name] = step

    with torch.no_grad():
        base(hidden)
    for name, settings in VARIANTS.items():
        head = EPHead(256, [256, 256], 10, tolerance=tolerance, **settings)
        head.load_state_dict(base.state_dict())
        add(name, head, lambda head=head: head(hidden))
        sweeps[name] = f"{head.statistics.free_sweeps} + {head.statistics.nudged_sweeps}"
    for count in (base.statistics.free_sweeps, 20):
        name = f"backpropagation through {count} sweeps"
        head = copy.deepcopy(base)
        add(name, head, lambda head=head, count=count: unrolled(head, hidden, count))
        sweeps[name] = str(count)

    def forward() -> None:
        with torch.no_grad():
            base(hidden)

    best = measure_cpu({"forward only": forward, **steps}, rounds)
    forward_cpu, adjoint = best["forward only"][0], best["adjoint (`exact`)"][0]
    lines = []
    for name in steps:
        cpu, wall = best[name]
        backward = (cpu - forward_cpu) / (adjoint - forward_cpu)
        lines.append(
            f"| {batch} | {torch.get_num_threads()} | {name} | {sweeps[name]} | {cpu:.2f} | {wall:.2f} | "
            f"{cpu / adjoint:.2f} | {backward:.2f} | {errors[name]:.1e} |"
        )
    return lines


def sweep_counts(head: EPHead) -> str:
    return f"{head.statistics.free_sweeps} + {head.statistics.nudged_sweeps}"


def forced_counts(step: Callable[[], object], nudged_sweeps: int) -> Callable[[], None]:
    """The same step with `max_steps` free sweeps and so many nudged ones, converged or not."""

    def nudged(dynamics, tolerance, max_steps, start=None, raises=True):
        # Two relaxations at this radius: of the principal mode, and from there of all points
        return relaxation.relax(dynamics, tolerance, nudged_sweeps // 2, start, raises)

    def run() -> None:
        never = mock.patch.object(relaxation, "absolute_tolerance", return_value=-1.0)
        content = mock.patch.object(relaxation._MovingSamples, "stuck", lambda moving: moving.residuals < -1)
        with never, content, mock.patch.object(gradient, "relax", nudged):
            step()

    return run


class PerceptronSteps:
    """
    Training steps in the setting of the official code's perceptron: 784-256-256-10, batch 50, SGD with momentum.

    Every step starts from the same weights, so that each takes the same sweeps in every round.

    Args:
        angle (`float`):
            Between feedback and forward weights, in degrees.
        weights (`dict`, *optional*):
            Weights to start from.
    """

    def __init__(self, angle: float, weights: dict[str, torch.Tensor] | None = None):
        torch.manual_seed(0)
        self.images, self.labels = torch.rand(50, 784), torch.randint(0, 10, (50,))
        self.angle = angle
        self.weights = weights or self.head().state_dict()
        self.steps: dict[str, Callable[[], object]] = {}
        self.sweeps: dict[str, str] = {}
        self.gradients: dict[str, dict[str, torch.Tensor]] = {}

    def head(self, **settings) -> EPHead:
        settings = {"rotated": False, "radius": RADIUS, "max_steps": FREE_STEPS} | settings
        return EPHead(
            784, [256, 256, 10], 10, activation="sigmoid", feedback="asymmetric", feedback_angle=self.angle, **settings
        )

    def add_head(self, name: str, nudged_sweeps: int | None = None, **settings) -> None:
        head = self.head(**settings)
        head._warned.add("unconverged")
        optimizer = torch.optim.SGD(head.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

        def train() -> None:
            loss = torch.nn.functional.cross_entropy(head(self.images), self.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        run = train if nudged_sweeps is None else forced_counts(train, nudged_sweeps)

        def step() -> None:
            head.load_state_dict(self.weights)
            run()

        step()
        self.steps[name], self.sweeps[name] = step, sweep_counts(head)
        self.gradients[name] = {key: p.grad for key, p in head.named_parameters() if p.grad is not None}

    def add_official(self, name: str, code: OfficialCode) -> None:
        step = code.step(code.initial_state(self.weights), self.images, self.labels)
        self.gradients[name] = code.gradient(step()[0])
        self.steps[name], self.sweeps[name] = step, f"{FREE_STEPS} + {NUDGED_STEPS}"

    def errors(self) -> dict[str, float]:
        """Relative to the gradient that the estimate tends to, converged and at an infinitesimal nudge, in float64."""
        head = self.head(estimator="tangent", tolerance=1e-12, max_steps=10_000)
        head.load_state_dict(self.weights)
        head.double()
        torch.nn.functional.cross_entropy(head(self.images.double()), self.labels).backward()
        limit = gradients(head)
        errors = {}
        for step, found in self.gradients.items():
            estimate = torch.cat([found[name].flatten().double() for name, _ in head.named_parameters()])
            errors[step] = ((estimate - limit).norm() / limit.norm()).item()
        return errors


def official_setting(rounds: int, directory: Path | None) -> list[str]:
    """Steps of the head in the official code's setting, in turns with the official step if there is a checkout."""
    lines = []
    codes = {}
    if directory is not None:
        codes["official"] = OfficialCode(directory)
        codes["official, no Jacobian metric"] = OfficialCode(directory, jacobian_metric=False)
    for angle, source in itertools.product((0.0, 90.0), ("official", "head") if codes else ("head",)):
        steps = PerceptronSteps(angle, codes["official"].initial_weights(angle) if source == "official" else None)
        for name, code in codes.items():
            steps.add_official(name, code)
        steps.add_head("head, as many sweeps", NUDGED_STEPS)
        steps.add_head("head, half as many", NUDGED_STEPS // 2, max_steps=FREE_STEPS // 2)
        steps.add_head("head, until converged")
        steps.add_head("head, until converged, default points", rotated=True, radius=1e-3)
        best, errors = measure_cpu(steps.steps, rounds), steps.errors()
        for name, (cpu, wall) in best.items():
            ratio = f"{best['official'][0] / cpu:.1f}" if codes else "-"
            lines.append(
                f"| {source}, angle {angle:.0f} | {name} | {steps.sweeps[name]} | {cpu:.1f} | {wall:.1f} | {ratio} | "
                f"{errors[name]:.1e} |"
            )
    return lines


def peak_memory(batch: int) -> list[str]:
    """Memory that forward and backward add, for relaxations of different length."""
    torch.manual_seed(0)
    hidden = torch.randn(batch, 256)
    lines = []
    content = mock.patch.object(relaxation._MovingSamples, "stuck", lambda moving: moving.residuals < -1)
    with mock.patch.object(relaxation, "absolute_tolerance", return_value=-1.0), content:
        for sweeps in (5, 20, 80):
            head = EPHead(256, [256, 256], 10, max_steps=sweeps)
            head._warned.add("unconverged")
            base = copy.deepcopy(head)
            peaks = []
            for run in (lambda head=head: head(hidden), lambda base=base, n=sweeps: unrolled(base, hidden, n)):
                run().sum().backward()
                with PeakMemory() as memory:
                    run().sum().backward()
                peaks.append(memory.added)
            lines.append(f"| {sweeps} | {peaks[0]:.0f} | {peaks[1]:.0f} |")
    return lines


def what_was_tried(rounds: int) -> list[str]:
    """Layers of one parity in one batched product, and dropping rows that have converged."""
    lines = []
    torch.manual_seed(0)
    with torch.no_grad():
        for batch in (64, 1024):
            weights = torch.randn(2, 256, 256) / 32
            states, drives = torch.randn(2, batch, 256), torch.randn(2, batch, 256)
            best = measure_cpu(
                {"two": lambda: [torch.addmm(drives[i], states[i], weights[i]) for i in (0, 1)],  # noqa: B023
                 "one": lambda: torch.baddbmm(drives, states, weights)}, 10 * rounds,  # noqa: B023
            )  # fmt: skip
            lines.append(
                f"| two layers of one parity as one batched product, batch {batch} | {best['two'][0]:.3f} | "
                f"{best['one'][0]:.3f} |"
            )
            head = EPHead(256, [256, 256], 10, tolerance=1e-5)
            hidden = torch.randn(batch, 256) * torch.logspace(-0.5, 1, batch).unsqueeze(1)

            def all_rows(head=head, hidden=hidden):
                with mock.patch.object(relaxation._MovingSamples, "narrow"):
                    head(hidden)

            best = measure_cpu({"all": all_rows, "dropped": lambda: head(hidden)}, rounds)  # noqa: B023
            lines.append(
                f"| rows dropped as they converge, forward, batch {batch}, inputs of different size | "
                f"{best['all'][0]:.2f} | {best['dropped'][0]:.2f} |"
            )
    return lines


def compiled_sweep(rounds: int) -> list[str]:
    """`torch.compile` of one sweep of two tanh layers."""
    lines = []
    torch.manual_seed(0)
    with torch.no_grad():
        for batch in (64, 1024):
            weight, bias = torch.randn(256, 256) / 32, torch.zeros(256)
            drive, second = torch.randn(batch, 256), torch.randn(batch, 256)

            def sweep(second, drive=drive, weight=weight, bias=bias):
                first = torch.tanh(torch.addmm(drive, second, weight))
                return torch.tanh(torch.addmm(bias, first, weight.T))

            compiled = torch.compile(sweep)
            compiled(second)
            best = measure_cpu(
                {"eager": lambda: [sweep(second) for _ in range(10)],  # noqa: B023
                 "compiled": lambda: [compiled(second) for _ in range(10)]}, rounds,  # noqa: B023
            )  # fmt: skip
            eager, fast = best["eager"][0], best["compiled"][0]
            lines.append(f"| `torch.compile` of a sweep, batch {batch} | {eager / 10:.3f} | {fast / 10:.3f} |")
    return lines


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=["estimators", "official", "memory", "tried"])
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument(
        "--official_dir",
        type=Path,
        help="Checkout of https://github.com/Laborieux-Axel/generalized-holo-ep for the part `official`: its training "
        "step then takes turns with the head's, from the same weights. Needs `pip install jax==0.10.2 flax==0.12.8 "
        "optax==0.2.8`; compiles for minutes. It does not run as published: "
        "tests/benchmarks/official_equilibrium.py lists what is supplied to it.",
    )
    return parser


def main() -> None:
    options = argument_parser().parse_args()
    if "estimators" in options.parts:
        print(
            "| batch | threads | gradient | sweeps | CPU ms | wall ms | step / adjoint | backward / adjoint | error |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for threads in sorted(set(options.threads)):
            torch.set_num_threads(threads)
            for batch in options.batches:
                print("\n".join(compare_estimators(batch, options.rounds, options.tolerance)), flush=True)
    torch.set_num_threads(1)
    if "official" in options.parts:
        print("\n| initial weights | step | sweeps | CPU ms | wall ms | official / this, CPU | error |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(official_setting(options.rounds, options.official_dir)), flush=True)
    if "memory" in options.parts:
        print("\n| sweeps, both phases | head MiB | backpropagation through them MiB |\n|---|---|---|")
        print("\n".join(peak_memory(1024)), flush=True)
    if "tried" in options.parts:
        print("\n| tried | before, CPU ms | after, CPU ms |\n|---|---|---|")
        print("\n".join(what_was_tried(options.rounds)), flush=True)
        print("\n".join(compiled_sweep(options.rounds)))


if __name__ == "__main__":
    main()
