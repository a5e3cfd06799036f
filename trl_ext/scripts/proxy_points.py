# /// script
# dependencies = ["trl-ext[proxy-points]"]
# ///
"""
Find proxy points: the values of rewards beyond which a gold metric falls, from the logs of finished runs.

# Runs of plain PPO
python -m trl_ext.scripts.proxy_points --runs outputs/ppo_a outputs/ppo_b --output_dir outputs/proxy_points

# With the reward that each run maximised, which gives that reward's curve
python -m trl_ext.scripts.proxy_points --runs meteor=outputs/meteor_0 intent=outputs/intent_0
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..core.safe_text import for_terminal
from .recipe.usage import description


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """Runs the command; returns its exit status."""
    from ..constrained_ppo.proxy_points.logged_runs import read_runs

    options = make_parser(prog).parse_args(arguments)
    assigned = [_assigned(run) for run in options.runs]
    measurements = read_runs(
        [folder for _, folder in assigned], options.rewards, options.gold_key, options.reward_key, options.kl_key
    )
    report = analyse(measurements, [name for name, _ in assigned], options)
    output_dir = Path(options.output_dir)
    write(report, measurements, output_dir)
    console = Console(highlight=False, markup=False)
    console = Console(highlight=False, markup=False, width=max(console.width, 110))
    console.print(table_of(report))
    for line in notes(report):
        console.print(line, soft_wrap=True)
    console.print(report["block"], soft_wrap=True)
    console.print(f"Written to {output_dir}: constraints.yaml, proxy_points.json and pictures.", soft_wrap=True)
    return 0


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command's options."""
    parser = argparse.ArgumentParser(
        prog, description=description(__doc__, prog), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--runs", nargs="+", required=True, metavar="[REWARD=]FOLDER", help="output folders of runs with a gold "
        "metric; REWARD= says which reward a run maximised, whose curve then takes its runs only")  # fmt: skip
    add("--output_dir", default="outputs/proxy_points", help="folder for pictures and results")
    add("--rewards", nargs="+", default=None, help="rewards to look at; default: all that every run has")
    add("--surrogate", choices=("polynomial", "gaussian-process"), default="polynomial", help="fitted surface")
    add("--degree", type=int, default=3, help="total degree of the polynomial; the paper's is 10")
    add("--relative_density", type=float, default=0.05, help="least density of measurements, as a fraction of the "
        "highest, where the surface is believed")  # fmt: skip
    add("--density", type=float, default=None, help="the same for the joint surface in measurements for each unit of "
        "volume; the paper's is 50")  # fmt: skip
    add("--num_resamples", type=int, default=200, help="bootstrap resamples; 0 for none")
    add("--confidence", type=float, default=0.95, help="coverage of the intervals")
    add("--kind", choices=(">=", "<=", "=="), default=None, help="kind of the constraints written; default: the "
        "preset's")  # fmt: skip
    add("--gold_key", default="eval_gold", help="key of the gold metric in the logs")
    add("--reward_key", default="eval_rewards/{}/mean", help="key of a reward, its name in place of the braces")
    add("--kl_key", default="eval_kl/per_response", help="key of the KL")
    add("--seed", type=int, default=0, help="seed of the bootstrap")
    return parser


def _assigned(run: str) -> tuple[str | None, str]:
    """`REWARD=FOLDER` in its parts; a folder whose own name has an equals sign is one."""
    name, equals, folder = run.partition("=")
    return (name, folder) if equals and not Path(run).exists() else (None, run)


def analyse(measurements: Any, assigned: Sequence[str | None], options: argparse.Namespace) -> dict[str, Any]:
    """
    Curves, joint surface, correlations and the constraints block.

    Args:
        measurements ([`Measurements`]):
            Measurements.
        assigned (`Sequence[str | None]`):
            Reward that each run maximised, where stated.
        options (`argparse.Namespace`):
            Options of the command.

    Returns:
        `dict` with `independent` (peak of each reward), `joint` (peak, or `None`), `without_joint` (why there is
        none), `kl` (peak over the KL, or `None`), `correlations`, `num_runs` and `block`.

    Raises:
        ValueError: If a reward does not vary, a run is assigned to an unknown one, or there are too few points.
    """
    from ..constrained_ppo.proxy_points import fit
    from ..constrained_ppo.proxy_points.surrogates import GaussianProcess, Polynomial

    names = measurements.names
    unknown = sorted({name for name in assigned if name is not None} - set(names))
    if unknown:
        raise ValueError(f"`runs` assigns runs to {unknown}, and the rewards are {names}.")
    fit.check_variation(names, measurements.rewards)
    surrogate = Polynomial(options.degree) if options.surrogate == "polynomial" else GaussianProcess()
    settings = (surrogate, options.num_resamples, options.confidence, options.seed)

    def peak(points: np.ndarray, of: Any, density: float | None = None) -> Any:
        mask = fit.DensityMask(points, options.relative_density, density)
        return fit.find_peak(points, of.gold, of.run, settings[0], mask, *settings[1:])

    own = [_own_runs(measurements, assigned, name) for name in names]
    report: dict[str, Any] = {
        "independent": {
            name: peak(of.rewards[:, [i]], of) for i, (name, of) in enumerate(zip(names, own, strict=True))
        },
        "own": dict(zip(names, own, strict=True)),
        "joint": None,
        "without_joint": None,
        "kl": None,
        "correlations": fit.correlations(names, measurements.rewards),
        "num_runs": len(assigned),
        "gold_key": options.gold_key,
    }
    if np.isfinite(measurements.kl).all() and np.ptp(measurements.kl) > 0:
        report["kl"] = peak(measurements.kl[:, None], measurements)
    try:
        fit.check_joint(names)
        report["joint"] = peak(measurements.rewards, measurements, options.density)
    except fit.NoJointSurface as error:
        report["without_joint"] = str(error)
    report["block"] = _block(report, names, options.kind)
    return report


def _own_runs(measurements: Any, assigned: Sequence[str | None], name: str) -> Any:
    runs = [run for run, reward in enumerate(assigned) if reward == name]
    return measurements.of_runs(runs) if runs else measurements


def _block(report: dict[str, Any], names: list[str], kind: str | None) -> str:
    from ..constrained_ppo.proxy_points.fit import constraints_block

    joint = report["joint"]
    peaks = [report["independent"][name].point[0] for name in names]
    source = "joint surface" if joint is not None else "each reward's own curve"
    comments = [f"Proxy points of {report['num_runs']} runs by `trl-ext proxy-points`, from the {source}"]
    at_edge = [joint.at_edge] if joint is not None else [report["independent"][name].at_edge for name in names]
    if any(at_edge):
        comments.append("The peak lies at the edge of the data: the gold metric may not have fallen yet")
    if joint is not None and joint.num_resamples:
        ends = (f"{name} {_interval(joint.interval[:, i])}" for i, name in enumerate(names))
        comments.append(f"Intervals over the runs: {', '.join(ends)}")
    return constraints_block(names, peaks if joint is None else joint.point, kind, comments)


def table_of(report: dict[str, Any]) -> Table:
    """The proxy points of every reward, joint beside independent."""
    table = Table(title=for_terminal(f"Proxy points of {report['gold_key']} ({report['num_runs']} runs)"))
    for column in ("reward", "measured", "independent", "interval", "joint", "interval", "edge"):
        table.add_column(column, justify="left" if column == "reward" else "right")
    joint = report["joint"]
    for index, (name, peak) in enumerate(report["independent"].items()):
        measured = report["own"][name].rewards[:, index]
        edges = [label for label, one in (("independent", peak), ("joint", joint)) if one is not None and one.at_edge]
        table.add_row(
            for_terminal(name),
            _interval(np.array([measured.min(), measured.max()])),
            f"{peak.point[0]:.4g}",
            _interval(peak.interval[:, 0]),
            "" if joint is None else f"{joint.point[index]:.4g}",
            "" if joint is None else _interval(joint.interval[:, index]),
            ", ".join(edges),
        )
    return table


def _interval(ends: np.ndarray) -> str:
    return "" if np.isnan(ends).any() else f"{ends[0]:.4g} to {ends[1]:.4g}"


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know of the results, one line each."""
    lines = [
        f"Correlation of {a} and {b}: {pearson:.2f} (Pearson), {spearman:.2f} (Spearman)."
        for (a, b), (pearson, spearman) in report["correlations"].items()
    ]
    peaks = {**report["independent"], **({"the joint surface": report["joint"]} if report["joint"] else {})}
    for name, peak in peaks.items():
        if peak.at_edge:
            own = list(report["independent"]) if peak is report["joint"] else [name]
            lines.append(_uncovered(name, own, peak))
        elif peak.edge_share > 0.2:
            lines.append(f"Of {name}, {peak.edge_share:.0%} of the resamples have their peak at the edge of the data.")
    lines += _apart(report)
    if report["num_runs"] == 1:
        lines.append("One run: the intervals say nothing of the spread between runs.")
    if report["without_joint"]:
        lines.append(f"No joint surface. {report['without_joint']}")
    return lines


def _uncovered(name: str, rewards: Sequence[str], peak: Any) -> str:
    """What a sweep lacks whose peak is at the edge of the data, and what to train next."""
    beyond = [
        (f"{reward} {'above' if up > 0 else 'below'} {at:.4g}", f"{'more' if up > 0 else 'less'} weight on {reward}")
        for reward, up, at in zip(rewards, peak.rising, peak.point, strict=True) if up
    ]  # fmt: skip
    warning = f"WARNING: the runs do not cover the peak of {name}: it lies at the edge of the data"
    if not beyond:
        return f"{warning}, where the fitted surface is flat or falls beyond. Add runs around it."
    where, weights = (" and ".join(parts) for parts in zip(*beyond, strict=True))
    longer = ", or train longer or with a smaller `kl_coef`," if (peak.rising > 0).any() else ""
    return (
        f"{warning}, and the gold metric still rises towards {where}. Add runs with {weights}{longer} until it falls."
    )


def _apart(report: dict[str, Any]) -> list[str]:
    """Where a reward's own curve names another threshold than the joint surface."""
    joint = report["joint"]
    if joint is None or joint.at_edge or not joint.num_resamples:
        return []
    own = [(name, float(peak.point[0]), *joint.interval[:, i])
           for i, (name, peak) in enumerate(report["independent"].items())]  # fmt: skip
    return [
        f"The peak of {name} on its own, {at:.4g}, lies {'below' if at < low else 'above'} the interval where the "
        f"rewards are high together, {low:.4g} to {high:.4g}: use the joint one."
        for name, at, low, high in own if not low <= at <= high
    ]  # fmt: skip


def write(report: dict[str, Any], measurements: Any, output_dir: Path) -> None:
    """Writes pictures, `proxy_points.json` and `constraints.yaml`."""
    from ..constrained_ppo.proxy_points.figures import draw_curve, draw_joint

    output_dir.mkdir(parents=True, exist_ok=True)
    gold = report["gold_key"]
    for index, (name, peak) in enumerate(report["independent"].items()):
        own = report["own"][name]
        safe = re.sub(r"[^\w.-]+", "_", name)
        draw_curve(own.rewards[:, index], own, peak, name, output_dir / f"{safe}.png", gold)
    if report["kl"] is not None:
        label = "KL(policy || reference), nats per response"
        draw_curve(measurements.kl, measurements, report["kl"], label, output_dir / "kl.png", gold)
    if report["joint"] is not None:
        independent = [float(peak.point[0]) for peak in report["independent"].values()]
        draw_joint(measurements, report["joint"], independent, output_dir / "joint_surface.png", gold)
    summary = {
        "num_runs": report["num_runs"],
        "num_measurements": len(measurements.gold),
        "gold_key": gold,
        "rewards": measurements.names,
        "independent": {name: _summary(peak) for name, peak in report["independent"].items()},
        "joint": _summary(report["joint"]),
        "kl": _summary(report["kl"]),
        "correlations": [[*pair, *values] for pair, values in report["correlations"].items()],
        "notes": notes(report),
    }
    (output_dir / "proxy_points.json").write_text(json.dumps(summary, indent=1))
    (output_dir / "constraints.yaml").write_text(report["block"])


def _summary(peak: Any) -> dict[str, Any] | None:
    if peak is None:
        return None
    resampled = peak.num_resamples > 0
    return {
        "point": peak.point.tolist(),
        "gold": peak.gold,
        "interval": peak.interval.tolist() if resampled else None,
        "at_edge": peak.at_edge,
        "rising": peak.rising.tolist(),
        "edge_share": peak.edge_share if resampled else None,
        "num_resamples": peak.num_resamples,
    }


if __name__ == "__main__":
    sys.exit(main())
