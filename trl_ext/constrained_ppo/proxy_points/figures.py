"""Pictures of a gold metric over rewards."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...core.figures import COLORS, new_axes, save_figure
from .fit import Peak
from .logged_runs import Measurements


BLUE, ORANGE, GREY = COLORS[0], COLORS[1], "#6b6b6b"


def draw_curve(
    x: np.ndarray, measurements: Measurements, peak: Peak, label: str, path: Path, gold_label: str = "gold metric"
) -> None:
    """Draws the gold metric over `x` `(M,)`, one reward or the KL, with its fitted curve and peak."""
    figure, (axes,) = new_axes()
    axes.plot(x, measurements.gold, ".", color=GREY, alpha=0.6, markersize=5, label="measured")
    at = peak.candidates[:, 0]
    axes.fill_between(at, *peak.band, color=BLUE, alpha=0.2, linewidth=0, label="bootstrap interval")
    axes.plot(at, peak.fitted, color=BLUE, linewidth=2, label="fitted")
    axes.axvspan(*peak.interval[:, 0], color=ORANGE, alpha=0.1, linewidth=0, label="interval of the peak")
    edge = " (at the edge of the data)" if peak.at_edge else ""
    axes.axvline(float(peak.point[0]), color=ORANGE, linestyle="--", label=f"peak {peak.point[0]:.4g}{edge}")
    axes.set_xlabel(label, parse_math=False)
    axes.set_ylabel(gold_label, parse_math=False)
    axes.legend(loc="lower center", frameon=False, fontsize=9)  # below the peak
    save_figure(figure, path)


def draw_joint(
    measurements: Measurements, peak: Peak, independent: Sequence[float], path: Path, gold_label: str
) -> None:
    """
    Draws the fitted surface of each pair of rewards, the highest over the others, with the joint peak and
    `independent`, the peak of each reward's own curve.
    """
    names = measurements.names
    pairs = list(itertools.combinations(range(len(names)), 2))
    figure, panels = new_axes(1, len(pairs))
    for axes, (i, j) in zip(panels, pairs, strict=True):
        surface = axes.pcolormesh(*_upper_surface(peak, i, j), cmap="viridis", shading="nearest", rasterized=True)
        figure.colorbar(surface, ax=axes).set_label(f"fitted {gold_label}", parse_math=False)
        axes.plot(
            *measurements.rewards[:, [i, j]].T, ".", color="white", markeredgecolor=GREY, markersize=5, alpha=0.7,
            label="measured",
        )  # fmt: skip
        axes.plot(
            peak.point[i], peak.point[j], "*", color=ORANGE, markeredgecolor="white", markersize=16, label="joint peak"
        )
        axes.plot(independent[i], independent[j], "X", color=BLUE, markeredgecolor="white", markersize=10,
                  label="each reward's own peak")  # fmt: skip
        axes.set_xlabel(names[i], parse_math=False)
        axes.set_ylabel(names[j], parse_math=False)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=9)
    save_figure(figure, path)


def _upper_surface(peak: Peak, i: int, j: int, size: int = 101) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells over two rewards with the highest fitted value of the candidates in each, NaN in empty ones."""
    at = peak.candidates[:, [i, j]]
    size = min(size, max(2, len(np.unique(at[:, 0]))))
    lowest, width = at.min(axis=0), np.ptp(at, axis=0)
    cells = np.rint((at - lowest) / width * (size - 1)).astype(int)
    values = np.full((size, size), -np.inf)
    known = ~np.isnan(peak.fitted)
    np.maximum.at(values, (cells[known, 1], cells[known, 0]), peak.fitted[known])
    axes = [lowest[axis] + width[axis] * np.linspace(0, 1, size) for axis in (0, 1)]
    return axes[0], axes[1], np.where(np.isfinite(values), values, np.nan)
